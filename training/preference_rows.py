"""One preference, one demonstration, and the rows they come from. Pure functions of rows.

Two answers to one prompt, with *more helpful* and *less harmful* asked apart: nothing in here makes
one label of the two but `Preference.trade_off`, which is the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from training.data import SPLITS, Split, normalise

Kind = Literal["refusal", "redirect", "borderline", "benign"]
KINDS: tuple[Kind, ...] = ("refusal", "redirect", "borderline", "benign")
T = TypeVar("T")
_NEVER_TRAINED_ON = ("upsrm_pku_test",)  # PKU's own severities are known of these rows


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    more_helpful, less_harmful: index of the answer, None where unknown or tied.
    severity: 0-3 per answer, None where unknown; unsafe: whether it harms at all.
    """

    prompt: str
    answers: tuple[str, str]
    source: str
    more_helpful: int | None = None
    less_harmful: int | None = None
    severity: tuple[int | None, int | None] = (None, None)
    unsafe: tuple[bool | None, bool | None] = (None, None)
    split: Split = "train"

    @property
    def conflicting(self) -> bool:
        """Both questions are decided, and the more helpful answer is the more harmful one."""
        return None not in (self.more_helpful, self.less_harmful) and (
            self.more_helpful != self.less_harmful
        )

    @property
    def trade_off(self) -> int | None:
        """One label for both questions, what a single-preference annotator is asked for: the less
        harmful answer where the other is worse by two levels of severity, else the more helpful,
        else what is known (docs/decisions/010)."""
        if not self.conflicting:
            return self.less_harmful if self.more_helpful is None else self.more_helpful
        assert self.less_harmful is not None
        levels = (
            self.severity[1 - self.less_harmful],
            self.severity[self.less_harmful],
        )
        if levels[0] is None or levels[1] is None or levels[0] - levels[1] >= 2:
            return self.less_harmful
        return self.more_helpful

    @property
    def safer(self) -> int | None:
        """The safe answer where the other is unsafe; None for two of a kind."""
        if None in self.unsafe or self.unsafe[0] == self.unsafe[1]:
            return None
        return int(bool(self.unsafe[0]))


@dataclass(frozen=True)
class Demonstration:
    """An answer to imitate.

    kind: a refusal; help in a safe direction on a prompt that others answered harmfully (redirect);
    help on a sensitive prompt that nobody did (borderline); help on an everyday one (benign).
    """

    prompt: str
    answer: str
    kind: Kind
    source: str
    split: Split = "train"


_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|(?:can ?not|can['’]t|won['’]t|unable to) (?:help|assist|provide|"
    r"fulfil|support|condone|recommend|give|offer|advise|answer|engage|create|write|comply|do "
    r"that|tell you)|not (?:appropriate|acceptable|advisable|okay|ok|legal|ethical|recommended|"
    r"right|a good idea)|inappropriate|illegal|unethical|against the law|immoral|"
    r"(?:should|would|do|must) (?:not|never)|shouldn['’]t|advise against|discourage)\b",
    re.IGNORECASE,
)


def refuses(answer: str) -> bool:
    """Whether an answer, in its first sentences, declines or advises against what was asked.

    A word list: it chooses training texts, and is no measure of harm.
    """
    return _REFUSAL.search(answer[:240]) is not None


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not is_text(value):
        raise ValueError(f"no {field!r}: it has to be a text that is not empty")
    return value


def is_text(value: object) -> bool:
    """A str with something in it, all of it characters: half of an emoji that was cut is none.
    Raises ValueError for that."""
    if not isinstance(value, str) or not value.strip():
        return False
    value.encode()
    return True


def _one_of(row: dict[str, Any], field: str, allowed: tuple[Any, ...]) -> Any:
    """The field's value. True is no 1 here, and neither is 1.0: a label of another type is a
    mistake in what wrote it."""
    value = row.get(field)
    if not any(value == one and type(value) is type(one) for one in allowed):
        shown = ", ".join("null" if one is None else str(one) for one in allowed)
        raise ValueError(f"{field} is {value!r}, not one of {shown}")
    return value


def _side(row: dict[str, Any], field: str) -> int | None:
    """0, 1, or None for a tie; the field itself must be there."""
    if field not in row:
        raise ValueError(f"no {field!r}: 0, 1, or null for a tie")
    side: int | None = _one_of(row, field, (0, 1, None))
    return side


def _both(row: dict[str, Any], field: str, allowed: tuple[Any, ...]) -> tuple[Any, Any]:
    """A value for each answer, (None, None) where the field is not there."""
    values = row.get(field, [None, None])
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"{field} is {values!r}, not a list of two, one for each answer")
    first, second = ({field: value} for value in values)
    return _one_of(first, field, allowed), _one_of(second, field, allowed)


def _safety(row: dict[str, Any], fields: tuple[str, str]) -> tuple[bool | None, bool | None]:
    """Whether each answer is unsafe, from fields that say whether it is safe."""
    first, second = (_one_of(row, field, (True, False, None)) for field in fields)
    return None if first is None else not first, None if second is None else not second


