"""LangChain messages to and from what the guard's protocol speaks. Opens nothing.

An answer has a part that can stream, its text, and parts that are judged whole before they go out:
tool calls, reasoning, and whatever else a message can hold. `Answer` keeps them apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    SystemMessage,
    ToolMessage,
    message_chunk_to_message,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk

from guardrail._judging import judge_strings
from guardrail._langchain_metadata import safe_metadata, safe_usage, token
from guardrail._langchain_words import ahead_of_text, not_words, other_blocks, words
from guardrail._names import is_token, plain_name
from guardrail.chat_model import Message, Reply
from guardrail.conversation import ChatResult, Check, Close, Emit, Open, Pull, Step
from guardrail.errors import UpstreamError
from guardrail.policy import Policy
from guardrail.stream import StreamConfig
from guardrail.taxonomy import Direction
from guardrail.verdict import Action, Pair, Verdict

__all__ = ["Answer", "all_words", "from_turns", "to_turns"]

# --- input ---------------------------------------------------------------------------------------

_ORIGIN = "langchain"
_ROLES = {"assistant", "developer", "function", "system", "tool"}


def to_turns(messages: Iterable[BaseMessage]) -> list[Message]:
    """The messages as the protocol reads them, each with the one that it came from. A role that
    is not known counts as the user's, so that it is judged."""
    return [{"role": _role(m), "content": _content(m), _ORIGIN: m} for m in messages]


def from_turns(turns: Iterable[Message]) -> list[BaseMessage]:
    """Those same messages, but for the text of those that the protocol masked, and with the system
    message that it may have added."""
    return [_back(turn) for turn in turns]


def _role(message: BaseMessage) -> str:
    match message:
        case AIMessage():
            return "assistant"
        case SystemMessage():
            return "system"
        case ToolMessage() | FunctionMessage():
            return "tool"
        case ChatMessage(role=role) if role in _ROLES:
            return role
    return "user"


def _content(message: BaseMessage) -> str | list[Any]:
    if isinstance(message, AIMessage):  # its other parts were judged when the model said them
        return str(message.text)
    if isinstance(message.content, str):
        return message.content
    return [{"type": "text", "text": p} if isinstance(p, str) else p for p in message.content]


def _back(turn: Message) -> BaseMessage:
    origin: BaseMessage | None = turn.get(_ORIGIN)
    content = turn["content"]
    if origin is None:
        return SystemMessage(content)
    if content == _content(origin):
        return origin
    if isinstance(origin.content, list) and isinstance(origin, AIMessage):
        content = [{"type": "text", "text": content}, *other_blocks(origin)]
    return origin.model_copy(update={"content": content})


# --- output --------------------------------------------------------------------------------------


@dataclass
class _Draw:
    """One answer of the model, as far as it has come."""

    whole: AIMessage | None = None
    text: str = ""
    meta: AIMessageChunk = field(default_factory=lambda: AIMessageChunk(content=""))
    block: dict[str, Any] | None = None  # the text block that deltas belong to
    held: list[AIMessageChunk] = field(default_factory=list)
    complete: int = 0  # held[:complete] has been followed by text, or by the end
    judged: list[AIMessageChunk] = field(default_factory=list)

    def drop_held(self) -> None:
        self.held, self.complete, self.judged = [], 0, []


