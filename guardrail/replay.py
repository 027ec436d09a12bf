"""`guardrail policy replay`: what another policy would have done on what was recorded.

A verdict's JSON rounds probabilities to 4 digits. Where one lies so near a threshold that the
rounding decides, each side is tried: a row counts as changed, or unchanged, only where all sides
agree; else it is *uncertain*, and said to be. So a replay never claims more than the record shows.

A policy leaves thresholds to the model. They are taken from the model that the row names, where its
folder is at hand; rows of other models are not decided, but counted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardrail._policy_diff import severity_threshold
from guardrail._replay_rows import ReplayError, Unjudged, recorded
from guardrail.artifact import artifact_folder, known_artifacts, read_manifest
from guardrail.errors import ArtifactError
from guardrail.policy import LEVELS, Policy, Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action, Assessment, Verdict

__all__ = ["Group", "Replay", "ReplayError", "Tally", "replay", "thresholds_at_hand"]

_HALF = 5.1e-5  # half of the last digit that is written, and a little for floating point
_HAIR = 1e-9
_SIDES = 256  # beyond so many ways to round, a row is uncertain without trying them

Models = Mapping[str, Mapping[Direction, Thresholds]]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that change alike: the action before and after, and what the stronger of them was for:
    the gravest category held, None where none was (unreadable text, no assessment)."""

    direction: Direction
    category: Category | None
    severity: Severity
    before: Action
    after: Action


