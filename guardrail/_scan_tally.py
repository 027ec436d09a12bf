"""Counts over the rows of a scan: what its summary, its report and its resume rest on. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from guardrail._rows import Outcome, Row
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action, Pair, Verdict

__all__ = ["BINS", "Tally", "Worst"]

BINS = 20  # of the histogram of P(unsafe), each 0.05 wide
_WORST = 20
_EXCERPT = 400  # characters


@dataclass(frozen=True, slots=True)
class Worst:
    """One of the most harmful texts: where it is, what it was held for; its text if asked for."""

    severity: Severity
    probability: float
    row: int
    field: str
    category: str
    text: str | None = None

    @property
    def rank(self) -> tuple[int, float, int]:
        return -self.severity, -self.probability, self.row

    def to_json(self) -> list[Any]:
        own = (self.probability, self.row, self.field, self.category, self.text)
        return [self.severity.label, *own]

    @classmethod
    def from_json(cls, data: list[Any]) -> Worst:
        severity, probability, row, name, category, text = data
        level = Severity.from_label(severity)
        return cls(level, float(probability), int(row), str(name), str(category), text)


@dataclass(slots=True)
class Tally:
    """Counts over the rows written so far, earlier runs of the same scan included.

    rows, errors: rows of the input; those that could not be judged. problems: what was wrong with
        them, without what the row said.
    actions, severities, degraded, unreadable, unsafe: verdicts, of which a row may have several;
        `degraded` have no assessment behind them; `unsafe` is a histogram of P(unsafe).
    held: verdicts per (category, severity) held against a text; a text may count in several.
    worst: the most harmful first, at most 20.
    """

    rows: int = 0
    errors: int = 0
    degraded: int = 0
    unreadable: int = 0
    actions: Counter[Action] = field(default_factory=Counter)
    severities: Counter[tuple[Direction, Severity]] = field(default_factory=Counter)
    held: Counter[tuple[Category, Severity]] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    unsafe: list[int] = field(default_factory=lambda: [0] * BINS)
    worst: list[Worst] = field(default_factory=list)

    @property
    def verdicts(self) -> int:
        return sum(self.actions.values())

    def add(self, row: Row, outcome: Outcome, *, excerpts: bool = False) -> None:
        """Count the next row. excerpts: keep the beginnings of the most harmful texts."""
        self.rows += 1
        if isinstance(outcome, str):
            self.errors += 1
            self.problems[_kind(outcome)] += 1
            return
        pairs: Mapping[str, Pair] = {} if isinstance(row.pairs, str) else row.pairs
        for name, verdict in outcome.items():
            self._add(verdict)
            if verdict.severity > Severity.NONE:
                text = pairs[name].text[:_EXCERPT] if excerpts else None
                self._note(name, verdict, text)

    def _add(self, verdict: Verdict) -> None:
        self.actions[verdict.action] += 1
        self.severities[verdict.direction, verdict.severity] += 1
        self.degraded += verdict.degraded
        self.held.update((reason.category, reason.severity) for reason in verdict.reasons)
        if verdict.assessment is not None:
            self.unreadable += verdict.assessment.unreadable
            bin_ = int(verdict.assessment.unsafe_probability * BINS)
            self.unsafe[min(max(bin_, 0), BINS - 1)] += 1

    def _note(self, name: str, verdict: Verdict, text: str | None) -> None:
        seen = verdict.assessment
        probability = seen.unsafe_probability if seen is not None else 1.0
        category = verdict.reasons[0].category.value if verdict.reasons else ""
        entry = Worst(verdict.severity, probability, self.rows, name, category, text)
        if len(self.worst) < _WORST or entry.rank < self.worst[-1].rank:
            self.worst = sorted([*self.worst, entry], key=lambda w: w.rank)[:_WORST]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "errors": self.errors,
            "degraded": self.degraded,
            "unreadable": self.unreadable,
            "actions": {action.value: n for action, n in self.actions.items()},
            "severities": [[d.value, s.label, n] for (d, s), n in self.severities.items()],
            "held": [[c.value, s.label, n] for (c, s), n in self.held.items()],
            "problems": dict(self.problems),
            "unsafe": self.unsafe,
            "worst": [entry.to_json() for entry in self.worst],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """What `to_json` gave. Raises one of MISSHAPEN on anything else."""
        level = Severity.from_label
        made = cls(
            rows=int(data["rows"]),
            errors=int(data["errors"]),
            degraded=int(data["degraded"]),
            unreadable=int(data["unreadable"]),
            actions=Counter({Action(action): int(n) for action, n in data["actions"].items()}),
            severities=Counter(
                {(Direction(d), level(s)): int(n) for d, s, n in data["severities"]}
            ),
            held=Counter({(Category(c), level(s)): int(n) for c, s, n in data["held"]}),
            problems=Counter({problem: int(n) for problem, n in data["problems"].items()}),
            unsafe=[int(n) for n in data["unsafe"]],
            worst=[Worst.from_json(entry) for entry in data["worst"]],
        )
        if made.to_json() != data or len(made.unsafe) != BINS:
            raise ValueError("its counts were changed")
        return made


def _kind(error: str) -> str:
    """What was wrong, without what the row said: that stands after a colon, or is a number."""
    return re.sub(r"(?<!UTF-)\d+", "N", error.partition(":")[0])
