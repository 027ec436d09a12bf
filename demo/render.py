"""HTML of the demo page. Pure: data in, markup out, every text of a user or a model escaped.

The markup is in `fragments.html`; Jinja escapes whatever is put into it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from guardrail import Action, Category, Direction, Passage, Policy, Severity, Verdict

__all__ = [
    "card",
    "empty",
    "inspection",
    "model_line",
    "note",
    "pair",
    "policy_grid",
    "split_passages",
]

_ENVIRONMENT = Environment(
    loader=PackageLoader("demo", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _percent(probability: float) -> str:
    """For people: whole percents, and never a 0 % or 100 % that is not one."""
    if 0 < probability < 0.01:
        return "<1%"
    if 0.99 < probability < 1:
        return ">99%"
    return f"{probability:.0%}"


_ENVIRONMENT.filters["percent"] = _percent


def _macro(macro: str, /, **values: object) -> str:
    module = _ENVIRONMENT.get_template("fragments.html").module
    return str(getattr(module, macro)(**values))


def empty(title: str, text: str) -> str:
    """A card in which there is no verdict yet."""
    return _macro("empty", title=title, text=text)


def note(text: str) -> str:
    """A line that says what went wrong."""
    return _macro("note", text=text)


def model_line(name: str) -> str:
    """Which chat model is behind the guard."""
    return _macro("model_line", name=name)


def card(title: str, verdict: Verdict, *, latency: bool = True) -> str:
    """A verdict: action, severity bars, the categories held against the text, time."""
    return _macro("card", title=title, verdict=verdict, severities=list(Severity), latency=latency)


def pair(first: str, second: str) -> str:
    """Two cards, one above the other: the message's and the answer's."""
    return f'<div id="g-input">{first}</div><div id="g-output">{second}</div>'


def policy_grid(policy: Policy) -> str:
    """The grid of a policy, direction x severity -> action, and the rows of its own categories."""
    levels = list(Severity)[1:]
    rows = []
    for direction in Direction:
        rules = policy.rules(direction)
        general = {level: rules.actions.get(level, Action.ALLOW) for level in levels}
        rows.append((direction.value, "any category", general, rules.thresholds.severity))
        for category in rules.categories:
            own = {level: rules.action(category, level) for level in levels}
            rows.append((direction.value, category.value, own, {}))
    return _macro("policy_grid", policy=policy, rows=rows, levels=levels)


def inspection(text: str, verdicts: Sequence[Verdict]) -> str:
    """One text under several policies: its bars, its marked passages, the verdicts side by side."""
    first = verdicts[0]
    held = {reason.category for verdict in verdicts for reason in verdict.reasons}
    seen = first.assessment
    ranked = sorted(seen.categories.items(), key=lambda item: -item[1]) if seen else []
    return _macro(
        "inspection",
        pieces=split_passages(text, first.passages),
        verdicts=verdicts,
        seen=seen,
        first=first,
        ranked=[(category.value, p, category in held) for category, p in ranked],
        severities=list(Severity),
        total=len(Category),
    )


def split_passages(text: str, passages: Sequence[Passage]) -> list[tuple[str, float | None]]:
    """`text` in pieces, in order: (piece, its probability of being unsafe, None if unmarked).

    Where passages overlap (windows of a long text do), the earlier one keeps the shared part.
    """
    pieces: list[tuple[str, float | None]] = []
    at = 0
    for passage in sorted(passages, key=lambda p: (p.start, p.end)):
        start = max(passage.start, at)
        if passage.end <= start:
            continue
        if start > at:
            pieces.append((text[at:start], None))
        pieces.append((text[start : passage.end], passage.probability))
        at = passage.end
    if at < len(text):
        pieces.append((text[at:], None))
    return pieces
