"""Moderators: what turns texts into assessments. `OnnxModerator` runs a local model.

Needs onnxruntime (extra `cpu` or `gpu`); it is imported when a model is opened, not before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from guardrail._language import read_tables
from guardrail._onnx import Device, Session
from guardrail._unwanted import check_wanted
from guardrail.artifact import Calibration, artifact_folder, read_manifest
from guardrail.encoding import Canonical, Encoder, Window, canonicalise, pad, sentences
from guardrail.errors import ModerationError
from guardrail.policy import Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Assessment, Pair, Passage

__all__ = ["MAX_CHARS", "Device", "Moderator", "OnnxModerator"]

MAX_CHARS = 2_000_000

_Floats = NDArray[np.float64]
_OUTPUTS = ("severity_logits", "category_logits")
_SENTENCES_PER_WINDOW = 16  # on average; beyond, judging them one by one costs more than it tells


class Moderator(Protocol):
    """Judges texts. Anything with these three members can stand behind a `Guard`."""

    @property
    def id(self) -> str:
        """Names the model in verdicts and logs."""
        ...

    @property
    def thresholds(self) -> Mapping[Direction, Thresholds]:
        """Calibrated thresholds per direction; {} to count everything from 0.5."""
        ...

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        """One assessment per pair, in order. Must be thread-safe. May raise ModerationError."""
        ...


class OnnxModerator:
    """A model artifact run by ONNX Runtime.

    model: a bundled or installed name (`small`), or the path of a model folder.
    device: `cpu`; `cuda` or `tensorrt`, which raise when they cannot be had (TensorRT builds an
        engine per shape first, and is for the fp16 export); `auto`, CUDA where it works, else CPU.
        `self.device` tells which one it is.
    threads: of one inference; all cores by default.
    locate: find the passages that carry the harm, at the cost of judging the sentences of texts
        that look unsafe one by one; else a passage is a whole window.
    max_chars: longer texts raise ModerationError, so that one request cannot hold a core for
        minutes.

    Thread-safe, and usable in a forked child, which opens the model anew. On the CPU a text is
    judged the same whatever is judged with it.
    """

    def __init__(
        self,
        model: str | Path = "small",
        *,
        device: Device = "auto",
        threads: int | None = None,
        locate: bool = True,
        max_chars: int = MAX_CHARS,
    ) -> None:
        self.folder = folder = artifact_folder(model)
        self.manifest = read_manifest(folder)
        self._encoder = Encoder.from_file(folder / "tokenizer.json", self.manifest.encoder_config())
        self._session = Session(folder / "model.onnx", device, threads, _OUTPUTS)
        self.device = self._session.device
        self._locate = locate
        self._max_chars = max_chars
        self._calibration = {d: self.manifest.calibration_of(d) for d in Direction}
        self._thresholds = {d: self.manifest.thresholds_of(d) for d in Direction}
        read_tables()

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def thresholds(self) -> Mapping[Direction, Thresholds]:
        return self._thresholds

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        for pair in pairs:
            longest = max(len(pair.text), len(pair.prompt))
            if longest > self._max_chars:
                raise ModerationError(
                    f"a text of {longest:,} characters, more than max_chars={self._max_chars:,}: "
                    "split it, or raise max_chars"
                )
        canonical = [self._canonical(pair) for pair in pairs]
        windows = [self._windows(pair, canonical[i]) for i, pair in enumerate(pairs)]
        scores = self._scores(pairs, windows)
        assessments = [
            self._assessment(pair, windows[i], scores[i], unreadable=canonical[i].unreadable)
            for i, pair in enumerate(pairs)
        ]
        return self._with_passages(pairs, assessments) if self._locate else assessments

    def logits(self, windows: Sequence[Window]) -> tuple[_Floats, _Floats]:
        """Raw model outputs: severity (windows, 3), categories (windows, 19)."""
        severity = np.empty((len(windows), 3))
        categories = np.empty((len(windows), len(Category)))
        # Dynamic int8 scales activations by the largest of a batch: windows judged together shift
        # one another's probabilities, by 0.2 at worst. One by one is also as fast on a CPU.
        for part in _batches(windows, 1 if self.device == "cpu" else 8192):
            check_wanted()
            feed = pad([windows[i] for i in part], self._encoder.pad_id)
            try:
                severity[part], categories[part] = self._session.run(_OUTPUTS, feed)
            except Exception as error:  # onnxruntime raises classes of its own, none public
                raise ModerationError(f"{self.id}: inference failed: {error}") from error
        if not (np.isfinite(severity).all() and np.isfinite(categories).all()):
            raise ModerationError(f"{self.id}: the model gave a value that is not a number")
        return severity, categories

    def _canonical(self, pair: Pair) -> Canonical:
        check_wanted()
        return canonicalise(pair.text)

    def _windows(self, pair: Pair, canonical: Canonical | None = None) -> list[Window]:
        check_wanted()
        return self._encoder.encode(pair, canonical)

    def _scores(
        self, pairs: Sequence[Pair], windows: Sequence[Sequence[Window]]
    ) -> list[tuple[_Floats, _Floats]]:
        """Calibrated probabilities per pair and window: cumulative severities, categories."""
        severity, categories = self.logits([w for group in windows for w in group])
        scores = []
        first = 0
        for pair, group in zip(pairs, windows, strict=True):
            calibration = self._calibration[pair.direction]
            part = slice(first, first + len(group))
            first += len(group)
            scores.append(calibrated(severity[part], categories[part], calibration))
        return scores

    def _assessment(
        self,
        pair: Pair,
        windows: Sequence[Window],
        scores: tuple[_Floats, _Floats],
        *,
        unreadable: bool,
    ) -> Assessment:
        """A text is as harmful as its worst window."""
        by_window, categories = scores
        at_least = by_window.max(axis=0)
        edges = np.concatenate([[1.0], at_least, [0.0]])
        minor = self._minor_threshold(pair.direction)
        passages = [
            Passage(w.start, w.end, float(p))
            for w, p in zip(windows, by_window[:, 0], strict=True)
            if p >= minor
        ]
        return Assessment(
            direction=pair.direction,
            severity_probabilities={s: float(edges[s] - edges[s + 1]) for s in Severity},
            categories=dict(zip(Category, map(float, categories.max(axis=0)), strict=True)),
            passages=tuple(passages),
            model=self.id,
            unreadable=unreadable,
        )

    def _minor_threshold(self, direction: Direction) -> float:
        return self._thresholds[direction].severity.get(Severity.MINOR, 0.5)

    def _with_passages(
        self, pairs: Sequence[Pair], assessments: list[Assessment]
    ) -> list[Assessment]:
        """Narrow unsafe windows down to the sentences that are unsafe on their own."""
        spans = [
            (i, start, end)
            for i, (pair, seen) in enumerate(zip(pairs, assessments, strict=True))
            for start, end in _sentences_within(pair.text, seen.passages)
        ]
        if not spans:
            return assessments
        parts = [_part(pairs[i], start, end) for i, start, end in spans]
        scores = self._scores(parts, [self._windows(part) for part in parts])
        found: list[list[Passage]] = [[] for _ in pairs]
        for (i, start, end), (severity, _) in zip(spans, scores, strict=True):
            probability = float(severity[:, 0].max())
            if probability >= self._minor_threshold(pairs[i].direction):
                found[i].append(Passage(start, end, probability))
        return [
            dataclasses.replace(seen, passages=_narrowed(seen.passages, found[i]))
            for i, seen in enumerate(assessments)
        ]


def calibrated(
    severity: _Floats, categories: _Floats, calibration: Calibration
) -> tuple[_Floats, _Floats]:
    """Logits to probabilities: cumulative severities (n, 3), made to fall, and categories (n, 19).

    Platt scaling per level could make neighbouring levels cross by a hair; the running minimum
    keeps P(>= k) monotone.
    """
    s = _sigmoid(severity, calibration.severity)
    return np.minimum.accumulate(s, axis=1), _sigmoid(categories, calibration.categories)


def _sigmoid(logits: _Floats, scale_bias: Sequence[tuple[float, float]]) -> _Floats:
    scale, bias = np.asarray(scale_bias, dtype=np.float64).T
    result: _Floats = 1.0 / (1.0 + np.exp(-np.clip(logits * scale + bias, -30, 30)))
    return result


def _part(pair: Pair, start: int, end: int) -> Pair:
    part = pair.text[start:end]
    return Pair(part) if pair.response is None else Pair(pair.prompt, part)


def _sentences_within(text: str, windows: Sequence[Passage]) -> list[tuple[int, int]]:
    """The sentences that share characters with the windows (in order of start, and of end); none
    where there are too many for the number of windows."""
    if not windows:
        return []
    spans = []
    first = 0
    for start, end in sentences(text):
        while first < len(windows) and windows[first].end <= start:
            first += 1
        if first < len(windows) and windows[first].start < end:
            spans.append((start, end))
    return spans if len(spans) <= _SENTENCES_PER_WINDOW * len(windows) else []


def _narrowed(windows: Sequence[Passage], found: Sequence[Passage]) -> tuple[Passage, ...]:
    """The sentences found, and the windows none was found in: their harm no sentence carries."""
    kept = []
    first = 0
    for window in windows:
        while first < len(found) and found[first].end <= window.start:
            first += 1
        if first == len(found) or found[first].start >= window.end:
            kept.append(window)
    return tuple(sorted([*found, *kept], key=lambda p: (p.start, p.end)))


def _batches(windows: Sequence[Window], tokens: int) -> Iterable[list[int]]:
    """Indices of windows, like lengths together, at most `tokens` padded tokens each, or one."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    first = 0
    while first < len(order):
        last = first + max(1, tokens // len(windows[order[first]].ids))
        yield order[first:last]
        first = last
