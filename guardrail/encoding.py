"""Text to tokens: the one encoder used in training, evaluation and serving, so nothing drifts.

1. `canonicalise` undoes what hides text from a model (compatibility forms, zero-width, bidi and
   tag characters, homoglyphs, s p a c e d and l33t words) and keeps a map back to the caller's.
2. `Encoder` cuts a `Pair` into overlapping token windows, so that long text is never truncated.
3. `pad` stacks windows into the arrays a model takes.

Needs numpy and tokenizers; imports no torch, no onnxruntime.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guardrail._lookalikes import HOMOGLYPHS, SPELLED, SYMBOLS
from guardrail.errors import ArtifactError
from guardrail.verdict import Pair

__all__ = [
    "Canonical",
    "Encoder",
    "EncoderConfig",
    "Window",
    "canonicalise",
    "pad",
    "sentences",
    "unreadable",
]


@dataclass(frozen=True, slots=True)
class Canonical:
    """Canonical text, and the way back to the caller's.

    origin: `origin[i]` is where in the source character `i` comes from, and `origin[len(text)]` the
        length of the source; it never falls.
    unreadable: what `unreadable` says of the text.
    """

    text: str
    origin: Sequence[int]
    unreadable: bool

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The stretch of the source behind canonical `text[start:end]`."""
        while 0 < end < len(self.text) and self.origin[end] == self.origin[end - 1]:
            end += 1  # one source character became several: it belongs to both sides whole
        return self.origin[start], self.origin[end]


_LEET = str.maketrans("013457@$!", "oieastasi")
# An @ before a domain is an address, and personal data must keep its shape.
_LEET_INSIDE = re.compile(r"(?<=[A-Za-z])(?:[013457$!]|@(?![\w\-]+\.\w)){1,3}(?=[A-Za-z])")
_SPACED = re.compile(r"(?<![^\W_])[^\W\d_]([ .\-_*·])(?:[^\W\d_]\1)+[^\W\d_](?![^\W_])")
_WORD = re.compile(rf"(?:[^\W\d_]|[{re.escape(SYMBOLS)}])+")
_FOLDABLE = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+")
_DROPPED = frozenset({"Cf", "Mn", "Me", "Cs", "Co"})
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0")  # letters by category, drawn as nothing


def canonicalise(text: str) -> Canonical:
    """NFKC; hidden characters, homoglyphs, spaced and leet words undone. Idempotent.

    Takes any text, lone surrogates and NUL included; what comes out encodes as UTF-8.
    """
    chars, origin = _fold_unicode(text)
    chars, origin = _join_spaced(chars, origin)
    chars = _fold_homoglyphs(chars)
    # Leet is undone last: it would turn the digits of encoded blobs into letters.
    return Canonical(_undo_leet(chars), origin, unreadable(chars))


def _undo_leet(text: str) -> str:
    return _LEET_INSIDE.sub(lambda m: m[0].translate(_LEET), text)


def _fold_unicode(text: str) -> tuple[str, Sequence[int]]:
    if not _FOLDABLE.search(text):
        return text, range(len(text) + 1)
    out: list[str] = []
    origin: list[int] = []
    last = 0
    for match in _FOLDABLE.finditer(text):
        out.append(text[last : match.start()])
        origin.extend(range(last, match.start()))
        for start, cluster in _clusters(match[0]):
            folded = _fold_cluster(cluster)
            out.append(folded)
            origin.extend([match.start() + start] * len(folded))
        last = match.end()
    out.append(text[last:])
    origin.extend(range(last, len(text) + 1))
    return "".join(out), origin


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
    pieces: list[str] = []
    kept: list[int] = []
    last = 0
    for match in _SPACED.finditer(text):
        pieces += text[last : match.start()], match[0][::2]
        kept.extend(origin[last : match.start()])
        kept.extend(origin[match.start() : match.end() : 2])
        last = match.end()
    if not pieces:
        return text, origin
    return "".join([*pieces, text[last:]]), [*kept, *origin[last:]]


