"""What the command line shows people: verdicts, policy grids, summaries. Rich, and nothing else.

Every text that comes from outside is escaped: a passage must not steer the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from guardrail._printable import printable
from guardrail.policy import LEVELS, Policy, Rules
from guardrail.taxonomy import Category, Direction
from guardrail.verdict import Action, Passage, Verdict

if TYPE_CHECKING:  # these bring the model's libraries along
    from guardrail.doctor import Check
    from guardrail.scan import Tally

__all__ = [
    "console",
    "grid",
    "health",
    "progress_line",
    "scan_progress",
    "summary",
    "verdict_view",
]

_COLOURS = {
    Action.ALLOW: "green",
    Action.FLAG: "yellow",
    Action.REDACT: "magenta",
    Action.REGENERATE: "magenta",
    Action.REFUSE: "red",
}
_STATUS = {"ok": "green", "warning": "yellow", "failure": "red"}
_PASSAGES = 5
_BAR = 24
_NAME = 26  # characters of a name beside a bar
_OVER = 300  # seconds that a rate is taken over: two chunks of a scan must fit, also large ones


def console(*, stderr: bool = False) -> Console:
    """A console on the stream of now; lines are not wrapped where no terminal reads them."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 200
    return Console(file=stream, width=width, highlight=False)


def verdict_view(verdict: Verdict, text: str, *, panel: bool) -> Panel | Group:
    """A verdict on `text`: in a panel for a terminal, else plain lines."""
    title = Text(f"{verdict.action.value} · {verdict.severity.label}")
    title.stylize(f"bold {_COLOURS[verdict.action]}")
    lines = _verdict_lines(verdict, text, "█" if panel else "#")
    model = verdict.assessment.model if verdict.assessment else "no assessment"
    facts = verdict.direction.value, verdict.policy, model, f"{verdict.latency_ms:.1f} ms"
    footer = Text(" · ".join(facts), "dim")
    if panel:
        return Panel(Group(*lines, footer), title=title, expand=False, padding=(0, 1))
    return Group(title, *lines, footer)


def _verdict_lines(verdict: Verdict, text: str, block: str) -> list[Text]:
    lines = []
    seen = verdict.assessment
    if seen is not None:
        for severity, probability in seen.severity_probabilities.items():
            bar = block * round(probability * _BAR)
            lines.append(Text(f"{severity.label:<9} {probability:.2f}  {bar}"))
        if seen.unreadable:
            lines.append(Text("the model cannot read this text", "yellow"))
    lines += [
        Text(
            f"held  {r.category.value}: {r.severity.label}, "
            f"probability {r.probability:.2f}, threshold {r.threshold:.2f}"
        )
        for r in verdict.reasons
    ]
    for passage in sorted(verdict.passages, key=lambda p: -p.probability)[:_PASSAGES]:
        lines.append(Text(f"{passage.probability:.2f}  “{_shortened(text, passage)}”"))
    if len(verdict.passages) > _PASSAGES:
        lines.append(Text(f"and {len(verdict.passages) - _PASSAGES} more passages (--json)"))
    return lines or [Text("nothing was assessed")]


def _shortened(text: str, passage: Passage, limit: int = 120) -> str:
    quoted = printable(text[passage.start : passage.end])
    return quoted if len(quoted) <= limit else f"{quoted[: limit - 3]}..."


