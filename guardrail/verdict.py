"""What a moderator sees (`Assessment`) and what a policy decides on it (`Verdict`). Pure data.

Data flows one way: text -> Assessment -> Verdict -> action. Imports only the taxonomy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from guardrail.taxonomy import Category, Direction, Severity

__all__ = ["Action", "Assessment", "Pair", "Passage", "Reason", "Verdict"]

_STAGE = re.compile(r"\w+(: [A-Za-z_]\w*(?=:))?")


class Action(StrEnum):
    """What happens to a text, weakest first: allow < flag < redact < regenerate < refuse."""

    ALLOW = "allow"
    FLAG = "flag"
    REDACT = "redact"
    REGENERATE = "regenerate"
    REFUSE = "refuse"

    @property
    def rank(self) -> int:
        """Position in the order above (0-4)."""
        return _ORDER[self]

    @property
    def delivers(self) -> bool:
        """True when the text goes out as it is (`allow`, `flag`)."""
        return self.rank <= Action.FLAG.rank

    # A StrEnum would compare by spelling; actions compare by strength.
    def __lt__(self, other: str) -> bool:
        return self.rank < Action(other).rank

    def __le__(self, other: str) -> bool:
        return self.rank <= Action(other).rank

    def __gt__(self, other: str) -> bool:
        return self.rank > Action(other).rank

    def __ge__(self, other: str) -> bool:
        return self.rank >= Action(other).rank


_ORDER = {action: rank for rank, action in enumerate(Action)}


@dataclass(frozen=True, slots=True)
class Pair:
    """A text to judge: a prompt alone (direction input), or a response to a prompt (output)."""

    prompt: str
    response: str | None = None

    @property
    def direction(self) -> Direction:
        return Direction.INPUT if self.response is None else Direction.OUTPUT

    @property
    def text(self) -> str:
        """The side that is judged: the response where there is one, else the prompt."""
        return self.prompt if self.response is None else self.response


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch `text[start:end]` of the judged text and its own probability of being unsafe."""

    start: int
    end: int
    probability: float

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "end": self.end,
            "probability": round(self.probability, 4),
        }


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a moderator sees in one text. Knows nothing of policies.

    severity_probabilities: P(severity = s) for each of the four severities; sums to 1.
    categories: P(category applies) for each of the 19; independent of one another.
    Raises ValueError on anything else, so that what makes no sense is never decided upon.
    passages: where the harm lies, offsets into `Pair.text`; empty for a harmless text.
    unreadable: the moderator could not read the text (foreign script, encoded blob), so that its
        probabilities mean little; a policy's `unreadable` action covers it.
    """

    direction: Direction
    severity_probabilities: Mapping[Severity, float]
    categories: Mapping[Category, float]
    passages: tuple[Passage, ...] = ()
    model: str = ""
    unreadable: bool = False

    def __post_init__(self) -> None:
        _complete("severity_probabilities", self.severity_probabilities, Severity)
        _complete("categories", self.categories, Category)
        total = sum(self.severity_probabilities.values())
        if abs(total - 1) > 0.01:
            raise ValueError(f"severity_probabilities sum to {total:.4g}, not to 1")

    @property
    def unsafe_probability(self) -> float:
        """P(severity >= minor)."""
        return self.at_least(Severity.MINOR)

    def at_least(self, severity: Severity) -> float:
        """P(severity >= `severity`)."""
        return min(1.0, sum(p for s, p in self.severity_probabilities.items() if s >= severity))

    @classmethod
    def harmless(cls, direction: Direction, *, model: str = "") -> Assessment:
        """The assessment of a text in which there is nothing to judge (empty, blank)."""
        return cls(
            direction=direction,
            severity_probabilities={s: float(s is Severity.NONE) for s in Severity},
            categories=dict.fromkeys(Category, 0.0),
            model=model,
        )


def _complete(name: str, values: Mapping[Any, float], words: type[Enum]) -> None:
    if values.keys() != set(words):
        raise ValueError(f"{name} must name each of the {len(words)}, and nothing else")
    for word, p in values.items():
        if not -1e-6 <= p <= 1 + 1e-6:  # float32 rounds; NaN compares with nothing
            raise ValueError(f"{name}: {word.name} has {p!r}, which is not a probability")


@dataclass(frozen=True, slots=True)
class Reason:
    """One category held against a text: its severity, probability, and the threshold it reached.

    The most probable category stands in where none reaches its own: its threshold is then its
    probability.
    """

    category: Category
    severity: Severity
    probability: float
    threshold: float

    def to_json(self) -> dict[str, Any]:
        return {
            "category": self.category.value,
            "severity": self.severity.label,
            "probability": round(self.probability, 4),
            "threshold": round(self.threshold, 4),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy decides on a text.

    severity: the calibrated decision; `none` means not flagged at all.
    reasons: the categories held against the text, strongest first.
    assessment: what the decision rests on; None when no moderator answered (`degraded`).
    degraded: a stage failed, so that `action` is the policy's `on_error`, or a stronger one that
        was decided before; `error` says what failed.
    """

    action: Action
    direction: Direction
    severity: Severity = Severity.NONE
    reasons: tuple[Reason, ...] = ()
    assessment: Assessment | None = None
    policy: str = ""
    degraded: bool = False
    error: str | None = None
    latency_ms: float = field(default=0.0, compare=False)

    @property
    def delivers(self) -> bool:
        """True when the text may go out as it is."""
        return self.action.delivers

    @property
    def passages(self) -> tuple[Passage, ...]:
        return self.assessment.passages if self.assessment else ()

    def summary(self) -> str:
        """One line for people: `refuse: severe Violence 0.91 (policy balanced@1)`."""
        if self.degraded:
            because = f"{'no assessment' if self.assessment is None else 'failed'}: {self.error}"
        elif self.reasons:
            because = ", ".join(
                f"{r.severity.label} {r.category.value} {r.probability:.2f}" for r in self.reasons
            )
        elif self.assessment is not None and self.assessment.unreadable:
            because = "text the model cannot read"
        else:
            because = "nothing held against it"
        return f"{self.action.value}: {because} (policy {self.policy})"

    def to_json(self) -> dict[str, Any]:
        """The verdict JSON shared by CLI, scan, HTTP and audit; null where nothing was assessed."""
        seen = self.assessment
        data: dict[str, Any] = {
            "action": self.action.value,
            "direction": self.direction.value,
            "severity": self.severity.label,
            "unsafe_probability": None if seen is None else round(seen.unsafe_probability, 4),
            "severity_probabilities": None
            if seen is None
            else {s.label: round(p, 4) for s, p in seen.severity_probabilities.items()},
            "categories": None
            if seen is None
            else {c.value: round(p, 4) for c, p in seen.categories.items()},
            "reasons": [reason.to_json() for reason in self.reasons],
            "passages": [passage.to_json() for passage in self.passages],
            "policy": self.policy,
            "model": None if seen is None else seen.model,
            "degraded": self.degraded,
            "latency_ms": round(self.latency_ms, 2),
        }
        if seen is not None and seen.unreadable:
            data["unreadable"] = True
        if self.error is not None:
            data["error"] = self.error
        return data


def stage_of(error: str) -> str:
    """Of a verdict's error, the stage that failed and its kind; the rest might quote the user."""
    found = _STAGE.match(error)
    return found[0] if found else "failed"
