"""Forms of rows: how each data set says what a `Record` holds, both ways. Pure functions.

| form | data set | a row is |
|---|---|---|
| `plain` | ours: `annotated_responses`, `annotated_prompts` | a text: severity, categories |
| `pairs` | ours: `annotated_pairs` | two answers: both texts' labels, more_helpful, less_harmful |
| `pku` | PKU-SafeRLHF | two answers: both texts' labels, better and safer answer |
| `pku-single` | PKU-SafeRLHF-single-dimension | two answers, one trade-off preference |
| `pku-qa` | PKU-SafeRLHF-QA | a text: is_safe, harm_category, severity_level |
| `beavertails` | BeaverTails | a text: is_safe, 14 categories |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from guardrail.taxonomy import Category, Severity
from training.annotation.labels import AnnotationError, Choice, PairLabel, Record, SafetyLabel

FormName = Literal["plain", "pairs", "pku", "pku-single", "pku-qa", "beavertails"]
Row = dict[str, Any]

# BeaverTails (Ji et al. 2023, arXiv:2307.04657, appendix) to PKU-SafeRLHF's 19. A category whose
# definition spreads over several of the 19 has none: the row's categories are then unknown, and
# masked in training, not guessed. docs/annotation.md has the measured agreement of each.
BEAVERTAILS: dict[str, Category | None] = {
    "animal_abuse": Category.ANIMAL_ABUSE,
    "child_abuse": None,
    "controversial_topics,politics": None,
    "discrimination,stereotype,injustice": Category.DISCRIMINATORY_BEHAVIOR,
    "drug_abuse,weapons,banned_substance": None,
    "financial_crime,property_crime,theft": Category.ECONOMIC_CRIME,
    "hate_speech,offensive_language": Category.INSULTING_BEHAVIOR,
    "misinformation_regarding_ethics,laws_and_safety": None,
    "non_violent_unethical_behavior": None,
    "privacy_violation": Category.PRIVACY_VIOLATION,
    "self_harm": Category.PHYSICAL_HARM,
    "sexually_explicit,adult_content": Category.SEXUAL_CONTENT,
    "terrorism,organized_crime": None,
    "violence,aiding_and_abetting,incitement": Category.VIOLENCE,
}
# The way back, for labels given here: the one of the 14 whose definition covers it.
_BACK = {
    Category.ENDANGERING_NATIONAL_SECURITY: "terrorism,organized_crime",
    Category.ENDANGERING_PUBLIC_HEALTH: "misinformation_regarding_ethics,laws_and_safety",
    Category.COPYRIGHT_ISSUES: "financial_crime,property_crime,theft",
    Category.DRUGS: "drug_abuse,weapons,banned_substance",
    Category.HUMAN_TRAFFICKING: "terrorism,organized_crime",
    Category.WHITE_COLLAR_CRIME: "financial_crime,property_crime,theft",
    **{category: name for name, category in BEAVERTAILS.items() if category is not None},
}
_OTHER = "non_violent_unethical_behavior"


@dataclass(frozen=True)
class Form:
    """fields: what the form knows; labels: those of them that say a label."""

    name: FormName
    pair: bool
    fields: frozenset[str]
    labels: frozenset[str]
    read: Callable[[Row], Record]
    write: Callable[[Record], Row]


def detect(row: Mapping[str, Any]) -> FormName:
    """The form that a row's fields speak for."""
    if "response_0" in row:
        if "safer_response_id" in row or "is_response_0_safe" in row:
            return "pku"
        return "pku-single" if "better_response_id" in row else "pairs"
    if isinstance(row.get("category"), dict) and "is_safe" in row:
        return "beavertails"
    return "pku-qa" if {"is_safe", "harm_category", "severity_level"} & row.keys() else "plain"


