"""A LangChain chat model put into `GuardedChat` as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableLambda
from pydantic import Field

from guardrail import Category, Guard, GuardedChat, Severity, UpstreamError
from guardrail.testing import FakeModerator

WORDS = {"bomb": (Severity.SEVERE, Category.VIOLENCE)}


class Model(GenericFakeChatModel):
    """Streams its words, and remembers what it was asked."""

    asked: list[list[BaseMessage]] = Field(default_factory=list)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        self.asked.append(messages)
        return super()._generate(messages, *args, **kwargs)


class Calling(Model):
    def _stream(self, messages: Any, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        piece = {"name": "send", "args": '{"to', "id": "c1", "index": 0}
        yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[piece]))


def guarded(model: GenericFakeChatModel) -> GuardedChat:
    return GuardedChat(model, Guard(FakeModerator(WORDS)))


def ask(chat: GuardedChat, how: str, messages: Any) -> str:
    async def later() -> str:
        if how == "acomplete":
            return (await chat.acomplete(messages)).text
        return "".join([text async for text in chat.astream(messages)])

    if how == "complete":
        return chat.complete(messages).text
    return "".join(chat.stream(messages)) if how == "stream" else asyncio.run(later())


HOW = pytest.mark.parametrize("how", ["complete", "stream", "acomplete", "astream"])


@HOW
def test_its_answers_are_delivered_or_refused(how: str) -> None:
    model = Model(messages=iter(["Good day to you.", "How to build a bomb: first"]))
    chat = guarded(model)
    chat_so_far = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Greet me"},
    ]
    assert ask(chat, how, chat_so_far) == "Good day to you."
    assert [(m.type, m.content) for m in model.asked[0]] == [
        ("system", "Be brief."), ("human", "Hi"), ("ai", "Yes?"), ("human", "Greet me"),
    ]  # fmt: skip
    assert "bomb" not in ask(chat, how, "And now?")


@HOW
def test_no_callback_of_the_caller_sees_unjudged_text(how: str) -> None:
    class Tap(BaseCallbackHandler):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            self.heard.append(str(token))

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            self.heard.append(str(response))

    tap = Tap()
    chat = guarded(Model(messages=iter(["How to build a bomb: first"])))
    chain = RunnableLambda(lambda text: ask(chat, how, text))
    chain.invoke("Hi", {"callbacks": [tap]})
    assert not any("bomb" in heard for heard in tap.heard)


@HOW
def test_a_tool_call_is_an_error_that_names_the_way_out(how: str) -> None:
    call = {"name": "send", "args": {}, "id": "c1"}
    model = Calling(messages=iter([AIMessage("", tool_calls=[call])]))
    with pytest.raises(UpstreamError, match=r"use guardrail\.langchain\.GuardedChatModel"):
        ask(guarded(model), how, "Hi")


@pytest.mark.parametrize(("said", "told"), [("length", "length"), ("a bomb is built so", "stop")])
def test_a_finish_reason_that_is_a_text_is_not_handed_on(said: str, told: str) -> None:
    message = AIMessage("Good day.", response_metadata={"finish_reason": said})
    result = guarded(Model(messages=iter([message]))).complete("Hi")
    assert (result.text, result.finish_reason) == ("Good day.", told)
