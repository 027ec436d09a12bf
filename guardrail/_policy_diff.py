"""What changes from one policy to another, cell by cell of the grid. Pure.

Compared is what counts in the end, after `extends` and defaults: two files that decide alike do
not differ. Only what a policy itself says is compared; a threshold it leaves to the model is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from guardrail.policy import LEVELS, Policy, Rules
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action

__all__ = ["Change", "changes"]

Effect = Literal["stricter", "looser", "other"]
Value = Action | float | str | None


@dataclass(frozen=True, slots=True)
class Change:
    """One change, with all categories of a direction that it is the same for.

    what: `minor`, `moderate`, `severe` (the action they cost), `held from` (the category's
        threshold), `P(>= minor)` ... (a severity's), `on_error`, `unreadable`, `refusal` (of one
        category, or all), `language`.
    before, after: None for a threshold that is left to the model.
    effect: `other` where one cannot tell, as against a model's own threshold.
    """

    what: str
    before: Value
    after: Value
    direction: Direction | None = None
    categories: tuple[Category, ...] = ()

    @property
    def effect(self) -> Effect:
        before, after = self.before, self.after
        if isinstance(before, Action) and isinstance(after, Action):
            return "stricter" if after > before else "looser"
        if isinstance(before, float) and isinstance(after, float):
            return "stricter" if after < before else "looser"
        return "other"

    def to_json(self) -> dict[str, Any]:
        return {
            "direction": self.direction and self.direction.value,
            "categories": [category.value for category in self.categories],
            "what": self.what,
            "from": self.before,
            "to": self.after,
            "effect": self.effect,
        }


def changes(before: Policy, after: Policy) -> list[Change]:
    """Everything that `after` decides otherwise than `before`, grouped; [] for none."""
    found = [
        Change(what, old, new)
        for what in ("on_error", "unreadable", "refusal", "language")
        if (old := getattr(before, what)) != (new := getattr(after, what))
    ]
    for category in Category:
        old, new = before.refusals.get(category, ""), after.refusals.get(category, "")
        if old != new:
            found.append(Change("refusal", old, new, None, (category,)))
    for direction in Direction:
        groups: dict[tuple[str, Value, Value], list[Category]] = {}
        for category in Category:
            cells = zip(
                _cells(before.rules(direction), category),
                _cells(after.rules(direction), category),
                strict=True,
            )
            for (what, old), (_, new) in cells:
                if old != new:
                    groups.setdefault((what, old, new), []).append(category)
        order = sorted(groups.items(), key=lambda group: -len(group[1]))
        found += [Change(*group, direction, tuple(where)) for group, where in order]
    return found


def _cells(rules: Rules, category: Category) -> Iterator[tuple[str, Value]]:
    for level in LEVELS:
        yield level.label, rules.action(category, level)
    yield "held from", rules.thresholds.categories.get(category)
    for level in LEVELS:
        yield f"P(>= {level.label})", severity_threshold(rules, category, level)


def severity_threshold(rules: Rules, category: Category, level: Severity) -> float | None:
    """The category's own, else the direction's, else None: the model's."""
    own = rules.category_severity.get(category, {}).get(level)
    return rules.thresholds.severity.get(level) if own is None else own
