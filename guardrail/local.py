"""A chat model in this process: a safety-aligned policy as ONNX, without torch or a server.

    chat = GuardedChat(OnnxChat("build/policy"))
    for text in chat.stream("How do I pick a lock?"): ...

`training.export_policy` makes the folder: `model.onnx` (a graph with a key-value cache, see
`training.llama_onnx`), `tokenizer.json`, and `manifest.json` with the chat format, the tokens that
end an answer and the hashes of both files. Needs onnxruntime, imported when a model is opened.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guardrail._files import MISSHAPEN, sha256_of, verify_file, write_json
from guardrail._messages import message_text, not_text, read_messages
from guardrail._onnx import Device, Session
from guardrail.chat_model import Message, Reply, as_chat_model
from guardrail.errors import ArtifactError, UpstreamError

__all__ = ["ChatEncoder", "ChatFormat", "OnnxChat", "PolicyManifest", "read_policy_manifest"]

_FILES = ("model.onnx", "tokenizer.json")
_CHUNK = 256  # tokens of a prompt that are read at once: between two chunks it can be cancelled
_UNFINISHED = 8  # tokens that may pass before a character is taken for broken, not for incomplete


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What stands around messages. opening: before a chat without a system message; before and
    after: around a message, by role; answer: what opens the answer (ChatML: the assistant's
    `before`)."""

    opening: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    answer: str

    def pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """The rendered chat as (text, is it of the format). Raises UpstreamError."""
        if not any(_role(message) == "system" for message in messages[:1]):
            yield self.opening, True
        for message in messages:
            role = _role(message)
            if role not in self.before:
                raise UpstreamError(
                    f"this model takes no {role!r} messages, only {', '.join(self.before)}"
                )
            yield self.before[role], True
            yield message_text(message), False
            yield self.after[role], True
        yield self.answer, True


def _role(message: Message) -> str:
    role = str(message["role"])
    return "system" if role == "developer" else role


@dataclass(frozen=True, slots=True)
class PolicyManifest:
    """All that is known of a chat policy; `manifest.json` holds these fields.

    chat: the fields of its ChatFormat; stop: token ids that end an answer; context: tokens of
    prompt and answer at most; cache: `layers`, `kv_heads` and `head`, the sizes of its cache.
    """

    id: str
    base: str
    adapter: str | None
    licence: str
    command: str
    created: str
    precision: str
    chat: Mapping[str, Any]
    stop: Sequence[int]
    context: int
    cache: Mapping[str, int]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Hash the model's files and write `manifest.json` last."""
        files = {name: sha256_of(folder / name) for name in _FILES}
        write_json(folder / "manifest.json", asdict(self) | {"files": files})


def read_policy_manifest(folder: Path) -> PolicyManifest:
    """The manifest of a chat policy, its files checked against their sha256. Raises
    ArtifactError."""
    path = folder / "manifest.json"
    try:
        manifest = PolicyManifest(**json.loads(path.read_text(encoding="utf-8")))
        _check_fields(manifest)
        hashes = [(folder / name, manifest.files[name]) for name in _FILES]
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: not a chat policy, or one half written; `make policy` builds one"
        ) from None
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(f"{path}: not a chat policy's manifest: {error!r}") from error
    for file, expected in hashes:
        verify_file(file, expected)
    return manifest


def _check_fields(manifest: PolicyManifest) -> None:
    """Raises one of MISSHAPEN for a field that holds what it cannot."""
    chat, cache = ChatFormat(**manifest.chat), manifest.cache
    around = [chat.opening, chat.answer, *chat.before.values(), *chat.after.values()]
    if not all(isinstance(text, str) for text in around):
        raise ValueError("chat: what stands around messages must be texts")
    if chat.before.keys() != chat.after.keys():
        raise ValueError("chat: 'before' and 'after' must name the same roles")
    if not all(isinstance(manifest.files[name], str) for name in _FILES):
        raise ValueError("files: hashes must be texts")
    if not all(type(token) is int for token in manifest.stop):
        raise ValueError(f"stop: tokens must be whole numbers, not {manifest.stop}")
    sizes = [manifest.context, *(cache[key] for key in ("layers", "kv_heads", "head"))]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"context {manifest.context!r} and cache {cache}: sizes must be whole numbers above 0"
        )


