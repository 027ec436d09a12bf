"""Whether an English model can tell what a text says. Pure functions of canonical text."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from guardrail._blobs import BYTE, CODE
from guardrail._language import foreign_share

__all__ = ["is_latin", "latin_share", "unreadable"]


@lru_cache(maxsize=8192)
def is_latin(char: str) -> bool:
    """A letter of the Latin script, of any language or of none."""
    return char.isalpha() and (char.isascii() or "LATIN" in unicodedata.name(char, ""))


def latin_share(text: str) -> float:
    """How many of the letters are Latin."""
    counts = Counter(text)
    return _total(counts, is_latin) / max(1, _total(counts, str.isalpha))


def _is_written(char: str) -> bool:
    """A Latin letter that some language's ordinary spelling has; phonetic and turned ones are
    none."""
    return is_latin(char) and (char < "\u0250" or "\u1e00" <= char < "\u1f00")


def _total(counts: Counter[str], kind: Callable[[str], bool]) -> int:
    return sum(n for char, n in counts.items() if kind(char))


_BLOB = re.compile(
    r"(?P<bits>\b[01][01 ]{63,})"
    rf"|(?P<base64>{CODE}{{40,}}={{0,2}})"
    rf"|(?P<hex>(?:{BYTE}[ :,]?){{24,}})"
    r"|(?P<endless>[^\W_]{101,})"
)

_MUCH = 0.3  # of the letters


def unreadable(text: str) -> bool:
    """True when an English model cannot tell what `text` says.

    Foreign or phonetic script (over 30 % of at least four letters), or sentences of another
    language (over 30 % of the letters), or symbols (over 75 % of at least 40 characters), or an
    encoded blob (base64, hex, bits, a word without end) that makes up over 40 % of it, or English
    backwards or in ROT13. Expects text whose homoglyphs are undone, as `canonicalise` does.
    """
    counts = Counter(text)
    letters = _total(counts, str.isalpha)
    foreign = letters - _total(counts, _is_written)
    if foreign >= 4 and foreign > _MUCH * letters:
        return True
    dense = len(text) - _total(counts, str.isspace)
    if dense >= 40 and _total(counts, str.isalnum) < 0.25 * dense:
        return True
    blobs = sum(len(match[0]) for match in _BLOB.finditer(text) if _is_encoded(match))
    if blobs >= 40 and blobs > 0.4 * len(text):
        return True
    return _is_scrambled(text) or foreign_share(text) > _MUCH


def _is_encoded(match: re.Match[str]) -> bool:
    """Paths, slugs and identifiers are made of short pieces, prose has few digits, and numbers
    have no letters; encodings are long, and mix digits with letters."""
    run = match[0]
    pieces = re.findall(r"[A-Za-z0-9]+", run)
    longest = max(map(len, pieces), default=len(run))
    if longest > 100 or match.lastgroup in ("bits", "endless"):
        return True  # WordPiece gives up on words beyond 100 characters
    mixed = any(map(str.isalpha, run)) and sum(map(str.isdigit, run)) >= 0.05 * len(run)
    return mixed and (match.lastgroup == "hex" or longest >= 20)


_COMMON = frozenset(
    ("the", "and", "of", "to", "is", "in", "it", "for", "you", "how", "with", "what", "that",
     "this", "are", "can", "make", "my", "me", "on", "be")
)  # fmt: skip
_SCRAMBLED = [
    frozenset(word[::-1] for word in _COMMON) - _COMMON,
    frozenset(codecs.encode(word, "rot13") for word in _COMMON) - _COMMON,
]


def _is_scrambled(text: str) -> bool:
    """Backwards or in ROT13: common words turned round, and few of them the right way."""
    words = re.findall(r"[a-z]+", text.lower())
    usual = sum(word in _COMMON for word in words)
    return any(
        (turned := sum(word in how for word in words)) >= 3
        and turned >= 0.15 * len(words)
        and turned > 4 * usual
        for how in _SCRAMBLED
    )
