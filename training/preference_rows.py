"""One preference, one demonstration, and the rows they come from. Pure functions of rows.

Two answers to one prompt, with *more helpful* and *less harmful* asked apart: nothing in here makes
one label of the two but `Preference.trade_off`, which is the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from training.data import Split, normalise

Kind = Literal["refusal", "redirect", "borderline", "benign"]
KINDS: tuple[Kind, ...] = ("refusal", "redirect", "borderline", "benign")
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
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no {field!r}: a preference needs a prompt and two answers")
    return value


def _side(row: dict[str, Any], field: str) -> int | None:
    """0, 1, or None for a tie; the field itself must be there."""
    if field not in row:
        raise ValueError(f"no {field!r}: 0, 1, or null for a tie")
    if row[field] not in (0, 1, None):
        raise ValueError(f"{field} is {row[field]!r}, not 0, 1 or null")
    side: int | None = row[field]
    return side


def from_annotated(row: dict[str, Any]) -> Preference:
    """A row of `annotated_pairs`: both questions, and severities of both answers."""
    levels = tuple(row.get(f"response_{side}_severity") for side in (0, 1))
    if not all(level in (0, 1, 2, 3) for level in levels):
        raise ValueError(f"severities {levels}, not 0-3 for each answer")
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
        source=row["source"],
        more_helpful=0 if dimension == "helpful" else None,
        less_harmful=0 if dimension == "harmless" else None,
        unsafe=tuple(
            None if row.get(f"{side}_safe") is None else not row[f"{side}_safe"]
            for side in ("chosen", "rejected")
        ),
    )


def from_pku(row: dict[str, Any]) -> Preference:
    """A row of PKU-SafeRLHF (v1 field names)."""
    safe = [row.get(f"is_response_{side}_safe") for side in (0, 1)]
    levels = [row.get(f"response_{side}_severity_level") for side in (0, 1)]
    return Preference(
        prompt=_text(row, "prompt"),
        answers=(_text(row, "response_0"), _text(row, "response_1")),
        source="pku",
        more_helpful=_side(row, "better_response_id"),
        less_harmful=_side(row, "safer_response_id"),
        severity=tuple(0 if s else level for s, level in zip(safe, levels, strict=True)),
        unsafe=tuple(None if s is None else not s for s in safe),
    )


def merge(preferences: Iterable[Preference]) -> list[Preference]:
    """One preference per prompt and pair of answers, in order of first sight."""
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
            more_helpful=other.more_helpful if known.more_helpful is None else known.more_helpful,
            less_harmful=other.less_harmful if known.less_harmful is None else known.less_harmful,
        )
    return list(merged.values())


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
