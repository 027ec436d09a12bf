"""What hides text from a model undone, with the way back to the caller's text. Pure functions."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from guardrail._blobs import decoded
from guardrail._lookalikes import HOMOGLYPHS, SPELLED, SYMBOLS
from guardrail._readable import is_latin, latin_share, unreadable

__all__ = ["Canonical", "canonicalise", "sentences"]


@dataclass(frozen=True, slots=True)
class Canonical:
    """Canonical text, and the way back to the caller's.

    origin: `origin[i]` is where in the source character `i` comes from, and `origin[len(text)]` the
        length of the source; it never falls.
    unreadable: what `unreadable` says of the text, before its blobs are read.
    """

    text: str
    origin: Sequence[int]
    unreadable: bool

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The stretch of the source behind canonical `text[start:end]`."""
        while 0 < end < len(self.text) and self.origin[end] == self.origin[end - 1]:
            end += 1  # one source character became several: it belongs to both sides whole
        return self.origin[start], self.origin[end]


_Change = tuple[int, int, str, Sequence[int]]
"""Start and end of a stretch, what stands there instead, where each character of that is from."""

_LEET = str.maketrans("013457@$!", "oieastasi")
# An @ before a domain is an address, and personal data must keep its shape.
_LEET_INSIDE = re.compile(r"(?<=[A-Za-z])(?:[013457$!]|@(?![\w\-]+\.\w)){1,3}(?=[A-Za-z])")
# What is put between letters: signs first, since blanks may then part the words.
_SPACED = [
    re.compile(rf"(?<![^\W_])[^\W\d_]({between})(?:[^\W\d_]\1)+[^\W\d_](?![^\W_])")
    for between in (r"[^\w\s]{1,3}|_", r"[^\S\n]{1,3}|\n{1,2}")
]
_TRIPLED = re.compile(r"(?<![^\W\d_])(?:([A-Za-z])\1{2,}(?!\1)){2,}(?![^\W\d_])")
_WORD = re.compile(rf"(?:[^\W\d_]|[{re.escape(SYMBOLS)}])+")
_FOLDABLE = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+")
# As JSON, Python and HTML write a character: who parses `b\u006fmb` reads a word.
_ESCAPE = re.compile(
    r"(?<!\\)\\+(?:u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{2,6})\}|U000([0-9A-Fa-f]{5})|x([0-9A-Fa-f]{2}))"
    r"|&#(?:[xX]([0-9A-Fa-f]{2,6})|([0-9]{2,7}));"
)
_DEEPEST = 16  # codes within codes; each costs a pass over the text
_DROPPED = frozenset({"Cf", "Mn", "Me", "Cs", "Co"})
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0")  # letters by category, drawn as nothing


def canonicalise(text: str) -> Canonical:
    """NFKC; hidden characters, homoglyphs, spaced and leet words undone, escapes and
    encoded blobs read (and the text still called unreadable where blobs are most of it, or more lie
    within one another than are read). Idempotent up to there.

    Takes any text, lone surrogates and NUL included; what comes out encodes as UTF-8.
    """
    chars, origin = _fold_unicode(text)
    chars, origin = _unspell(chars, origin)
    opaque = unreadable(chars)
    for _ in range(_DEEPEST):
        if (opened := _read_escapes(*_read_blobs(chars, origin)))[0] == chars:
            break
        chars, origin = _unspell(*opened)
    else:
        opaque = True
    # Leet is undone after all that: it would turn the digits of encoded blobs into letters.
    chars = _undo_leet(chars)
    return Canonical(*_spliced(chars, origin, _once(chars, origin)), opaque)


def _unspell(text: str, origin: Sequence[int]) -> tuple[str, Sequence[int]]:
    chars, origin = _join_spaced(text, origin)
    return _fold_homoglyphs(chars), origin


def _undo_leet(text: str) -> str:
    return _LEET_INSIDE.sub(lambda m: m[0].translate(_LEET), text)


def _spliced(
    text: str, origin: Sequence[int], changes: Iterable[_Change]
) -> tuple[str, Sequence[int]]:
    """`text` and its origins after `changes`, which are in order and apart."""
    pieces: list[str] = []
    kept: list[int] = []
    last = 0
    for start, end, new, source in changes:
        pieces += text[last:start], new
        kept.extend(origin[last:start])
        kept.extend(source)
        last = end
    if not pieces:
        return text, origin
    return "".join([*pieces, text[last:]]), [*kept, *origin[last:]]