class OnnxChat:
    """A chat policy run by ONNX Runtime; a `ChatModel`, so `GuardedChat` takes it. Thread-safe.

    folder: of `model.onnx`, `tokenizer.json` and `manifest.json`.
    temperature: 0 is greedy, always the same answer; above it, tokens are drawn from the softmax of
        logits / temperature, of which top_p keeps the likeliest that together have this mass
        (nucleus sampling, Holtzman et al. 2020).
    seed: makes the draws of each answer repeatable; without it every answer is another. `redrawn`
        gives the answers after the first to the same messages.
    max_new_tokens: an answer that has as many ends there, with finish reason `length`.
    device, threads: as of `OnnxModerator`.

    What a message holds is text and nothing else: the words `<|im_end|>` in it do not end a turn.
    Raises ArtifactError for a folder that is not whole, ValueError for options that cannot be.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_new_tokens: int = 256,
        device: Device = "cpu",
        threads: int | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
        self.folder = Path(folder)
        self.manifest = read_policy_manifest(self.folder)
        self.encoder = ChatEncoder(self.folder / "tokenizer.json", ChatFormat(**self.manifest.chat))
        self._temperature, self._top_p, self._seed = temperature, top_p, seed
        self._draw = 0
        self._max_new_tokens = max_new_tokens
        self._stop = frozenset(self.manifest.stop)
        path = self.folder / "model.onnx"
        self._session = Session(path, device, threads, outputs=("logits",))
        self._check_cache()
        self.device = self._session.device
        self._memory = "cpu" if self.device == "cpu" else "cuda"
        self._threaded = as_chat_model(self.stream)

    def complete(self, messages: str | Sequence[Message]) -> Reply:
        """The whole answer. Raises UpstreamError, ValueError on messages that are none."""
        pieces = list(self.stream(messages))
        return Reply("".join(piece.text for piece in pieces), pieces[-1].finish_reason)

    def stream(self, messages: str | Sequence[Message]) -> Iterator[Reply]:
        """The answer as it is made; pieces may be empty, and the last carries the finish reason.
        Closing the iterator ends the work."""
        prompt = self.encoder.encode(_read(messages))
        room = self.manifest.context - len(prompt)
        if room < 1:
            raise UpstreamError(
                f"the chat has {len(prompt)} tokens, and {self.manifest.id} reads "
                f"{self.manifest.context} with its answer: leave out earlier turns"
            )
        seed = self._seed if self._seed is None or self._draw == 0 else (self._seed, self._draw)
        rng = np.random.default_rng(seed)
        text = _Detokenizer(self.encoder.tokenizer)
        cache = self._empty_cache()
        for start in range(0, len(prompt), _CHUNK):
            logits, cache = self._step(prompt[start : start + _CHUNK], cache)
            yield Reply("")
        for _ in range(min(room, self._max_new_tokens)):
            token = draw(logits, self._temperature, self._top_p, rng)
            if token in self._stop:
                yield Reply("", "stop")
                return
            if piece := text.push(token):
                yield Reply(piece)
            logits, cache = self._step([token], cache)
        yield Reply("", "length")

    def redrawn(self, draw: int) -> OnnxChat:
        """The same model for answer `draw` (1, 2, ...) to messages it has answered: it draws from
        another seed, made of its own and `draw`."""
        other = copy.copy(self)
        other._draw = draw
        other._threaded = as_chat_model(other.stream)
        return other

    async def acomplete(self, messages: str | Sequence[Message]) -> Reply:
        """`complete`, in threads."""
        return await self._threaded.acomplete(_read(messages))

    def astream(self, messages: str | Sequence[Message]) -> AsyncIterator[Reply]:
        """`stream`, in threads. Closing it ends the work with the token under way."""
        return self._threaded.astream(_read(messages))

    def _check_cache(self) -> None:
        """Raises ArtifactError where the model has another cache than the manifest says."""
        size = self.manifest.cache
        inputs = self._session.here().get_inputs()
        found = [given.shape[1::2] for given in inputs if given.name.startswith("past_")]
        each = [size["kv_heads"], size["head"]]
        if len(found) != 2 * size["layers"] or any(shape != each for shape in found):
            raise ArtifactError(
                f"{self.folder / 'manifest.json'}: says cache {size}, and model.onnx has another: "
                "`make policy` builds both anew"
            )

    def _empty_cache(self) -> dict[str, Any]:
        from onnxruntime import OrtValue

        size = self.manifest.cache
        empty = np.zeros((1, size["kv_heads"], 0, size["head"]), np.float32)
        return {
            f"past_{what}_{i}": OrtValue.ortvalue_from_numpy(empty, self._memory)
            for i in range(size["layers"])
            for what in ("key", "value")
        }

    def _step(
        self, ids: Sequence[int], cache: Mapping[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Read `ids` after what the cache holds: logits (vocabulary,) of what follows the last, and
        the grown cache, which stays on the device."""
        session = self._session.here()
        bound = session.io_binding()
        bound.bind_cpu_input("input_ids", np.array([ids], np.int64))
        bound.bind_cpu_input("keep", np.array([1], np.int64))
        for name, value in cache.items():
            bound.bind_ortvalue_input(name, value)
            bound.bind_output(name.replace("past", "present"), self._memory)
        bound.bind_output("logits", "cpu")
        try:
            session.run_with_iobinding(bound)
        except Exception as error:  # onnxruntime raises classes of its own, none public
            raise UpstreamError(f"{self.manifest.id}: inference failed: {error}") from error
        *grown, logits = bound.get_outputs()
        found: NDArray[np.float32] = logits.numpy()[0, -1]
        if not np.isfinite(found).all():
            raise UpstreamError(f"{self.manifest.id}: the model gave a value that is no number")
        return found, dict(zip(cache, grown, strict=True))


