"""From several people's labels on one task to the label that stands for it. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations

from guardrail.taxonomy import Category
from training.annotation.labels import Choice, Label, PairLabel, SafetyLabel, StoredLabel

RANKS = ("adjudicated", "human", "import", "ai")
"""Whose word stands, first to last. A moderator's own opinion never does: it is what is checked."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """label: None where nobody whose word counts said anything; by: of which rank;
    agreed: whether all of that rank said the same."""

    label: Label | None
    by: str | None = None
    agreed: bool = True
    annotators: tuple[str, ...] = ()


def resolve(labels: Sequence[StoredLabel], ranks: Sequence[str] = RANKS) -> Resolved:
    """The label that stands for one task: that of the first rank that has any."""
    for rank in ranks:
        said = [s for s in labels if rank_of(s) == rank]
        if said:
            values = [s.value for s in said]
            return Resolved(
                combine(values), rank, not disagree(values), tuple(s.annotator for s in said)
            )
    return Resolved(None)


def rank_of(label: StoredLabel) -> str:
    return "adjudicated" if label.adjudicated else label.role


def disagree(labels: Sequence[Label]) -> bool:
    """True when two labels differ in anything that both say. What one leaves open (a severity, a
    question that was not asked) contradicts nobody."""
    return any(_contradict(a, b) for a, b in combinations(set(labels), 2))


def _contradict(a: Label, b: Label) -> bool:
    both = ((getattr(a, one.name), getattr(b, one.name)) for one in fields(a))
    return any(x is not None and y is not None and x != y for x, y in both)


def combine(labels: Sequence[Label]) -> Label:
    """Several labels as one. At least one; all of one kind.

    Safe by majority, an even split counts as unsafe; severity: the lower median of those who say
    unsafe, as the rubric takes the lower level in doubt; categories: named by at least half of
    them, unknown where each names others. A preference: by majority, else a tie.
    """
    safety = [one for one in labels if isinstance(one, SafetyLabel)]
    return _combine_safety(safety) if safety else _combine_pairs(labels)


def _combine_safety(labels: Sequence[SafetyLabel]) -> SafetyLabel:
    unsafe = [one for one in labels if not one.safe]
    if 2 * len(unsafe) < len(labels):
        return SafetyLabel(True)
    levels = sorted(one.severity for one in unsafe if one.severity is not None)
    named = [set(one.categories) for one in unsafe if one.categories is not None]
    counts = Counter(name for names in named for name in names)
    held = tuple(c.value for c in Category if 2 * counts[c.value] >= len(named) > 0)
    return SafetyLabel(
        safe=False,
        severity=levels[(len(levels) - 1) // 2] if levels else None,
        categories=held if named and (held or not counts) else None,
    )


def _combine_pairs(labels: Sequence[Label]) -> PairLabel:
    def majority(name: str) -> Choice | None:
        votes = Counter(getattr(one, name) for one in labels if getattr(one, name) is not None)
        if not votes:
            return None
        (first, most), *rest = votes.most_common(2)
        choice: Choice = "tie" if rest and rest[0][1] == most else first
        return choice

    return PairLabel(**{one.name: majority(one.name) for one in fields(PairLabel)})
