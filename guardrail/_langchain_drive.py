"""Runs one guarded answer over a LangChain model or chain, sync and async.

What runs behind the guard runs detached: it sees none of the caller's callbacks, so that no event
of its own (`astream_events`, LangGraph's `messages` mode) carries text that was not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, var_child_runnable_config

from guardrail._langchain_answer import Answer, from_turns, to_turns
from guardrail._messages import read_messages
from guardrail.chat import AsyncChatStream, ChatStream
from guardrail.chat_model import Reply
from guardrail.conversation import ChatResult, Open, Rules, conversation
from guardrail.errors import UpstreamError
from guardrail.guard import Guard
from guardrail.stream import StreamConfig

if TYPE_CHECKING:
    from guardrail.score import BestOf

__all__ = ["Piece", "Run", "detached_config"]

Piece = AIMessageChunk | str
_END: Any = object()  # of a chain's pieces: None may be one, and a wrong one


def detached_config(config: RunnableConfig | None = None) -> RunnableConfig:
    """`config`, or what is inherited from the caller, without its callbacks."""
    seen = ensure_config(config)
    seen.pop("run_id", None)
    seen.pop("run_name", None)
    return {**seen, "callbacks": [], "tags": [*(seen.get("tags") or []), "nostream"]}


@dataclass(frozen=True, slots=True)
class Run:
    """How conversations are guarded; `GuardedChatModel` says what each option means."""

    guard: Guard
    on_block: Literal["refuse", "raise"] = "refuse"
    context_turns: int = 4
    regenerate_tries: int = 2
    stream_config: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    best_of: BestOf | None = None

    def __post_init__(self) -> None:
        if self.on_block not in ("refuse", "raise"):
            raise ValueError(f"on_block must be 'refuse' or 'raise', not {self.on_block!r}")
        if self.context_turns < 1 or self.regenerate_tries < 0:
            raise ValueError("context_turns must be 1 or more, regenerate_tries 0 or more")

    def rules(self, *, whole: bool = False) -> Rules:
        """whole: for an answer that is not streamed."""
        config = self.stream_config.gathered() if whole else self.stream_config
        return Rules(
            self.guard.policy,
            config,
            self.on_block,
            self.context_turns,
            self.regenerate_tries,
            self.best_of is not None,
        )

    def answer(self, *, plain: bool = False) -> Answer:
        return Answer(self.guard.policy, self.stream_config, plain=plain)

    def stream(
        self,
        messages: Sequence[BaseMessage],
        open_: Callable[[list[BaseMessage]], Iterator[object]],
        answer: Answer,
        *,
        whole: bool = False,
    ) -> Iterator[tuple[Piece, ChatResult | None]]:
        """The judged pieces; those after the text's end come with the result. Raises what the
        model raises, Blocked where asked to, ValueError on messages without a user's."""

        def pull(step: Open) -> Iterator[Reply]:
            with _detached():
                pieces = open_(from_turns(step.messages))
            try:
                while True:
                    with _detached():
                        piece = next(pieces, _END)
                    if piece is _END:
                        return
                    yield answer.take(piece)
            finally:
                with _detached():
                    if (close := getattr(pieces, "close", None)) is not None:
                        close()

        flow = conversation(read_messages(to_turns(messages)), self.rules(whole=whole))
        guarded = answer.guard(flow)
        with _errors_as_raised(), ChatStream(guarded, self.guard, pull, self.best_of) as stream:
            for text in stream:
                for piece in answer.emit(text):
                    yield piece, None
        for piece in answer.finish(stream.result):
            yield piece, stream.result

    async def astream(
        self,
        messages: Sequence[BaseMessage],
        open_: Callable[[list[BaseMessage]], AsyncIterator[object]],
        answer: Answer,
        *,
        whole: bool = False,
    ) -> AsyncIterator[tuple[Piece, ChatResult | None]]:
        """`stream`, without blocking the event loop."""

        async def pull(step: Open) -> AsyncIterator[Reply]:
            with _detached():
                pieces = open_(from_turns(step.messages))
            try:
                while True:
                    with _detached():
                        piece = await anext(pieces, _END)
                    if piece is _END:
                        return
                    yield answer.take(piece)
            finally:
                with _detached():
                    if (aclose := getattr(pieces, "aclose", None)) is not None:
                        await aclose()

        flow = conversation(read_messages(to_turns(messages)), self.rules(whole=whole))
        with _errors_as_raised():
            guarded = answer.guard(flow)
            async with AsyncChatStream(guarded, self.guard, pull, self.best_of) as stream:
                async for text in stream:
                    for piece in answer.emit(text):
                        yield piece, None
        for piece in answer.finish(stream.result):
            yield piece, stream.result


@contextmanager
def _detached() -> Iterator[None]:
    # Never held over a yield: a generator shares the context of whoever advances it.
    token = var_child_runnable_config.set(detached_config())
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


@contextmanager
def _errors_as_raised() -> Iterator[None]:
    # `with_retry` and `with_fallbacks` choose by the class of the model's own errors.
    try:
        yield
    except UpstreamError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
