"""What stands behind a guarded chat: the `ChatModel` protocol, and what is made into one.

A callable takes the messages and returns a str, or an iterator of str, or the async twin of
either. Sync ones are run in threads when they are called asynchronously.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from guardrail._names import plain_name
from guardrail.errors import UpstreamError

__all__ = [
    "ChatModel",
    "Message",
    "Reply",
    "aclose",
    "as_chat_model",
    "as_reply",
    "close",
    "drawn",
    "finish_reason",
]

logger = logging.getLogger("guardrail")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or a piece of one; the last piece carries the finish reason."""

    text: str
    finish_reason: str | None = None


@runtime_checkable
class ChatModel(Protocol):
    """A chat model. May raise UpstreamError. Closing an iterator cancels the answer."""

    def complete(self, messages: Sequence[Message]) -> Reply: ...

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]: ...

    async def acomplete(self, messages: Sequence[Message]) -> Reply: ...

    def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]: ...


def finish_reason(said: object) -> str | None:
    """The finish reason in an API's answer, None where there is none. One that is no plain name is
    a text, which nobody judged: it is read as `stop`."""
    return plain_name(said) or "stop" if said else None


def drawn(model: ChatModel, draw: int) -> ChatModel:
    """The model that gives one of several answers to the same messages: `model.redrawn(draw)`,
    where it has that, for a seeded one would give the first again; else the model itself."""
    redrawn = getattr(model, "redrawn", None)
    return model if redrawn is None or draw == 0 else cast(ChatModel, redrawn(draw))


def as_chat_model(model: ChatModel | Callable[[list[Message]], Any]) -> ChatModel:
    """A ChatModel as it is, a LangChain chat model or a callable made into one. Raises TypeError
    for anything else."""
    if isinstance(model, ChatModel):
        return model
    if _is_langchain_model(model):
        from guardrail._langchain_model import LangChainModel

        return LangChainModel(cast(Any, model))
    if callable(model):
        return _CallableModel(model)
    raise TypeError(
        f"a chat model is a callable, a LangChain chat model, or has complete, stream, acomplete "
        f"and astream; {type(model).__name__} is none of these"
    )


def _is_langchain_model(model: Any) -> bool:
    """By the names of its classes: LangChain is not imported to ask."""
    return any(
        base.__name__ == "BaseChatModel" and base.__module__.startswith("langchain_core.")
        for base in type(model).__mro__
    )


class _CallableModel:
    def __init__(self, function: Callable[[list[Message]], Any]) -> None:
        self._function = function
        call = function if inspect.isroutine(function) else type(function).__call__
        self._is_async = inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)

    def complete(self, messages: Sequence[Message]) -> Reply:
        return _joined(list(self.stream(messages)))

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        answer = None if self._is_async else self._call(messages)
        if inspect.iscoroutine(answer):
            answer.close()
        if self._is_async or isinstance(answer, Awaitable | AsyncIterator):
            raise UpstreamError("this chat model is async: call acomplete() or astream()")
        yield from _pieces(answer)

    async def acomplete(self, messages: Sequence[Message]) -> Reply:
        return _joined([piece async for piece in self.astream(messages)])

    async def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]:
        if self._is_async:
            answer = self._function(list(messages))
        else:
            answer = await asyncio.to_thread(self._call, messages)
        if isinstance(answer, Awaitable):
            answer = await answer
        if isinstance(answer, AsyncIterator):
            try:
                async for piece in answer:
                    yield as_reply(piece)
            finally:
                await aclose(answer)
            return
        pieces = _Threaded(_pieces(answer))
        try:
            while (reply := await asyncio.to_thread(pieces.next)) is not None:
                yield reply
        finally:
            # Not awaited: a cancelled caller does not wait for the piece that is being made.
            threading.Thread(target=pieces.close, daemon=True).start()

    def _call(self, messages: Sequence[Message]) -> Any:
        try:
            return self._function(list(messages))
        except StopIteration as error:  # no thread can hand one on: the caller would wait for ever
            raise UpstreamError(
                "the chat model failed: it raised StopIteration, as next() does at the end of an "
                "iterator"
            ) from error


class _Threaded:
    """A generator that is advanced in one thread and may be closed from another."""

    def __init__(self, pieces: Iterator[Reply]) -> None:
        self._pieces = pieces
        self._lock = threading.Lock()
        self._closed = False

    def next(self) -> Reply | None:
        with self._lock:
            return None if self._closed else next(self._pieces, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._pieces.close()  # type: ignore[attr-defined]


def _pieces(answer: object) -> Iterator[Reply]:
    if isinstance(answer, str | Reply):
        yield as_reply(answer)
    elif isinstance(answer, Iterable) and not isinstance(answer, Mapping):  # its names are no text
        try:
            for piece in answer:
                yield as_reply(piece)
        finally:
            close(answer)
    else:
        as_reply(answer)


def as_reply(piece: object) -> Reply:
    """What a model gave as a piece of its answer. Raises UpstreamError for what is none."""
    if isinstance(piece, str):
        return Reply(piece)
    if isinstance(piece, Reply) and isinstance(piece.text, str):
        return piece
    if inspect.iscoroutine(piece):
        piece.close()
    what = (
        f"Reply({type(piece.text).__name__})" if isinstance(piece, Reply) else type(piece).__name__
    )
    raise UpstreamError(f"the chat model answered with {what}: it must give str, or str in pieces")


def close(pieces: object) -> None:
    """Close a model's answer, where it can be closed. What was judged of it stands: that closing
    fails is logged."""
    try:
        if (closes := getattr(pieces, "close", None)) is not None:
            closes()
    except Exception as error:
        _not_closed(error)


async def aclose(pieces: object) -> None:
    """`close`, async."""
    try:
        if (closes := getattr(pieces, "aclose", None)) is not None:
            await closes()
    except Exception as error:
        _not_closed(error)


def _not_closed(error: Exception) -> None:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning("the chat model failed when its answer was closed: %s", what)


def _joined(pieces: Sequence[Reply]) -> Reply:
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
    return Reply("".join(piece.text for piece in pieces), reasons[-1] if reasons else None)
