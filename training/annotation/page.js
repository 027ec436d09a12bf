// Keyboard shortcuts, the blur, and who is signed in: kept by the tab, so that a reload or a new
// server finds the same session again, and two tabs are two sessions.
(() => {
  const STORE = "guardrail-annotation";
  const LETTERS = "acdefghijklmnopqrtu";
  const fresh = () => {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const session = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    return JSON.stringify({ session });
  };
  window.annotation = {
    identity: () => {
      if (!sessionStorage.getItem(STORE)) sessionStorage.setItem(STORE, fresh());
      return sessionStorage.getItem(STORE);
    },
    keep: (value) => {
      if (value) sessionStorage.setItem(STORE, value);
    },
  };

  const toggle = (box) => {
    const button = box.querySelector(".a-show");
    if (!button) return;
    const show = box.querySelector(".a-blurred") !== null;
    for (const text of box.querySelectorAll(".a-text")) {
      text.classList.toggle("a-blurred", !show);
      text.setAttribute("aria-hidden", String(!show));
    }
    button.firstChild.textContent = show ? "Hide the texts " : "Show the texts ";
  };
  document.addEventListener("click", (event) => {
    const hit = event.target.closest?.(".a-show, .a-blurred");
    if (hit) toggle(hit.closest(".a-texts"));
  });

  const click = (selector, n = 0) => {
    const found = document.querySelectorAll(selector);
    if (found[n]) found[n].click();
    return Boolean(found[n]);
  };
  const digit = (n) => {
    if (document.querySelector("#a-pair input")) return click("#a-pair input[type=radio]", n - 1);
    if (n > 3) return false;
    return click("#a-safe input", n === 0 ? 0 : 1) && (n === 0 || click("#a-severity input", n - 1));
  };
  const actions = { Enter: "#a-save", x: "#a-skip", z: "#a-undo", s: "#a-suggest" };
  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    if (target.closest("textarea, input:not([type=radio]):not([type=checkbox])")) return;
    if (key === "Enter" && target.closest("button, a")) return;
    let done = false;
    if (key === "b") {
      const box = document.querySelector(".a-texts");
      if (box) toggle(box);
      done = Boolean(box);
    } else if (key in actions) done = click(actions[key]);
    else if (/^[0-9]$/.test(key)) done = digit(Number(key));
    else if (key.length === 1 && LETTERS.includes(key))
      done = click("#a-categories input[type=checkbox]", LETTERS.indexOf(key));
    if (done) event.preventDefault();
  });
})();
