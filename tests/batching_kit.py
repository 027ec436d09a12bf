"""What the tests of the batcher share: texts that differ, and a moderator that waits to be let."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guardrail.errors import ModerationError
from guardrail.moderator import OnnxModerator
from guardrail.taxonomy import Category, Severity
from guardrail.testing import FakeModerator
from guardrail.verdict import Assessment, Pair

PATIENCE = 60  # seconds; machines are noisy, and only a failing test waits so long
WORDS = {"bomb": (Severity.SEVERE, Category.VIOLENCE)}


# Just below the server's limit of a body; more than 1,000 windows, a minute of a core.
ENDLESS = "Paris lies on the Seine, and people bake bread there. " * 18_000


def text(n: int) -> Pair:
    """A text whose assessment no other text shares: the passage starts at n."""
    return Pair("x" * n + "bomb")


def seen(pairs: Sequence[Pair]) -> list[Assessment]:
    return FakeModerator(WORDS).assess(pairs)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


class Held(FakeModerator):
    """Judges a batch each time it is let; knows what it was given and how much at a time."""

    def __init__(self) -> None:
        super().__init__(WORDS, on_assess=self.hold)
        self.batches: list[list[Pair]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._let = threading.Semaphore(0)

    def hold(self, pairs: Sequence[Pair]) -> None:
        with self._lock:
            self.batches.append(list(pairs))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        assert self._let.acquire(timeout=PATIENCE), "the test forgot to let a batch through"
        with self._lock:
            self.at_once -= 1
        if any("poison" in pair.text for pair in pairs):
            raise ModerationError("too hot")

    def let(self, batches: int = 10_000) -> None:
        self._let.release(batches)


class Counting(OnnxModerator):
    """The bundled model, which counts the windows that it has run."""

    def __init__(self) -> None:
        super().__init__(device="cpu", threads=1)
        self.windows = 0
        self._run = self._session.run
        self._session.run = self._counted  # type: ignore[method-assign]

    def _counted(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        self.windows += 1
        return self._run(outputs, feed)
