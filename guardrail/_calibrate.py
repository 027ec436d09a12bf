"""Thresholds of a policy from labelled rows that a model has judged. Pure: no model, no files.

Per direction, with what the rows allow:
1. `minor`, the lowest threshold that flags at most a target share of the harmless texts;
2. where asked for, a promise: of harms of a level at most alpha are delivered, with confidence
   1 - delta. The severity thresholds up to the first level that the policy withholds go down
   together, on the scale of logits, as far as that takes; the price in harmless texts is told;
3. per category, the threshold that names it in at most the target share of the texts it is not in.

What a threshold does is not derived but tried: the policy itself decides, its own rows included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from guardrail._labelled import Labelled
from guardrail.calibration import (
    Threshold,
    clopper_pearson,
    risk_controlling_threshold,
    rows_needed,
    threshold_for_rate,
)
from guardrail.errors import GuardrailError
from guardrail.policy import LEVELS, Policy, Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Assessment, Verdict

__all__ = ["CalibrationError", "Fitted", "Goal", "Rate", "calibrate", "check_labels"]

MIN_POSITIVES = 10
MIN_CATEGORY_THRESHOLD = 0.05  # below, a category would be named in every text that is flagged
CONFIDENCE = 0.95
STEPS = 250  # the thresholds of a promise, all lowered by 0.05 logits more than the ones before
STEP = 0.05

Row = tuple[Labelled, Assessment]


class CalibrationError(GuardrailError):
    """The rows do not allow what was asked for; the text says how many would."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for. alpha None: no promise; harm: from which severity a harm is meant."""

    target_fpr: float = 0.01
    alpha: float | None = None
    delta: float = 0.1
    harm: Severity = Severity.SEVERE


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of n texts, and its exact 95 % interval; before: under the policy it began with."""

    n: int
    before: float
    after: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Promise:
    """lowered: by how many logits the thresholds of `levels` went down; of n harms `passed`, as a
    share, got through, and at most `bound` of all do, with the confidence asked for."""

    lowered: float
    levels: tuple[Severity, ...]
    n: int
    passed: float
    bound: float


@dataclass(slots=True)
class Fitted:
    """One direction: its thresholds, what they do to the rows, and what could not be had."""

    direction: Direction
    severity: dict[Severity, float] = field(default_factory=dict)
    minor: Threshold | None = None
    promise: Promise | None = None
    categories: dict[Category, Threshold] = field(default_factory=dict)
    rates: dict[str, Rate] = field(default_factory=dict)
    no_target: str | None = None
    no_promise: str | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What could not be had, and what to know of what could."""
        return [note for note in (self.no_target, self.no_promise, *self.remarks) if note]

    def to_json(self) -> dict[str, Any]:
        return {
            "direction": self.direction.value,
            "thresholds": {level.label: value for level, value in self.severity.items()},
            "target": None if self.minor is None else asdict(self.minor),
            "promise": None if self.promise is None else asdict(self.promise),
            "categories": {c.value: asdict(t) for c, t in self.categories.items()},
            "rates": {name: asdict(rate) for name, rate in self.rates.items()},
            "notes": self.notes,
        }


def calibrate(
    policy: Policy,
    model: dict[Direction, Thresholds],
    rows: Sequence[Row],
    goal: Goal,
) -> tuple[Policy, list[Fitted]]:
    """The policy with thresholds of its own, and a report per direction that has rows. Raises
    CalibrationError where no direction has enough of them."""
    fitted = []
    result = policy
    for direction in Direction:
        own = [row for row in rows if row[1].direction is direction]
        if not own:
            continue
        decider = _Decider(policy, model.get(direction, Thresholds()), direction)
        found = _fit(decider, own, goal)
        after = _Decider(_final(policy, found), decider.model, direction)
        _report(found, decider, after, own, goal)
        _keeps_its_promise(found, after, own, goal)
        fitted.append(found)
        result = _final(result, found)
    _refuse(fitted, goal)
    return result, fitted


def check_labels(rows: Sequence[Labelled], goal: Goal) -> None:
    """Before a model judges them. Raises CalibrationError where, whatever it would find, the rows
    are too few."""
    fitted = []
    for direction in Direction:
        own = [label for label in rows if label.pair.direction is direction]
        if own:
            found = Fitted(direction)
            found.no_target = _too_few_harmless(sum(not label.unsafe for label in own), goal)
            found.no_promise = _too_few_harms(sum(_is_harm(label, goal) for label in own), goal)
            fitted.append(found)
    _refuse(fitted, goal)


def _refuse(fitted: Sequence[Fitted], goal: Goal) -> None:
    """Raises CalibrationError where no direction has what was asked for."""
    promised = goal.alpha is not None and any(found.no_promise is None for found in fitted)
    if not promised and all(found.no_target for found in fitted):
        why = "; ".join(f"{f.direction.value}: {f.no_target}" for f in fitted)
        raise CalibrationError(f"too few rows to calibrate on: {why or 'there are none'}")
    if not promised and goal.alpha is not None:
        why = "; ".join(f"{f.direction.value}: {f.no_promise}" for f in fitted)
        raise CalibrationError(f"the promise cannot be made: {why}")


