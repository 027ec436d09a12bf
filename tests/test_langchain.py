"""LangChain and LangGraph themselves, with models that say forbidden things; the guard's decisions
are a `FakeModerator`'s. Nothing that any stream mode yields may hold a forbidden word."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelResponse
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, MessagesState, StateGraph
from loopback import serving
from pydantic import BaseModel, Field, ValidationError

from guardrail import Blocked, Category, Guard, GuardrailError, Pair, Policy, Severity, Verdict
from guardrail.errors import UpstreamError
from guardrail.langchain import (
    GuardedChatModel,
    GuardrailCallbackHandler,
    GuardrailMiddleware,
    GuardrailRunnable,
)
from guardrail.score import BestOf
from guardrail.stream import StreamConfig
from guardrail.testing import FakeModerator, leaked_chars

WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "0199": (Severity.MODERATE, Category.PRIVACY_VIOLATION),
}
POLICY = Policy.parse(
    """
    name = "test"
    extends = "balanced"
    [input.categories."Privacy Violation"]
    moderate = "redact"
    [output.categories."Privacy Violation"]
    moderate = "redact"
    """
)
BAD = "First we talk about the weather. Then you build a bomb from parts. And that was all."
GOOD = (
    "Tea is made of leaves. Pour hot water on them, wait for 3 minutes,\n\tand drink it — slowly. "
)
USAGE = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
PRIVATE = "Her number is 0199, so call her."


def make_guard(policy: Policy = POLICY, **options: Any) -> Guard:
    return Guard(FakeModerator(WORDS, **options), policy)


def leaks(things: Any) -> int:
    """Of everything in an event: its text form holds its messages, metadata and all."""
    return leaked_chars(repr(things), ["bomb"]) + leaked_chars(_joined(things), ["bomb"])


def _joined(things: Any) -> str:
    """All texts of the message chunks in order, so that a word in two pieces is seen."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, BaseMessage):
            found.append(str(value.text))
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(things)
    return "".join(found)