def _read(messages: str | Sequence[Message]) -> list[Message]:
    """`read_messages`; also raises ValueError on a part that is no text, which would be lost."""
    found = read_messages(messages)
    if (strange := not_text(found)) is not None:
        raise ValueError(f"{strange}, and this model reads only text: leave it out")
    return found


def draw(
    logits: NDArray[np.float32], temperature: float, top_p: float, rng: np.random.Generator
) -> int:
    """A token from logits (vocabulary,): the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) - logits.max()
    # A tiny temperature may overflow to -inf, which exp takes to the 0 it should be.
    with np.errstate(over="ignore"):
        shares = np.exp(scaled / temperature)
    order = np.argsort(-shares, kind="stable")
    mass = np.cumsum(shares[order])
    kept = int(np.searchsorted(mass, top_p * mass[-1])) + 1
    place = np.searchsorted(mass[:kept], rng.random() * mass[min(kept, len(mass)) - 1], "right")
    return int(order[min(place, kept - 1, len(order) - 1)])


class ChatEncoder:
    """Turns a chat into token ids. Special tokens come from the format alone: what a message holds
    is encoded as the text it is."""

    def __init__(self, tokenizer: Path, chat: ChatFormat) -> None:
        try:
            self.tokenizer: Any = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{tokenizer}: not a readable tokenizer: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        added = self.tokenizer.get_added_tokens_decoder()
        self._special = {t.content: n for n, t in added.items() if t.special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._chat = chat

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to and with what opens the answer. Raises UpstreamError."""
        ids: list[int] = []
        text = ""
        for piece, is_format in self._chat.pieces(messages):
            parts = self._split.split(piece) if is_format else [piece]
            for i, part in enumerate(parts):
                if i % 2:  # a special token
                    ids += [*self._ids(text), self._special[part]]
                    text = ""
                else:
                    text += part
        return ids + self._ids(text)

    def _ids(self, text: str) -> list[int]:
        # Half of a surrogate pair, which JSON can say and the tokenizer cannot, becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found


class _Detokenizer:
    """Tokens to text, piece by piece: a character comes out when its last byte is there, and one
    that never ends does not come out at all."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # a token's text may depend on the one before: a space, say
        self._given = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        now = self._tokenizer.decode(self._ids[self._context :])
        if now == before:  # a special token: between two words it must not stand for their space
            self._ids.pop()
            return ""
        if now.endswith("\ufffd") and len(self._ids) - self._given < _UNFINISHED:
            return ""
        self._context, self._given = self._given, len(self._ids)
        return str(now[len(before) :])
