"""`GuardedChat`: a chat model behind a guard, its input and its output checked, streamed or not.

The protocol is `guardrail.conversation`; here are its two drivers, sync and async, and nothing
else that they could disagree on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from guardrail._messages import read_messages
from guardrail.chat_model import (
    ChatModel,
    Message,
    Reply,
    aclose,
    as_chat_model,
    as_reply,
    close,
    drawn,
)
from guardrail.conversation import (
    ChatResult,
    Check,
    Close,
    Emit,
    Open,
    Pull,
    Rank,
    Rules,
    Step,
    conversation,
)
from guardrail.errors import UpstreamError
from guardrail.guard import Guard, as_guard
from guardrail.stream import StreamConfig
from guardrail.verdict import Pair

if TYPE_CHECKING:
    from guardrail.score import BestOf

__all__ = ["AsyncChatStream", "ChatResult", "ChatStream", "GuardedChat"]

logger = logging.getLogger("guardrail")

_Flow = Generator[Step, Any, ChatResult]
_END: Any = object()  # of a model's pieces: None may be one, and a wrong one


class GuardedChat:
    """A chat model whose input and output pass a guard.

        chat = GuardedChat(model)
        result = chat.complete("Hello")                     # result.text, result.blocked
        for text in chat.stream(messages): ...

    model: a callable that takes the messages and returns a str or an iterator of str (or their
        async twins), a `ChatModel` such as `guardrail.upstream.OpenAICompatible` or
        `guardrail.local.OnnxChat`, or a LangChain chat model, of which the texts are taken.
    guard: `Guard()` by default.
    on_block: `refuse` answers with a refusal text, `raise` raises Blocked.
    context_turns: how many recent user turns are judged together, with the answers between them
        and without, beside the last one alone, so that an attack spread over turns is seen. Turns
        before them are sent on as they are. A refused turn that stays in the history is judged
        again with it: leave it out (`result.blocked`) if the chat is to go on.
    regenerate_tries: how often a model is asked again, with a safety instruction, when the policy
        says `regenerate` and nothing of its answer was released; then it is a refusal.
    best_of: how the answers of all these tries are compared (`guardrail.score.BestOf`): the best of
        those that may go out is given, at once. Without it, the first of them is.
    stream_config: how often a stream is judged.

    Actions: allow and flag deliver; redact masks the passages and goes on (the model, too, is sent
    the masked message), or refuses when what is left is still not deliverable; on an input,
    regenerate means refuse. Fails closed: what the guard cannot judge follows the policy's
    `on_error`. Thread-safe where the model is.

    Messages are a str (one user turn), or OpenAI-style dicts; only user and assistant messages are
    judged. The methods raise UpstreamError when the model fails, ValueError on messages that are
    none, and Blocked where asked to.
    """

    def __init__(
        self,
        model: ChatModel | Callable[[list[Message]], Any],
        guard: Guard | None = None,
        *,
        on_block: Literal["refuse", "raise"] = "refuse",
        context_turns: int = 4,
        regenerate_tries: int = 2,
        best_of: BestOf | None = None,
        stream_config: StreamConfig | None = None,
    ) -> None:
        if on_block not in ("refuse", "raise"):
            raise ValueError(f"on_block must be 'refuse' or 'raise', not {on_block!r}")
        if context_turns < 1 or regenerate_tries < 0:
            raise ValueError("context_turns must be 1 or more, regenerate_tries 0 or more")
        self._model = as_chat_model(model)
        self._guard = as_guard(guard)
        self._rules = Rules(
            self._guard.policy,
            stream_config or StreamConfig(),
            on_block,
            context_turns,
            regenerate_tries,
            best_of is not None,
        )
        self._best_of = best_of

    def complete(self, messages: str | Sequence[Message]) -> ChatResult:
        """The whole answer, judged as one."""
        stream = ChatStream(
            self._flow(messages, whole=True),
            self._guard,
            lambda step: iter([drawn(self._model, step.draw).complete(step.messages)]),
            self._best_of,
        )
        with stream:
            for _ in stream:
                pass
        return stream.result

    def stream(self, messages: str | Sequence[Message]) -> ChatStream:
        """The answer in pieces, each of them judged before it is given out."""
        return ChatStream(
            self._flow(messages),
            self._guard,
            lambda step: drawn(self._model, step.draw).stream(step.messages),
            self._best_of,
        )

    async def acomplete(self, messages: str | Sequence[Message]) -> ChatResult:
        """`complete`, without blocking the event loop."""

        async def once(step: Open) -> AsyncIterator[Reply]:
            yield await drawn(self._model, step.draw).acomplete(step.messages)

        flow = self._flow(messages, whole=True)
        async with AsyncChatStream(flow, self._guard, once, self._best_of) as stream:
            async for _ in stream:
                pass
        return stream.result

    def astream(self, messages: str | Sequence[Message]) -> AsyncChatStream:
        """`stream`, without blocking the event loop."""
        return AsyncChatStream(
            self._flow(messages),
            self._guard,
            lambda step: drawn(self._model, step.draw).astream(step.messages),
            self._best_of,
        )

    def _flow(self, messages: str | Sequence[Message], *, whole: bool = False) -> _Flow:
        rules = self._rules
        if whole:
            rules = dataclasses.replace(rules, stream=rules.stream.gathered())
        return conversation(read_messages(messages), rules)


class _Result:
    _result: ChatResult | None = None

    @property
    def result(self) -> ChatResult:
        """The whole of it; RuntimeError before the end."""
        if self._result is None:
            raise RuntimeError("the stream has no result before its end: read it to the end first")
        return self._result


class ChatStream(_Result):
    """Iterate it for the text; `result` holds the ChatResult after the end. `close()` (or leaving
    its `with` block) cancels the answer upstream. Nothing is called before the first iteration."""

    def __init__(
        self,
        flow: _Flow,
        guard: Guard,
        open_: Callable[[Open], Iterator[Reply]],
        best_of: BestOf | None = None,
    ) -> None:
        self._steps = self._drive(flow, guard, open_, best_of)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._steps)

    def close(self) -> None:
        self._steps.close()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drive(
        self,
        flow: _Flow,
        guard: Guard,
        open_: Callable[[Open], Iterator[Reply]],
        best_of: BestOf | None,
    ) -> Generator[str, None, None]:
        pieces: Iterator[Reply] = iter(())
        answer: Any = None
        try:
            while True:
                step = flow.send(answer)
                answer = None
                match step:
                    case Check(pairs):
                        answer = guard.check_many(pairs)
                    case Open():
                        with _upstream():
                            pieces = open_(step)
                    case Pull():
                        with _upstream():
                            answer = _pulled(next(pieces, _END))
                    case Close():
                        close(pieces)
                    case Rank(pairs):
                        answer = _scores(best_of, pairs)
                    case Emit(text):
                        yield text
        except StopIteration as end:
            self._result = end.value
        finally:
            close(pieces)


class AsyncChatStream(_Result):
    """`ChatStream` for `async for` and `async with`; `aclose()`, or the cancelling of the task that
    reads it, cancels the answer upstream."""

    def __init__(
        self,
        flow: _Flow,
        guard: Guard,
        open_: Callable[[Open], AsyncIterator[Reply]],
        best_of: BestOf | None = None,
    ) -> None:
        self._steps = self._drive(flow, guard, open_, best_of)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await anext(self._steps)

    async def aclose(self) -> None:
        await self._steps.aclose()

    async def __aenter__(self) -> AsyncChatStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _drive(
        self,
        flow: _Flow,
        guard: Guard,
        open_: Callable[[Open], AsyncIterator[Reply]],
        best_of: BestOf | None,
    ) -> AsyncGenerator[str, None]:
        pieces: AsyncIterator[Reply] | None = None
        answer: Any = None
        try:
            while True:
                step = flow.send(answer)
                answer = None
                match step:
                    case Check(pairs):
                        answer = await guard.acheck_many(pairs)
                    case Open():
                        with _upstream():
                            pieces = open_(step)
                    case Pull():
                        assert pieces is not None  # the protocol opens before it pulls
                        with _upstream():
                            answer = _pulled(await anext(pieces, _END))
                    case Close():
                        await aclose(pieces)
                    case Rank(pairs):
                        answer = await asyncio.to_thread(_scores, best_of, pairs)
                    case Emit(text):
                        yield text
        except StopIteration as end:
            self._result = end.value
        finally:
            await aclose(pieces)


@contextmanager
def _upstream() -> Iterator[None]:
    """Gives errors of the user's model the one class that callers have to know."""
    try:
        yield
    except UpstreamError:
        raise
    except Exception as error:
        raise UpstreamError(f"the chat model failed: {type(error).__name__}: {error}") from error


def _pulled(piece: object) -> Reply | None:
    return None if piece is _END else as_reply(piece)


def _scores(best_of: BestOf | None, pairs: list[Pair]) -> list[float]:
    """Each of the answers may go out, so that where they cannot be compared the first one does."""
    assert best_of is not None  # the protocol ranks where it was told to
    try:
        return best_of.scores(pairs)
    except Exception as error:
        logger.error("%d answers were not compared, the first is given: %s", len(pairs), error)
        return [0.0] * len(pairs)
