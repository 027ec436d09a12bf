"""For users' tests and ours: a moderator that needs no model, and a leak meter.

guard = Guard(FakeModerator({"bomb": (Severity.SEVERE, Category.VIOLENCE)}))
assert leaked_chars(GuardedChat(model, guard).stream(messages), {"bomb"}) == 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from guardrail.policy import Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Assessment, Pair, Passage

__all__ = ["FakeModerator", "leaked_chars"]


class FakeModerator:
    """Finds words, and is sure of them: `{word: (severity, category)}`.

    on_assess: called with every batch, to record or to raise.
    """

    thresholds: Mapping[Direction, Thresholds] = {}

    def __init__(
        self,
        words: Mapping[str, tuple[Severity, Category]],
        *,
        on_assess: Callable[[Sequence[Pair]], None] | None = None,
    ) -> None:
        if "" in words:
            raise ValueError("a forbidden word cannot be empty: it stands in every text")
        self._words = dict(words)
        self._on_assess = on_assess

    @property
    def id(self) -> str:
        return "fake"

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        if self._on_assess is not None:
            self._on_assess(pairs)
        return [self._assess(pair) for pair in pairs]

    def _assess(self, pair: Pair) -> Assessment:
        passages = []
        worst = Severity.NONE
        categories = dict.fromkeys(Category, 0.0)
        for word, (severity, category) in self._words.items():
            start = pair.text.find(word)
            while start >= 0:
                passages.append(Passage(start, start + len(word), 1.0))
                worst = max(worst, severity)
                categories[category] = 1.0
                start = pair.text.find(word, start + 1)
        return Assessment(
            direction=pair.direction,
            severity_probabilities={s: float(s is worst) for s in Severity},
            categories=categories,
            passages=tuple(sorted(passages, key=lambda p: p.start)),
            model=self.id,
        )


def leaked_chars(released: Iterable[str] | str, forbidden: Iterable[str]) -> int:
    """How many characters of `forbidden` strings reached the caller; 0 is the only good answer.

    A forbidden string counts, with all its characters, each time it stands whole in what was
    released, pieces joined. A part of one does not count: until its last character arrives, a
    string is not yet the forbidden one, and no gate can know.
    """
    text = released if isinstance(released, str) else "".join(released)
    return sum(text.count(word) * len(word) for word in forbidden if word)