def _fold_homoglyphs(text: str) -> str:
    """Write look-alike letters in Latin: in words that mix scripts, in Latin text in all, and in
    text that is made of nothing else, as no language's is."""
    if text.isascii():
        return text
    text = _WORD.sub(lambda m: _latin(m[0]) if any(map(str.isascii, m[0])) else m[0], text)
    folded = _WORD.sub(lambda m: _latin(m[0]), text)
    # What leet hides are Latin letters too.
    if _latin_share(_undo_leet(text)) > 0.5 or (len(text) >= 12 and _latin_share(folded) >= 0.9):
        return folded
    return text


def _latin_share(text: str) -> float:
    counts = Counter(text)
    return _total(counts, _is_latin) / max(1, _total(counts, str.isalpha))


def _latin(word: str) -> str:
    """The word with its look-alikes in Latin, if it has letters and that leaves no other."""
    if word.isascii() or not any(map(str.isalpha, word)):
        return word
    folded = word.translate(HOMOGLYPHS)
    return folded if all(map(_is_latin, folded)) else word


@lru_cache(maxsize=8192)
def _is_latin(char: str) -> bool:
    return char.isalpha() and (char.isascii() or "LATIN" in unicodedata.name(char, ""))


def _is_written(char: str) -> bool:
    """A Latin letter that some language's ordinary spelling has; phonetic and turned ones are
    none."""
    return _is_latin(char) and (char < "\u0250" or "\u1e00" <= char < "\u1f00")


def _total(counts: Counter[str], kind: Callable[[str], bool]) -> int:
    return sum(n for char, n in counts.items() if kind(char))


_BLOB = re.compile(
    r"(?P<bits>\b[01][01 ]{63,})"
    r"|(?P<base64>[A-Za-z0-9+/_\-]{40,}={0,2})"
    r"|(?P<hex>(?:(?:%|\\x|\\u00|0x)?[0-9A-Fa-f]{2}[ :,]?){24,})"
    r"|(?P<endless>[^\W_]{101,})"
)


def unreadable(text: str) -> bool:
    """True when an English model cannot tell what `text` says.

    Foreign or phonetic script (over 30 % of at least four letters), or symbols (over 75 % of at
    least 40 characters), or an encoded blob (base64, hex, bits, a word without end) that makes up
    over 40 % of it. Expects text whose homoglyphs are undone, as `canonicalise` does.
    """
    counts = Counter(text)
    letters = _total(counts, str.isalpha)
    foreign = letters - _total(counts, _is_written)
    if foreign >= 4 and foreign > 0.3 * letters:
        return True
    dense = len(text) - _total(counts, str.isspace)
    if dense >= 40 and _total(counts, str.isalnum) < 0.25 * dense:
        return True
    blobs = sum(len(match[0]) for match in _BLOB.finditer(text) if _is_encoded(match))
    return blobs >= 40 and blobs > 0.4 * len(text)


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


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+\s*")