@dataclass(slots=True)
class Tally:
    """How many rows, and the ids of the first few."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, row: str, examples: int) -> None:
        self.rows += 1
        if len(self.examples) < examples:
            self.examples.append(row)


@dataclass(slots=True)
class Replay:
    """What a replay found. Each row is counted once: in `unchanged`, `changes`, `uncertain`,
    `unknown_model`, `errors` or `malformed`.

    actions: rows per (action before, action after), of those that are certain.
    degraded: of those, how many had no assessment, so that `on_error` decided on both sides.
    errors: rows that a scan had not judged. malformed: rows that are no verdict.
    unlike: rows that `policy_from` would not have decided as recorded: another policy decided
        then, or it, or its model's thresholds, were others.
    """

    policy: str
    baseline: str
    unchanged: int = 0
    changes: dict[Group, Tally] = field(default_factory=dict)
    actions: Counter[tuple[Action, Action]] = field(default_factory=Counter)
    uncertain: Tally = field(default_factory=Tally)
    degraded: int = 0
    unknown_model: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    malformed: Tally = field(default_factory=Tally)
    unlike: Tally = field(default_factory=Tally)

    @property
    def changed(self) -> int:
        return sum(tally.rows for tally in self.changes.values())

    @property
    def rows(self) -> int:
        left = self.errors + self.malformed.rows + self.unknown_model.total()
        return self.unchanged + self.changed + self.uncertain.rows + left

    def ordered(self) -> list[tuple[Group, Tally]]:
        """The changes, most rows first."""
        return sorted(self.changes.items(), key=lambda item: -item[1].rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "baseline": self.baseline,
            "rows": self.rows,
            "unchanged": self.unchanged,
            "changed": self.changed,
            "uncertain": _tally_json(self.uncertain),
            "degraded": self.degraded,
            "unknown_model": dict(self.unknown_model),
            "errors": self.errors,
            "malformed": _tally_json(self.malformed),
            "unlike_baseline": _tally_json(self.unlike),
            "actions": [
                {"from": before.value, "to": after.value, "rows": n}
                for (before, after), n in sorted(self.actions.items())
            ],
            "changes": [
                {
                    "direction": group.direction.value,
                    "category": group.category and group.category.value,
                    "severity": group.severity.label,
                    "from": group.before.value,
                    "to": group.after.value,
                    **_tally_json(tally),
                }
                for group, tally in self.ordered()
            ],
        }


def _tally_json(tally: Tally) -> dict[str, Any]:
    return {"rows": tally.rows, "examples": tally.examples}


def thresholds_at_hand(folders: Iterable[Path] = ()) -> dict[str, dict[Direction, Thresholds]]:
    """Calibrated thresholds by model id: of the models in `folders` (ArtifactError where one is
    none), of those bundled and those installed."""
    manifests = [read_manifest(artifact_folder(folder), verify=False) for folder in folders]
    for folder in known_artifacts().values():
        try:
            manifests.append(read_manifest(folder, verify=False))
        except ArtifactError:
            continue  # of no use to a replay; its rows, if any, are counted as unknown_model
    return {m.id: {d: m.thresholds_of(d) for d in Direction} for m in reversed(manifests)}


def replay(
    path: Path,
    policy: Policy,
    models: Models,
    *,
    policy_from: Policy | None = None,
    uncalibrated: bool = False,
    examples: int = 3,
    progress: Callable[[int], None] = lambda rows: None,
) -> Replay:
    """Decide every recorded row anew, and compare with the record, or with `policy_from`.

    path: an audit log, or the output of a scan. models: thresholds by model id. uncalibrated:
    decide the rows of other models too, as if theirs were all 0.5. progress: called with the number
    of rows so far. Raises ReplayError, AuditError, MissingExtra.
    """
    replayer = _Replayer(policy, policy_from, models, uncalibrated, examples)
    number = 0
    for number, (row, verdict) in enumerate(recorded(path), 1):
        replayer.add(row, verdict)
        if number % 1000 == 0:
            progress(number)
    progress(number)
    found = replayer.found
    if number == found.malformed.rows:
        raise ReplayError(
            f"{path}: none of its {number} rows has a verdict: give an audit log, or the output of "
            "a scan"
        )
    return found


class _Replayer:
    def __init__(
        self,
        policy: Policy,
        policy_from: Policy | None,
        models: Models,
        uncalibrated: bool,
        examples: int,
    ) -> None:
        self.policy, self.policy_from = policy, policy_from
        self.models, self.uncalibrated, self.examples = models, uncalibrated, examples
        self.found = Replay(policy.id, policy_from.id if policy_from else "as recorded")
        self._cuts: dict[tuple[str, Direction], _Cuts] = {}

    def add(self, row: str, verdict: Verdict | Unjudged) -> None:
        found = self.found
        if isinstance(verdict, Unjudged):
            if verdict.scan_error:
                found.errors += 1
            else:
                found.malformed.add(row, self.examples)
            return
        seen = verdict.assessment
        if seen is not None and seen.model not in self.models and not self.uncalibrated:
            found.unknown_model[seen.model] += 1
            return
        pairs = self._pairs(verdict)
        unlike = [before.action is not verdict.action for before, _ in pairs]
        if unlike and all(unlike):  # under each way to round
            found.unlike.add(row, self.examples)
        if len({(before.action, after.action) for before, after in pairs}) != 1:
            found.uncertain.add(row, self.examples)
            return
        before, after = pairs[0]
        found.degraded += seen is None
        found.actions[before.action, after.action] += 1
        if before.action is after.action:
            found.unchanged += 1
        else:
            group = _group(before, after, self.policy_from, self.policy)
            found.changes.setdefault(group, Tally()).add(row, self.examples)

    def _pairs(self, verdict: Verdict) -> list[tuple[Verdict, Verdict]]:
        """Each decision before and after that the record allows; [] where there are too many."""
        seen, direction = verdict.assessment, verdict.direction
        if seen is None:
            failed = self.policy_from.fail(direction, "") if self.policy_from else verdict
            return [(failed, self.policy.fail(direction, ""))]
        thresholds = self.models.get(seen.model, {}).get(direction)
        cuts = self._cuts_of(seen.model, direction, thresholds)
        sides = list(itertools.islice(cuts.sides(seen), _SIDES + 1))
        if len(sides) > _SIDES:
            return []
        return [
            (
                self._decide(self.policy_from, side, thresholds, verdict.degraded)
                if self.policy_from
                else verdict,
                self._decide(self.policy, side, thresholds, verdict.degraded),
            )
            for side in sides
        ]

    @staticmethod
    def _decide(
        policy: Policy, seen: Assessment, thresholds: Thresholds | None, degraded: bool
    ) -> Verdict:
        made = policy.decide(seen, thresholds)
        failed = policy.fail(seen.direction, "")
        return failed if degraded and failed.action > made.action else made

    def _cuts_of(self, model: str, direction: Direction, own: Thresholds | None) -> _Cuts:
        key = model, direction
        if key not in self._cuts:
            policies = [p for p in (self.policy, self.policy_from) if p is not None]
            self._cuts[key] = _Cuts.of(policies, direction, own or Thresholds())
        return self._cuts[key]


def _group(before: Verdict, after: Verdict, old: Policy | None, new: Policy) -> Group:
    stronger, by = (after, new) if after.action > before.action else (before, old)
    costs = stronger.reasons
    if by is not None:
        rules = by.rules(stronger.direction)
        costs = tuple(r for r in costs if rules.action(r.category, r.severity) is stronger.action)
    category, severity = (costs[0].category, costs[0].severity) if costs else (None, Severity.NONE)
    return Group(after.direction, category, severity, before.action, after.action)


@dataclass(frozen=True, slots=True)
class _Cuts:
    """All thresholds that a probability may lie near, of the policies of a replay."""

    levels: Mapping[Severity, Sequence[float]]
    categories: Mapping[Category, Sequence[float]]

    @classmethod
    def of(cls, policies: Sequence[Policy], direction: Direction, own: Thresholds) -> _Cuts:
        levels: dict[Severity, set[float]] = {level: set() for level in LEVELS}
        categories: dict[Category, set[float]] = {category: set() for category in Category}
        for policy in policies:
            rules = policy.rules(direction)
            held = (own | rules.thresholds).categories
            for category in Category:
                categories[category].add(held.get(category, 0.5))
                for level in LEVELS:
                    cut = severity_threshold(rules, category, level)
                    levels[level].add(own.severity.get(level, 0.5) if cut is None else cut)
        return cls(
            {level: sorted(cuts) for level, cuts in levels.items()},
            {category: sorted(cuts) for category, cuts in categories.items()},
        )

    def sides(self, seen: Assessment) -> Iterator[Assessment]:
        """Assessments that round to the one given, one for each way to fall about the cuts; nearly
        always that one alone."""
        reached = [
            _values(seen.at_least(level), len(LEVELS) - i, self.levels[level])
            for i, level in enumerate(LEVELS)
        ]
        categories = [_values(p, 1, self.categories[c]) for c, p in seen.categories.items()]
        ways = itertools.product(itertools.product(*reached), itertools.product(*categories))
        tied = self._tied(seen)
        if len(tied) == 1 and all(len(values) == 1 for values in (*reached, *categories)):
            yield seen
            return
        for (levels, values), top in itertools.product(ways, tied):
            by_category = dict(zip(seen.categories, values, strict=True))
            if top is not None:
                by_category[top] = min(1.0, by_category[top] + 2 * _HALF + 2 * _HAIR)
            # Raised to the level above, which is part of it: lowering that could undo a crossing.
            falling = list(itertools.accumulate(reversed(levels), max))[::-1]
            yield _with(seen, falling, by_category)

    def _tied(self, seen: Assessment) -> Sequence[Category | None]:
        """Where no category reaches its threshold the most probable one stands in: which may that
        have been? [None] where it does not matter, or is clear."""
        probable = seen.categories.items()
        harmless = seen.at_least(Severity.MINOR) + 3 * _HALF < self.levels[Severity.MINOR][0]
        if harmless or any(p - _HALF >= self.categories[c][-1] for c, p in probable):
            return [None]
        best = max(seen.categories.values())
        top = [c for c, p in probable if p >= best - 2 * _HALF]
        return top if len(top) > 1 else [None]


def _values(probability: float, terms: int, cuts: Sequence[float]) -> list[float]:
    """The lowest value of each stretch between cuts that a sum of `terms` rounded ones may lie in;
    where no cut is near, the lowest of all."""
    low = max(0.0, probability - terms * _HALF)
    crossed = [cut for cut in cuts if low < cut <= probability + terms * _HALF]
    # A hair above a cut: adding probabilities up again may lose one.
    return [low, *(cut + _HAIR for cut in crossed)] if crossed else [low + _HAIR]


def _with(
    seen: Assessment, at_least: Sequence[float], categories: Mapping[Category, float]
) -> Assessment:
    edges = [1.0, *at_least, 0.0]
    return dataclasses.replace(
        seen,
        severity_probabilities={s: edges[s] - edges[s + 1] for s in Severity},
        categories=categories,
    )