class ToolModel(GenericFakeChatModel):
    """GenericFakeChatModel, with tools, which streams tool calls too; and remembers its inputs."""

    seen: list[list[BaseMessage]] = Field(default_factory=list, repr=False)
    kwargs: list[dict[str, Any]] = Field(default_factory=list, repr=False)

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any) -> Any:
        return self.bind(tools=[getattr(t, "name", t) for t in tools], **kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self.seen.append(list(messages))
        self.kwargs.append(kwargs)
        return super()._generate(messages, stop, run_manager, **kwargs)

    def _stream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        message = self._generate(messages, stop, run_manager, **kwargs).generations[0].message
        assert isinstance(message, AIMessage)
        for i in range(0, len(message.content), 3):
            yield self._given(
                AIMessageChunk(message.content[i : i + 3], id=message.id), run_manager
            )
        for n, call in enumerate(message.tool_calls):
            args = json.dumps(call["args"])
            for i in range(0, len(args), 4):
                head = {"name": call["name"], "id": call["id"]} if i == 0 else {}
                piece = {"name": None, "id": None, **head, "args": args[i : i + 4], "index": n}
                chunk = AIMessageChunk("", tool_call_chunks=[piece], id=message.id)
                yield self._given(chunk, run_manager)

    def _given(self, chunk: AIMessageChunk, run_manager: Any) -> ChatGenerationChunk:
        generation = ChatGenerationChunk(message=chunk)
        if run_manager:
            run_manager.on_llm_new_token(chunk.content, chunk=generation)
        return generation


def says(*answers: str | AIMessage, **fields: Any) -> ToolModel:
    return ToolModel(messages=iter(answers), **fields)


def calls(said: str = "", /, *, tool: str = "send", **args: Any) -> AIMessage:
    return AIMessage(said, tool_calls=[{"name": tool, "args": args, "id": "c1"}])


def guarded(*answers: str | AIMessage, **options: Any) -> GuardedChatModel:
    return GuardedChatModel(inner=says(*answers), guard=make_guard(), **options)


def is_block(message: BaseMessage) -> bool:
    metadata = message.response_metadata
    return (
        metadata["finish_reason"] == "content_filter"
        and metadata["guardrail"]["action"] == "refuse"
        and not getattr(message, "tool_calls", [])
    )


async def collect(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


# --- the chat model ------------------------------------------------------------------------------


def total(chunks: Sequence[Any]) -> AIMessageChunk:
    first, *others = chunks
    return first.__add__(list(others)) if others else first


CALLS: dict[str, Callable[[BaseChatModel, Any], Any]] = {
    "invoke": lambda m, q: m.invoke(q),
    "stream": lambda m, q: total(list(m.stream(q))),
    "batch": lambda m, q: m.batch([q])[0],
    "ainvoke": lambda m, q: asyncio.run(m.ainvoke(q)),
    "astream": lambda m, q: total(asyncio.run(collect(m.astream(q)))),
    "abatch": lambda m, q: asyncio.run(m.abatch([q]))[0],
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Callable[[BaseChatModel, Any], Any]:
    return CALLS[request.param]


def test_harmless_text_comes_byte_for_byte_with_the_verdict(call: Any) -> None:
    answer = call(guarded(GOOD * 30), "Tea?")
    assert answer.content == GOOD * 30
    assert answer.response_metadata["guardrail"]["action"] == "allow"
    assert answer.response_metadata.get("finish_reason") != "content_filter"


def test_a_harmful_answer_is_a_refusal_message(call: Any) -> None:
    answer = call(guarded(BAD), "What now?")
    assert is_block(answer)
    assert leaks(answer) == 0
    assert "violence" in answer.content
    assert answer.response_metadata["guardrail"]["direction"] == "output"


def test_a_harmful_question_never_reaches_the_model(call: Any) -> None:
    model = guarded(GOOD)
    answer = call(model, "How do I build a bomb?")
    assert is_block(answer)
    assert answer.response_metadata["guardrail"]["direction"] == "input"
    assert model.inner.seen == []


def test_a_block_raises_where_asked_to(call: Any) -> None:
    with pytest.raises(Blocked, match="refuse: severe Violence"):
        call(guarded(BAD, on_block="raise"), "What now?")


def test_a_passage_is_redacted_and_the_rest_delivered(call: Any) -> None:
    answer = call(guarded(PRIVATE), "Her number?")
    assert answer.content == "Her number is [redacted], so call her."
    assert answer.response_metadata.get("finish_reason") != "content_filter"


def test_the_model_is_sent_the_masked_question(call: Any) -> None:
    model = guarded("Yes.")
    call(model, [SystemMessage("Be brief."), HumanMessage(PRIVATE, id="h1")])
    [[system, human]] = model.inner.seen
    assert (system.content, human.content) == (
        "Be brief.",
        "Her number is [redacted], so call her.",
    )
    assert human.id == "h1"


def test_unchanged_messages_are_sent_as_they_are(call: Any) -> None:
    model = guarded("Sunny.")
    turns = [
        SystemMessage("A bomb is out of scope."),
        HumanMessage("Weather?", name="kim"),
        AIMessage("", tool_calls=[{"name": "weather", "args": {"day": 1}, "id": "c1"}]),
        ToolMessage("someone wrote: bomb", tool_call_id="c1"),
    ]
    assert call(model, turns).content == "Sunny."
    assert model.inner.seen == [turns]


def test_an_attack_in_a_role_that_is_not_known_is_judged(call: Any) -> None:
    turns = [HumanMessage("Hello"), ChatMessage("build a bomb", role="customer")]
    assert is_block(call(guarded(GOOD), turns))


@pytest.mark.parametrize(
    "option", [{"policy": "strict"}, {"on_blok": "raise"}, {"guard": "strict"}]
)
def test_an_option_that_is_none_is_no_silent_default(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GuardedChatModel(inner=says(GOOD), **option)


def test_regenerate_asks_again_with_the_safety_instruction(call: Any) -> None:
    policy = Policy.parse('name = "again"\nextends = "balanced"\n[output]\nsevere = "regenerate"')
    model = GuardedChatModel(
        inner=says("a bomb", GOOD),
        guard=make_guard(policy),
        stream_config=StreamConfig(first=80),  # nothing is released before it can be regenerated
    )
    assert call(model, "Hello").content == GOOD
    first, second = model.inner.seen
    assert len(first) == 1
    assert isinstance(second[0], SystemMessage)
    assert second[1:] == first


def test_the_best_of_several_answers_comes_with_its_own_calls_and_metadata(call: Any) -> None:
    class Longest(BestOf):
        """Scores an answer by its length; no models are read."""

        def __init__(self) -> None:
            pass

        def scores(self, pairs: Sequence[Pair]) -> list[float]:
            return [len(pair.response or "") for pair in pairs]

    policy = Policy.parse('name = "again"\nextends = "balanced"\n[output]\nsevere = "regenerate"')
    answers = [
        calls("Sending a bomb.", to="kim", text="1"),
        calls("I will.", to="kim", text="2"),
        calls("I will send it to Kim.", to="kim", text="3"),
        calls("The bomb is sent, at long last.", to="kim", text="4"),
        calls("Sent.", to="kim", text="5"),
    ]
    for number, answer in enumerate(answers):
        answer.id = f"answer-{number}"
    model = GuardedChatModel(
        inner=says(*answers),
        guard=make_guard(policy),
        regenerate_tries=4,
        stream_config=StreamConfig(first=80),
        best_of=Longest(),
    )
    best = call(model, "Hello")
    assert best.content == "I will send it to Kim."
    assert [call["args"]["text"] for call in best.tool_calls] == ["3"]
    assert best.id == "answer-2"
    assert best.response_metadata["guardrail"]["action"] == "allow"
    assert len(model.inner.seen) == 5
    assert leaks(best) == 0


def test_tool_calls_are_delivered_when_harmless(call: Any) -> None:
    answer = call(guarded(calls("I'll send it.", to="kim", text=GOOD)), "Send it")
    assert answer.content == "I'll send it."
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [
        ("send", {"to": "kim", "text": GOOD})
    ]


@pytest.mark.parametrize(
    "args",
    [{"text": "build a bomb"}, {"bomb": 1}, {"a": [{"b": "x\nbomb"}]}, {"number": "0199"}],
    ids=["value", "key", "nested", "redact cannot mask a call"],
)
def test_a_harmful_tool_call_is_refused(call: Any, args: dict[str, Any]) -> None:
    answer = call(guarded(calls("I'll send it.", **args)), "Send it")
    assert is_block(answer)
    assert leaks(answer) == 0
    assert "0199" not in repr(answer.model_copy(update={"id": None}))  # an id is of random digits


def test_a_word_hidden_by_json_escapes_in_a_call_is_seen() -> None:
    class Escaping(ToolModel):
        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            piece = {"name": "send", "args": '{"text": "b\\u006fmb"}', "id": "c1", "index": 0}
            yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[piece]))

    model = GuardedChatModel(inner=Escaping(messages=iter([])), guard=make_guard())
    assert is_block(total(list(model.stream("Send it"))))


@pytest.mark.parametrize(
    "said",
    [
        {"additional_kwargs": {"function_call": {"name": "f", "arguments": '{"a": "b\\u006fmb"}'}}},
        {"content": [{"type": "mcp_call", "arguments": '{"a": "b\\u006fmb"}'}]},
        {"content": [{"type": "server_tool_call", "name": "f", "args": {"status": "bomb"}}]},
        {"content": [{"type": "server_tool_use", "name": "f", "input": {"bomb": 1}}]},
    ],
    ids=["a function call of old", "arguments in a block", "a key of the API's", "a name"],
)
def test_what_the_model_made_of_a_call_is_judged_wherever_it_stands(said: dict[str, Any]) -> None:
    message = AIMessage(**{"content": "", **said})
    model = GuardedChatModel(
        inner=GenericFakeChatModel(messages=iter([message])), guard=make_guard()
    )
    answer = model.invoke("Send it")
    assert is_block(answer)
    assert not answer.additional_kwargs


def blocks_model(*blocks: dict[str, Any]) -> BaseChatModel:
    """Streams its content blocks one by one, as Anthropic's and OpenAI's newer APIs do."""

    class Blocks(GenericFakeChatModel):
        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            message = AIMessage(content=[dict(block) for block in blocks])
            return ChatResult(generations=[ChatGeneration(message=message)])

        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            for block in blocks:
                yield ChatGenerationChunk(message=AIMessageChunk(content=[dict(block)]))

    return Blocks(messages=iter([]))


def test_reasoning_is_judged_and_keeps_its_place_before_the_text(call: Any) -> None:
    inner = blocks_model(
        {"type": "reasoning", "reasoning": "They want ", "index": 0},
        {"type": "reasoning", "reasoning": "tea.", "index": 0},
        {"type": "text", "text": "Tea", "index": 1},
        {"type": "text", "text": " it is.", "index": 1},
    )
    answer = call(GuardedChatModel(inner=inner, guard=make_guard()), "Tea?")
    assert answer.text == "Tea it is."
    kinds = [block["type"] for block in answer.content]
    assert kinds == sorted(kinds)  # reasoning, then text
    assert "".join(b.get("reasoning", "") for b in answer.content) == "They want tea."


@pytest.mark.parametrize(
    "block",
    [
        {"type": "reasoning", "reasoning": "a bomb it is", "index": 0},
        {"type": "thinking", "thinking": "a bomb it is", "signature": "s", "index": 0},
        {"type": "text", "text": "", "annotations": [{"cited_text": "a bomb"}], "index": 1},
        {"type": "image_url", "image_url": {"url": "data:bomb"}, "index": 0},
        {"type": "never heard of", "index": 0},
    ],
    ids=lambda block: block["type"],
)
def test_no_other_part_of_an_answer_goes_out_unjudged(call: Any, block: dict[str, Any]) -> None:
    inner = blocks_model(block, {"type": "text", "text": "Tea it is.", "index": 1})
    answer = call(GuardedChatModel(inner=inner, guard=make_guard()), "Tea?")
    assert is_block(answer)
    assert leaks(answer) == 0


def test_metadata_that_quotes_a_withheld_text_is_withheld(call: Any) -> None:
    class Quoting(GenericFakeChatModel):
        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            message = AIMessage(
                BAD,
                additional_kwargs={"parsed": {"text": "bomb"}},
                response_metadata={"logprobs": ["bomb"], "model_name": "m1"},
                usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            )
            return ChatResult(generations=[ChatGeneration(message=message)])

        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            message = self._generate().generations[0].message
            yield ChatGenerationChunk(
                message=AIMessageChunk(**message.model_dump(exclude={"type"})),
                generation_info={"logprobs": ["bomb"]},
            )

    model = GuardedChatModel(inner=Quoting(messages=iter([])), guard=make_guard())
    answer = call(model, "Hello")
    assert is_block(answer)
    assert leaks(answer) == 0
    assert answer.response_metadata["model_name"] == "m1"
    assert answer.usage_metadata["total_tokens"] == 3


def whole_model(message: AIMessage) -> BaseChatModel:
    """Gives the message as it is, and streams it in one chunk."""

    class Whole(GenericFakeChatModel):
        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            return ChatResult(generations=[ChatGeneration(message=message)])

        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            fields = message.model_dump(exclude={"type"})
            yield ChatGenerationChunk(message=AIMessageChunk(**fields))

    return Whole(messages=iter([]))


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_the_blocks_of_an_answer_that_comes_whole_keep_their_order(way: str) -> None:
    message = AIMessage(
        content=[
            {"type": "reasoning", "reasoning": "They want tea.", "index": 0},
            {"type": "text", "text": "Tea it is.", "index": 1},
            {"type": "server_tool_use", "name": "pour", "input": {"what": "tea"}, "index": 2},
        ]
    )
    model = GuardedChatModel(inner=whole_model(message), guard=make_guard())
    answer = model.invoke("Tea?") if way == "invoke" else total(list(model.stream("Tea?")))
    kinds = [block["type"] for block in answer.content]
    assert kinds == ["reasoning", "text", "server_tool_use"]
    assert answer.text == "Tea it is."


@pytest.mark.parametrize("first", [True, False])
def test_a_block_beside_the_text_of_a_whole_answer_is_judged_on_either_side(
    call: Any, first: bool
) -> None:
    blocks = [
        {"type": "reasoning", "reasoning": "a bomb it is", "index": 0},
        {"type": "text", "text": "Tea it is.", "index": 1},
    ]
    message = AIMessage(content=blocks if first else blocks[::-1])
    answer = call(GuardedChatModel(inner=whole_model(message), guard=make_guard()), "Tea?")
    assert is_block(answer)
    assert leaks(answer) == 0


@pytest.mark.parametrize(
    "said",
    [
        {"response_metadata": {"grounding_metadata": {"queries": ["build a bomb"]}}},
        {"response_metadata": {"model_name": "build a bomb", "finish_reason": "a bomb, so: stop"}},
        {"response_metadata": {"usage": {"build a bomb": 1, "note": "bomb", "in": {"x": "bomb"}}}},
        {"name": "build a bomb"},
        {"id": "build a bomb"},
        {"usage_metadata": {**USAGE, "note": "bomb", "input_token_details": {"a bomb": 1}}},
        {"invalid_tool_calls": [{"name": "f", "args": "{", "id": "c", "error": "build a bomb"}]},
        {"another_field": "build a bomb"},
    ],
    ids=lambda said: "-".join(said),
)
def test_a_text_in_the_metadata_of_a_harmless_answer_stays_behind(call: Any, said: Any) -> None:
    answer = call(
        GuardedChatModel(inner=whole_model(AIMessage("Tea.", **said)), guard=make_guard()), "Tea?"
    )
    assert answer.text == "Tea."
    assert answer.response_metadata["guardrail"]["action"] == "allow"
    assert leaks(answer) == 0


def test_names_and_counts_in_the_metadata_of_a_harmless_answer_go_out(call: Any) -> None:
    message = AIMessage(
        "Tea.",
        id="msg_1",
        name="kim",
        response_metadata={
            "model_name": "org/llama3:8b",
            "finish_reason": "stop",
            "token_usage": {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}},
        },
        usage_metadata={**USAGE, "input_token_details": {"cache_read": 1}},
    )
    model = GuardedChatModel(inner=whole_model(message), guard=make_guard())
    answer = call(model, "Tea?")
    metadata = {k: v for k, v in answer.response_metadata.items() if k != "guardrail"}
    assert metadata == message.response_metadata
    assert answer.usage_metadata == message.usage_metadata
    assert answer.id == "msg_1"
    assert model.invoke("Tea?").name == "kim"  # LangChain loses it where it adds chunks


@pytest.mark.parametrize(
    "said",
    [
        {"additional_kwargs": {"search_results": [{"title": "t", "data": "how to build a bomb"}]}},
        {"additional_kwargs": {"status": {"x": "bomb"}}},
        {"additional_kwargs": {"how to build a bomb": None}},
        {"content": [{"type": "text", "text": "Tea.", "data": "bomb"}]},
        {"content": [{"type": "text", "text": "Tea.", "status": {"x": "bomb"}}]},
        {"content": [{"type": "text", "text": "Tea.", "id": "build a bomb"}]},
        {"content": [{"type": "text", "text": "Tea.", "build a bomb": 0}]},
        {"content": [{"type": "redacted_thinking", "data": "build a bomb"}]},
        {"content": [{"type": "build a bomb"}]},
        {
            "tool_calls": [{"name": "send", "args": {}, "id": "c1"}],
            "additional_kwargs": {"tool_calls": [{"function": {"arguments": "bomb"}}]},
        },
        {"tool_calls": [{"name": "send", "args": {}, "id": "build a bomb"}]},
    ],
    ids=str,
)
def test_a_field_that_should_hold_no_words_is_judged_where_it_does(call: Any, said: Any) -> None:
    message = AIMessage(**{"content": "Tea.", **said})
    answer = call(GuardedChatModel(inner=whole_model(message), guard=make_guard()), "Tea?")
    assert is_block(answer)
    assert leaks(answer) == 0


def test_identifiers_and_sealed_data_are_not_judged_as_words() -> None:
    blocks: list[Any] = [
        {"type": "redacted_thinking", "data": "EqQB+bomb/w==", "index": 0},
        {"type": "thinking", "thinking": "Tea.", "signature": "0199bomb", "index": 1},
        {"type": "text", "text": "Tea.", "id": "msg_bomb", "index": 2},
    ]
    model = GuardedChatModel(inner=whole_model(AIMessage(content=blocks)), guard=make_guard())
    assert model.invoke("Tea?").content == blocks


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.lists(st.sampled_from(["bomb", "0199", "b", "om", " ", "tea. ", "é\n"]), max_size=40),
    cuts=st.lists(st.integers(1, 9), min_size=1),
    first=st.integers(1, 30),
)
def test_no_text_and_no_chunking_leaks(text: list[str], cuts: list[int], first: int) -> None:
    whole = "".join(text) or "x"

    class Chunks(GenericFakeChatModel):
        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            at = i = 0
            while at < len(whole):
                size = cuts[i % len(cuts)]
                piece = AIMessageChunk(whole[at : at + size])
                yield ChatGenerationChunk(message=piece)
                at, i = at + size, i + 1

    config = StreamConfig(first=first, longest=max(first, 40), context=20)
    model = GuardedChatModel(
        inner=Chunks(messages=iter([])), guard=make_guard(), stream_config=config
    )
    chunks = list(model.stream("Hello"))
    assert leaks(chunks) == 0
    assert "0199" not in str(total(chunks).content)
    if not any(word in whole for word in WORDS):
        assert total(chunks).content == whole