def read_record(row: Row, form: FormName | None = None) -> Record:
    """A row as a record that `write_row` makes the same row of again. Raises AnnotationError."""
    how = FORMS[form or detect(row)]
    record = how.read(row)
    back = how.write(record)
    differs = {k: v for k, v in row.items() if k in how.fields and _json(back, k) != _json(row, k)}
    absent = [k for k in back if k not in row]
    raw = {"form": how.name, "differs": differs, "absent": absent} if differs or absent else {}
    extra = {k: v for k, v in row.items() if k not in how.fields}
    return replace(record, extra=extra, raw=raw)


def write_row(record: Record, form: FormName, *, relabelled: bool = False) -> Row:
    """A record in a form; with `relabelled`, fields that say labels are as the form writes them.

    Raises AnnotationError where the form has no place for a pair, or only for one.
    """
    how = FORMS[form]
    if how.pair != (record.kind == "pair"):
        raise AnnotationError(f"form {form} holds {'pairs' if how.pair else 'single texts'} only")
    row = {**record.extra, **how.write(record)}
    if record.raw.get("form") == form:
        stale = how.labels if relabelled else frozenset()
        row |= {k: v for k, v in record.raw["differs"].items() if k not in stale}
        for name in record.raw["absent"]:
            if name not in stale:
                row.pop(name, None)
    return row


def _json(row: Row, key: str) -> str | None:
    # 1, 1.0 and True are equal to Python, and not the same in a file.
    return json.dumps(row[key], sort_keys=True) if key in row else None


# --- ours ----------------------------------------------------------------------------------------


def _read_plain(row: Row) -> Record:
    response = row.get("response")
    if response is not None:
        response = _text(row, "response")
    label = _plain_label(row, "")
    source = _optional_text(row, "source")
    origin = _optional_text(row, "label_source")
    return Record(_text(row, "prompt"), (response,), (label,), None, (source,), origin)


def _write_plain(record: Record) -> Row:
    row: Row = {"prompt": record.prompt}
    if record.responses[0] is not None:
        row["response"] = record.responses[0]
    row |= _plain_fields(record.safety[0], "")
    return row | _named("label_source", record.origin) | _named("source", *record.sources[:1])


def _read_pairs(row: Row) -> Record:
    choices = {
        name: _choice(row, name, null="tie") if name in row else None
        for name in ("more_helpful", "less_harmful", "single")
    }
    return Record(
        _text(row, "prompt"),
        (_text(row, "response_0"), _text(row, "response_1")),
        (_plain_label(row, "response_0_"), _plain_label(row, "response_1_")),
        PairLabel(**choices) if any(c is not None for c in choices.values()) else None,
        (_optional_text(row, "source_0"), _optional_text(row, "source_1")),
        _optional_text(row, "label_source"),
    )


def _write_pairs(record: Record) -> Row:
    row: Row = {"prompt": record.prompt}
    for side in (0, 1):
        row[f"response_{side}"] = record.responses[side]
    for side in (0, 1):
        row |= _plain_fields(record.safety[side], f"response_{side}_")
    if record.preference is not None:
        for name, choice in record.preference.to_json().items():
            if choice is not None:
                row[name] = None if choice == "tie" else choice
    row |= _named("label_source", record.origin)
    for side, source in enumerate(record.sources):
        row |= _named(f"source_{side}", source)
    return row


def _plain_label(row: Row, prefix: str) -> SafetyLabel | None:
    severity, safe = row.get(f"{prefix}severity"), row.get(f"{prefix}safe")
    if isinstance(severity, str):
        try:
            severity = int(Severity.from_label(severity))
        except ValueError as error:
            raise AnnotationError(f"{prefix}severity: {error}") from None
    if severity is None and safe is None:
        return None
    if severity is not None:
        severity = _level(severity, f"{prefix}severity")
        if safe is not None and safe is not (severity == 0):
            raise AnnotationError(f"{prefix}safe is {safe!r} and {prefix}severity {severity}")
        safe = severity == 0
    return SafetyLabel(_flag(safe, f"{prefix}safe"), severity, _names(row, f"{prefix}categories"))