def _fold_unicode(text: str) -> tuple[str, Sequence[int]]:
    def folded() -> Iterator[_Change]:
        for match in _FOLDABLE.finditer(text):
            parts = [(match.start() + at, _fold_cluster(c)) for at, c in _clusters(match[0])]
            origin = [at for at, new in parts for _ in new]
            yield *match.span(), "".join(new for _, new in parts), origin

    return _spliced(text, range(len(text) + 1), folded())


def _clusters(text: str) -> Iterable[tuple[int, str]]:
    """Base characters with the combining marks that follow, and where each starts."""
    start = 0
    for index in range(1, len(text) + 1):
        if index == len(text) or not unicodedata.combining(text[index]):
            # Sorting the marks of a cluster takes quadratic time, and no script has this many.
            yield start, text[start : min(index, start + 32)]
            start = index


@lru_cache(maxsize=8192)
def _fold_cluster(cluster: str) -> str:
    """NFKC without what is invisible, or a mark that hides the letter below it."""
    return "".join(
        char
        for char in unicodedata.normalize("NFKC", cluster.translate(SPELLED))
        if (kind := unicodedata.category(char)) not in _DROPPED
        and char not in _FILLERS
        and (kind != "Cc" or char in "\n\r\t")
    )


def _join_spaced(text: str, origin: Sequence[int]) -> tuple[str, Sequence[int]]:
    """`h o w`-style runs of three letters and more become words."""
    for spaced in _SPACED:
        joined = (
            (*m.span(), m[0][:: 1 + len(m[1])], origin[m.start() : m.end() : 1 + len(m[1])])
            for m in spaced.finditer(text)
        )
        text, origin = _spliced(text, origin, joined)
    return text, origin


def _once(text: str, origin: Sequence[int]) -> Iterator[_Change]:
    """`hhhooowww`, whose letters are each written three times and more, becomes `how`."""
    for match in _TRIPLED.finditer(text):
        start, end = match.span()
        kept = [n for n in range(start, end) if n == start or text[n] != text[n - 1]]
        yield start, end, "".join(text[n] for n in kept), [origin[n] for n in kept]


def _read_blobs(text: str, origin: Sequence[int]) -> tuple[str, Sequence[int]]:
    """Encoded blobs become what they say. Each character of it comes from where the blob starts,
    so that what is held against one of them is held against the blob."""
    plain = ((start, end, _fold_unicode(said)[0]) for start, end, said in decoded(text))
    read = ((start, end, new, [origin[start]] * len(new)) for start, end, new in plain)
    return _spliced(text, origin, read)


def _read_escapes(text: str, origin: Sequence[int]) -> tuple[str, Sequence[int]]:
    """Single characters that are written as numbers."""

    def read() -> Iterator[_Change]:
        for match in _ESCAPE.finditer(text):
            start, end = match.span()
            *hexes, decimal = match.groups()
            code = int(decimal) if decimal else int(next(filter(None, hexes)), 16)
            if code <= sys.maxunicode and not 0xD800 <= code < 0xE000:  # half a pair
                yield start, end, chr(code), [origin[start]]

    plain, origin = _spliced(text, origin, read())
    if plain == text:
        return text, origin
    folded, back = _fold_unicode(plain)
    return folded, [origin[at] for at in back]


def _fold_homoglyphs(text: str) -> str:
    """Write look-alike letters in Latin: in words that mix scripts, in Latin text in all, and in
    text that is made of nothing else, as no language's is."""
    if text.isascii():
        return text
    text = _WORD.sub(lambda m: _latin(m[0]) if any(map(str.isascii, m[0])) else m[0], text)
    folded = _WORD.sub(lambda m: _latin(m[0]), text)
    # What leet hides are Latin letters too.
    if latin_share(_undo_leet(text)) > 0.5 or (len(text) >= 12 and latin_share(folded) >= 0.9):
        return folded
    return text


def _latin(word: str) -> str:
    """The word with its look-alikes in Latin, if it has letters and that leaves no other."""
    if word.isascii() or not any(map(str.isalpha, word)):
        return word
    folded = word.translate(HOMOGLYPHS)
    return folded if all(map(is_latin, folded)) else word


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+\s*")


def sentences(text: str) -> list[tuple[int, int]]:
    """Offsets of the sentences and lines of `text`, blank ones left out."""
    edges = [0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]
    return [(a, b) for a, b in pairwise(edges) if text[a:b].strip()]
