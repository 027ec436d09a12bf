"""What the page's form holds, as plain values: pure functions between a tab and the store.

A *turn* names the task that a tab shows; a *draft* is a turn with what was clicked so far, which
the tab keeps, so that a reload or a new server finds it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from training.annotation import page_html as show
from training.annotation.labels import AnnotationError, Label, PairLabel, SafetyLabel, Task

Form = list[Any]
"""safe, severity, categories, one side per question of `page_html.QUESTIONS`, note."""


def turn_of(task: Task) -> str:
    return json.dumps([task.id, task.kind, list(task.order), task.adjudicating])


def shown(turn: str) -> Task:
    """What the tab shows: enough of the task to read an answer to it."""
    if not turn:
        raise AnnotationError("no task is open: look again")
    number, kind, order, adjudicating = json.loads(turn)
    return Task(number, kind, "", (), tuple(order), "blind", adjudicating=adjudicating)


def first_clicks(
    safe: str | None, severity: int | None, categories: list[str] | None
) -> dict[str, Any]:
    """What was clicked so far, as `Queue.reveal` keeps it."""
    given = {
        "safe": None if safe is None else safe == "Safe",
        "severity": severity,
        "categories": categories or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def label_of(task: Task, form: Sequence[Any]) -> Label:
    """The answer that a form gives. Raises AnnotationError where it gives none."""
    safe, severity, categories, *sides, _ = form
    if task.kind == "pair":
        return PairLabel(*(None if one is None else task.choice(one) for one in sides))
    if safe is None:
        raise AnnotationError("say first whether the text is safe, or skip it")
    return SafetyLabel(safe == "Safe", severity, tuple(categories or ()))


def note_of(form: Sequence[Any]) -> str | None:
    return (form[-1] or "").strip() or None


def empty_form() -> Form:
    return [None, None, [], *(None for _ in show.QUESTIONS), ""]


def form_of(task: Task | None) -> Form:
    """The form of a task: empty, or with the answer that was taken back."""
    form, answer = empty_form(), task.answer if task else None
    if isinstance(answer, SafetyLabel):
        form[:3] = [
            "Safe" if answer.safe else "Unsafe", answer.severity or None,
            list(answer.categories or ()),
        ]  # fmt: skip
    elif task is not None and isinstance(answer, PairLabel):
        form[3:-1] = [show.side(getattr(answer, name), task.order) for name in show.QUESTIONS]
    return form


def draft_of(turn: str, form: Sequence[Any]) -> str:
    return json.dumps({"turn": turn, "form": list(form)}) if turn else ""


def read_draft(draft: str | None) -> tuple[str, Form]:
    """The turn of a draft, "" where there is none, and its form."""
    kept = json.loads(draft or "{}")
    turn, form = kept.get("turn", ""), kept.get("form")
    empty = empty_form()
    if not isinstance(turn, str) or not isinstance(form, list) or len(form) != len(empty):
        return "", empty  # of another version of the page
    if form[0] == "Safe":  # noted by the tab before it took the rest back
        form[1:3] = empty[1:3]
    return turn, form
