"""What a batcher keeps of those who call it: their texts, and the futures that they wait for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from guardrail.verdict import Assessment, Pair

__all__ = ["Call", "Job", "Settled", "settle", "size_of"]

_OVERHEAD = 50  # what a text costs whatever its length, in characters


@dataclass(eq=False, slots=True)
class Call:
    """One caller's texts and the future that it waits for."""

    found: list[Assessment | None]
    left: int
    future: futures.Future[list[Assessment]] = field(default_factory=futures.Future)
    done: bool = False  # guarded by the batcher's lock: who sets it settles the future

    @property
    def given_up(self) -> bool:
        """Whether it was over before all of its texts were judged."""
        return self.done and self.left > 0


@dataclass(eq=False, slots=True)
class Job:
    """One text of a call."""

    call: Call
    index: int
    pair: Pair
    size: int


Settled: TypeAlias = tuple[Call, BaseException | None]


def settle(settled: Sequence[Settled]) -> None:
    """Not under the lock: it runs what callers hung on their futures."""
    for call, error in settled:
        if call.future.set_running_or_notify_cancel():
            if error is not None:
                call.future.set_exception(error)
            else:
                call.future.set_result(cast(list[Assessment], call.found))


def size_of(pair: Pair) -> int:
    """What judging a text costs, in characters."""
    return _OVERHEAD + len(pair.prompt) + len(pair.response or "")
