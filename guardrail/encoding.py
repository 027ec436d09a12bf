"""Text to tokens: the one encoder used in training, evaluation and serving, so nothing drifts.

1. `canonicalise` undoes what hides text from a model (compatibility forms, zero-width, bidi and
   tag characters, homoglyphs, s p a c e d and l33t words) and keeps a map back to the caller's.
2. `Encoder` cuts a `Pair` into overlapping token windows, so that long text is never truncated.
3. `pad` stacks windows into the arrays a model takes.

Needs numpy and tokenizers; imports no torch, no onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guardrail._canonical import Canonical, canonicalise, sentences
from guardrail._readable import unreadable
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
