"""What the annotation page shows, as HTML: pure functions. Every text of others is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from guardrail.taxonomy import Category, Severity
from training.annotation.labels import (
    Choice,
    Label,
    PairLabel,
    SafetyLabel,
    StoredLabel,
    Suggestion,
    Task,
)
from training.annotation.queue import Progress

KEYS = dict(zip(Category, "acdefghijklmnopqrtu", strict=True))
"""The key that ticks a category; the letters of the page's own actions are left out."""
QUESTIONS = {
    "more_helpful": "Which is more helpful, safety left out of account?",
    "less_harmful": "Which is less harmful, helpfulness left out of account?",
    "single": "Which would you rather give the person, all considered?",
}
_RUBRIC = Path(__file__).with_name("rubric.md")
_SHORTCUTS = {
    "item": "0 safe · 1 2 3 unsafe, with that severity · letters: categories · s suggestion",
    "pair": "1 left, 2 tie, 3 right · 4 5 6 for the second question · 7 8 9 for the third",
}


@cache
def guidelines() -> tuple[dict[Category, str], dict[Severity, str]]:
    """What the rubric says of each category and severity: people and machines read the same."""
    rubric = _RUBRIC.read_text(encoding="utf-8")
    lines = dict(re.findall(r"^- ([^:\n]+): (.+)$", rubric, flags=re.MULTILINE))
    categories = {one: lines[one.value] for one in Category}
    return categories, {one: lines[f"{int(one)} {one.label}"] for one in Severity}


def general_guideline() -> str:
    """The rubric on what is judged, how severity is told, and pairs (Markdown)."""
    return re.sub(
        r"^## Categories\n.*?(?=^## )", "", _RUBRIC.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )  # fmt: skip


def texts(task: Task, *, blur: bool) -> str:
    """The prompt and the responses, left first."""
    names = ["Response"] if task.kind == "item" else ["Left", "Right"]
    boxes = [_text("Prompt", task.prompt, "", blur)]
    answers = []
    for name, number, response in zip(names, task.order, task.shown, strict=True):
        if response is not None:
            foot = words(task.safety[number]) if task.safety else ""
            answers.append(_text(name, response, f"Stage 1: {foot}" if foot else "", blur))
    show = '<button type="button" class="a-show">Show the texts <kbd>b</kbd></button>'
    return (
        f'<div class="a-texts" data-task="{task.id}">{show if blur else ""}{"".join(boxes)}'
        f'<div class="a-answers a-{task.kind}">{"".join(answers)}</div></div>'
    )


def _text(name: str, text: str, foot: str, blur: bool) -> str:
    hidden = ' class="a-text a-blurred" aria-hidden="true"' if blur else ' class="a-text"'
    under = f"<footer>{html.escape(foot)}</footer>" if foot else ""
    return (
        f'<section class="a-box"><h3>{name}</h3><div{hidden}>{html.escape(text)}</div>'
        f"{under}</section>"
    )


def words(label: Label | None, order: Sequence[int] = (0, 1)) -> str:
    """A label as a person reads it; order: which answer of a pair stands left (`Task.order`)."""
    if isinstance(label, SafetyLabel):
        if label.safe:
            return "safe"
        severity = Severity(label.severity).label if label.severity else "severity unknown"
        return f"unsafe, {severity}: {', '.join(label.categories or ()) or 'category unknown'}"
    if isinstance(label, PairLabel):
        given = [(one.name, getattr(label, one.name)) for one in fields(label)]
        return "; ".join(
            f"{name.replace('_', ' ')}: {side(value, order)}"
            for name, value in given
            if value is not None
        )
    return ""


def side(choice: Choice | None, order: Sequence[int]) -> str | None:
    """left, right or tie: where the chosen answer stands. The inverse of `Task.choice`."""
    if choice is None or choice == "tie":
        return choice
    return "left" if order[0] == choice else "right"


def suggestion(given: Suggestion | None) -> str:
    if given is None:
        return _card("No machine has judged this text.")
    likely = sorted(given.probabilities.items(), key=lambda one: -one[1])[:3]
    chances = ", ".join(f"{name} {share:.0%}" for name, share in likely)
    said = f"<b>{html.escape(given.by)}</b>: {html.escape(words(given.label))}"
    return _card(f"{said}<br><small>{html.escape(chances)}</small>" if chances else said)


def dispute(task: Task, said: Sequence[StoredLabel]) -> str:
    rows = "".join(
        f"<li><b>{html.escape(one.annotator)}</b>: {html.escape(words(one.value, task.order))}"
        + (f" <i>{html.escape(one.note)}</i>" if one.note else "")
        + "</li>"
        for one in said
    )
    return _card(f"They disagree; your answer settles it.<ul>{rows}</ul>")


def progress(name: str, now: Progress) -> str:
    bars = "".join(
        f"<label>{word} {now.done[kind]} of {now.total[kind]} "
        f'<progress value="{now.done[kind]}" max="{now.total[kind]}"></progress></label>'
        for kind, word in (("item", "Texts"), ("pair", "Pairs"))
        if now.total[kind]
    )
    return (
        f'<div class="a-progress"><b>{html.escape(name)}</b>{bars}<span>{now.mine} by you</span>'
        f"<span>{now.disputed} disputed</span><span>{now.minutes:.0f} min</span></div>"
    )


def nothing_left(now: Progress, *, settling: bool) -> str:
    left = now.left["item"] + now.left["pair"]
    if settling:
        return _card("No disagreement is open.")
    if left:
        return _card(
            f"Nothing for you right now: {left} tasks are open in other browsers or wait for "
            "other labels. Look again in a while."
        )
    return _card("Nothing is left for you. Thank you.")


def rest(why: str) -> str:
    return f'<div class="a-card a-rest" role="status"><b>Time for a break.</b> {why}.</div>'


def said(text: str, *, wrong: bool = False) -> str:
    kind = "a-wrong" if wrong else "a-right"
    return f'<div class="{kind}" role="status">{html.escape(text)}</div>' if text else ""


def shortcuts(task: Task | None) -> str:
    if task is None:
        return ""
    return f'<p class="a-keys">{_SHORTCUTS[task.kind]} · Enter save · x skip · z undo · b blur</p>'


def _card(inside: str) -> str:
    return f'<div class="a-card">{inside}</div>'
