"""Harmless texts of the lengths that a guard meets, for the benchmarks."""

from __future__ import annotations

import random

__all__ = ["LENGTHS", "text"]

_WORDS = ("the", "fox", "went", "through", "a", "wood", "and", "asked", "how", "bread", "bakes")
LENGTHS = (8, 8, 20, 20, 60, 110)  # words: chat prompts, sentences of a stream, whole answers


def text(chance: random.Random, lengths: tuple[int, ...] = LENGTHS) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.choice(lengths)))
