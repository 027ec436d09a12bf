"""The annotation page: Gradio over `queue`. `python -m training.annotate serve` starts it.

Keeps nothing between events: the tab sends who it is, what it shows and what was clicked, and the
store says what comes next. So a server may be killed and started again, or stand beside others,
and the same open page goes on.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from guardrail.taxonomy import Category, Severity
from training.annotation import page_html as show
from training.annotation.labels import (
    AnnotationError,
    Label,
    PairLabel,
    SafetyLabel,
    Settings,
    StoredLabel,
    Task,
)
from training.annotation.queue import Queue
from training.annotation.store import Annotator, Store

__all__ = ["Page", "launch", "serve"]

Updates = dict[Any, Any]
_HERE = Path(__file__).parent
# Whatever a text says, the browser asks nobody but this server for anything.
_HEAD = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' 'unsafe-inline' "
    "'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'\">"
)
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who sits before a tab. session: the tab; its leases are its own."""

    session: str
    who: Annotator

    @property
    def name(self) -> str:
        return self.who.name


class Page:
    """The components, and what their events do to the store."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.blocks = gr.Blocks(title="Annotation", analytics_enabled=False)
        with self.blocks:
            # Hidden, not gr.State: a State lives in the server, and dies with it.
            self.identity = gr.Textbox(visible="hidden", elem_id="a-identity")
            self.turn = gr.Textbox(visible="hidden", elem_id="a-turn")
            with gr.Column(visible=False) as self.door:
                self._door()
            with gr.Column(visible=False) as self.desk:
                self._desk()
            self._wire()

    # --- components ------------------------------------------------------------------------------

    def _door(self) -> None:
        gr.Markdown("## Annotation\nSign in with the name and the key you were given.")
        self.name = gr.Textbox(label="Name", elem_id="a-name", max_length=200)
        self.key = gr.Textbox(label="Key", type="password", elem_id="a-key", max_length=200)
        self.enter = gr.Button("Sign in", variant="primary", elem_id="a-enter")
        self.refused = gr.HTML(elem_id="a-refused")

    def _desk(self) -> None:
        with gr.Row():
            self.progress = gr.HTML(elem_id="a-progress")
            self.settling = gr.Checkbox(
                label="Settle disagreements", visible=False, elem_id="a-settling", min_width=200,
                container=False,
            )  # fmt: skip
            self.leave = gr.Button("Sign out", size="sm", scale=0, elem_id="a-leave")
        with gr.Row(visible=False) as self.rest:
            self.why_rest = gr.HTML(elem_id="a-rest")
            self.rested = gr.Button("I had a break", size="sm", scale=0, elem_id="a-rested")
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                self.texts = gr.HTML(elem_id="a-texts")
                self.dispute = gr.HTML(elem_id="a-dispute")
                self.again = gr.Button("Look again", visible=False, elem_id="a-again")
                with gr.Accordion("Guideline", open=False):
                    gr.Markdown(show.general_guideline())
            with gr.Column(scale=2, min_width=340, visible=False) as self.form:
                self._stage_1()
                self._stage_2()
                self.note = gr.Textbox(
                    label="Note (optional)", max_lines=3, max_length=2000, elem_id="a-note"
                )
                with gr.Row():
                    self.save = gr.Button("Save", variant="primary", elem_id="a-save")
                    self.skip = gr.Button("Skip", elem_id="a-skip")
        with gr.Row():
            self.said = gr.HTML(elem_id="a-said")
            self.undo = gr.Button("Undo", size="sm", scale=0, elem_id="a-undo")
        self.shortcuts = gr.HTML(elem_id="a-shortcuts")

    def _stage_1(self) -> None:
        of_category, of_severity = show.guidelines()
        with gr.Column(visible=False, elem_id="a-item") as self.item:
            self.safe = gr.Radio(["Safe", "Unsafe"], label="Safe?", elem_id="a-safe")
            self.suggest = gr.Button("Show the suggestion", size="sm", elem_id="a-suggest")
            self.suggestion = gr.HTML(elem_id="a-suggestion")
            self.severity = gr.Radio(
                [
                    (f"{level.label}: {of_severity[level]}", int(level))
                    for level in Severity
                    if level
                ],
                label="Severity, of an unsafe text",
                elem_id="a-severity",
            )
            self.categories = gr.CheckboxGroup(
                [(f"{one} [{show.KEYS[one]}]: {of_category[one]}", one.value) for one in Category],
                label="Categories, of an unsafe text",
                elem_id="a-categories",
            )

    def _stage_2(self) -> None:
        sides = [("Left", "left"), ("Tie", "tie"), ("Right", "right")]
        with gr.Column(visible=False, elem_id="a-pair") as self.pair:
            self.questions = {
                name: gr.Radio(sides, label=text, elem_id=f"a-{name}")
                for name, text in show.QUESTIONS.items()
            }

    # --- events ----------------------------------------------------------------------------------

    def _wire(self) -> None:
        clicked = [self.safe, self.severity, self.categories]
        shown = [self.identity, self.turn, self.settling]
        everything = [
            self.identity, self.turn, self.name, self.key, self.door, self.desk, self.refused,
            self.progress, self.settling, self.rest, self.why_rest, self.texts, self.dispute,
            self.again, self.form, self.item, *clicked, self.suggest, self.suggestion, self.pair,
            *self.questions.values(), self.note, self.said, self.shortcuts,
        ]  # fmt: skip
        self.blocks.load(
            self.on_open, self.identity, everything, js="() => window.annotation.identity()",
            **_EVENT,
        )  # fmt: skip
        self.identity.change(None, self.identity, js="(value) => window.annotation.keep(value)")
        gr.on(
            [self.enter.click, self.key.submit], self.on_enter,
            [self.identity, self.name, self.key], everything, trigger_mode="once", **_EVENT,
        )  # fmt: skip
        # One event for all of them, so that nothing is clicked twice while it is under way.
        gr.on(
            [
                self.save.click, self.note.submit, self.skip.click, self.undo.click,
                self.again.click, self.rested.click, self.leave.click, self.settling.input,
            ],
            self.on_act, [*shown, *clicked, *self.questions.values(), self.note], everything,
            trigger_mode="once", **_EVENT,
        )  # fmt: skip
        self.safe.input(
            None, clicked, [self.severity, self.categories],
            js="(safe, level, names) => safe === 'Safe' ? [null, []] : [level, names]",
        )  # fmt: skip
        gr.on(
            [part.input for part in (*clicked, *self.questions.values())], self.on_touch,
            [self.identity, self.turn, *clicked], [self.suggest, self.said],
            trigger_mode="always_last", **_EVENT,
        )  # fmt: skip
        self.suggest.click(
            self.on_suggest, [self.identity, self.turn, *clicked], [self.suggestion, self.said],
            trigger_mode="once", **_EVENT,
        )  # fmt: skip

    def visitor(self, identity: str | None) -> Visitor | None:
        """Checked on every event: the server remembers nobody."""
        given = json.loads(identity or "{}")
        who = self.queue.store.sign_in(given.get("name", ""), given.get("key", ""))
        return Visitor(given["session"], who) if who and given.get("session") else None

    def on_open(self, identity: str) -> Updates:
        visitor = self.visitor(identity)
        if visitor is None:
            return {self.identity: identity, **self._at_the_door("")}
        return {self.identity: identity, **self._next(visitor, settling=False)}

    def on_enter(self, identity: str, name: str, key: str) -> Updates:
        session = json.loads(identity or "{}").get("session")
        known = json.dumps({"session": session, "name": name.strip(), "key": key.strip()})
        visitor = self.visitor(known)
        if visitor is None:
            return {self.refused: show.said("No such name and key.", wrong=True)}
        return {self.identity: known, self.key: "", **self._next(visitor, settling=False)}

    def on_act(
        self, event: gr.EventData, identity: str, turn: str, settling: bool, *form: Any
    ) -> Updates:
        visitor = self.visitor(identity)
        if visitor is None:
            return self._at_the_door("Your key is no longer good: sign in again.")
        try:
            # By name: of a part that was updated once, what comes is a copy.
            return self._act(event.target.elem_id, visitor, turn, settling, *form)
        except AnnotationError as error:
            # Nothing else changes: what was clicked stays.
            return {self.said: show.said(str(error), wrong=True)}

    def _act(self, what: str, visitor: Visitor, turn: str, settling: bool, *form: Any) -> Updates:
        queue, session = self.queue, visitor.session
        if what == self.leave.elem_id:
            queue.release(visitor.name, session=session)
            out = json.dumps({"session": session})
            return {self.identity: out, **self._at_the_door("Signed out.")}
        if what == self.undo.elem_id:
            task = queue.undo(visitor.name, session=session)
            if task is None:
                raise AnnotationError("there is nothing to take back")
            return self._show(visitor, task, [], settling=task.adjudicating, said="Taken back.")
        if what == self.settling.elem_id:
            queue.release(visitor.name, session=session)
            return self._next(visitor, settling=settling)
        if what == self.rested.elem_id:
            queue.had_break(visitor.name)
            return {self.rest: gr.update(visible=False), self.said: show.said("Welcome back.")}
        if what == self.again.elem_id:
            return self._next(visitor, settling=settling)
        shown = _shown(turn)
        note = (form[-1] or "").strip() or None
        if what == self.skip.elem_id:
            if shown.adjudicating:
                raise AnnotationError("a disagreement is settled, or left: untick the box above")
            queue.skip(visitor.name, shown.id, session=session, reason=note)
            return self._next(visitor, settling=settling, said="Skipped.")
        label = _label(shown, *form[:-1])
        keep = queue.adjudicate if shown.adjudicating else queue.save
        keep(visitor.name, shown.id, label, session=session, note=note)
        return self._next(visitor, settling=settling, said="Saved.")

    def on_touch(self, identity: str, turn: str, *clicked: Any) -> Updates:
        """A click is a sign of life: the lease runs anew. The suggestion may be asked for now."""
        visitor = self.visitor(identity)
        if visitor is None or not turn:
            return {self.said: show.said("Sign in again.", wrong=True)}
        self.queue.renew(visitor.name, _shown(turn).id, session=visitor.session)
        # What was said is left alone: this answer may come after that of a save, and wipe it.
        return {self.suggest: gr.update(interactive=bool(_first(*clicked)))}

    def on_suggest(self, identity: str, turn: str, *clicked: Any) -> Updates:
        visitor = self.visitor(identity)
        if visitor is None or not turn:
            return {self.said: show.said("Sign in again.", wrong=True)}
        try:
            given = self.queue.reveal(visitor.name, _shown(turn).id, _first(*clicked))
        except AnnotationError as error:
            return {self.said: show.said(str(error), wrong=True)}
        return {self.suggestion: show.suggestion(given)}

    # --- what is shown next ----------------------------------------------------------------------

    def _at_the_door(self, why: str) -> Updates:
        return {
            self.door: gr.update(visible=True), self.desk: gr.update(visible=False),
            self.refused: show.said(why), self.turn: "", self.texts: "", self.dispute: "",
        }  # fmt: skip

    def _next(self, visitor: Visitor, *, settling: bool, said: str = "") -> Updates:
        name, session = visitor.name, visitor.session
        if settling:
            found = self.queue.claim_disputed(name, session=session)
            task, labels = found if found else (None, [])
        else:
            task, labels = self.queue.claim(name, session=session), []
        return self._show(visitor, task, labels, settling=settling, said=said)

    def _show(
        self, visitor: Visitor, task: Task | None, labels: list[StoredLabel], *, settling: bool,
        said: str,
    ) -> Updates:  # fmt: skip
        now, settings = self.queue.progress(visitor.name), self.queue.settings
        if task is None:
            texts = show.nothing_left(now, settling=settling)
        else:
            texts = show.texts(task, blur=settings.blur)
        return {
            self.door: gr.update(visible=False),
            self.desk: gr.update(visible=True),
            self.settling: gr.update(visible=visitor.who.adjudicates, value=settling),
            self.progress: show.progress(visitor.name, now),
            self.rest: gr.update(visible=now.rest is not None),
            self.why_rest: show.rest(now.rest or ""),
            self.texts: texts,
            self.dispute: show.dispute(task, labels) if task and labels else "",
            self.again: gr.update(visible=task is None),
            self.said: show.said(said),
            self.shortcuts: show.shortcuts(task),
            **self._fill(task, settings),
        }

    def _fill(self, task: Task | None, settings: Settings) -> Updates:
        """The form, empty or with the answer that was taken back."""
        answer = task.answer if task else None
        safety = answer if isinstance(answer, SafetyLabel) else None
        choices = answer if isinstance(answer, PairLabel) else PairLabel()
        kind, order = (task.kind, task.order) if task else (None, (0, 1))
        asks = task is not None and kind == "item" and task.condition == "after_click"
        wanted = {
            name: settings.preference in ("both", "single" if name == "single" else "dual")
            for name in self.questions
        }
        return {
            self.turn: _turn(task) if task else "",
            self.form: gr.update(visible=task is not None),
            self.item: gr.update(visible=kind == "item"),
            self.pair: gr.update(visible=kind == "pair"),
            self.safe: None if safety is None else "Safe" if safety.safe else "Unsafe",
            self.severity: (safety.severity or None) if safety else None,
            self.categories: list(safety.categories or ()) if safety else [],
            self.suggest: gr.update(visible=asks, interactive=safety is not None),
            self.suggestion: "",
            self.note: "",
            **{
                part: gr.update(
                    visible=wanted[name], value=show.side(getattr(choices, name), order)
                )
                for name, part in self.questions.items()
            },
        }


# --- between the page and the store --------------------------------------------------------------


def _turn(task: Task) -> str:
    return json.dumps([task.id, task.kind, list(task.order), task.adjudicating])


def _shown(turn: str) -> Task:
    """What the tab shows: enough of the task to read an answer to it."""
    if not turn:
        raise AnnotationError("no task is open: look again")
    number, kind, order, adjudicating = json.loads(turn)
    return Task(number, kind, "", (), tuple(order), "blind", adjudicating=adjudicating)


def _first(safe: str | None, severity: int | None, categories: list[str] | None) -> dict[str, Any]:
    given = {
        "safe": None if safe is None else safe == "Safe",
        "severity": severity,
        "categories": categories or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _label(
    task: Task, safe: str | None, severity: int | None, categories: list[str] | None,
    *sides: Literal["left", "right", "tie"] | None,
) -> Label:  # fmt: skip
    if task.kind == "pair":
        return PairLabel(*(None if one is None else task.choice(one) for one in sides))
    if safe is None:
        raise AnnotationError("say first whether the text is safe, or skip it")
    return SafetyLabel(safe == "Safe", severity, tuple(categories or ()))


# --- serving -------------------------------------------------------------------------------------


def launch(queue: Queue, host: str, port: int) -> tuple[gr.Blocks, str]:
    """Serve the page in the background; returns it and its URL. OSError when the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    blocks = Page(queue).blocks
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    url: str
    _, url, _ = blocks.queue(default_concurrency_limit=8).launch(
        server_name=host,
        server_port=port or None,
        theme=gr.themes.Base(
            primary_hue="teal", neutral_hue="slate",
            font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css_paths=_HERE / "page.css",
        head=f"{_HEAD}<script>{script}</script>",
        footer_links=[],
        run_history=False,  # it would keep what annotators see in the browser, and their keys
        enable_monitoring=False,
        ssr_mode=False,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    return blocks, url


def serve(path: Path, host: str, port: int, settings: Settings) -> None:
    """The page over the store at `path`, until it is interrupted.

    settings: those of the store, to say at the start; the page follows later changes of them.
    Raises AnnotationError when the port is taken.
    """
    try:
        blocks, url = launch(Queue(Store(path)), host, port)
    except OSError as error:
        raise AnnotationError(
            f"cannot serve on {host}:{port} ({error}): is the port taken? give another: --port"
        ) from None
    print(
        f"The annotation page is at {url} (Ctrl-C ends it; suggestions: {settings.suggestions}, "
        f"preference: {settings.preference})",
        flush=True,
    )
    blocks.block_thread()
