"""Score models: one number for an answer to a prompt, from a local ONNX model.

A reward says how helpful an answer is (0 is average, 1 a standard deviation better); a cost how
harmful, where a cost above 0 means unsafe. `training.score_model` makes them; best-of-n in
`regenerate` (`BestOf`) and PPO-Lagrangian use them. Needs onnxruntime, imported when a model is
opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guardrail._files import MISSHAPEN, sha256_of, verify_file, write_json
from guardrail._onnx import Session
from guardrail.encoding import Encoder, EncoderConfig, Window, pad
from guardrail.errors import ArtifactError, ModerationError
from guardrail.verdict import Pair

__all__ = ["BestOf", "OnnxScorer", "ScoreKind", "ScoreManifest", "Scorer", "read_score_manifest"]

ScoreKind = Literal["reward", "cost"]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScoreManifest:
    """All that is known of a score model; `manifest.json` holds these fields.

    encoding: `{"layout": "pair", ...EncoderConfig}` for encoders, or `{"layout": "chat", "before",
        "between", "after", "max_tokens", "pad_id"}` for language models: the texts around prompt
        and answer.
    run: what tells the run that trained it from others (`training.runs.identity`).
    """

    kind: ScoreKind
    id: str
    base: str
    licence: str
    command: str
    seed: int
    created: str
    data: Mapping[str, int]
    encoding: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    run: str = ""

    def write(self, folder: Path) -> None:
        """Hash the model's files and write `manifest.json` last."""
        files = {name: sha256_of(folder / name) for name in ("model.onnx", "tokenizer.json")}
        write_json(folder / "manifest.json", asdict(self) | {"files": files})


def read_score_manifest(folder: Path) -> ScoreManifest:
    """The manifest of a score model, its files checked against their sha256. Raises
    ArtifactError."""
    path = folder / "manifest.json"
    try:
        manifest = ScoreManifest(**json.loads(path.read_text(encoding="utf-8")))
        files = [(folder / name, manifest.files[name]) for name in ("model.onnx", "tokenizer.json")]
        if not isinstance(manifest.encoding, dict):
            raise ValueError(f"encoding must be an object, not {manifest.encoding!r}")
        if not all(isinstance(expected, str) for _, expected in files):
            raise ValueError("files: hashes must be texts")
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: not a score model, or one half written") from None
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(f"{path}: not a score model's manifest: {error}") from error
    if manifest.kind not in get_args(ScoreKind):
        raise ArtifactError(f"{path}: kind {manifest.kind!r} is neither reward nor cost")
    for file, expected in files:
        verify_file(file, expected)
    return manifest


