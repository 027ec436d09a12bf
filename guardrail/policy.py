"""Policies: a declarative grid direction x category x severity -> action. Pure data and functions.

A policy is TOML:

    name = "support-desk"
    extends = "balanced"            # a preset, or another file beside this one
    on_error = "refuse"             # when no assessment could be had: refuse unless said otherwise
    unreadable = "flag"             # for text the model cannot read
    language = "de"                 # of the refusals; or your own words: refusal = "..."

    [refusals]                      # your own words for one category
    "Drugs" = "..."

    [output]                        # what a severity costs, whatever its category
    minor = "flag"
    moderate = "refuse"
    severe = "refuse"

    [output.thresholds]             # P(severity >= level) from which a level counts
    minor = 0.5                     # (left out: the model's own calibrated value)

    [output.categories."Psychological Harm"]
    minor = "refuse"                # its own row of the grid
    threshold = 0.2                 # hold this category from this probability
    thresholds = { minor = 0.3 }    # and its own severity thresholds

How a decision is made: a category counts when its probability reaches its threshold; where none
does, the most probable one stands in. Its severity climbs from `minor` as long as P(severity >=
level) reaches that level's threshold, the category's own where it has one. A category that gets to
`minor` is *held* and costs what the grid says; the strongest action wins. So a higher probability
of harm never gives a weaker action, unless a row of the grid falls.

`parse` reads TOML text, `load` a preset or a file; imports only the standard library.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from guardrail._policy_values import (
    action_of,
    category_of,
    check_keys,
    probability_of,
    table_of,
    value_of,
)
from guardrail._toml import nearest, read_toml
from guardrail.errors import PolicyError
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action, Assessment, Reason, Verdict

__all__ = ["LANGUAGES", "PRESETS", "Policy", "Rules", "Thresholds"]

PRESETS = ("strict", "balanced", "permissive", "audit-only")
LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "pt", "zh")
LEVELS = (Severity.MINOR, Severity.MODERATE, Severity.SEVERE)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From which probability a severity level, or a category, counts. Anything left out is 0.5.

    A model's manifest carries its calibrated ones; a policy's own override them. Raises ValueError
    on what is no probability.
    """

    severity: Mapping[Severity, float] = field(default_factory=dict)
    categories: Mapping[Category, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (*self.severity.values(), *self.categories.values()):
            if not 0 <= value <= 1:
                raise ValueError(f"a threshold is a probability between 0 and 1, not {value!r}")

    def __or__(self, other: Thresholds) -> Thresholds:
        """These, overridden by `other`."""
        return Thresholds(
            {**self.severity, **other.severity}, {**self.categories, **other.categories}
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction's half of the grid.

    actions: per severity level; categories: rows that replace parts of it for one category;
    thresholds: over the model's; category_severity: severity thresholds of one category.
    """

    actions: Mapping[Severity, Action] = field(default_factory=dict)
    categories: Mapping[Category, Mapping[Severity, Action]] = field(default_factory=dict)
    thresholds: Thresholds = Thresholds()
    category_severity: Mapping[Category, Mapping[Severity, float]] = field(default_factory=dict)

    def action(self, category: Category, severity: Severity) -> Action:
        """The grid's cell; `allow` for severity none and for what nothing is said about."""
        row = self.categories.get(category, {})
        return row.get(severity, self.actions.get(severity, Action.ALLOW))


@dataclass(frozen=True, slots=True)
class Policy:
    """What to do about what a moderator sees. Immutable; equal policies decide equally.

    language: of the refusals in `guardrail.refusals`, one of LANGUAGES; refusal: said instead of
    them; refusals: said instead of either where that category leads. Empty ones are none. Raises
    PolicyError for another language.
    """

    name: str
    version: int = 1
    description: str = ""
    input: Rules = Rules()
    output: Rules = Rules()
    on_error: Action = Action.REFUSE
    unreadable: Action = Action.FLAG
    refusal: str = ""
    refusals: Mapping[Category, str] = field(default_factory=dict)
    language: str = "en"

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise PolicyError(_unknown_language(self.language))

    @property
    def id(self) -> str:
        """`name@version`, as verdicts and logs carry it."""
        return f"{self.name}@{self.version}"

    def rules(self, direction: Direction) -> Rules:
        return self.input if direction is Direction.INPUT else self.output

    @classmethod
    def load(cls, source: str | Path) -> Policy:
        """A preset by name, or a TOML file by path. Raises PolicyError."""
        return _load(source, [])

    @classmethod
    def parse(cls, text: str, *, where: str = "policy") -> Policy:
        """A policy from TOML text; it may extend presets only. Raises PolicyError."""
        return _parse(text, where, None, [])

    def decide(self, assessment: Assessment, model: Thresholds | None = None) -> Verdict:
        """The verdict on an assessment; `model` holds the calibrated thresholds of its model."""
        rules = self.rules(assessment.direction)
        thresholds = (model or Thresholds()) | rules.thresholds
        reasons = _reasons(rules, thresholds, assessment)
        actions = [rules.action(r.category, r.severity) for r in reasons]
        if assessment.unreadable:
            actions.append(self.unreadable)
        return Verdict(
            action=max(actions, default=Action.ALLOW),
            direction=assessment.direction,
            severity=max((r.severity for r in reasons), default=Severity.NONE),
            reasons=reasons,
            assessment=assessment,
            policy=self.id,
        )

    def fail(self, direction: Direction, error: str) -> Verdict:
        """The verdict where no assessment could be had: `on_error`, marked degraded."""
        return Verdict(
            action=self.on_error,
            direction=direction,
            policy=self.id,
            degraded=True,
            error=error,
        )


def _reasons(rules: Rules, thresholds: Thresholds, seen: Assessment) -> tuple[Reason, ...]:
    reached = {level: seen.at_least(level) for level in LEVELS}
    held = []
    for category, threshold in _counted(thresholds.categories, seen.categories):
        own = rules.category_severity.get(category, {})
        severity = _severity(reached, {**thresholds.severity, **own})
        if severity:
            held.append(Reason(category, severity, seen.categories[category], threshold))
    return tuple(sorted(held, key=lambda r: (-r.severity, -r.probability)))


def _counted(
    thresholds: Mapping[Category, float], probabilities: Mapping[Category, float]
) -> list[tuple[Category, float]]:
    """The categories that reach their threshold, and which that is; else the most probable one."""
    counted = [
        (category, threshold)
        for category, probability in probabilities.items()
        if probability >= (threshold := thresholds.get(category, 0.5))
    ]
    top = max(probabilities, key=lambda category: probabilities[category])
    return counted or [(top, probabilities[top])]


def _severity(reached: Mapping[Severity, float], levels: Mapping[Severity, float]) -> Severity:
    severity = Severity.NONE
    for level in LEVELS:
        if reached[level] < levels.get(level, 0.5):
            break
        severity = level
    return severity


# --- reading TOML --------------------------------------------------------------------------------

_DEEPEST = 50  # files that extend one another

_TOP = (
    "name", "version", "description", "extends", "on_error", "unreadable", "refusal",
    "refusals", "language", "input", "output",
)  # fmt: skip
_ROW = (*(level.label for level in LEVELS), "threshold", "thresholds")
_DIRECTION = (*(level.label for level in LEVELS), "thresholds", "categories")


def policy_files(source: str | Path) -> list[Path]:
    """The file of a policy and those it extends, none for a preset. Raises PolicyError."""
    read: list[Path] = []
    _load(source, read)
    return read


def _load(source: str | Path, read: list[Path]) -> Policy:
    """As `Policy.load`; each file that is read is added to `read`."""
    if isinstance(source, str) and source in PRESETS:
        return _preset(source)
    path = Path(source)
    if not os.path.isfile(path):  # unlike Path.is_file, for a name of any length
        hint = nearest(str(source), PRESETS)
        raise PolicyError(
            f"policy {str(source)!r}: neither a preset ({', '.join(PRESETS)}) nor a file{hint}"
        )
    return _load_file(path, read)


def _preset(name: str) -> Policy:
    file = resources.files("guardrail").joinpath(f"policies/{name}.toml")
    return _parse(file.read_text(encoding="utf-8"), f"preset {name}", None, [])


def _load_file(path: Path, read: list[Path]) -> Policy:
    read.append(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: cannot be read: {error}") from error
    return _parse(text, str(path), path.parent, read)


def _parse(text: str, where: str, folder: Path | None, read: list[Path]) -> Policy:
    try:
        data = read_toml(text)
    except ValueError as error:
        raise PolicyError(f"{where}: not valid TOML: {error}") from error
    check_keys(data, _TOP, where, "")
    base = _base(data.get("extends"), where, folder, read)
    name = value_of(data, "name", str, "", where)
    if not name or not name.isprintable():
        raise PolicyError(
            f"{where}: key 'name': every policy has one of its own, on one line, found {name!r}"
        )
    language = value_of(data, "language", str, base.language, where)
    if language not in LANGUAGES:
        raise PolicyError(f"{where}: {_unknown_language(language)}")
    return Policy(
        name=name,
        version=value_of(data, "version", int, 1, where),
        description=value_of(data, "description", str, "", where),
        input=_rules(data.get("input", {}), base.input, where, "input"),
        output=_rules(data.get("output", {}), base.output, where, "output"),
        on_error=action_of(data.get("on_error", base.on_error), where, "on_error"),
        unreadable=action_of(data.get("unreadable", base.unreadable), where, "unreadable"),
        refusal=value_of(data, "refusal", str, base.refusal, where),
        refusals={**base.refusals, **_refusals(data.get("refusals", {}), where)},
        language=language,
    )


def _unknown_language(language: str) -> str:
    return (
        f"key 'language': {language!r} is none of {', '.join(LANGUAGES)}: give the refusals in "
        "your own words, with 'refusal' and 'refusals'"
    )


def _base(extends: object, where: str, folder: Path | None, read: list[Path]) -> Policy:
    if extends is None:
        return Policy("")
    if not isinstance(extends, str):
        raise PolicyError(
            f"{where}: key 'extends': expected the name of a preset or a file, found {extends!r}"
        )
    if extends in PRESETS:
        return _preset(extends)
    path = folder / extends if folder is not None else None
    if path is None or not os.path.isfile(path):
        hint = nearest(extends, PRESETS)
        raise PolicyError(
            f"{where}: key 'extends': {extends!r} is neither a preset ({', '.join(PRESETS)}) "
            f"nor a file beside it{hint}"
        )
    if path.resolve() in [file.resolve() for file in read]:
        raise PolicyError(f"{where}: key 'extends': {extends!r} extends this policy in turn")
    if len(read) >= _DEEPEST:
        raise PolicyError(
            f"{where}: key 'extends': {len(read)} files extend one another up to here, and no more "
            "may: let this one extend a preset, or nothing"
        )
    return _load_file(path, read)


def _rules(data: object, base: Rules, where: str, key: str) -> Rules:
    table = table_of(data, where, key)
    check_keys(table, _DIRECTION, where, key)
    actions = _actions(table, where, key)
    rows = {
        category: {level: max(action, actions.get(level, action)) for level, action in row.items()}
        for category, row in base.categories.items()
    }
    category_thresholds: dict[Category, float] = dict(base.thresholds.categories)
    category_severity = {c: dict(levels) for c, levels in base.category_severity.items()}
    for name, value in table_of(table.get("categories", {}), where, f"{key}.categories").items():
        at = f'{key}.categories."{name}"'
        category = category_of(name, where, f"{key}.categories")
        row = table_of(value, where, at)
        check_keys(row, _ROW, where, at)
        rows.setdefault(category, {}).update(_actions(row, where, at))
        if "threshold" in row:
            category_thresholds[category] = probability_of(
                row["threshold"], where, f"{at}.threshold"
            )
        if "thresholds" in row:
            levels = _levels(row["thresholds"], where, f"{at}.thresholds")
            category_severity.setdefault(category, {}).update(levels)
    severity = _levels(table.get("thresholds", {}), where, f"{key}.thresholds")
    return Rules(
        actions={**base.actions, **actions},
        categories=rows,
        thresholds=Thresholds({**base.thresholds.severity, **severity}, category_thresholds),
        category_severity=category_severity,
    )


def _refusals(data: object, where: str) -> dict[Category, str]:
    table = table_of(data, where, "refusals")
    return {
        category_of(name, where, "refusals"): value_of(table, name, str, "", f"{where}: refusals")
        for name in table
    }


def _actions(table: Mapping[str, object], where: str, key: str) -> dict[Severity, Action]:
    return {
        level: action_of(table[level.label], where, f"{key}.{level.label}")
        for level in LEVELS
        if level.label in table
    }


def _levels(data: object, where: str, key: str) -> dict[Severity, float]:
    table = table_of(data, where, key)
    check_keys(table, [level.label for level in LEVELS], where, key)
    return {
        Severity.from_label(label): probability_of(value, where, f"{key}.{label}")
        for label, value in table.items()
    }