def sentences(text: str) -> list[tuple[int, int]]:
    """Offsets of the sentences and lines of `text`, blank ones left out."""
    edges = [0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]
    return [(a, b) for a, b in pairwise(edges) if text[a:b].strip()]


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """How a pair becomes windows; written into the manifest, so that serving repeats training.

    max_tokens: length of a window, special tokens included.
    prompt_tokens: how much of a prompt goes with each window of its response (its head and its
        tail, when it is longer); the prompt itself is judged whole in direction input.
    overlap: tokens that neighbouring windows share.

    Raises ValueError when that leaves no room for a response.
    """

    max_tokens: int = 256
    prompt_tokens: int = 80
    overlap: int = 48

    def __post_init__(self) -> None:
        if (
            self.prompt_tokens < 0
            or not 0 <= self.overlap < self.max_tokens - self.prompt_tokens - 4
        ):
            raise ValueError(
                f"max_tokens={self.max_tokens} must exceed prompt_tokens={self.prompt_tokens} + "
                f"overlap={self.overlap} + 4 special tokens, none of them below 0"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Window:
    """One model input. `start:end` are offsets into the caller's own `Pair.text`."""

    ids: list[int]
    segments: list[int]
    start: int
    end: int


class Encoder:
    """Cuts pairs into token windows, in the format the tokenizer's own model was trained with.

    BERT: `[CLS] prompt [SEP] response [SEP]` with segments 0 and 1; MPNet and RoBERTa:
    `<s> prompt </s> </s> response </s>`. Thread-safe. Raises ArtifactError on a tokenizer that has
    the special tokens of neither.
    """

    def __init__(self, tokenizer: Tokenizer, config: EncoderConfig | None = None) -> None:
        self.config = config or EncoderConfig()
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a `[SEP]` that somebody typed is text
        # MPNet's vocabulary holds BERT's `[CLS]` too, as a word: what counts is what is special.
        special = {
            t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special
        }
        layout = next((names for names in _LAYOUTS if special.keys() >= set(names)), None)
        if layout is None:
            raise ArtifactError(
                "the tokenizer's special tokens are neither BERT's ([CLS] [SEP] [PAD]) nor "
                "RoBERTa's (<s> </s> <pad>)"
            )
        self._start, self._end, self.pad_id = (special[name] for name in layout)
        bert = layout is _LAYOUTS[0]
        self._middle = [self._end] if bert else [self._end, self._end]
        self._second_segment = 1 if bert else 0
        # Every passage of a streamed answer, and every sentence of it, comes with one prompt.
        self._context = lru_cache(maxsize=16)(self._tokenize_context)

    @classmethod
    def from_file(cls, path: str | Path, config: EncoderConfig | None = None) -> Encoder:
        """Read a `tokenizer.json`."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ArtifactError(f"{path}: not a readable tokenizer: {error}") from error
        return cls(tokenizer, config)

    def encode(self, pair: Pair, canonical: Canonical | None = None) -> list[Window]:
        """The windows of one pair; at least one, and together they cover the whole text.

        canonical: `canonicalise(pair.text)`, from a caller that has it.
        """
        judged = canonical or canonicalise(pair.text)
        encoded = self._tokenizer.encode(judged.text, add_special_tokens=False)
        ids, offsets = encoded.ids, encoded.offsets  # each access builds a list
        head, second = [self._start], 0
        if pair.response is not None:
            head += [*self._context(pair.prompt), *self._middle]
            second = self._second_segment
        windows = []
        for first, last in _strides(
            len(ids), self.config.max_tokens - len(head) - 1, self.config.overlap
        ):
            start, end = _source_span(judged, offsets, first, last)
            windows.append(
                Window(
                    ids=[*head, *ids[first:last], self._end],
                    segments=[0] * len(head) + [second] * (last - first + 1),
                    start=start,
                    end=end,
                )
            )
        return windows

    def _tokenize_context(self, prompt: str) -> list[int]:
        text = canonicalise(prompt).text
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        limit = self.config.prompt_tokens
        if len(ids) <= limit:
            return ids
        return ids[: limit - limit // 2] + ids[len(ids) - limit // 2 :]


_LAYOUTS = (("[CLS]", "[SEP]", "[PAD]"), ("<s>", "</s>", "<pad>"))


def _source_span(
    judged: Canonical, offsets: Sequence[tuple[int, int]], first: int, last: int
) -> tuple[int, int]:
    """Windows meet without gaps: each reaches to where the next token begins."""
    start = offsets[first][0] if first else 0
    end = offsets[last][0] if last < len(offsets) else len(judged.text)
    source_start, source_end = judged.span(start, end)
    return (source_start if first else 0), source_end


def _strides(length: int, room: int, overlap: int) -> Iterable[tuple[int, int]]:
    """Cut `length` tokens into stretches of at most `room` that overlap; (0, 0) for none."""
    step = max(1, room - overlap)
    first = 0
    while True:
        last = min(first + room, length)
        yield first, last
        if last >= length:
            return
        first += step


def pad(windows: Sequence[Window], pad_id: int) -> dict[str, NDArray[np.int64]]:
    """Stack windows: `input_ids`, `attention_mask`, `token_type_ids`, each (batch, longest)."""
    longest = max(len(window.ids) for window in windows)
    shape = (len(windows), longest)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    for row, window in enumerate(windows):
        length = len(window.ids)
        ids[row, :length] = window.ids
        mask[row, :length] = 1
        segments[row, :length] = window.segments
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