class OnnxScorer:
    """A score model run by ONNX Runtime on the CPU. Thread-safe.

    folder: of `model.onnx`, `tokenizer.json` and `manifest.json`; `kind` tells reward from cost.
    threads: of one inference; all cores by default.
    Raises ArtifactError for a folder that is not whole.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_score_manifest(self.folder)
        self.kind: ScoreKind = self.manifest.kind
        self._layout = layout_of(self.folder / "tokenizer.json", self.manifest.encoding)
        self._session = Session(self.folder / "model.onnx", "cpu", threads, outputs=("score",))

    def score(self, pairs: Sequence[tuple[str, str] | Pair]) -> _Floats:
        """One float per (prompt, answer), (len(pairs),). Of a long answer, a reward is the mean of
        its windows, a cost that of the worst. Raises ModerationError."""
        groups = [self._layout.encode(*_texts(pair)) for pair in pairs]
        scores = np.empty(len(pairs))
        for index, windows in enumerate(groups):
            # One at a time: in dynamic int8, texts that are scored together shift one another.
            found = np.concatenate([self._run([window]) for window in windows])
            scores[index] = found.max() if self.kind == "cost" else found.mean()
        if not np.isfinite(scores).all():
            raise ModerationError(f"{self.manifest.id}: the model gave a value that is no number")
        return scores

    def _run(self, windows: Sequence[Window]) -> _Floats:
        try:
            (found,) = self._session.run(["score"], pad(windows, self._layout.pad_id))
        except Exception as error:  # onnxruntime raises classes of its own, none public
            raise ModerationError(f"{self.manifest.id}: inference failed: {error}") from error
        return np.asarray(found, dtype=np.float64)


class Scorer(Protocol):
    """Scores answers; `OnnxScorer` is one. Must be thread-safe. May raise ModerationError."""

    kind: ScoreKind

    def score(self, pairs: Sequence[Pair]) -> _Floats:
        """One float per pair, (len(pairs),)."""
        ...


class BestOf:
    """Compares answers by reward - harm_weight * cost: helpful and harmless at once.

        GuardedChat(model, best_of=BestOf("build/reward", "build/cost"), regenerate_tries=4)

    reward, cost: score models, or their folders; each has to be of its kind.
    harm_weight: how much reward one unit of cost is worth (lambda); 0 or more.

    The model has to answer otherwise each time it is asked: a temperature above 0. Raises
    ArtifactError for a folder that is not whole, ValueError for a model of the other kind.
    """

    def __init__(
        self, reward: str | Path | Scorer, cost: str | Path | Scorer, *, harm_weight: float = 1.0
    ) -> None:
        if not (math.isfinite(harm_weight) and harm_weight >= 0):
            raise ValueError(f"harm_weight must be 0 or more, not {harm_weight}")
        self._reward, self._cost = _scorer(reward, "reward"), _scorer(cost, "cost")
        self._harm_weight = harm_weight

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """One float per pair, the best the largest. Raises ModerationError."""
        cost = self._harm_weight * self._cost.score(pairs)
        found = [float(score) for score in self._reward.score(pairs) - cost]
        if not all(map(math.isfinite, found)):
            raise ModerationError("a score model gave a value that is no number")
        return found


def _scorer(model: str | Path | Scorer, kind: ScoreKind) -> Scorer:
    scorer: Scorer = OnnxScorer(model) if isinstance(model, str | Path) else model
    if scorer.kind != kind:
        raise ValueError(f"best-of-n needs a {kind} model here, not a {scorer.kind} model")
    return scorer


def _texts(pair: tuple[str, str] | Pair) -> tuple[str, str]:
    return (pair.prompt, pair.response or "") if isinstance(pair, Pair) else pair


class Layout(Protocol):
    """Turns a prompt and an answer into a model's windows."""

    pad_id: int

    def encode(self, prompt: str, answer: str) -> list[Window]: ...


def layout_of(tokenizer: Path, encoding: Mapping[str, Any]) -> Layout:
    """The layout that a manifest's `encoding` names. Raises ArtifactError."""
    options = dict(encoding)
    kind = options.pop("layout", None)
    try:
        if kind == "pair":
            return _PairLayout(tokenizer, EncoderConfig(**options))
        if kind == "chat":
            return ChatLayout(tokenizer, **options)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{tokenizer.parent}: encoding {encoding}: {error}") from error
    raise ArtifactError(f"{tokenizer.parent}: encoding has the unknown layout {kind!r}")


class _PairLayout:
    """An encoder's: prompt and answer as its two segments, a long answer in several windows."""

    def __init__(self, tokenizer: Path, config: EncoderConfig) -> None:
        self._encoder = Encoder.from_file(tokenizer, config)
        self.pad_id = self._encoder.pad_id

    def encode(self, prompt: str, answer: str) -> list[Window]:
        return self._encoder.encode(Pair(prompt, answer))


class ChatLayout:
    """A language model's: a rendered chat, whose last token is scored. The head of a long prompt
    and the tail of a long answer are left out."""

    def __init__(
        self,
        tokenizer: Path,
        before: str,
        between: str,
        after: str,
        max_tokens: int,
        pad_id: int,
    ) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._before, self._between, self._after = (
            self._ids(text) for text in (before, between, after)
        )
        fixed = len(self._before) + len(self._between) + len(self._after)
        if max_tokens < fixed + 16:
            raise ValueError(f"max_tokens={max_tokens} leaves no room beside {fixed} of the chat")
        self._room = max_tokens - fixed
        self.pad_id = pad_id

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, prompt: str, answer: str) -> list[Window]:
        asked, answered = self._ids(prompt), self._ids(answer.strip())
        answered = answered[: max(self._room // 2, self._room - len(asked))]
        asked = asked[max(0, len(asked) - (self._room - len(answered))) :]
        ids = [*self._before, *asked, *self._between, *answered, *self._after]
        return [Window(ids, [0] * len(ids), 0, len(answer))]