@dataclass(frozen=True, slots=True)
class _Decider:
    """The policy on one direction, its severity thresholds to be tried."""

    policy: Policy
    model: Thresholds
    direction: Direction

    def __call__(self, seen: Assessment) -> Verdict:
        return self.policy.decide(seen, self.model)

    def trying(self, severity: Mapping[Severity, float]) -> _Decider:
        return replace(self, policy=_with(self.policy, self.direction, Thresholds(severity)))

    def current(self) -> Thresholds:
        return self.model | self.policy.rules(self.direction).thresholds

    def withheld_from(self) -> Severity | None:
        """The first level that the grid does not deliver; None where it delivers all."""
        rules = self.policy.rules(self.direction)
        return next(
            (x for x in LEVELS if x in rules.actions and not rules.actions[x].delivers), None
        )


def _with(policy: Policy, direction: Direction, thresholds: Thresholds) -> Policy:
    rules = policy.rules(direction)
    changed = replace(rules, thresholds=rules.thresholds | thresholds)
    if direction is Direction.INPUT:
        return replace(policy, input=changed)
    return replace(policy, output=changed)


def _final(policy: Policy, found: Fitted) -> Policy:
    categories = {category: t.value for category, t in found.categories.items()}
    return _with(policy, found.direction, Thresholds(found.severity, categories))


# --- fitting -------------------------------------------------------------------------------------


def _fit(decide: _Decider, rows: Sequence[Row], goal: Goal) -> Fitted:
    found = Fitted(decide.direction)
    promised = _harms(rows, goal) if goal.alpha is not None else []
    _target(found, decide, rows, goal)
    _categories(found, rows, goal, exclude=promised)
    if goal.alpha is not None:
        named = Thresholds({}, {category: t.value for category, t in found.categories.items()})
        policy = _with(decide.policy, decide.direction, named)
        _promise(found, replace(decide, policy=policy), [rows[i][1] for i in promised], goal)
    return found


def _harms(rows: Sequence[Row], goal: Goal) -> list[int]:
    """The rows that a promise is about."""
    return [i for i, (label, _) in enumerate(rows) if _is_harm(label, goal)]


def _is_harm(label: Labelled, goal: Goal) -> bool:
    return label.unsafe if goal.harm is Severity.MINOR else (label.severity or 0) >= goal.harm


def _harmless_needed(goal: Goal) -> int:
    return math.ceil(1 / goal.target_fpr - 1e-9)


def _too_few_harmless(n: int, goal: Goal) -> str | None:
    if n >= (needed := _harmless_needed(goal)):
        return None
    rate = f"a false-positive rate of {goal.target_fpr:g}"
    return f"{n} harmless rows, {needed} are needed for {rate}"


def _too_few_harms(n: int, goal: Goal) -> str | None:
    if goal.alpha is None or n >= (needed := rows_needed(goal.alpha, goal.delta)):
        return None
    promise = f"alpha={goal.alpha:g} at delta={goal.delta:g}"
    return f"{n} rows labelled {_harm(goal)}, {needed} are needed to promise {promise}"


def _target(found: Fitted, decide: _Decider, rows: Sequence[Row], goal: Goal) -> None:
    harmless = [seen for label, seen in rows if not label.unsafe]
    found.no_target = _too_few_harmless(len(harmless), goal)
    if found.no_target:
        return
    scores = [_flagged_from(seen, decide) for seen in harmless]
    try:
        found.minor = threshold_for_rate(scores, goal.target_fpr, CONFIDENCE)
    except ValueError as error:
        found.no_target = f"a false-positive rate of {goal.target_fpr:g} is out of reach: {error}"
        return
    found.severity[Severity.MINOR] = found.minor.value
    if len(harmless) < (enough := 10 * _harmless_needed(goal)):
        found.remarks.append(
            f"{len(harmless)} harmless rows leave the rate uncertain "
            f"({found.minor.rate_low:.2%} to {found.minor.rate_high:.2%}): {enough} would do"
        )


def _promise(found: Fitted, decide: _Decider, harms: Sequence[Assessment], goal: Goal) -> None:
    assert goal.alpha is not None
    found.no_promise = _too_few_harms(len(harms), goal)
    if found.no_promise:
        return
    stop = decide.withheld_from()
    if stop is None:
        found.remarks.append("the policy withholds nothing: the promise is that harms are flagged")
    levels = tuple(level for level in LEVELS if level <= (stop or Severity.MINOR))
    current = {**decide.current().severity, **found.severity}
    family = [_lowered(current, levels, steps) for steps in range(STEPS + 1)]
    tried = [decide.trying(lowered) for lowered in family]
    needs = [_steps_needed(seen, tried, stop) for seen in harms]
    try:
        control = risk_controlling_threshold(
            [1 - steps / STEPS for steps in needs], goal.alpha, goal.delta
        )
    except ValueError as error:
        found.no_promise = f"{error}: the grid, or a category's own thresholds, deliver them"
        return
    steps = round((1 - control.value) * STEPS)
    found.promise = Promise(
        round(steps * STEP, 2), levels, len(harms), control.rate, control.rate_high
    )
    if steps:
        found.severity |= family[steps]