class Answer:
    """One guarded answer: takes the model's pieces, gives out what was judged.

    plain: give out str, not messages; set by the first piece that is a str.
    """

    def __init__(self, policy: Policy, config: StreamConfig, *, plain: bool = False) -> None:
        self._policy = policy
        self._config = config
        self._plain = plain
        self._draws: dict[int, _Draw] = {}
        self._now = _Draw()

    # --- in

    def take(self, piece: object) -> Reply:
        """A piece of the model's answer; what is returned of it is the text to judge.
        Raises UpstreamError for a piece that is neither a message of the model nor a str."""
        if isinstance(piece, str):
            self._plain = True
            self._now.text += piece
            return Reply(piece)
        if not isinstance(piece, AIMessage):
            raise UpstreamError(
                f"a guarded chain must answer with str or AIMessage, not {type(piece).__name__}"
            )
        if not isinstance(piece, AIMessageChunk):
            self._now.whole = piece
            piece = _as_chunk(piece)
        text = str(piece.text)
        ahead = ahead_of_text(piece) if text else []
        if ahead:
            self._now.held.append(AIMessageChunk(content=ahead, id=token(piece.id)))
        if text:
            self._now.complete = len(self._now.held)
            self._now.block = _text_block(piece)
        if (rest := _without_text(piece, len(ahead))) is not None:
            self._now.held.append(rest)
        self._now.text += text
        self._now.meta += AIMessageChunk(
            content="",
            id=token(piece.id),
            name=piece.name,
            response_metadata=piece.response_metadata,
            usage_metadata=_usage(piece),
        )
        metadata = piece.response_metadata
        return Reply(text, metadata.get("finish_reason") or metadata.get("stop_reason"))

    def guard(self, flow: Generator[Step, Any, ChatResult]) -> Generator[Step, Any, ChatResult]:
        """`flow`, with what is held judged beside the text, as soon as it is complete."""
        answer: Any = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            match step:
                case Open(_, draw):
                    self._now = self._draws[draw] = _Draw()
                case Emit(_, int() as draw):
                    self._now = self._draws[draw]
                case Close():
                    self._now.drop_held()
                case Check([Pair(prompt, str()), *_] as pairs) if self._now.complete:
                    held = self._now.held[: self._now.complete]
                    [text] = yield Check(pairs)
                    rest = yield from judge_strings(prompt, words(_sum(held)), self._config)
                    answer = self._decide(held, text, rest)
                    continue
            answer = yield step
            if isinstance(step, Pull) and answer is None:
                self._now.complete = len(self._now.held)

    def _decide(self, held: list[AIMessageChunk], text: Verdict, rest: Verdict) -> list[Verdict]:
        if (strange := not_words(held)) is not None:
            rest = self._policy.fail(Direction.OUTPUT, strange)
        if rest.delivers:
            self._now.judged += held
            del self._now.held[: self._now.complete]
            self._now.complete = 0
        elif rest.action is Action.REDACT:  # a call with a hole in it is another call
            rest = dataclasses.replace(rest, action=Action.REFUSE)
        return [max(text, rest, key=lambda verdict: verdict.action.rank)]

    # --- out

    def emit(self, text: str) -> Iterator[AIMessageChunk | str]:
        """Judged text, and what was judged before it; but calls wait until all of it was."""
        if self._plain:
            yield text
            return
        calls = [i for i, chunk in enumerate(self._now.judged) if chunk.tool_call_chunks]
        ready = calls[0] if calls else len(self._now.judged)
        if ready:
            yield _sum(self._now.judged[:ready])
            del self._now.judged[:ready]
        content: Any = text if self._now.block is None else [{**self._now.block, "text": text}]
        yield AIMessageChunk(content=content, id=self._now.meta.id)

    def finish(self, result: ChatResult) -> Iterator[AIMessageChunk | str]:
        """The calls, and whatever else waited; metadata with `finish_reason` and the verdict."""
        if self._plain:
            return
        judged = [] if result.blocked else self._now.judged
        last = _sum([*judged, AIMessageChunk(content="", id=self._now.meta.id)])
        if not self._unchanged(result):  # they may quote what was masked
            last.additional_kwargs = {}
        yield last.model_copy(
            update={
                "response_metadata": self._metadata(result),
                "usage_metadata": self._now.meta.usage_metadata,
                "name": plain_name(self._now.meta.name),
                "chunk_position": "last",
            }
        )

    def joined(self, given: Sequence[tuple[AIMessageChunk | str, ChatResult | None]]) -> Any:
        """All that was `given`, with its result, as one: a str, or an AIMessage; the model's own
        where nothing of it was changed."""
        if self._plain:
            return "".join(str(piece) for piece, _ in given)
        result = given[-1][1]
        if self._now.whole is not None and result is not None and self._unchanged(result):
            return _judged_parts(self._now.whole, self._metadata(result))
        return message_chunk_to_message(
            _sum([piece for piece, _ in given if isinstance(piece, AIMessageChunk)])
        )

    def _unchanged(self, result: ChatResult) -> bool:
        return not result.blocked and result.text == self._now.text

    def _metadata(self, result: ChatResult) -> dict[str, Any]:
        said = safe_metadata(self._now.meta.response_metadata, result.text)
        if result.blocked:
            said = {**said, "finish_reason": "content_filter"}
        verdict = result.output_verdict or result.input_verdict
        return {**said, "guardrail": verdict.to_json()}


