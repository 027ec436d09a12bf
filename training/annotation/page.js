// Keyboard shortcuts, the blur, a server that is gone; and who is signed in and what was clicked:
// kept by the tab, so that a reload or a new server finds both again, and two tabs are two sessions.
(() => {
  const STORE = "guardrail-annotation";
  const DRAFT = "guardrail-annotation-draft";
  const LETTERS = "acdefghijklmnopqrtu";
  const fresh = () => {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const session = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    return JSON.stringify({ session });
  };
  window.annotation = {
    open: () => {
      if (!sessionStorage.getItem(STORE)) sessionStorage.setItem(STORE, fresh());
      return [sessionStorage.getItem(STORE), sessionStorage.getItem(DRAFT) ?? ""];
    },
    keep: (value) => {
      if (value) sessionStorage.setItem(STORE, value);
    },
    draft: (value) => {
      sessionStorage.setItem(DRAFT, value ?? "");
    },
  };

  // What the form holds, in the order of `page_form`: read off the page, since Gradio handles no
  // event once its server is gone.
  const QUESTIONS = ["more_helpful", "less_harmful", "single"];
  const picked = (name) => document.querySelector(`#a-${name} input:checked`)?.value ?? null;
  const clicked = () => {
    const boxes = document.querySelectorAll("#a-categories input:checked");
    const severity = picked("severity");
    return [
      picked("safe"), severity && Number(severity), Array.from(boxes, (box) => box.name),
      ...QUESTIONS.map(picked), document.querySelector("#a-note textarea")?.value ?? "",
    ];
  };
  document.addEventListener("input", (event) => {
    if (!event.target.closest("#a-item, #a-pair, #a-note")) return;
    const turn = document.querySelector("#a-turn textarea, #a-turn input")?.value;
    if (turn) window.annotation.draft(JSON.stringify({ turn, form: clicked() }));
  });

  // Gradio's own client does not find a server that was started again; a page opened anew does.
  const LOST = "a-lost";
  const AWAY =
    "The server does not answer. What you saved is safe, and what you clicked is kept in this " +
    "tab: leave it open. The page goes on by itself when the server is back.";
  const lose = () => {
    if (document.body.classList.contains(LOST)) return;
    document.body.classList.add(LOST);
    const banner = document.createElement("div");
    banner.id = LOST;
    banner.setAttribute("role", "alert");
    banner.textContent = AWAY;
    document.body.append(banner);
  };
  const lost = () => document.body.classList.contains(LOST);
  const watch = async () => {
    const { root, api_prefix, app_id } = window.gradio_config ?? {};
    if (app_id !== undefined) {
      try {
        const question = { cache: "no-store", signal: AbortSignal.timeout(15_000) };
        const answer = await fetch(`${root}${api_prefix}/app_id`, question);
        if (!answer.ok) throw new Error(`status ${answer.status}`);
        if (lost() || (await answer.json()).app_id !== app_id) return location.reload();
      } catch (error) {
        console.info("the server does not answer:", error);
        lose();
      }
    }
    setTimeout(watch, 2_000);
  };
  setTimeout(watch, 2_000);

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
    } else if (key in actions) done = !lost() && click(actions[key]);
    else if (/^[0-9]$/.test(key)) done = digit(Number(key));
    else if (key.length === 1 && LETTERS.includes(key))
      done = click("#a-categories input[type=checkbox]", LETTERS.indexOf(key));
    if (done) event.preventDefault();
  });
})();