def _plain_fields(label: SafetyLabel | None, prefix: str) -> Row:
    if label is None:
        return {}
    names = None if label.categories is None else list(label.categories)
    row: Row = {f"{prefix}severity": label.severity, f"{prefix}categories": names}
    return row if label.severity is not None else {f"{prefix}safe": label.safe, **row}


# --- PKU-SafeRLHF --------------------------------------------------------------------------------


def _read_pku(row: Row) -> Record:
    labels = tuple(
        _pku_label(
            row, f"is_response_{n}_safe", f"response_{n}_harm_category",
            f"response_{n}_severity_level",
        )
        for n in (0, 1)
    )  # fmt: skip
    helpful = _choice(row, "better_response_id", tie=-1)
    harmless = _choice(row, "safer_response_id", tie=-1)
    asked = helpful is not None or harmless is not None
    return Record(
        _text(row, "prompt"),
        (_text(row, "response_0"), _text(row, "response_1")),
        labels,
        PairLabel(helpful, harmless) if asked else None,
        (_optional_text(row, "response_0_source"), _optional_text(row, "response_1_source")),
    )


def _write_pku(record: Record) -> Row:
    row: Row = {"prompt": record.prompt}
    for n in (0, 1):
        row[f"response_{n}"] = record.responses[n]
    for n, source in enumerate(record.sources):
        row |= _named(f"response_{n}_source", source)
    for n, label in enumerate(record.safety):
        row |= _pku_fields(
            label, f"is_response_{n}_safe", f"response_{n}_harm_category",
            f"response_{n}_severity_level",
        )  # fmt: skip
    said = record.preference or PairLabel()
    return (
        row
        | _chosen("better_response_id", said.more_helpful)
        | _chosen("safer_response_id", said.less_harmful)
    )


def _read_pku_single(row: Row) -> Record:
    choice = _choice(row, "better_response_id", tie=-1)
    record = _read_pku({**row, "better_response_id": None})
    return replace(record, preference=None if choice is None else PairLabel(single=choice))


def _write_pku_single(record: Record) -> Row:
    row = _write_pku(replace(record, preference=None, safety=(None, None)))
    said = record.preference or PairLabel()
    return row | _chosen("better_response_id", said.single)


def _read_qa(row: Row) -> Record:
    return Record(
        _text(row, "prompt"),
        (_text(row, "response"),),
        (_pku_label(row, "is_safe", "harm_category", "severity_level"),),
        sources=(_optional_text(row, "response_source"),),
    )


def _write_qa(record: Record) -> Row:
    row: Row = {"prompt": record.prompt, "response": record.responses[0]}
    row |= _named("response_source", *record.sources[:1])
    return row | _pku_fields(record.safety[0], "is_safe", "harm_category", "severity_level")


def _pku_label(row: Row, safe: str, harms: str, severity: str) -> SafetyLabel | None:
    if row.get(safe) is None:
        return None
    said, level = _flag(row[safe], safe), row.get(severity)
    if level is not None:
        level = _level(level, severity)
    # PKU writes 0 for a severity that nobody gave.
    return SafetyLabel(said, level if said else (level or None), _names(row, harms))


def _pku_fields(label: SafetyLabel | None, safe: str, harms: str, severity: str) -> Row:
    if label is None:
        return {}
    row: Row = {safe: label.safe}
    if label.categories is not None:
        row[harms] = {c.value: c.value in label.categories for c in Category}
    return row | _named(severity, label.severity)


# --- BeaverTails ---------------------------------------------------------------------------------


def _read_beavertails(row: Row) -> Record:
    harms = row.get("category")
    if not isinstance(harms, dict) or not set(harms) <= set(BEAVERTAILS):
        raise AnnotationError("category is not a map from BeaverTails' 14 categories to true/false")
    held = [BEAVERTAILS[name] for name, on in harms.items() if _flag(on, "category") is True]
    names = None if None in held or not held else tuple(c.value for c in held if c is not None)
    safe = _flag(row.get("is_safe"), "is_safe")
    label = SafetyLabel(safe, None, () if safe and not held else names)
    if safe and held:
        raise AnnotationError("is_safe is true, and a category is too")
    return Record(_text(row, "prompt"), (_text(row, "response"),), (label,), sources=(None,))