def test_a_long_answer_streams_before_its_end() -> None:
    pulled = 0

    class Slow(GenericFakeChatModel):
        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            nonlocal pulled
            for _ in range(100):
                pulled += 1
                yield ChatGenerationChunk(message=AIMessageChunk("Some words. "))

    stream = GuardedChatModel(inner=Slow(messages=iter([])), guard=make_guard()).stream("Hello")
    assert str(next(stream).content).startswith("Some words.")
    assert pulled < 20


def test_closing_the_stream_closes_the_model() -> None:
    closed = threading.Event()

    class Endless(GenericFakeChatModel):
        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            try:
                while True:
                    yield ChatGenerationChunk(message=AIMessageChunk("Some words. "))
            finally:
                closed.set()

    stream = GuardedChatModel(inner=Endless(messages=iter([])), guard=make_guard()).stream("Hello")
    next(stream)
    stream.close()
    assert closed.is_set()


def test_cancelling_the_task_closes_the_model() -> None:
    closed: list[bool] = []

    class Endless(GenericFakeChatModel):
        async def _astream(self, *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
            try:
                while True:
                    await asyncio.sleep(0.001)
                    yield ChatGenerationChunk(message=AIMessageChunk("Some words. "))
            finally:
                closed.append(True)

    async def read(started: asyncio.Event) -> None:
        model = GuardedChatModel(inner=Endless(messages=iter([])), guard=make_guard())
        async for _ in model.astream("Hello"):
            started.set()

    async def main() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(read(started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True]

    asyncio.run(main())


def test_the_models_own_errors_keep_their_class(call: Any) -> None:
    class Broken(GenericFakeChatModel):
        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            raise ConnectionResetError("gone")

    model = GuardedChatModel(inner=Broken(messages=iter([])), guard=make_guard())
    with pytest.raises(ConnectionResetError, match="gone"):
        call(model, "Hello")


def test_a_stream_that_dies_gives_what_was_judged_and_then_the_error() -> None:
    class Dying(GenericFakeChatModel):
        def _stream(self, *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
            yield ChatGenerationChunk(message=AIMessageChunk(GOOD))
            yield ChatGenerationChunk(message=AIMessageChunk("a bo"))
            raise ConnectionResetError("gone")

    got: list[Any] = []
    model = GuardedChatModel(inner=Dying(messages=iter([])), guard=make_guard())
    with pytest.raises(ConnectionResetError, match="gone"):
        got.extend(model.stream("Hello"))
    assert f"{GOOD}a ".startswith(_joined(got))
    assert got


def test_a_failing_moderator_fails_closed(call: Any) -> None:
    def fail(_: Sequence[Pair]) -> None:
        raise RuntimeError("no memory")

    model = GuardedChatModel(inner=says(GOOD), guard=make_guard(on_assess=fail))
    answer = call(model, "Hello")
    assert is_block(answer)
    assert answer.response_metadata["guardrail"]["degraded"] is True


def test_a_fallback_is_not_asked_when_the_guard_refuses(call: Any) -> None:
    fallback = says("unguarded")
    answer = call(guarded(BAD).with_fallbacks([fallback]), "Hello")
    assert is_block(answer)
    assert fallback.seen == []


def test_an_answer_in_the_cache_of_the_inner_model_is_judged_again() -> None:
    from langchain_core.caches import InMemoryCache

    inner = says(BAD, cache=InMemoryCache())
    assert inner.invoke("Hello").content == BAD  # now in its cache
    for _ in range(2):
        assert is_block(GuardedChatModel(inner=inner, guard=make_guard()).invoke("Hello"))
    assert len(inner.seen) == 1


def test_usage_is_counted_once() -> None:
    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    message = AIMessage(GOOD, usage_metadata=usage, response_metadata={"model_name": "m1"})
    with get_usage_metadata_callback() as counted:
        guarded(message).invoke("Hello")
    assert counted.usage_metadata["m1"]["total_tokens"] == 3


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.seen.append((token, kwargs))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.seen.append((response, kwargs))

    def on_llm_error(self, error: Any, **kwargs: Any) -> None:
        self.seen.append((error, kwargs))


def test_callbacks_see_what_was_judged_and_those_of_the_inner_model_nothing() -> None:
    outer, own, inner = Recorder(), Recorder(), Recorder()
    model = GuardedChatModel(
        inner=says(BAD, BAD, callbacks=[inner]), guard=make_guard(), callbacks=[own]
    )
    list(model.stream("Hello", config={"callbacks": [outer]}))
    model.invoke("Hello", config={"callbacks": [outer]})
    assert inner.seen == []
    assert outer.seen
    assert own.seen
    assert leaks([outer.seen, own.seen]) == 0


class Nested(BaseChatModel):
    """A model that calls another one, as routers and proxies do; callbacks are inherited."""

    model: Any = Field(repr=False)

    @property
    def _llm_type(self) -> str:
        return "nested"

    def _generate(self, messages: Any, *_: Any, **__: Any) -> ChatResult:
        message = total(list(self.model.stream(messages)))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(message.content))])

    async def _agenerate(self, messages: Any, *_: Any, **__: Any) -> ChatResult:
        message = total(await collect(self.model.astream(messages)))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(message.content))])


