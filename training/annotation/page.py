"""The annotation page: Gradio over `queue`. `python -m training.annotate serve` starts it.

Keeps nothing between events: the tab sends who it is, what it shows and what was clicked, and the
store says what comes next. So a server may be killed and started again, or stand beside others,
and the same open page goes on: `page.js` sees that the server is gone, says so, and opens the page
anew when it is back, with what was clicked (`page_form`: a draft).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from training.annotation import page_html as show
from training.annotation.labels import AnnotationError, Settings, StoredLabel, Task
from training.annotation.page_form import (
    draft_of,
    first_clicks,
    form_of,
    label_of,
    note_of,
    read_draft,
    shown,
    turn_of,
)
from training.annotation.page_parts import Parts
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


class Page(Parts):
    """The components, and what their events do to the store."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.blocks = gr.Blocks(title="Annotation", analytics_enabled=False)
        with self.blocks:
            super().__init__()
            self._wire()

    # --- events ----------------------------------------------------------------------------------

    def _wire(self) -> None:
        clicked = [self.safe, self.severity, self.categories]
        form = [*clicked, *self.questions.values(), self.note]
        everything = [
            self.identity, self.turn, self.draft, self.name, self.key, self.door, self.desk,
            self.refused, self.progress, self.settling, self.rest, self.why_rest, self.texts,
            self.dispute, self.again, self.form, self.item, self.suggest, self.suggestion,
            self.pair, *form, self.said, self.shortcuts,
        ]  # fmt: skip
        self.blocks.load(
            self.on_open, [self.identity, self.draft], everything,
            js="() => window.annotation.open()", **_EVENT,
        )  # fmt: skip
        self.identity.change(None, self.identity, js="(value) => window.annotation.keep(value)")
        # The tab itself adds what is clicked: Gradio handles no event once a server is gone.
        self.draft.change(None, self.draft, js="(value) => window.annotation.draft(value)")
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
            self.on_act, [self.identity, self.turn, self.settling, *form], everything,
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

    def on_open(self, identity: str, draft: str) -> Updates:
        visitor = self.visitor(identity)
        if visitor is None:
            return {self.identity: identity, **self._at_the_door("")}
        turn, _ = read_draft(draft)
        settling = bool(turn) and shown(turn).adjudicating and visitor.who.adjudicates
        return {self.identity: identity, **self._next(visitor, settling=settling, draft=draft)}

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
        task, note = shown(turn), note_of(form)
        if what == self.skip.elem_id:
            if task.adjudicating:
                raise AnnotationError("a disagreement is settled, or left: untick the box above")
            queue.skip(visitor.name, task.id, session=session, reason=note)
            return self._next(visitor, settling=settling, said="Skipped.")
        keep = queue.adjudicate if task.adjudicating else queue.save
        keep(visitor.name, task.id, label_of(task, form), session=session, note=note)
        return self._next(visitor, settling=settling, said="Saved.")

    def on_touch(self, identity: str, turn: str, *clicked: Any) -> Updates:
        """A click is a sign of life: the lease runs anew. The suggestion may be asked for now."""
        visitor = self.visitor(identity)
        if visitor is None or not turn:
            return {self.said: show.said("Sign in again.", wrong=True)}
        self.queue.renew(visitor.name, shown(turn).id, session=visitor.session)
        # What was said is left alone: this answer may come after that of a save, and wipe it.
        return {self.suggest: gr.update(interactive=bool(first_clicks(*clicked)))}

    def on_suggest(self, identity: str, turn: str, *clicked: Any) -> Updates:
        visitor = self.visitor(identity)
        if visitor is None or not turn:
            return {self.said: show.said("Sign in again.", wrong=True)}
        try:
            given = self.queue.reveal(visitor.name, shown(turn).id, first_clicks(*clicked))
        except AnnotationError as error:
            return {self.said: show.said(str(error), wrong=True)}
        return {self.suggestion: show.suggestion(given)}

    # --- what is shown next ----------------------------------------------------------------------

    def _at_the_door(self, why: str) -> Updates:
        return {
            self.door: gr.update(visible=True), self.desk: gr.update(visible=False),
            self.refused: show.said(why), self.turn: "", self.draft: "", self.texts: "",
            self.dispute: "",
        }  # fmt: skip

    def _next(
        self, visitor: Visitor, *, settling: bool, said: str = "", draft: str = ""
    ) -> Updates:
        name, session = visitor.name, visitor.session
        if settling:
            found = self.queue.claim_disputed(name, session=session)
            task, labels = found if found else (None, [])
        else:
            task, labels = self.queue.claim(name, session=session), []
        return self._show(visitor, task, labels, settling=settling, said=said, draft=draft)

    def _show(
        self, visitor: Visitor, task: Task | None, labels: list[StoredLabel], *, settling: bool,
        said: str, draft: str = "",
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
            **self._fill(task, settings, draft),
        }

    def _fill(self, task: Task | None, settings: Settings, draft: str) -> Updates:
        """The form: empty, with the answer that was taken back, or as the tab's draft has it."""
        turn, (kept_turn, kept) = turn_of(task) if task else "", read_draft(draft)
        safe, severity, categories, *sides, note = form = (
            kept if turn and kept_turn == turn else form_of(task)
        )
        kind = task.kind if task else None
        asks = task is not None and kind == "item" and task.condition == "after_click"
        questions = {
            part: gr.update(
                visible=settings.preference in ("both", "single" if name == "single" else "dual"),
                value=side,
            )
            for (name, part), side in zip(self.questions.items(), sides, strict=True)
        }
        return {
            self.turn: turn,
            self.draft: draft_of(turn, form),
            self.form: gr.update(visible=task is not None),
            self.item: gr.update(visible=kind == "item"),
            self.pair: gr.update(visible=kind == "pair"),
            self.safe: safe,
            self.severity: severity,
            self.categories: categories,
            self.suggest: gr.update(
                visible=asks, interactive=bool(first_clicks(safe, severity, categories))
            ),
            self.suggestion: "",
            self.note: note,
            **questions,
        }


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
