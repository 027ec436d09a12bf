"""How much of a text is in another language than English. A pure function.

py3langid tells the language of a stretch (naive Bayes on letters, 140 languages, calibrated for
short texts). Its tables (0.4 s, 80 MB) are read once, when a moderator is made: the first text
has a time-out like another, and forked children share them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from threading import Lock

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from guardrail._forks import renewed_in_children

__all__ = ["foreign_share", "read_tables"]

# Short English is taken for Nigerian Pidgin, or for text in no language.
_ENGLISH = frozenset(("en", "pcm", "zxx"))
# No language is sure of romanised Hindi, nor of a list of names. So what counts is how much more a
# stretch looks like the likeliest others than like English (decision 016).
_LIKELIEST, _SURE, _RATIO = 3, 0.25, 8.0
# "Rio de Janeiro and Nguyen": names speak their own language, the words between them English.
_ENGLISH_WORDS = frozenset(
    ("the", "and", "of", "you", "with", "what", "how", "that", "this", "are", "your", "have",
     "from", "they", "not", "would")
)  # fmt: skip
_WORDS, _LETTERS = 3, 12  # shorter stretches tell nothing
_LONGEST = 410  # of a piece; what is longer ends in a flood of signs or blanks
_PIECE = re.compile(r"[^.!?:;\n\"“”«»„()\[\]{}…]{1,400}[^\w\s]*\s*")
_WORD = re.compile(r"[^\W\d_]+")


def foreign_share(text: str) -> float:
    """The share of the letters, from 0 to 1, that stand in sentences of another language."""
    total = foreign = 0
    for stretch, letters in _stretches(text):
        total += letters
        foreign += letters if _is_foreign(stretch) else 0
    return foreign / max(1, total)


def _stretches(text: str) -> Iterator[tuple[str, int]]:
    """Sentences and lines, with how many letters each has. Short ones are joined to the next, and
    one at the end is left out. None is long, whatever the text: they are cached."""
    pieces: list[str] = []
    words = letters = 0
    for piece in _PIECE.finditer(text):
        found = _WORD.findall(piece[0])
        if not found:
            continue
        pieces.append(piece[0][:_LONGEST])
        words, letters = words + len(found), letters + sum(map(len, found))
        if words >= _WORDS and letters >= _LETTERS:
            yield "".join(pieces), letters
            pieces, words, letters = [], 0, 0


@lru_cache(maxsize=4096)
def _is_foreign(stretch: str) -> bool:
    lower = [word for word in _WORD.findall(stretch) if word.islower()]
    if lower and sum(word in _ENGLISH_WORDS for word in lower) >= len(lower) / 3:
        return False
    ranked = _TABLES.read().rank(stretch)
    english = sum(p for language, p in ranked if language in _ENGLISH)
    others = [p for language, p in ranked if language not in _ENGLISH]
    return bool(sum(others[:_LIKELIEST]) >= max(_SURE, _RATIO * english))


class _Tables:
    """py3langid's, read once."""

    def __init__(self) -> None:
        self._found: LanguageIdentifier | None = None
        self._after_fork()
        renewed_in_children(self)

    def _after_fork(self) -> None:
        self._lock = Lock()  # a thread of the parent's may have held the old one

    def read(self) -> LanguageIdentifier:
        if self._found is None:
            with self._lock:  # two threads would both read them
                if self._found is None:
                    self._found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return self._found


_TABLES = _Tables()


def read_tables() -> None:
    """Read what the first text would wait for."""
    _TABLES.read()
