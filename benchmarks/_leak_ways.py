"""Every way a caller can get an answer: the client adapters in their stream modes, for `leaks`.

Each way is asked a prompt and yields what its caller sees, in order: `Piece`s of one growing text,
and `Whole` texts, such as a message in an agent's state. Whoever answers says `source.answer`, in
deltas of uneven sizes: the same for every way, so that each gates the same passages.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from benchmarks._leak_server import Source, serve
from guardrail import Guard, GuardedChat
from guardrail.langchain import GuardedChatModel, GuardrailMiddleware, GuardrailRunnable
from guardrail.openai import guard_openai
from guardrail.upstream import OpenAICompatible

__all__ = ["Piece", "Seen", "Way", "Whole", "ways"]


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of the text that the caller reads."""

    text: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A text that stands by itself, whether or not it was streamed as well."""

    text: str


Seen = Piece | Whole
Way = Callable[[str], Iterable[Seen]]


@contextmanager
def ways(source: Source, guard: Guard) -> Iterator[dict[str, Way]]:
    """The ways by name; their server and clients are closed at the end."""
    # The runner closes last: it closes the async client.
    with asyncio.Runner() as runner, ExitStack() as stack:
        url = stack.enter_context(serve(source))
        found: dict[str, Way] = {}
        for name, way in {
            **_chat_ways(source, guard, url),
            **_openai_ways(stack, runner, guard, url),
            **_langchain_ways(source, guard, url),
        }.items():
            found[name] = _sync(runner, way) if inspect.isasyncgenfunction(way) else way
        yield found


def _sync(runner: asyncio.Runner, way: Any) -> Way:
    """What an async way yields, one by one: each piece is looked at when it is delivered."""

    def ask(prompt: str) -> Iterator[Seen]:
        items = way(prompt)
        try:
            while (seen := runner.run(_next(items))) is not None:
                yield seen
        finally:
            runner.run(items.aclose())

    return ask


async def _next(items: AsyncIterator[Seen]) -> Seen | None:
    return await anext(items, None)


# --- GuardedChat ---------------------------------------------------------------------------------


def _chat_ways(source: Source, guard: Guard, url: str) -> dict[str, Any]:
    own = GuardedChat(lambda _: source.deltas(), guard)
    remote = GuardedChat(OpenAICompatible(url, model="m"), guard)
    bare = GuardedChat(_Says(source=source), guard)

    async def astream(prompt: str) -> AsyncIterator[Seen]:
        async for text in own.astream(prompt):
            yield Piece(text)

    async def acomplete(prompt: str) -> AsyncIterator[Seen]:
        yield Whole((await own.acomplete(prompt)).text)

    async def remote_astream(prompt: str) -> AsyncIterator[Seen]:
        async for text in remote.astream(prompt):
            yield Piece(text)

    return {
        "callable, complete": lambda p: [Whole(own.complete(p).text)],
        "callable, stream": lambda p: map(Piece, own.stream(p)),
        "callable, acomplete": acomplete,
        "callable, astream": astream,
        "URL, complete": lambda p: [Whole(remote.complete(p).text)],
        "URL, stream": lambda p: map(Piece, remote.stream(p)),
        "URL, astream": remote_astream,
        "GuardedChat of a LangChain model, stream": lambda p: map(Piece, bare.stream(p)),
    }


# --- guard_openai --------------------------------------------------------------------------------


def _openai_ways(
    stack: ExitStack, runner: asyncio.Runner, guard: Guard, url: str
) -> dict[str, Any]:
    http = stack.enter_context(httpx.Client(timeout=600))
    ahttp = httpx.AsyncClient(timeout=600)
    stack.callback(lambda: runner.run(ahttp.aclose()))
    client = guard_openai(OpenAI(api_key="k", base_url=url, http_client=http), guard)
    aclient = guard_openai(AsyncOpenAI(api_key="k", base_url=url, http_client=ahttp), guard)
    chat, achat = client.chat.completions, aclient.chat.completions

    def asked(prompt: str) -> Any:
        return {"model": "m", "messages": [{"role": "user", "content": prompt}]}

    def create(prompt: str) -> Iterator[Seen]:
        yield Whole(chat.create(**asked(prompt)).choices[0].message.content or "")

    def stream(prompt: str) -> Iterator[Seen]:
        for chunk in chat.create(**asked(prompt), stream=True):
            yield from (Piece(c.delta.content or "") for c in chunk.choices)

    async def acreate(prompt: str) -> AsyncIterator[Seen]:
        yield Whole((await achat.create(**asked(prompt))).choices[0].message.content or "")

    async def astream(prompt: str) -> AsyncIterator[Seen]:
        async for chunk in await achat.create(**asked(prompt), stream=True):
            for choice in chunk.choices:
                yield Piece(choice.delta.content or "")

    def responses(prompt: str) -> Iterator[Seen]:
        yield Whole(client.responses.create(model="m", input=prompt).output_text)

    def responses_stream(prompt: str) -> Iterator[Seen]:
        for event in client.responses.create(model="m", input=prompt, stream=True):
            yield from _event_texts(event)

    async def aresponses(prompt: str) -> AsyncIterator[Seen]:
        yield Whole((await aclient.responses.create(model="m", input=prompt)).output_text)

    async def aresponses_stream(prompt: str) -> AsyncIterator[Seen]:
        async for event in await aclient.responses.create(model="m", input=prompt, stream=True):
            for seen in _event_texts(event):
                yield seen

    return {
        "openai chat.completions": create,
        "openai chat.completions, stream": stream,
        "openai chat.completions, async": acreate,
        "openai chat.completions, async stream": astream,
        "openai responses": responses,
        "openai responses, stream": responses_stream,
        "openai responses, async": aresponses,
        "openai responses, async stream": aresponses_stream,
    }


def _event_texts(event: Any) -> Iterator[Seen]:
    """The delta of an event, and every text that it repeats whole."""
    data = event.model_dump(mode="json", warnings=False)
    if event.type == "response.output_text.delta":
        yield Piece(event.delta)
        return
    yield from map(Whole, _texts_under(data))


def _texts_under(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            yield value["text"]
        for part in value.values():
            yield from _texts_under(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts_under(part)


# --- LangChain -----------------------------------------------------------------------------------


class _Says(BaseChatModel):
    """Says what its source says, streamed or not, and tells its callbacks each token: that would
    be the leak."""

    source: Any

    @property
    def _llm_type(self) -> str:
        return "says"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self.source.answer))])

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        for text in self.source.deltas():
            chunk = ChatGenerationChunk(message=AIMessageChunk(text))
            if run_manager:
                run_manager.on_llm_new_token(text, chunk=chunk)
            yield chunk


def _langchain_ways(source: Source, guard: Guard, url: str) -> dict[str, Any]:
    bare = _Says(source=source)
    model = GuardedChatModel(inner=bare, guard=guard)
    remote = GuardedChatModel(
        inner=ChatOpenAI(model="m", base_url=url, api_key="k"),  # type: ignore[arg-type]
        guard=guard,
    )
    agent: Any = create_agent(bare, [], middleware=[GuardrailMiddleware(guard=guard)])
    chain = GuardrailRunnable(RunnableLambda(lambda p: p) | bare, guard=guard)

    def turns(prompt: str) -> Any:
        return {"messages": [{"role": "user", "content": prompt}]}

    def agent_way(mode: str) -> Way:
        def ask(prompt: str) -> Iterator[Seen]:
            for event in agent.stream(turns(prompt), stream_mode=mode):
                yield from _agent_texts(mode, event)

        return ask

    def agent_away(mode: str) -> Any:
        async def ask(prompt: str) -> AsyncIterator[Seen]:
            async for event in agent.astream(turns(prompt), stream_mode=mode):
                for seen in _agent_texts(mode, event):
                    yield seen

        return ask

    async def ainvoke(prompt: str) -> AsyncIterator[Seen]:
        yield Whole(str((await model.ainvoke(prompt)).text))

    async def astream(prompt: str) -> AsyncIterator[Seen]:
        async for chunk in model.astream(prompt):
            yield Piece(str(chunk.text))

    def events(of: Any, given: Callable[[str], Any]) -> Any:
        async def ask(prompt: str) -> AsyncIterator[Seen]:
            async for event in of.astream_events(given(prompt), version="v2"):
                if event["event"] == "on_chat_model_stream":
                    yield Piece(str(event["data"]["chunk"].text))
                elif event["event"].endswith("_end"):  # `_stream` events of a chain hold parts
                    for text in _said(event["data"].get("output")):
                        yield Whole(text)

        return ask

    return {
        "LangChain model, invoke": lambda p: [Whole(str(model.invoke(p).text))],
        "LangChain model, stream": lambda p: (Piece(str(c.text)) for c in model.stream(p)),
        "LangChain model, ainvoke": ainvoke,
        "LangChain model, astream": astream,
        "LangChain model, astream_events": events(model, str),
        "LangChain ChatOpenAI, stream": lambda p: (Piece(str(c.text)) for c in remote.stream(p)),
        "LangChain pipe, stream": lambda p: (Piece(str(c.text)) for c in chain.stream(p)),
        "LangChain agent, values": agent_way("values"),
        "LangChain agent, messages": agent_way("messages"),
        "LangChain agent, updates": agent_way("updates"),
        "LangChain agent, async messages": agent_away("messages"),
        "LangChain agent, astream_events": events(agent, turns),
    }


def _agent_texts(mode: str, event: Any) -> Iterator[Seen]:
    if mode == "messages" and isinstance(event[0], AIMessageChunk):
        yield Piece(str(event[0].text))
    else:
        yield from map(Whole, _said(event))


def _said(value: Any) -> Iterator[str]:
    """The texts of all messages of the model in an event."""
    if isinstance(value, AIMessage | AIMessageChunk):
        yield str(value.text)
    elif isinstance(value, BaseMessage):
        return
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _said(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _said(part)
    elif hasattr(value, "result"):  # a ModelResponse, or a Command's update
        yield from _said(value.result)
    elif hasattr(value, "update"):
        yield from _said(value.update)
