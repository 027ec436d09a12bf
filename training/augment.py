"""Obfuscation that canonicalisation cannot undo, for training: typing errors, words cut or joined.

What it can undo (homoglyphs, zero-width and spaced letters, leetspeak) a model never sees, so that
there is nothing to learn from it.
"""

from __future__ import annotations

import random
import re

__all__ = ["obfuscate"]

_WORD = re.compile(r"[A-Za-z]{4,}")


def obfuscate(text: str, rng: random.Random, share: float = 0.3) -> str:
    """`text` with about `share` of its words of four letters or more disturbed, all in one way."""
    disturb = rng.choice((_swap, _drop, _double, _dotted, _cased, _joined))
    return _WORD.sub(lambda m: disturb(m[0], rng) if rng.random() < share else m[0], text)


def _inside(word: str, rng: random.Random) -> int:
    return rng.randrange(1, len(word) - 1)


def _swap(word: str, rng: random.Random) -> str:
    i = _inside(word, rng)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _drop(word: str, rng: random.Random) -> str:
    i = _inside(word, rng)
    return word[:i] + word[i + 1 :]


def _double(word: str, rng: random.Random) -> str:
    i = _inside(word, rng)
    return word[:i] + word[i] * rng.randint(2, 4) + word[i + 1 :]


def _dotted(word: str, rng: random.Random) -> str:
    i = _inside(word, rng)
    return word[:i] + rng.choice(".-*_ ") + word[i:]


def _cased(word: str, rng: random.Random) -> str:
    return "".join(rng.choice((c.lower(), c.upper())) for c in word)


def _joined(word: str, rng: random.Random) -> str:
    return word + rng.choice(("_", "-", "."))