def _judged_parts(whole: AIMessage, metadata: dict[str, Any]) -> AIMessage:
    """A new message: the model's may have fields of its own, which nobody judged."""
    return AIMessage(
        content=whole.content,
        id=token(whole.id),
        name=plain_name(whole.name),
        tool_calls=whole.tool_calls,
        invalid_tool_calls=[
            {**call, "error": plain_name(call.get("error"))} for call in whole.invalid_tool_calls
        ],
        additional_kwargs=whole.additional_kwargs,
        response_metadata=metadata,
        usage_metadata=_usage(whole),
    )


def _sum(chunks: Sequence[AIMessageChunk]) -> AIMessageChunk:
    first, *others = chunks
    return first.__add__(others) if others else first.model_copy()


def _as_chunk(message: AIMessage) -> AIMessageChunk:
    calls = [(c["name"], json.dumps(c["args"]), c["id"]) for c in message.tool_calls]
    calls += [(c["name"] or "", c["args"] or "", c["id"]) for c in message.invalid_tool_calls]
    return AIMessageChunk(
        content=message.content,
        id=message.id,
        name=message.name,
        tool_call_chunks=[
            tool_call_chunk(name=name, args=args, id=call_id, index=i)
            for i, (name, args, call_id) in enumerate(calls)
        ],
        additional_kwargs=message.additional_kwargs,
        response_metadata=message.response_metadata,
        usage_metadata=_usage(message),
    )


def _usage(message: AIMessage) -> UsageMetadata | None:
    """Its usage; None for what an answer from a cache carries, which is none and does not add."""
    usage = safe_usage(message)
    return usage if usage is not None and "input_tokens" in usage else None


def _text_block(chunk: AIMessageChunk) -> dict[str, Any] | None:
    """The head of the block that the text of a chunk stands in; None where content is a str."""
    if isinstance(chunk.content, str):
        return None
    blocks = [b for b in chunk.content if isinstance(b, dict) and b.get("type") == "text"]
    head = blocks[-1] if blocks else {}
    return {
        "type": "text",
        **{k: head[k] for k in ("index", "id") if k in head and is_token(head[k])},
    }


def _without_text(chunk: AIMessageChunk, after: int = 0) -> AIMessageChunk | None:
    """All but its text, and but its first `after` other blocks; None where that is nothing."""
    blocks = other_blocks(chunk)[after:]
    if not (blocks or chunk.tool_call_chunks or chunk.additional_kwargs):
        return None
    return AIMessageChunk(
        content=blocks or "",
        id=token(chunk.id),
        tool_call_chunks=chunk.tool_call_chunks,
        additional_kwargs=chunk.additional_kwargs,
    )


def all_words(message: AIMessage) -> str:
    """Everything in words that an answer holds, its text first."""
    chunk = message if isinstance(message, AIMessageChunk) else _as_chunk(message)
    rest = _without_text(chunk)
    parts = [str(chunk.text), *(words(rest) if rest is not None else ())]
    return "\n".join(filter(None, parts))
