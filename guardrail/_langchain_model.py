"""A LangChain chat model as a `ChatModel`, so that `GuardedChat` takes one as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from guardrail._langchain_drive import detached_config
from guardrail.chat_model import Message, Reply, finish_reason
from guardrail.errors import UpstreamError

__all__ = ["LangChainModel"]


class LangChainModel:
    """Its texts, and nothing else: an answer with tool calls is an UpstreamError, for they could
    not be handed on. It runs without the caller's callbacks, which would see unjudged text."""

    def __init__(self, inner: BaseChatModel) -> None:
        self._inner = inner

    def complete(self, messages: Sequence[Message]) -> Reply:
        return _reply(self._inner.invoke(_turns(messages), detached_config()))

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        pieces = self._inner.stream(_turns(messages), detached_config())
        try:
            for piece in pieces:
                yield _reply(piece)
        finally:
            if (close := getattr(pieces, "close", None)) is not None:
                close()

    async def acomplete(self, messages: Sequence[Message]) -> Reply:
        return _reply(await self._inner.ainvoke(_turns(messages), detached_config()))

    async def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]:
        pieces = self._inner.astream(_turns(messages), detached_config())
        try:
            async for piece in pieces:
                yield _reply(piece)
        finally:
            if (aclose := getattr(pieces, "aclose", None)) is not None:
                await aclose()


def _turns(messages: Sequence[Message]) -> list[dict[str, object]]:
    return [dict(message) for message in messages]


def _reply(message: BaseMessage) -> Reply:
    calls = ("tool_calls", "invalid_tool_calls", "tool_call_chunks")
    if any(getattr(message, name, None) for name in calls):
        raise UpstreamError(
            "the model called a tool, and GuardedChat hands on text alone: use "
            "guardrail.langchain.GuardedChatModel(inner=model), which guards tool calls too"
        )
    return Reply(str(message.text), finish_reason(message.response_metadata.get("finish_reason")))
