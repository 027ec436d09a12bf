"""What the two guarded APIs of `openai` share, sans-IO: the steps, the input, the judging of texts.

A flow is a generator that yields steps and is sent what came of them; `_openai_client` runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

from guardrail._json_text import parsed
from guardrail._judging import Judging, judge_strings
from guardrail._messages import read_messages
from guardrail._names import is_identifier, plain_name
from guardrail.chat_model import Message
from guardrail.conversation import (
    Check,
    Close,
    Pull,
    Rules,
    asked,
    judge_input,
)
from guardrail.errors import Blocked, GuardrailError, UpstreamError
from guardrail.refusals import refusal_text
from guardrail.taxonomy import Direction
from guardrail.verdict import Verdict

__all__ = [
    "ALTERNATIVES",
    "END",
    "Api",
    "Ask",
    "Give",
    "UnfitError",
    "bare",
    "is_opaque",
    "judge_data",
    "judge_messages",
    "known",
    "list_of",
    "named",
    "of_upstream",
    "strings",
]

T = TypeVar("T")
S = TypeVar("S")
P = ParamSpec("P")
# Made by the API, never by the model; noise to a moderator, as long as they hold one word.
_OPAQUE = {"id", "call_id", "item_id", "encrypted_content", "index", "status", "type"}
_NO_NAME = {"id": "", "model": ""}  # what many a caller takes for a string
_MODEL_MADE = {"arguments", "input"}  # in these, every name and value is the model's
ALTERNATIVES = "top_logprobs name words that were never judged: leave it out; logprobs work alone"

END: Any = object()  # answers a Pull where nothing comes any more; None is what some server sent


class UnfitError(ValueError):
    """What a request says in its field `param` cannot be judged, or has no meaning."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Give:
    """Give `item` (a chunk or an event) to the caller. Send None."""

    item: Any