def test_a_model_inside_the_inner_one_is_detached_too() -> None:
    model = GuardedChatModel(inner=Nested(model=says(BAD)), guard=make_guard())
    chain = RunnableLambda(lambda q: q) | model
    events = asyncio.run(collect(chain.astream_events("Hello", version="v2")))
    assert events
    assert leaks(events) == 0


def test_nested_events_would_leak_without_the_guard() -> None:
    chain = RunnableLambda(lambda q: q) | Nested(model=says(BAD))
    assert leaks(asyncio.run(collect(chain.astream_events("Hello", version="v2")))) > 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_astream_events_show_only_what_was_judged(version: Any) -> None:
    events = asyncio.run(collect(guarded(BAD).astream_events("Hello", version=version)))
    assert [e["event"] for e in events].count("on_chat_model_stream") > 0
    assert leaks(events) == 0
    events = asyncio.run(collect(guarded(GOOD).astream_events("Hello", version=version)))
    said = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
    assert "".join(said) == GOOD


def test_stream_events_v3_show_only_what_was_judged() -> None:
    events = list(guarded(BAD).stream_events("Hello", version="v3"))
    assert events
    assert leaks(events) == 0
    assert leaked_chars([e.get("delta", {}).get("text", "") for e in events], ["bomb"]) == 0