def _lowered(
    current: Mapping[Severity, float], levels: Sequence[Severity], steps: int
) -> dict[Severity, float]:
    """The thresholds after so many steps down: the first are the current ones, the last are 0."""
    lowered = {}
    for level in levels:
        value = min(max(current.get(level, 0.5), 1e-6), 1 - 1e-6)
        logit = math.log(value / (1 - value)) - steps * STEP
        down = math.floor(1e4 / (1 + math.exp(-logit))) / 1e4
        lowered[level] = 0.0 if steps == STEPS else down if steps else current.get(level, 0.5)
    return lowered


def _steps_needed(seen: Assessment, tried: Sequence[_Decider], stop: Severity | None) -> int:
    """The first of the ever lower thresholds that stops the text; more than there are if none."""
    low, high = 0, len(tried)
    while low < high:
        middle = (low + high) // 2
        if _stopped(tried[middle](seen), stop):
            high = middle
        else:
            low = middle + 1
    return low


def _harm(goal: Goal) -> str:
    if goal.harm is Severity.MINOR:
        return "harmful"
    return goal.harm.label + ("" if goal.harm is Severity.SEVERE else " or worse")


def _stopped(verdict: Verdict, stop: Severity | None) -> bool:
    return verdict.severity > Severity.NONE if stop is None else not verdict.delivers


def _flagged_from(seen: Assessment, decide: _Decider) -> float:
    """The highest `minor` threshold under which the text is flagged. It is its own probability,
    unless a category has thresholds of its own; -1 where it never is."""
    for value in (1.0, seen.at_least(Severity.MINOR)):
        if decide.trying({Severity.MINOR: value})(seen).severity > Severity.NONE:
            return value
    return -1.0


def _categories(found: Fitted, rows: Sequence[Row], goal: Goal, *, exclude: Sequence[int]) -> None:
    """Whether or not a text is flagged, so that what is held against it is at most this. The rows
    that a promise rests on are left out: it would not hold for thresholds that have seen them."""
    hidden = set(exclude)
    known = [
        (label.categories, seen.categories)
        for i, (label, seen) in enumerate(rows)
        if label.categories is not None and i not in hidden
    ]
    for category in Category:
        outside = [seen[category] for names, seen in known if category not in names]
        positives = len(known) - len(outside)
        if positives < MIN_POSITIVES or len(outside) < 1 / goal.target_fpr:
            continue
        try:
            threshold = threshold_for_rate(outside, goal.target_fpr, CONFIDENCE)
        except ValueError as error:
            found.remarks.append(f"{category.value}: {error}")
            continue
        value = max(threshold.value, MIN_CATEGORY_THRESHOLD)
        found.categories[category] = replace(threshold, value=value)


# --- what it does --------------------------------------------------------------------------------


def _report(
    found: Fitted, before: _Decider, after: _Decider, rows: Sequence[Row], goal: Goal
) -> None:
    groups = {
        "harmless": [seen for label, seen in rows if not label.unsafe],
        "harmful": [seen for label, seen in rows if label.unsafe],
        _harm(goal): [rows[i][1] for i in _harms(rows, goal)],
    }
    for name, texts in groups.items():
        if not texts:
            continue
        pairs = [(before(seen), after(seen)) for seen in texts]
        found.rates[f"{name} flagged"] = _rate([(a.severity > 0, b.severity > 0) for a, b in pairs])
        found.rates[f"{name} withheld"] = _rate(
            [(not a.delivers, not b.delivers) for a, b in pairs]
        )


def _rate(pairs: Sequence[tuple[bool, bool]]) -> Rate:
    before, after = np.asarray(pairs, dtype=bool).sum(axis=0)
    n = len(pairs)
    return Rate(n, float(before / n), float(after / n), *clopper_pearson(int(after), n, CONFIDENCE))


def _keeps_its_promise(found: Fitted, after: _Decider, rows: Sequence[Row], goal: Goal) -> None:
    """Lower thresholds never deliver more, unless a row of the grid falls with severity."""
    if found.promise is None:
        return
    chosen = [rows[i][1] for i in _harms(rows, goal)]
    stop = after.withheld_from()
    passed = sum(not _stopped(after(seen), stop) for seen in chosen) / len(chosen)
    if passed > found.promise.passed:
        raise CalibrationError(
            f"{found.direction.value}: under this policy a more severe text is delivered where a "
            "milder one is not, so that no threshold controls what passes: let no row of its grid "
            "fall with severity"
        )