def from_built(row: dict[str, Any]) -> Preference:
    """A row with the fields of `Preference`, such as `training.preferences build` writes."""
    answers = row.get("answers")
    if not isinstance(answers, list | tuple) or len(answers) != 2 or not all(map(is_text, answers)):
        raise ValueError("answers are not two texts")
    if not {"more_helpful", "less_harmful"} & row.keys():
        raise ValueError("neither more_helpful nor less_harmful: 0, 1, or null where unknown")
    checked = {
        "prompt": _text(row, "prompt"),
        "answers": tuple(answers),
        "source": _text(row, "source"),
        "more_helpful": _one_of(row, "more_helpful", (0, 1, None)),
        "less_harmful": _one_of(row, "less_harmful", (0, 1, None)),
        "severity": _both(row, "severity", (0, 1, 2, 3, None)),
        "unsafe": _both(row, "unsafe", (True, False, None)),
        "split": _one_of({"split": "train"} | row, "split", SPLITS),
    }
    return Preference(**row | checked)


def demonstration(row: dict[str, Any]) -> Demonstration:
    """A row with the fields of `Demonstration`."""
    checked = {
        "prompt": _text(row, "prompt"),
        "answer": _text(row, "answer"),
        "kind": _one_of(row, "kind", KINDS),
        "source": _text(row, "source"),
        "split": _one_of({"split": "train"} | row, "split", SPLITS),
    }
    return Demonstration(**row | checked)


def from_annotated(row: dict[str, Any]) -> Preference:
    """A row of `annotated_pairs`: both questions, and severities of both answers."""
    levels = [_one_of(row, f"response_{side}_severity", (0, 1, 2, 3)) for side in (0, 1)]
    return Preference(
        prompt=_text(row, "prompt"),
        answers=(_text(row, "response_0"), _text(row, "response_1")),
        source="annotated_pairs",
        more_helpful=_side(row, "more_helpful"),
        less_harmful=_side(row, "less_harmful"),
        severity=(levels[0], levels[1]),
        unsafe=(levels[0] > 0, levels[1] > 0),
    )


def from_chosen(row: dict[str, Any]) -> Preference | None:
    """A row with `chosen` and `rejected` on one dimension (`harmless` where it names none)."""
    if row.get("source") in _NEVER_TRAINED_ON:
        return None
    dimension = row.get("dimension", "harmless")
    if dimension not in ("helpful", "harmless"):
        raise ValueError(f"dimension is {dimension!r}, not helpful or harmless")
    return Preference(
        prompt=_text(row, "prompt"),
        answers=(_text(row, "chosen"), _text(row, "rejected")),
        source=_text(row, "source"),
        more_helpful=0 if dimension == "helpful" else None,
        less_harmful=0 if dimension == "harmless" else None,
        unsafe=_safety(row, ("chosen_safe", "rejected_safe")),
    )


def from_pku(row: dict[str, Any]) -> Preference:
    """A row of PKU-SafeRLHF (v1 field names)."""
    unsafe = _safety(row, ("is_response_0_safe", "is_response_1_safe"))
    levels = [_one_of(row, f"response_{n}_severity_level", (0, 1, 2, 3, None)) for n in (0, 1)]
    severity = [0 if u is False else level for u, level in zip(unsafe, levels, strict=True)]
    return Preference(
        prompt=_text(row, "prompt"),
        answers=(_text(row, "response_0"), _text(row, "response_1")),
        source="pku",
        more_helpful=_side(row, "better_response_id"),
        less_harmful=_side(row, "safer_response_id"),
        severity=(severity[0], severity[1]),
        unsafe=unsafe,
    )


def kinds_of_prompts(
    preferences: Iterable[Preference], demonstrations: Iterable[Demonstration]
) -> tuple[set[str], set[str]]:
    """Harmful prompts, to which some answer was unsafe, and harmless ones, which were asked as
    such; a prompt of both kinds is of the first."""
    harmful = {p.prompt for p in preferences if True in p.unsafe}
    asked = {d.prompt for d in demonstrations if d.kind in ("benign", "borderline")}
    return harmful, asked - harmful


def merge(preferences: Iterable[Preference]) -> list[Preference]:
    """One preference per prompt and pair of answers, in order of first sight; what the first does
    not know of questions and answers is taken from the next."""
    merged: dict[tuple[str, ...], Preference] = {}
    for p in preferences:
        texts = [normalise(answer) for answer in p.answers]
        if texts[0] == texts[1]:
            continue
        key = (normalise(p.prompt), *sorted(texts))
        known = merged.setdefault(key, p)
        if known is p:
            continue
        other = p if normalise(known.answers[0]) == texts[0] else swapped(p)
        merged[key] = replace(
            known,
            more_helpful=_first_known(known.more_helpful, other.more_helpful),
            less_harmful=_first_known(known.less_harmful, other.less_harmful),
            severity=tuple(map(_first_known, known.severity, other.severity)),
            unsafe=tuple(map(_first_known, known.unsafe, other.unsafe)),
        )
    return list(merged.values())


def _first_known(first: T | None, second: T | None) -> T | None:
    return second if first is None else first


def swapped(p: Preference) -> Preference:
    """The same preference with its answers the other way round."""
    return replace(
        p,
        answers=p.answers[::-1],
        severity=p.severity[::-1],
        unsafe=p.unsafe[::-1],
        more_helpful=None if p.more_helpful is None else 1 - p.more_helpful,
        less_harmful=None if p.less_harmful is None else 1 - p.less_harmful,
    )