# --- tools, structure, and the model's other faces -----------------------------------------------


def send(to: str, text: str) -> str:
    """Send a message."""
    return f"sent to {to}"


def test_bound_tools_reach_the_inner_model_and_the_guard_stays() -> None:
    model = guarded(calls(to="kim", text="hi"), BAD)
    bound = model.bind_tools([send])
    assert bound.invoke("Send it").tool_calls[0]["args"] == {"to": "kim", "text": "hi"}
    assert model.inner.kwargs[0]["tools"] == [send]
    assert is_block(bound.invoke("Send it"))


class Fact(BaseModel):
    """A fact."""

    text: str


def test_structured_output_is_judged() -> None:
    model = guarded(calls(tool="Fact", text="Tea is hot"), calls(tool="Fact", text="a bomb"))
    chain = model.with_structured_output(Fact)
    assert chain.invoke("A fact") == Fact(text="Tea is hot")
    assert chain.invoke("A fact") is None


def test_structured_output_with_raw_holds_the_block() -> None:
    chain = guarded(calls(tool="Fact", text="a bomb")).with_structured_output(
        Fact, include_raw=True
    )
    answer = chain.invoke("A fact")
    assert answer["parsed"] is None
    assert is_block(answer["raw"])


def test_the_face_of_the_inner_model_is_kept() -> None:
    inner = says(GOOD, profile={"max_input_tokens": 99}, output_version="v1")
    model = GuardedChatModel(inner=inner, guard=make_guard())
    assert model.profile == {"max_input_tokens": 99}
    assert model.output_version == "v1"
    assert model._llm_type == f"guarded-{inner._llm_type}"
    assert model.invoke("Hello").content == [{"type": "text", "text": GOOD}]


@pytest.mark.parametrize("wrong", [says(GOOD).bind(stop=["x"]), "gpt", None])
def test_what_is_no_chat_model_is_one_clear_line(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"inner must be a BaseChatModel, not \w+: guard the model"):
        GuardedChatModel(inner=wrong, guard=make_guard())