def _write_beavertails(record: Record) -> Row:
    row: Row = {"prompt": record.prompt, "response": record.responses[0]}
    label = record.safety[0]
    if label is None:
        return row
    held = {_BACK.get(Category(name), _OTHER) for name in label.categories or ()}
    category = {name: name in held for name in BEAVERTAILS}
    return row | {"category": category, "is_safe": label.safe}


# --- values --------------------------------------------------------------------------------------


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is not a text but {type(value).__name__}"
        raise AnnotationError(f"{name} {found}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise AnnotationError(f"{name} holds half a character (a lone surrogate)") from None
    return value


def _optional_text(row: Row, name: str) -> str | None:
    return None if row.get(name) is None else _text(row, name)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise AnnotationError(f"{name} is true or false, not {value!r}")
    return value


def _level(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1, 2, 3):
        raise AnnotationError(f"{name} is 0, 1, 2 or 3, not {value!r}")
    return int(value)


def _names(row: Row, name: str) -> tuple[str, ...] | None:
    """Categories as a list of names, or as a map from name to true or false."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, dict):
        return tuple(key for key, on in value.items() if on and _flag(on, name))
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise AnnotationError(f"{name} is a list of category names, not {value!r}")
    return tuple(value)


def _choice(row: Row, name: str, *, null: Choice | None = None, tie: int = -1) -> Choice | None:
    value = row.get(name)
    if value is None:
        return null
    if value == tie and not isinstance(value, bool):
        return "tie"
    if isinstance(value, bool) or value not in (0, 1):
        raise AnnotationError(f"{name} is 0 or 1, not {value!r}")
    return 1 if value else 0


def _chosen(name: str, choice: Choice | None) -> Row:
    return {} if choice is None else {name: -1 if choice == "tie" else choice}


def _named(name: str, value: object = None) -> Row:
    return {} if value is None else {name: value}


def _sides(*names: str) -> frozenset[str]:
    return frozenset(name.replace("#", str(n)) for name in names for n in (0, 1))


_PLAIN = frozenset({"severity", "categories", "safe", "label_source"})
_PAIRS = _sides("response_#_severity", "response_#_categories", "response_#_safe") | {
    "more_helpful", "less_harmful", "single", "label_source",
}  # fmt: skip
_PKU = _sides("is_response_#_safe", "response_#_harm_category", "response_#_severity_level") | {
    "better_response_id", "safer_response_id",
}  # fmt: skip
_QA = frozenset({"is_safe", "harm_category", "severity_level"})
_TEXTS = frozenset({"prompt"}) | _sides("response_#")
_TEXT = frozenset({"prompt", "response"})

FORMS: dict[FormName, Form] = {
    form.name: form
    for form in (
        Form("plain", False, _TEXT | _PLAIN | {"source"}, _PLAIN, _read_plain, _write_plain),
        Form("pairs", True, _TEXTS | _PAIRS | _sides("source_#"), _PAIRS, _read_pairs,
             _write_pairs),
        Form("pku", True, _TEXTS | _PKU | _sides("response_#_source"), _PKU, _read_pku,
             _write_pku),
        Form("pku-single", True, _TEXTS | _sides("response_#_source") | {"better_response_id"},
             frozenset({"better_response_id"}), _read_pku_single, _write_pku_single),
        Form("pku-qa", False, _TEXT | _QA | {"response_source"}, _QA, _read_qa, _write_qa),
        Form("beavertails", False, _TEXT | {"category", "is_safe"},
             frozenset({"category", "is_safe"}), _read_beavertails, _write_beavertails),
    )
}  # fmt: skip
assert set(FORMS) == set(get_args(FormName))