Flow = Generator[Check | Pull | Close | Give, Any, None]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its body as it may be sent, and the verdict on it (None: nothing was sent)."""

    body: Mapping[str, Any]
    prompt: str
    verdict: Verdict | None
    ok: bool
    rules: Rules

    @property
    def note(self) -> dict[str, Any] | None:
        return self.verdict.to_json() if self.verdict else None

    @property
    def structured(self) -> bool:
        """Whether the answer is to be JSON of a schema. The stream helpers of `openai` parse it
        while it comes, so that a refusal must not stand in its place."""
        text = self.body.get("text")
        form = text.get("format") if isinstance(text, Mapping) else None
        form = self.body.get("response_format") or form
        return isinstance(form, Mapping) and form.get("type") == "json_schema"

    def refusal(self, verdict: Verdict) -> str:
        """The refusal text; raises Blocked where asked to."""
        if self.rules.on_block == "raise":
            raise Blocked(verdict)
        return refusal_text(verdict, self.rules.policy)

    def unjudged(self, kind: object, where: str = "") -> Verdict:
        """The verdict on what is of a `kind` that cannot be read; it quotes no text of the API."""
        what = repr(kind) if kind is None or plain_name(kind) else "a text"
        return self.rules.policy.fail(
            Direction.OUTPUT, f"only text can be judged, not what is of type {what}{where}"
        )


@dataclass(frozen=True, slots=True)
class Api:
    """One API: how its requests are read, its answers judged, its refusals written."""

    answer_type: type[Any]
    read: Callable[[Mapping[str, Any], Rules], Judging[Ask]]
    judge: Callable[[Ask, Any], Judging[Any]]
    stream: Callable[[Ask], Flow]
    refused: Callable[[Ask], Any]
    refused_stream: Callable[[Ask], Iterable[Any]]


def of_upstream(
    flow: Callable[P, Generator[S, Any, T]],
) -> Callable[P, Generator[S, Any, T]]:
    """The door of what an API says. The `openai` package builds its objects from any JSON without
    a look at it, so that a flow may meet anything in any place: what it cannot read is an
    UpstreamError, the cause of which says where."""

    @functools.wraps(flow)
    def guarded(*args: P.args, **options: P.kwargs) -> Generator[S, Any, T]:
        try:
            return (yield from flow(*args, **options))
        except GuardrailError:
            raise
        except Exception as error:  # of the flow alone: it does nothing but read
            raise UpstreamError(
                "the API's answer does not have the shape that its kind has, so that it cannot be "
                f"judged ({type(error).__name__}): look at what it says without the guard"
            ) from error

    return guarded


def list_of(body: Mapping[str, Any], name: str) -> Sequence[Any]:
    """The list under `name` in a request; none is an empty one. Raises UnfitError."""
    value = body.get(name)
    if not isinstance(value, list | tuple | None):
        raise UnfitError(name, f"{name} must be a list, not {type(value).__name__}")
    return value or ()


def judge_messages(
    messages: Sequence[Message], rules: Rules
) -> Judging[tuple[list[Message], str, Verdict, bool]]:
    """The messages to send on, the prompt in them, the verdict, and whether they may be sent.

    Raises ValueError on what are no messages, and on an unknown role: a server may take it for
    the user's.
    """
    # A tool loop, or a system prompt alone, is a lawful request in which there is no user text.
    has_user = any(isinstance(m, Mapping) and m.get("role") == "user" for m in messages)
    turns = read_messages([*messages, *([] if has_user else [{"role": "user", "content": ""}])])
    flow = judge_input(turns, rules)
    step = next(flow)
    while True:
        assert isinstance(step, Check)  # judging an input takes nothing else
        verdicts = yield step
        try:
            step = flow.send(verdicts)
        except StopIteration as end:
            turns, verdict, ok = end.value
            break
    prompt = asked(turns, rules.context_turns)
    return turns if has_user else turns[:-1], prompt, verdict, ok


def known(model: Any, /, **update: Any) -> Any:
    """A copy of a pydantic model without what its class does not know: that was not judged."""
    copy = model.model_copy()
    if copy.model_extra:
        copy.model_extra.clear()
    return copy.model_copy(update=update)


def named(model: Any, /, **update: Any) -> Any:
    """`known` at any depth, and without the texts that stand where a name belongs; for what an
    API writes around an answer. `update` goes out as it is."""
    fields = model.model_fields_set - update.keys()
    said = {name: bare(name, value) for name, value in vars(model).items() if name in fields}
    return known(model, **said, **update)


def bare(name: str, value: Any) -> Any:
    """The value of a field that an API writes around an answer: names, numbers, and no text."""
    match value:
        case str():
            return value if is_word(name, value) else _NO_NAME.get(name)
        case BaseModel():
            return named(value)
        case list():  # of words, it would be a text
            return [bare(name, part) for part in value if not isinstance(part, str)] or None
        case Mapping():
            return {key: bare(key, part) for key, part in value.items() if is_word("", key)}
    return value


def judge_data(ask: Ask, value: Any) -> Judging[Verdict]:
    """The verdict on all strings in JSON data, the names of its keys included."""
    return (yield from judge_strings(ask.prompt, list(strings(value)), ask.rules.stream))


def is_word(name: str, value: str) -> bool:
    """Whether what an API says in its field `name` is one word, which tells nobody anything: a
    name, an id, which may be long, or the ciphertext of what nobody can read, of any length."""
    limit = None if name == "encrypted_content" else 512 if name.endswith("id") else 128
    return is_identifier(value, limit)


def is_opaque(name: str, value: Any) -> bool:
    """Whether this field was made by the API, and holds no text."""
    plain = isinstance(value, int | float) or (isinstance(value, str) and is_word(name, value))
    return name in _OPAQUE and (value is None or plain)


def strings(value: Any, *, made: bool = False) -> Iterator[str]:
    """The texts in JSON data; a string that is itself JSON (a tool call's arguments) is read, for
    escapes such as `\\u0062` hide words from a moderator."""
    if isinstance(value, str):
        inner = parsed(value)
        if inner is None:
            yield value
        else:
            yield from strings(inner, made=True)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if made or not is_opaque(name, part):
                yield from (name, *strings(part, made=made or name in _MODEL_MADE))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings(part, made=made)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
