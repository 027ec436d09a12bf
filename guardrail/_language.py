"""How much of a text is in another language than English. A pure function.

py3langid tells the language of a stretch (naive Bayes on letters, 140 languages, calibrated for
short texts). Its tables (0.4 s, 80 MB) are read once, with the first text that is judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, lru_cache
from threading import Lock

from py3langid.langid import MODEL_FILE, LanguageIdentifier

__all__ = ["foreign_share"]

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
    one at the end is left out."""
    start = end = words = letters = 0
    for piece in _PIECE.finditer(text):
        found = _WORD.findall(piece[0])
        words, letters, end = words + len(found), letters + sum(map(len, found)), piece.end()
        if words >= _WORDS and letters >= _LETTERS:
            yield text[start:end], letters
            start, words, letters = end, 0, 0


@lru_cache(maxsize=4096)
def _is_foreign(stretch: str) -> bool:
    lower = [word for word in _WORD.findall(stretch) if word.islower()]
    if lower and sum(word in _ENGLISH_WORDS for word in lower) >= len(lower) / 3:
        return False
    ranked = _identifier().rank(stretch)
    english = sum(p for language, p in ranked if language in _ENGLISH)
    others = [p for language, p in ranked if language not in _ENGLISH]
    return bool(sum(others[:_LIKELIEST]) >= max(_SURE, _RATIO * english))


_opening = Lock()


def _identifier() -> LanguageIdentifier:
    with _opening:  # two threads would both read the tables
        return _opened()


@cache
def _opened() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
