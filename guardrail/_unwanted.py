"""How judging ends early when nobody waits for it any more: a moderator asks, between two pieces
of its work. The question lies in a context variable, for `assess(pairs)` has no place for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["Interest", "Unwanted", "check_wanted", "in_thread", "while_wanted"]

A = TypeVar("A")
T = TypeVar("T")

_WANTED: ContextVar[Callable[[], bool] | None] = ContextVar("guardrail-wanted", default=None)


class Unwanted(BaseException):
    """Nobody waits for this any more. Like a cancelled task's, no fault that is to be handled."""


@contextmanager
def while_wanted(wanted: Callable[[], bool]) -> Iterator[None]:
    """What runs within, in this thread, may be ended once `wanted()` is false."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def check_wanted() -> None:
    """Raises Unwanted when what is being done is not wanted any more."""
    wanted = _WANTED.get()
    if wanted is not None and not wanted():
        raise Unwanted


class Interest:
    """Of one who waits for what another thread does, until `given_up` is set."""

    def __init__(self) -> None:
        self.given_up = False

    def run(self, function: Callable[[A], T], argument: A) -> T:
        """Call it, in the other thread."""
        with while_wanted(lambda: not self.given_up):
            return function(argument)


async def in_thread(function: Callable[[A], T], argument: A) -> T:
    """`asyncio.to_thread`; when it is cancelled, the thread is told."""
    interest = Interest()
    try:
        return await asyncio.to_thread(interest.run, function, argument)
    finally:
        interest.given_up = True
