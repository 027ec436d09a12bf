"""What an annotation says, as plain values: labels, tasks, settings. No storage, no effects.

Stage 1 labels one text (safe?, severity, categories); stage 2 compares the two answers of a pair
(which helps more, which harms less, asked apart; or one single trade-off). The paradigm is that of
PKU-SafeRLHF (Ji et al. 2024, arXiv:2406.15513).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from guardrail.errors import GuardrailError
from guardrail.taxonomy import Category

Kind = Literal["item", "pair"]
Choice = Literal[0, 1, "tie"]
Condition = Literal["blind", "after_click"]
Suggestions = Literal["blind", "after_click", "experiment"]
Preference = Literal["dual", "single", "both"]
Role = Literal["human", "ai", "moderator", "import"]

_ORDER = {category.value: n for n, category in enumerate(Category)}


class AnnotationError(GuardrailError):
    """What went wrong, why, and what to do next, in one line."""


@dataclass(frozen=True, slots=True)
class SafetyLabel:
    """Stage 1, on one text. Raises AnnotationError on labels that contradict themselves.

    severity: 0-3, 0 exactly for a safe text; None where a source has only safe/unsafe.
    categories: names in the order of the taxonomy, () for a safe text; None where unknown.
    """

    safe: bool
    severity: int | None = None
    categories: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        names = self.categories
        if self.safe:
            if self.severity not in (None, 0):
                raise AnnotationError(f"a safe text has severity 0, not {self.severity!r}")
            if names:
                raise AnnotationError(f"a safe text has no categories, not {', '.join(names)}")
            object.__setattr__(self, "severity", 0)
            object.__setattr__(self, "categories", ())
            return
        if self.severity is not None and self.severity not in (1, 2, 3):
            raise AnnotationError(f"an unsafe text has severity 1, 2 or 3, not {self.severity!r}")
        if names is not None:
            unknown = [name for name in names if name not in _ORDER]
            if unknown:
                raise AnnotationError(f"no such category: {', '.join(map(repr, unknown))}")
            ordered = tuple(sorted(set(names), key=_ORDER.__getitem__))
            object.__setattr__(self, "categories", ordered)

    @property
    def complete(self) -> bool:
        """True with a severity and, for an unsafe text, at least one category."""
        return self.severity is not None and (self.safe or bool(self.categories))

    def to_json(self) -> dict[str, Any]:
        names = None if self.categories is None else list(self.categories)
        return {"safe": self.safe, "severity": self.severity, "categories": names}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SafetyLabel:
        names = data["categories"]
        return cls(data["safe"], data["severity"], None if names is None else tuple(names))


@dataclass(frozen=True, slots=True)
class PairLabel:
    """Stage 2, on two answers to one prompt. None: not asked; "tie": asked, and equal.

    0 and 1 are the stored order of the answers, whatever side they were shown on.
    """

    more_helpful: Choice | None = None
    less_harmful: Choice | None = None
    single: Choice | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and (
                value is True or value is False or value not in (0, 1, "tie")
            ):
                raise AnnotationError(f"{one.name} is 0, 1 or tie, not {value!r}")

    def answers(self, preference: Preference) -> bool:
        """True when every question of the setting has an answer."""
        dual = self.more_helpful is not None and self.less_harmful is not None
        single = self.single is not None
        return {"dual": dual, "single": single, "both": dual and single}[preference]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PairLabel:
        return cls(**data)


Label = SafetyLabel | PairLabel


def read_label(kind: Kind, text: str) -> Label:
    data = json.loads(text)
    return SafetyLabel.from_json(data) if kind == "item" else PairLabel.from_json(data)


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to label, as one annotator sees it.

    responses: in stored order: (None,) a prompt alone, (text,) an answer, (text, text) a pair.
    order: which stored response stands on each side, e.g. (1, 0): the second one is on the left.
    condition: whether this annotator may see a suggestion on this task, and when.
    safety: what stage 1 came to for each response of a pair, where it has; () for an item.
    answer: this annotator's own earlier answer, when it comes back by undo.
    adjudicating: this turn settles a dispute: `Queue.adjudicate` takes the answer, not `save`.
    """

    id: int
    kind: Kind
    prompt: str
    responses: tuple[str | None, ...]
    order: tuple[int, ...]
    condition: Condition
    source: str | None = None
    safety: tuple[SafetyLabel | None, ...] = ()
    answer: Label | None = None
    adjudicating: bool = False

    @property
    def shown(self) -> tuple[str | None, ...]:
        """The responses as they stand on the page, left first."""
        return tuple(self.responses[n] for n in self.order)

    def choice(self, side: Literal["left", "right", "tie"]) -> Choice:
        """The stored number of the response on a side."""
        if side == "tie":
            return "tie"
        return 0 if self.order[0 if side == "left" else 1] == 0 else 1


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What a machine says of a text; probabilities where it is a moderator (category -> P)."""

    label: SafetyLabel
    by: str
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data set: texts, the labels it came with, and all else it said.

    responses, safety, sources: aligned; see `Task.responses`.
    origin: who gave the labels (human, ai, derived, ...), where the row says so.
    extra: every field of the row that its form does not know; kept for the way back.
    raw: where the row says what its form knows in another way than the form writes it.
    """

    prompt: str
    responses: tuple[str | None, ...]
    safety: tuple[SafetyLabel | None, ...]
    preference: PairLabel | None = None
    sources: tuple[str | None, ...] = ()
    origin: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return "pair" if len(self.responses) == 2 else "item"


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """A label that counts, with who gave it and under what circumstances.

    origin: human, ai, moderator; for imported labels what their row says.
    position: which stored answer stood on the left; condition, revealed, first, suggested: what
    was known of the machine's opinion when; detail: a machine's probabilities, cost, model.
    """

    id: int
    task_id: int
    kind: Kind
    annotator: str
    role: Role
    origin: str
    value: Label
    adjudicated: bool
    record_id: int | None
    side: int | None
    position: int | None
    condition: str | None
    revealed: bool
    first: Mapping[str, Any] | None
    suggested: SafetyLabel | None
    seconds: float | None
    detail: Mapping[str, Any]
    created: float
    note: str | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How a store is annotated; kept in it, so that every process does the same."""

    overlap_share: float = 0.1
    """Share of the tasks that several people label, so that agreement can be measured."""
    overlap_labels: int = 2
    """How many people label those."""
    suggestions: Suggestions = "experiment"
    """blind: never shown; after_click: on demand, once a first answer stands; experiment: each
    annotator gets half of the tasks blind, so that anchoring is measured and not guessed."""
    preference: Preference = "dual"
    """dual: helpful and harmless asked apart; single: one trade-off; both."""
    pairs_wait: bool = True
    """A pair is asked about only when both of its answers have a stage-1 label."""
    lease_seconds: float = 900.0
    """How long a task stays with the one who opened it before others may have it."""
    break_minutes: float = 45.0
    """A break is suggested after so much work without one."""
    break_harmful: int = 15
    """A break is suggested after so many unsafe texts in a row."""
    blur: bool = True
    """Texts are blurred until wanted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_share <= 1:
            raise AnnotationError(f"overlap_share is between 0 and 1, not {self.overlap_share}")
        if self.overlap_labels < 1:
            raise AnnotationError(f"overlap_labels is at least 1, not {self.overlap_labels}")
        if self.lease_seconds <= 0:
            raise AnnotationError(f"lease_seconds is more than 0, not {self.lease_seconds}")
        for name, words in (("suggestions", Suggestions), ("preference", Preference)):
            if getattr(self, name) not in get_args(words):
                raise AnnotationError(f"{name} is one of {', '.join(get_args(words))}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})