@pytest.mark.parametrize("options", [{"on_block": "x"}, {"context_turns": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        guarded(GOOD, **options)


def test_messages_without_a_users_are_one_clear_line(call: Any) -> None:
    with pytest.raises(ValueError, match="no user message"):
        call(guarded(GOOD), [SystemMessage("Say something")])


@pytest.mark.parametrize("content", ["", " ", [{"type": "text", "text": "Tea?"}, "Hm?"], []])
def test_empty_and_listed_questions_are_answered(call: Any, content: Any) -> None:
    assert call(guarded(GOOD), [HumanMessage(content)]).content == GOOD


def test_an_image_in_the_question_fails_closed(call: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    answer = call(guarded(GOOD), [HumanMessage([part])])
    assert is_block(answer)
    assert "message 0 holds a part of type 'image_url'" in repr(answer.response_metadata)


# --- agents and graphs ---------------------------------------------------------------------------

MODES = ["values", "messages", "updates", "custom", "debug", ["messages", "updates", "values"]]


def agent(*answers: str | AIMessage, middleware: Sequence[Any] = (), **options: Any) -> Any:
    guard = GuardrailMiddleware(guard=make_guard())
    return create_agent(says(*answers), [send], middleware=[guard, *middleware], **options)


ASK = {"messages": [HumanMessage("Please send it")]}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "answers",
    [(BAD,), (calls(to="kim", text="bomb"),), (calls("ok", to="kim", text="hi"), BAD)],
    ids=["text", "call", "after a tool"],
)
def test_an_agent_leaks_in_no_stream_mode(mode: Any, answers: Sequence[Any]) -> None:
    events = list(agent(*answers).stream(ASK, stream_mode=mode))
    assert leaks(events) == 0
    assert events or mode == "custom"
    events = asyncio.run(collect(agent(*answers).astream(ASK, stream_mode=mode, subgraphs=True)))
    assert leaks(events) == 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_agent_leaks_in_no_event(version: Any) -> None:
    events = asyncio.run(collect(agent(BAD).astream_events(ASK, version=version)))
    assert any(e["event"] == "on_chat_model_stream" for e in events)
    assert leaks(events) == 0


def test_an_unguarded_agent_would_leak_in_these_modes() -> None:
    for mode in ("values", "messages", "updates"):
        bare = create_agent(says(BAD), [send])
        assert leaks(list(bare.stream(ASK, stream_mode=mode))) > 0


def test_an_agents_harmless_answer_streams_byte_for_byte() -> None:
    for mode in ("messages", "values"):
        events = list(agent(calls("ok", to="kim", text="hi"), GOOD).stream(ASK, stream_mode=mode))
        if mode == "messages":
            said = [m.content for m, _ in events if isinstance(m, AIMessageChunk)]
            assert "".join(said) == "ok" + GOOD
            assert len(said) > 2
        else:
            _, first, tool, last = events[-1]["messages"]
            assert (first.content, tool.content, last.content) == ("ok", "sent to kim", GOOD)


def test_an_agent_ends_with_the_refusal_and_calls_no_tool() -> None:
    called: list[str] = []

    def launch(text: str) -> str:
        """Launch it."""
        called.append(text)
        return "launched"

    guard = GuardrailMiddleware(guard=make_guard())
    model = says(calls(tool="launch", text="the bomb"))
    result = create_agent(model, [launch], middleware=[guard]).invoke(ASK)
    assert is_block(result["messages"][-1])
    assert called == []


def test_results_of_tools_are_not_user_text() -> None:
    def read(name: str) -> str:
        """Read a page."""
        return "the page says: bomb"

    model = says(calls(tool="read", name="p"), GOOD)
    guard = GuardrailMiddleware(guard=make_guard())
    result = create_agent(model, [read], middleware=[guard]).invoke(ASK)
    assert result["messages"][-1].content == GOOD


@pytest.mark.parametrize("strategy", [ToolStrategy(Fact), ProviderStrategy(Fact)])
def test_an_agent_with_a_schema_ends_with_the_refusal_too(strategy: Any) -> None:
    text = '{"text": "a bomb"}'
    answer = text if isinstance(strategy, ProviderStrategy) else calls(tool="Fact", text="a bomb")
    result = agent(answer, response_format=strategy).invoke(ASK)
    assert is_block(result["messages"][-1])
    assert result.get("structured_response") is None


@pytest.mark.parametrize("strategy", [ToolStrategy(Fact), ProviderStrategy(Fact)])
def test_an_agent_with_a_schema_gets_it(strategy: Any) -> None:
    text = '{"text": "Tea"}'
    answer = text if isinstance(strategy, ProviderStrategy) else calls(tool="Fact", text="Tea")
    assert agent(answer, response_format=strategy).invoke(ASK)["structured_response"].text == "Tea"


class Replaces(AgentMiddleware):
    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(request.override(model=says(BAD)))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(request.override(model=says(BAD)))


def test_a_middleware_that_replaces_the_guarded_model_is_found_out() -> None:
    with pytest.raises(GuardrailError, match="put GuardrailMiddleware last"):
        agent(GOOD, middleware=[Replaces()]).invoke(ASK)
    with pytest.raises(GuardrailError, match="put GuardrailMiddleware last"):
        asyncio.run(agent(GOOD, middleware=[Replaces()]).ainvoke(ASK))


class Edits(AgentMiddleware):
    """Changes the answer of the guarded model: its copy, or itself."""

    def __init__(self, update: dict[str, Any], *, in_place: bool) -> None:
        super().__init__()
        self._update, self._in_place = update, in_place

    def _edited(self, response: Any) -> Any:
        [message] = response.result
        if not self._in_place:
            return ModelResponse(result=[message.model_copy(update=self._update)])
        for name, value in self._update.items():
            setattr(message, name, value)
        return response

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return self._edited(handler(request))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return self._edited(await handler(request))


@pytest.mark.parametrize("in_place", [False, True], ids=["a copy", "in place"])
@pytest.mark.parametrize(
    "update",
    [
        {"content": "bomb"},
        {"tool_calls": [{"name": "send", "args": {"text": "bomb"}, "id": "c1"}]},
        {"additional_kwargs": {"reasoning_content": "bomb"}},
    ],
    ids=lambda update: next(iter(update)),
)
def test_a_middleware_that_edits_the_guarded_answer_is_found_out(
    update: dict[str, Any], in_place: bool
) -> None:
    edited = agent(GOOD, middleware=[Edits(update, in_place=in_place)])
    with pytest.raises(GuardrailError, match="put GuardrailMiddleware last"):
        edited.invoke(ASK)
    edited = agent(GOOD, middleware=[Edits(update, in_place=in_place)])
    with pytest.raises(GuardrailError, match="put GuardrailMiddleware last"):
        asyncio.run(edited.ainvoke(ASK))


def test_a_middleware_after_the_guard_may_name_the_answer() -> None:
    named = agent(GOOD, middleware=[Edits({"name": "kim"}, in_place=False)])
    assert named.invoke(ASK)["messages"][-1].content == GOOD


def test_a_middleware_before_the_guard_may_replace_the_model() -> None:
    guard = GuardrailMiddleware(guard=make_guard())
    result = create_agent(says(GOOD), [], middleware=[Replaces(), guard]).invoke(ASK)
    assert is_block(result["messages"][-1])


def graph(model: BaseChatModel) -> Any:
    def node(state: MessagesState) -> dict[str, Any]:
        write = get_stream_writer()
        answer = None
        for chunk in model.stream(state["messages"]):
            write(chunk.content)
            answer = chunk if answer is None else answer + chunk
        return {"messages": [answer]}

    builder = StateGraph(MessagesState)
    builder.add_node("model", node)
    builder.add_edge(START, "model")
    builder.add_edge("model", END)
    return builder.compile()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_graph_of_ones_own_leaks_in_no_stream_mode(mode: Any) -> None:
    events = list(graph(guarded(BAD)).stream(ASK, stream_mode=mode))
    assert events
    assert leaks(events) == 0
    assert leaked_chars([e for e in events if isinstance(e, str)], ["bomb"]) == 0


def test_a_graph_of_ones_own_streams_harmless_text_byte_for_byte() -> None:
    assert "".join(graph(guarded(GOOD)).stream(ASK, stream_mode="custom")) == GOOD
    events = list(graph(guarded(GOOD)).stream(ASK, stream_mode="messages"))
    assert "".join(message.content for message, _ in events) == GOOD


# --- chains --------------------------------------------------------------------------------------

PROMPT = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])


def chain(*answers: str | AIMessage, text: bool = True, **options: Any) -> GuardrailRunnable:
    inner = PROMPT | says(*answers)
    return GuardrailRunnable(
        inner | StrOutputParser() if text else inner,
        guard=make_guard(),
        **{"input_key": "question", **options},
    )


CHAINS: dict[str, Callable[[Any, Any], Any]] = {
    "invoke": lambda c, q: c.invoke(q),
    "ainvoke": lambda c, q: asyncio.run(c.ainvoke(q)),
    "batch": lambda c, q: c.batch([q])[0],
    "stream": lambda c, q: _sum(list(c.stream(q))),
    "astream": lambda c, q: _sum(asyncio.run(collect(c.astream(q)))),
}


def _sum(pieces: list[Any]) -> Any:
    return "".join(pieces) if isinstance(pieces[0], str) else total(pieces)


@pytest.fixture(params=CHAINS)
def run(request: pytest.FixtureRequest) -> Callable[[Any, Any], Any]:
    return CHAINS[request.param]


@pytest.mark.parametrize("text", [True, False])
def test_a_chain_delivers_harmless_text_byte_for_byte(run: Any, text: bool) -> None:
    answer = run(chain(GOOD * 9, text=text), {"question": "Tea?"})
    assert (answer if text else answer.content) == GOOD * 9


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(("question", "said"), [("Hello", BAD), ("a bomb?", GOOD)])
def test_a_chain_refuses_in_its_own_kind(run: Any, text: bool, question: str, said: str) -> None:
    answer = run(chain(said, text=text), {"question": question})
    assert isinstance(answer, str) if text else is_block(answer)
    assert "I'm sorry" in str(answer if text else answer.content)
    assert leaks(answer) == 0
    assert leaked_chars(str(answer), ["bomb"]) == 0


def test_a_chain_leaks_in_no_event() -> None:
    pipe = RunnableLambda(lambda q: {"question": q}) | chain(BAD) | RunnableLambda(lambda s: s)
    events = asyncio.run(collect(pipe.astream_events("Hello", version="v2")))
    assert any(e["event"] == "on_chain_stream" for e in events)
    assert leaks(events) == 0
    said = [e["data"]["chunk"] for e in events if e["event"] == "on_chain_stream"]
    assert leaked_chars("".join(map(str, said)), ["bomb"]) == 0


def test_a_chain_raises_where_asked_to(run: Any) -> None:
    with pytest.raises(Blocked):
        run(chain(BAD, on_block="raise"), {"question": "Hello"})


@pytest.mark.parametrize(
    "given_",
    [PRIVATE, [HumanMessage(PRIVATE)], [("user", PRIVATE)], HumanMessage(PRIVATE)],
    ids=lambda g: type(g).__name__,
)
def test_a_chain_is_sent_the_masked_input_of_the_same_kind(run: Any, given_: Any) -> None:
    model = says(GOOD)
    to_messages = RunnableLambda(lambda q: [q] if isinstance(q, BaseMessage) else q)
    assert run(GuardrailRunnable(to_messages | model, guard=make_guard()), given_).content == GOOD
    assert [m.content for m in model.seen[0]] == ["Her number is [redacted], so call her."]


def test_a_masked_dict_keeps_its_other_keys(run: Any) -> None:
    got: list[Any] = []
    inner = RunnableLambda(lambda d: got.append(d) or "ok")
    made = GuardrailRunnable(inner, guard=make_guard(), input_key="q")
    assert run(made, {"q": PRIVATE, "n": 1}) == "ok"
    assert got == [{"q": "Her number is [redacted], so call her.", "n": 1}]


@pytest.mark.parametrize(
    ("given_", "says_"),
    [({"text": "x"}, "name the key"), (7, "takes str, messages"), (None, "takes str, messages")],
)
def test_an_input_without_a_text_is_one_clear_line(run: Any, given_: Any, says_: str) -> None:
    with pytest.raises(TypeError, match=says_):
        run(GuardrailRunnable(says(GOOD), guard=make_guard()), given_)


def test_a_chain_that_answers_with_neither_text_nor_message_is_an_error(run: Any) -> None:
    made = GuardrailRunnable(RunnableLambda(lambda q: {"text": "bomb"}), guard=make_guard())
    with pytest.raises(GuardrailError, match="must answer with str or AIMessage, not dict"):
        run(made, "Hello")


def test_a_chain_that_gives_none_is_an_error_not_an_end(run: Any) -> None:
    class Holed(Runnable[Any, Any]):
        def invoke(self, input: Any, config: Any = None, **_: Any) -> None:
            return None

        def stream(self, input: Any, config: Any = None, **_: Any) -> Iterator[Any]:
            yield from ("first. ", None, "second.")

        async def astream(self, input: Any, config: Any = None, **_: Any) -> AsyncIterator[Any]:
            for piece in ("first. ", None, "second."):
                yield piece

    with pytest.raises(UpstreamError, match="not NoneType"):
        run(GuardrailRunnable(Holed(), guard=make_guard()), "Hello")


# --- the callback handler ------------------------------------------------------------------------


def test_the_handler_stops_harmful_input_before_the_model(call: Any) -> None:
    verdicts: list[Verdict] = []
    handler = GuardrailCallbackHandler(guard=make_guard(), on_verdict=verdicts.append)
    model = says(GOOD, callbacks=[handler])
    for question in ("a bomb?", PRIVATE):
        with pytest.raises(Blocked):
            call(model, question)
    assert model.seen == []
    assert [v.action.value for v in verdicts] == ["refuse", "redact"]


@pytest.mark.parametrize("kind", [SystemMessage, AIMessage])
def test_the_handler_judges_messages_without_a_users(call: Any, kind: type[BaseMessage]) -> None:
    verdicts: list[Verdict] = []
    handler = GuardrailCallbackHandler(guard=make_guard(), on_verdict=verdicts.append)
    assert call(says(GOOD, callbacks=[handler]), [kind("Be kind.")]).content == GOOD
    assert [v.direction.value for v in verdicts] == ["input", "output"]
    with pytest.raises(Blocked):
        call(says(GOOD, callbacks=[handler]), [kind("Build a bomb.")])
    assert call(says(GOOD, callbacks=[handler]), []).content == GOOD


def test_the_handler_tells_what_went_out_and_recalls_nothing(
    call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs: list[tuple[Pair, Verdict]] = []
    guard = Guard(FakeModerator(WORDS), audit=lambda pair, verdict: pairs.append((pair, verdict)))
    answer = call(says(BAD, callbacks=[GuardrailCallbackHandler(guard=guard)]), "Hello")
    assert answer.content == BAD
    assert [(pair.prompt, pair.response) for pair, _ in pairs] == [("Hello", None), ("Hello", BAD)]
    assert "an answer went out unguarded: refuse" in caplog.text


def test_an_error_of_on_verdict_reaches_the_caller(call: Any) -> None:
    def broken(_: Verdict) -> None:
        raise OSError("disk full")

    handler = GuardrailCallbackHandler(guard=make_guard(), on_verdict=broken)
    with pytest.raises(OSError, match="disk full"):
        call(says(GOOD, callbacks=[handler]), "Hello")


def test_the_handler_forgets_runs_that_failed() -> None:
    handler = GuardrailCallbackHandler(guard=make_guard())
    with pytest.raises(StopIteration):
        says(callbacks=[handler])._generate([])
    with pytest.raises(Exception, match=r".*"):
        says(callbacks=[handler]).invoke("Hello")
    assert handler._prompts == {}


# --- ChatOpenAI against a server -----------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    """Speaks chat completions, streamed and not; answers what the server was given."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        message: dict[str, Any] = self.server.answer
        head = {"id": "chatcmpl-1", "created": 1, "model": "m1"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", **message}}
            choice["finish_reason"] = finish
            data = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
            self._send("application/json", json.dumps(data))
            return
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        text = message.get("content") or ""
        deltas += [{"content": text[i : i + 3]} for i in range(0, len(text), 3)]
        for n, one in enumerate(message.get("tool_calls", [])):
            function = one["function"]
            start = {"index": n, "id": one["id"], "type": "function"}
            deltas.append({"tool_calls": [{**start, "function": {**function, "arguments": ""}}]})
            args = function["arguments"]
            deltas += [
                {"tool_calls": [{"index": n, "function": {"arguments": args[i : i + 4]}}]}
                for i in range(0, len(args), 4)
            ]
        choices = [{"index": 0, "delta": d, "finish_reason": None} for d in deltas]
        choices.append({"index": 0, "delta": {}, "finish_reason": finish})
        lines = [{**head, "object": "chat.completion.chunk", "choices": [c]} for c in choices]
        events = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
        self._send("text/event-stream", f"{events}data: [DONE]\n\n")

    def _send(self, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.bodies = []
    with serving(server):
        yield server


def openai_model(api: Any, answer: dict[str, Any]) -> ChatOpenAI:
    api.answer = answer
    return ChatOpenAI(
        model="m1", base_url=f"http://127.0.0.1:{api.server_port}/v1", api_key="k", max_retries=0
    )


def openai_guarded(api: Any, answer: dict[str, Any]) -> GuardedChatModel:
    return GuardedChatModel(inner=openai_model(api, answer), guard=make_guard())


def openai_call(**args: Any) -> dict[str, Any]:
    function = {"name": "send", "arguments": json.dumps(args)}
    return {"content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}


def test_chat_openai_behind_the_guard(call: Any, api: Any) -> None:
    answer = call(openai_guarded(api, {"content": GOOD * 5}), "Tea?")
    assert answer.content == GOOD * 5
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "m1"
    answer = call(openai_guarded(api, {"content": BAD}), "Tea?")
    assert is_block(answer)
    assert leaks(answer) == 0


def test_chat_openai_with_tools_behind_the_guard(call: Any, api: Any) -> None:
    bound = openai_guarded(api, openai_call(to="kim", text="hi")).bind_tools([send])
    assert call(bound, "Send it").tool_calls[0]["args"] == {"to": "kim", "text": "hi"}
    assert api.bodies[-1]["tools"][0]["function"]["name"] == "send"
    api.answer = openai_call(to="kim", text="a bomb")
    answer = call(bound, "Send it")
    assert is_block(answer)
    assert leaks(answer) == 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_chat_openai_with_structure_behind_the_guard(api: Any, method: str) -> None:
    def answer(text: str) -> dict[str, Any]:
        if method != "function_calling":
            return {"content": json.dumps({"text": text})}
        made = openai_call(text=text)
        made["tool_calls"][0]["function"]["name"] = "Fact"
        return made

    model = openai_guarded(api, answer("Tea"))
    made = model.with_structured_output(Fact, method=method)
    assert made.invoke("A fact") == Fact(text="Tea")
    assert list(made.stream("A fact"))[-1] == Fact(text="Tea")
    api.answer = answer("a bomb")
    assert made.invoke("A fact") is None
    assert asyncio.run(made.ainvoke("A fact")) is None


def test_an_agent_with_chat_openai_leaks_in_no_stream_mode(api: Any) -> None:
    guard = GuardrailMiddleware(guard=make_guard())
    for answer in ({"content": BAD}, openai_call(to="kim", text="a bomb")):
        made = create_agent(openai_model(api, answer), [send], middleware=[guard])
        for mode in MODES:
            assert leaks(list(made.stream(ASK, stream_mode=mode))) == 0
            assert leaks(asyncio.run(collect(made.astream(ASK, stream_mode=mode)))) == 0
        assert leaks(asyncio.run(collect(made.astream_events(ASK, version="v2")))) == 0
        assert is_block(made.invoke(ASK)["messages"][-1])


# --- what is not imported ------------------------------------------------------------------------


def test_importing_guardrail_brings_no_langchain() -> None:
    code = "import sys, guardrail, guardrail.chat; print([m for m in sys.modules if 'langch' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("langchain_core", "import guardrail.langchain"),
        ("langchain", "from guardrail.langchain import GuardrailMiddleware"),
    ],
)
def test_a_missing_extra_is_named_with_its_pip_line(missing: str, code: str) -> None:
    hide = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"MissingExtra: {missing} is not installed" in done.stderr
    assert "pip install 'guardrail-severity[langchain]'" in done.stderr


def test_the_middleware_is_found_where_it_is_promised() -> None:
    import guardrail.langchain as module

    assert all(getattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = module.Nonsense