def grid(policy: Policy, *, every: bool) -> Group:
    """The policy's grid; of the categories, only those that differ unless `every`."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("direction", "category", "held from", *(level.label for level in LEVELS)):
        table.add_column(column)
    for direction in Direction:
        rules = policy.rules(direction)
        own = [c for c in Category if _has_own_row(rules, c)]
        rest = "every other category" if own else "every category"
        if not every:
            table.add_row(direction.value, rest, *_row(rules, None))
        for category in Category if every else own:
            table.add_row(direction.value, category.value, *_row(rules, category))
        table.add_section()
    fails = "fails open" if policy.on_error.delivers else "fails closed"
    notes = [
        Text(policy.id, "bold"),
        Text(printable(policy.description)),
        Text(f"when no assessment could be had (on_error): {policy.on_error.value}: {fails}"),
        Text(f"text the model cannot read (unreadable): {policy.unreadable.value}"),
        *_refusal_lines(policy),
        Text("≥ is a threshold of this policy; where there is none, the model's own counts"),
    ]
    return Group(*(note for note in notes if note.plain), table)


def _refusal_lines(policy: Policy) -> list[Text]:
    """What a refusal says, as far as it is not the default."""
    said = {}
    if policy.language != Policy("").language:
        said["language of the refusals (language)"] = policy.language
    if policy.refusal:
        said["said in place of every refusal (refusal)"] = policy.refusal
    for category, words in policy.refusals.items():
        said[f"said where {category.value} leads (refusals)"] = words
    return [Text(f"{what}: {printable(words)}") for what, words in said.items()]


def _has_own_row(rules: Rules, category: Category) -> bool:
    return _row(rules, category) != _row(rules, None)


def _row(rules: Rules, category: Category | None) -> list[Text]:
    held = None if category is None else rules.thresholds.categories.get(category)
    own = {} if category is None else rules.category_severity.get(category, {})
    cells = [Text("model's own" if held is None else f"≥ {held:g}")]
    for level in LEVELS:
        default = rules.actions.get(level, Action.ALLOW)
        action = default if category is None else rules.action(category, level)
        threshold = own.get(level, rules.thresholds.severity.get(level))
        words = action.value if threshold is None else f"{action.value} ≥ {threshold:g}"
        cells.append(Text(words, _COLOURS[action]))
    return cells


def health(checks: Iterable[Check]) -> Table:
    """One row per check of the doctor, with its cure below what was found."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("check", "status", "found"):
        table.add_column(column)
    for check in checks:
        found = printable(check.detail)
        if check.cure:
            found += f"\n→ {printable(check.cure)}"
        table.add_row(check.check, Text(check.status, _STATUS[check.status]), Text(found))
    return table


class _Name(ProgressColumn):
    """The end of a task's name: a path may be longer than the terminal is wide."""

    def render(self, task: Task) -> Text:
        name = printable(task.description)
        return Text(name if len(name) <= _NAME else f"…{name[1 - _NAME :]}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed) if task.speed else "")


def _rate(rate: float) -> str:
    return f"{rate:,.{0 if rate >= 100 else 1}f} rows/s"


def scan_progress() -> Progress:
    """Rows, rows per second and time left, on stderr; nothing where that is no terminal."""
    out = console(stderr=True)
    columns = (
        _Name(table_column=Column(no_wrap=True)),
        BarColumn(_BAR),  # where there is little room, this alone gives way
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _Rate(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    return Progress(*columns, console=out, disable=not out.is_terminal, speed_estimate_period=_OVER)


def progress_line(task: Task) -> str:
    """What the bar says, for a log."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    said = [f"{printable(task.description)}: {task.completed:,.0f}{total} rows"]
    if task.speed:
        said.append(_rate(task.speed))
    if task.time_remaining is not None:
        said.append(f"{timedelta(seconds=task.time_remaining)} left")
    return ", ".join(said)


def summary(tally: Tally, rate: float) -> Group:
    """What a scan found: actions, categories by severity, errors, rows per second of this run."""
    actions = ", ".join(f"{a.value} {tally.actions[a]:,}" for a in Action if tally.actions[a])
    parts: list[Table | Text] = []
    if tally.held:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("category")
        for level in LEVELS:
            table.add_column(level.label, justify="right")
        for category in Category:
            counts: Sequence[int] = [tally.held[category, level] for level in LEVELS]
            if any(counts):
                table.add_row(category.value, *(f"{n:,}" for n in counts))
        parts.append(table)
    parts.append(Text(f"actions: {actions or 'none'}"))
    parts.append(
        Text(
            f"{tally.rows:,} rows, {tally.errors:,} with errors, {tally.degraded:,} judged by "
            f"on_error alone; {_rate(rate)}"
        )
    )
    return Group(*parts)
