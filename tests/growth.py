"""How the time of a piece of work grows with its text: machines differ in speed, not in this."""

from __future__ import annotations

import time
from collections.abc import Callable

EIGHTHS = 8
# In proportion would be 8 times as long, quadratic 64; between them lies a noisy machine.
IN_PROPORTION = 3 * EIGHTHS


def _seconds(work: Callable[[str], object], text: str) -> float:
    started = time.process_time()
    work(text)
    return time.process_time() - started


def growth(work: Callable[[str], object], text: str) -> float:
    """How many times as long as for an eighth of `text` it takes for all, in processor time."""
    eighth = text[: len(text) // EIGHTHS]
    brief = min(_seconds(work, eighth) for _ in range(3))  # the first makes what is made once
    return min(_seconds(work, text) for _ in range(2)) / brief
