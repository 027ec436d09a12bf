"""The real `openai` client, guarded, against a real server on loopback that speaks the API."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseIncompleteEvent
from pydantic import BaseModel

from guardrail import Blocked, Category, Guard, GuardrailError, Policy, Severity
from guardrail.errors import UpstreamError
from guardrail.openai import guard_openai
from guardrail.stream import StreamConfig
from guardrail.testing import FakeModerator, leaked_chars

WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "insult": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
    "ssn-1234": (Severity.MODERATE, Category.PRIVACY_VIOLATION),
}
REDACTS_INPUT = """
name = "redacts"
extends = "balanced"
[input.categories."Privacy Violation"]
moderate = "redact"
"""
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
HARMLESS = "Paris is the capital of France. It lies on the Seine. " * 12
BAD = f"{HARMLESS}Now take the bomb and go. {HARMLESS}"
EARLY = "bomb first."
# Each example is a call over HTTP: a failing one is found soon, and would be shrunk for minutes.
NO_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]


# --- a server that speaks the API ----------------------------------------------------------------


class Server:
    """Answers with `body` or, to a stream, with `events`; dies after `dies_after` of them."""

    def __init__(self) -> None:
        self.reset()
        app = FastAPI()
        app.post("/v1/chat/completions")(self._answer)
        app.post("/v1/responses")(self._answer)
        app.get("/v1/responses/{id}")(self._answer)
        app.post("/v1/embeddings")(self._embed)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"

    def reset(self) -> None:
        self.clients: list[OpenAI] = []  # the sync ones that were made for it
        self.body: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.dies_after: int | None = None
        self.pause = 0.0
        self.sent = 0
        self.gone = threading.Event()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _answer(self, request: Request) -> Any:
        raw = await request.body()
        self.requests.append(json.loads(raw) if raw else {})
        if self.requests[-1].get("stream") or request.query_params.get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        return JSONResponse(self.body)

    async def _embed(self) -> dict[str, Any]:
        row = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
        return {"object": "list", "model": "m", "data": [row], "usage": USAGE}

    async def _stream(self) -> AsyncIterator[str]:
        try:
            for i, event in enumerate(self.events):
                if i == self.dies_after:
                    raise ConnectionResetError("the server dies here")
                await asyncio.sleep(self.pause)
                known = isinstance(event, dict) and isinstance(event.get("type"), str)
                name = f"event: {event['type']}\n" if known else ""
                yield f"{name}data: {json.dumps(event)}\n\n"
                self.sent += 1
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone.set()
            raise


@pytest.fixture(scope="module")
def the_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(the_server: Server) -> Iterator[Server]:
    the_server.reset()
    yield the_server
    for client in the_server.clients:  # an open one is a ResourceWarning of a later test
        client.close()


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


def chat_says(server: Server, *texts: str, sizes: Sequence[int] = (7,), **message: Any) -> None:
    """The choices, whole and as interleaved chunks."""
    finish = "tool_calls" if "tool_calls" in message else "stop"
    head = {"id": "chatcmpl-1", "created": 1, "model": "m-1"}
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text, **message},
            "finish_reason": finish,
        }
        for i, text in enumerate(texts)
    ]
    server.body = {**head, "object": "chat.completion", "choices": choices, "usage": USAGE}
    head["object"] = "chat.completion.chunk"

    def chunk(i: int, delta: dict[str, Any], end: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": i, "delta": delta, "finish_reason": end}]}

    events = [chunk(i, {"role": "assistant", "content": ""}) for i in range(len(texts))]
    pieces = [cut(text, sizes) for text in texts]
    for at in range(max((len(p) for p in pieces), default=0)):
        events += [chunk(i, {"content": p[at]}) for i, p in enumerate(pieces) if at < len(p)]
    for at, call in enumerate(message.get("tool_calls", [])):
        function = call["function"]
        first = {**call, "index": at, "function": {**function, "arguments": ""}}
        events.append(chunk(0, {"tool_calls": [first]}))
        for piece in cut(function["arguments"], sizes):
            part = {"index": at, "function": {"arguments": piece}}
            events.append(chunk(0, {"tool_calls": [part]}))
    events += [chunk(i, {}, finish) for i in range(len(texts))]
    server.events = [*events, {**head, "choices": [], "usage": USAGE}]


def message_item(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def call_item(arguments: str) -> dict[str, Any]:
    return {
        "id": "fc_1",
        "type": "function_call",
        "call_id": "call_1",
        "name": "search",
        "arguments": arguments,
        "status": "completed",
    }


def response_says(server: Server, *items: dict[str, Any], sizes: Sequence[int] = (7,)) -> None:
    base = {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m-1",
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    usage = {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    done = {**base, "status": "completed", "output": list(items), "usage": usage}
    server.body = done
    begun = {**base, "status": "in_progress", "output": []}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for at, item in enumerate(items):
        where = {"item_id": item["id"], "output_index": at}
        start = {"type": "response.output_item.added", "output_index": at}
        end = {"type": "response.output_item.done", "output_index": at, "item": item}
        if item["type"] == "message":
            events.append({**start, "item": {**item, "content": [], "status": "in_progress"}})
            for i, part in enumerate(item["content"]):
                here = {**where, "content_index": i}
                empty = {**part, "text": ""}
                events.append({"type": "response.content_part.added", "part": empty, **here})
                delta = {"type": "response.output_text.delta", "logprobs": [], **here}
                events += [{**delta, "delta": piece} for piece in cut(part["text"], sizes)]
                text = {"text": part["text"], "logprobs": []}
                events.append({"type": "response.output_text.done", **text, **here})
                events.append({"type": "response.content_part.done", "part": part, **here})
        elif item["type"] == "function_call":
            events.append({**start, "item": {**item, "arguments": ""}})
            delta = {"type": "response.function_call_arguments.delta", **where}
            events += [{**delta, "delta": piece} for piece in cut(item["arguments"], sizes)]
            whole = {"arguments": item["arguments"], "name": item["name"]}
            events.append({"type": "response.function_call_arguments.done", **whole, **where})
        else:
            events.append({**start, "item": item})
        events.append(end)
    events.append({"type": "response.completed", "response": done})
    server.events = [{**event, "sequence_number": i} for i, event in enumerate(events)]


# --- the client ----------------------------------------------------------------------------------


def make_guard(policy: str = "balanced", **options: Any) -> Guard:
    return Guard(FakeModerator(WORDS, **options), Policy.parse(policy) if "=" in policy else policy)


def make(server: Server, guard: Guard | None = None, **options: Any) -> Any:
    client = OpenAI(
        api_key="k",
        base_url=server.url,
        max_retries=0,
        # Certificates are slow to load, and not used on loopback.
        http_client=openai.DefaultHttpxClient(verify=False, timeout=20),
    )
    server.clients.append(client)
    return guard_openai(client, guard or make_guard(), **options)


def amake(server: Server, guard: Guard | None = None, **options: Any) -> Any:
    client = AsyncOpenAI(
        api_key="k",
        base_url=server.url,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(verify=False, timeout=20),
    )
    return guard_openai(client, guard or make_guard(), **options)


def call(how: str, server: Server, path: str, guard: Guard | None = None, **request: Any) -> Any:
    """What `client.<path>(**request)` gives: an answer, or all items of a stream, each of the
    official class. `how` is sync or async; options of guard_openai go in `options`."""
    options = request.pop("options", {})
    if how == "sync":
        with make(server, guard, **options) as client:
            answer = _method(client, path)(model="m", **request)
            return list(answer) if request.get("stream") else answer

    async def run() -> Any:
        async with amake(server, guard, **options) as client:
            answer = await _method(client, path)(model="m", **request)
            return [item async for item in answer] if request.get("stream") else answer

    return asyncio.run(run())


def _method(client: Any, path: str) -> Any:
    for name in path.split("."):
        client = getattr(client, name)
    return client


CHAT, RESPONSES = "chat.completions.create", "responses.create"
ways = pytest.mark.parametrize("how", ["sync", "async"])
streamed = pytest.mark.parametrize("stream", [False, True])


def user(text: str = "hello") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def texts_of(answer: Any, n: int = 1) -> list[str]:
    """The text of each choice, of a completion or of chunks."""
    out = [""] * n
    if isinstance(answer, ChatCompletion):
        return [choice.message.content or "" for choice in answer.choices]
    for chunk in answer:
        assert isinstance(chunk, ChatCompletionChunk)
        for choice in chunk.choices:
            out[choice.index] += choice.delta.content or ""
    return out


def finishes_of(answer: Any) -> dict[int, str]:
    chunks = [answer] if isinstance(answer, ChatCompletion) else answer
    return {c.index: c.finish_reason for k in chunks for c in k.choices if c.finish_reason}


def text_of(answer: Any) -> str:
    """The text of a response, or of its events, which have to agree with one another."""
    if isinstance(answer, Response):
        return answer.output_text
    assert [event.sequence_number for event in answer] == list(range(len(answer)))
    deltas = "".join(e.delta for e in answer if e.type == "response.output_text.delta")
    assert deltas == "".join(e.text for e in answer if e.type == "response.output_text.done") or (
        answer[-1].type == "response.incomplete"
    )
    assert answer[-1].response.output_text == deltas
    return deltas


def final(answer: Any) -> Response:
    response = answer if isinstance(answer, Response) else answer[-1].response
    assert isinstance(response, Response)
    return response


# --- chat completions ----------------------------------------------------------------------------


@ways
@streamed
def test_harmless_choices_are_delivered_byte_for_byte(
    server: Server, how: str, stream: bool
) -> None:
    answers = [HARMLESS, "Größe: 10 µm 🎉\n\n  - ok  ", ""]
    chat_says(server, *answers)
    found = call(how, server, CHAT, **user(), n=3, stream=stream)
    assert texts_of(found, 3) == answers
    assert finishes_of(found) == dict.fromkeys(range(3), "stop")
    last = found[-1] if stream else found
    assert (last.id, last.model, last.usage.total_tokens) == ("chatcmpl-1", "m-1", 8)
    assert server.requests[0]["messages"] == user()["messages"]


@ways
@streamed
def test_a_refused_choice_costs_its_neighbours_nothing(
    server: Server, how: str, stream: bool
) -> None:
    chat_says(server, HARMLESS, BAD, EARLY)
    found = call(how, server, CHAT, **user(), n=3, stream=stream)
    good, bad, early = texts_of(found, 3)
    assert good == HARMLESS
    assert bad.endswith("it touches on violence.")
    assert early == "I'm sorry, but I can't give this answer: it touches on violence."
    assert leaked_chars([good, bad, early], WORDS) == 0
    assert finishes_of(found) == {0: "stop", 1: "content_filter", 2: "content_filter"}


@ways
@streamed
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_refused_input_makes_no_call(server: Server, how: str, stream: bool, path: str) -> None:
    request = user("a bomb") if path == CHAT else {"input": "a bomb"}
    found = call(how, server, path, **request, stream=stream)
    text = texts_of(found)[0] if path == CHAT else text_of(found)
    assert text == "I'm sorry, but I can't help with violence."
    assert server.requests == []
    if path == CHAT:
        assert finishes_of(found) == {0: "content_filter"}
        assert (found[-1] if stream else found).guardrail["action"] == "refuse"
    else:
        assert final(found).status == "incomplete"
        assert final(found).incomplete_details.reason == "content_filter"
        assert final(found).guardrail["direction"] == "input"


@ways
@streamed
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_block_is_raised_where_asked_to(
    server: Server, how: str, stream: bool, path: str
) -> None:
    chat_says(server, EARLY) if path == CHAT else response_says(server, message_item(EARLY))
    for text in ("hello", "a bomb"):
        request = user(text) if path == CHAT else {"input": text}
        with pytest.raises(Blocked, match="severe Violence"):
            call(how, server, path, **request, stream=stream, options={"on_block": "raise"})


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["bomb", "bo", "mb", " ", "fine. ", "ssn-1234"]))
        .map("".join)
        .map(lambda text: text * 3),
        min_size=1,
        max_size=4,
    ),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    how=st.sampled_from(["sync", "async"]),
    first=st.integers(1, 60),
)
@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
def test_no_chunking_and_no_number_of_choices_leaks(
    the_server: Server, texts: list[str], sizes: list[int], how: str, first: int
) -> None:
    the_server.reset()
    chat_says(the_server, *texts, sizes=sizes)
    config = StreamConfig(first=first, longest=max(first, 90))
    options = {"stream_config": config}
    n = len(texts)
    found = call(how, the_server, CHAT, **user(), n=n, stream=True, options=options)
    for text, seen, end in zip(texts, texts_of(found, n), range(n), strict=True):
        assert leaked_chars(seen, ["bomb", "ssn-1234"]) == 0
        refused = finishes_of(found)[end] == "content_filter"
        assert refused == ("bomb" in text)
        if not refused:
            assert seen.count("[redacted]") <= text.count("ssn-1234")
            if "ssn-1234" not in text:
                assert seen == text


@ways
@streamed
def test_a_redacted_answer_goes_on(server: Server, how: str, stream: bool) -> None:
    text = f"{HARMLESS}Her number is ssn-1234, he said. {HARMLESS}"
    chat_says(server, text)
    [seen] = texts_of(call(how, server, CHAT, **user(), stream=stream))
    assert seen == text.replace("ssn-1234", "[redacted]")
    response_says(server, message_item(text))
    found = call(how, server, RESPONSES, input="hi", stream=stream)
    assert text_of(found) == seen
    assert "ssn-1234" not in final(found).model_dump_json()


@ways
@streamed
def test_a_redacted_input_is_sent_masked(server: Server, how: str, stream: bool) -> None:
    guard = make_guard(REDACTS_INPUT)
    chat_says(server, "ok")
    call(how, server, CHAT, guard, **user("I am ssn-1234, hi"), stream=stream)
    assert server.requests[0]["messages"] == user("I am [redacted], hi")["messages"]
    response_says(server, message_item("ok"))
    call(how, server, RESPONSES, guard, input="I am ssn-1234, hi", stream=stream)
    assert server.requests[1]["input"] == "I am [redacted], hi"
    part = {"type": "input_text", "text": "I am ssn-1234, hi"}
    items = [{"role": "user", "content": [part]}]
    call(how, server, RESPONSES, guard, input=items, stream=stream)
    assert server.requests[2]["input"][0]["content"] == "I am [redacted], hi"


def tool_call(arguments: str, id: str = "call_1") -> dict[str, Any]:
    return {
        "id": id,
        "type": "function",
        "function": {"name": "search", "arguments": arguments},
    }


@ways
@streamed
def test_harmless_tool_calls_pass_unchanged(server: Server, how: str, stream: bool) -> None:
    calls = [tool_call('{"q": "the Louvre"}'), tool_call('{"q": "Orsay"}', "call_2")]
    chat_says(server, "Let me look.", tool_calls=calls)
    found = call(how, server, CHAT, **user(), stream=stream)
    assert finishes_of(found) == {0: "tool_calls"}
    if not stream:
        assert [c.model_dump() for c in found.choices[0].message.tool_calls] == calls
        return
    seen = ["", ""]
    for chunk in found:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                seen[part.index] += part.function.arguments
    assert seen == [c["function"]["arguments"] for c in calls]


@ways
@streamed
@pytest.mark.parametrize(
    "arguments",
    [
        '{"q": "buy a bomb"}',
        '{"q": "buy a b\\u006fmb"}',
        '{"bomb": 1}',
        '{"id": "bomb"}',
        '{"q": "bomb", "q": "tea"}',
        '{"q": "{\\"x\\": \\"b\\\\u006fmb\\"}"}',
        '{"q": "half a bomb',
        '{"q": "ssn-1234"}',
        pytest.param(f'{{"n": {"1" * 5000}, "q": "b\\u006fmb"}}', id="a long number"),
    ],
)
def test_harmful_tool_calls_are_withheld(
    server: Server, how: str, stream: bool, arguments: str
) -> None:
    chat_says(server, "Let me look.", tool_calls=[tool_call('{"a": 1}'), tool_call(arguments)])
    found = call(how, server, CHAT, **user(), stream=stream)
    assert finishes_of(found) == {0: "content_filter"}
    assert "search" not in str(found)
    response_says(server, call_item(arguments))
    found = call(how, server, RESPONSES, input="hi", stream=stream)
    assert final(found).incomplete_details.reason == "content_filter"
    assert "search" not in str(found)


@ways
@streamed
def test_fields_that_servers_add_are_judged_too(server: Server, how: str, stream: bool) -> None:
    chat_says(server, "fine", reasoning_content="now the bomb")
    server.events[1]["choices"][0]["delta"] |= {"reasoning_content": "now the bo"}
    server.events[2]["choices"][0]["delta"] |= {"reasoning_content": "mb"}
    found = call(how, server, CHAT, **user(), stream=stream)
    assert finishes_of(found) == {0: "content_filter"}
    assert "now the bo" not in str(found)
    chat_says(server, "fine")
    server.body["choices"][0]["note"] = server.body["note"] = "bomb"
    for event in server.events:
        event["note"] = "bomb"
    found = call(how, server, CHAT, **user(), stream=stream)
    assert texts_of(found) == ["fine"]
    assert "bomb" not in str(found)


def test_reasoning_that_is_harmless_is_delivered(server: Server) -> None:
    chat_says(server, "fine", reasoning_content="thinking")
    found = call("sync", server, CHAT, **user())
    assert found.choices[0].message.reasoning_content == "thinking"
    server.events[1]["choices"][0]["delta"] = {"reasoning_content": "thinking"}
    found = call("sync", server, CHAT, **user(), stream=True)
    extra = [(c.choices[0].delta.model_extra or {}) for c in found if c.choices]
    assert "".join(e.get("reasoning_content", "") for e in extra) == "thinking"


# --- responses -----------------------------------------------------------------------------------


@ways
@streamed
def test_a_harmless_response_is_delivered_byte_for_byte(
    server: Server, how: str, stream: bool
) -> None:
    items = [call_item('{"q": "Louvre"}'), message_item(HARMLESS)]
    response_says(server, *items)
    found = call(how, server, RESPONSES, input="hi", stream=stream)
    assert text_of(found) == HARMLESS
    response = final(found)
    assert response.status == "completed"
    assert (response.id, response.model, response.usage.total_tokens) == ("resp_1", "m-1", 8)
    output = [item.model_dump(exclude_unset=True) for item in response.output]
    assert output == items
    assert response.guardrail["action"] == response.guardrail_output["action"] == "allow"
    if stream:
        assert [e.type for e in found if "delta" not in e.type] == [
            e["type"] for e in server.events if "delta" not in e["type"]
        ]


@ways
@streamed
def test_a_harmful_response_ends_in_a_refusal(server: Server, how: str, stream: bool) -> None:
    response_says(server, message_item(BAD))
    found = call(how, server, RESPONSES, input="hi", stream=stream)
    text = text_of(found)
    assert leaked_chars(text, WORDS) == leaked_chars(str(found), WORDS) == 0
    assert text.endswith("it touches on violence.")
    assert final(found).status == "incomplete"
    assert final(found).guardrail_output["action"] == "refuse"
    if stream:
        assert isinstance(found[-1], ResponseIncompleteEvent)
        assert text.startswith("Paris is")


@given(
    parts=st.lists(st.sampled_from(["bomb", "bo", "mb", " ", "fine. ", "ssn-1234", "ü"])),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    how=st.sampled_from(["sync", "async"]),
)
@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
def test_no_chunking_of_a_response_leaks(
    the_server: Server, parts: list[str], sizes: list[int], how: str
) -> None:
    the_server.reset()
    text = "".join(parts) * 3
    response_says(the_server, message_item("fine. "), message_item(text), sizes=sizes)
    config = StreamConfig(first=9, longest=40)
    options = {"stream_config": config}
    found = call(how, the_server, RESPONSES, input="hi", stream=True, options=options)
    assert leaked_chars(str(found), ["bomb", "ssn-1234"]) == 0
    assert (final(found).status == "incomplete") == ("bomb" in text)
    if "bomb" not in text and "ssn-1234" not in text:
        assert text_of(found) == "fine. " + text


@ways
@streamed
def test_reasoning_is_judged_and_an_unknown_item_fails_closed(
    server: Server, how: str, stream: bool
) -> None:
    summary = [{"type": "summary_text", "text": "thinking of Paris"}]
    reasoning = {"id": "rs_1", "type": "reasoning", "summary": summary}
    response_says(server, reasoning, message_item("fine"))
    found = call(how, server, RESPONSES, input="hi", stream=stream)
    assert final(found).status == "completed"
    assert final(found).output[0].summary[0].text == "thinking of Paris"
    for bad in (
        {**reasoning, "summary": [{"type": "summary_text", "text": "the bomb"}]},
        {"id": "x", "type": "hologram", "text": "of the thing"},
        {"id": "i", "type": "image_generation_call", "status": "completed", "result": "QUJD"},
    ):
        response_says(server, bad, message_item("fine"))
        found = call(how, server, RESPONSES, input="hi", stream=stream)
        assert final(found).incomplete_details.reason == "content_filter"
        assert not any(part in str(found) for part in ("bomb", "of the thing", "QUJD"))


@streamed
@pytest.mark.parametrize(
    "odd",
    [
        {
            "type": "code_interpreter_call",
            "outputs": [{"type": "image", "url": "http://x/PICTURE"}],
        },
        {
            "type": "custom_tool_call_output",
            "output": [{"type": "input_image", "image_url": "PICTURE"}],
        },
        {
            "type": "function_call_output",
            "output": [{"type": "input_file", "file_data": "PICTURE"}],
        },
        {
            "type": "shell_call_output",
            "output": {"content": {"type": "computer_screenshot", "image_url": "PICTURE"}},
        },
    ],
    ids=lambda odd: str(odd["type"]),
)
def test_a_picture_inside_an_item_of_text_follows_on_error(
    server: Server, stream: bool, odd: dict[str, Any]
) -> None:
    item = {"id": "x", "call_id": "c", "container_id": "c", "code": "plot()", **odd}
    for policy, status in (("balanced", "incomplete"), ("audit-only", "completed")):
        response_says(server, item, message_item("fine"))
        found = call("sync", server, RESPONSES, make_guard(policy), input="hi", stream=stream)
        assert final(found).status == status
        assert ("PICTURE" in dumped(found)) == (status == "completed")
    logs = [{"type": "logs", "logs": "a plot"}]
    response_says(server, {**item, "type": "code_interpreter_call", "outputs": logs, "output": ""})
    assert final(call("sync", server, RESPONSES, input="hi", stream=stream)).status == "completed"


@ways
@streamed
def test_a_text_in_place_of_an_id_or_a_kind_is_judged(
    server: Server, how: str, stream: bool
) -> None:
    reasoning: dict[str, Any] = {"id": "rs_1", "type": "reasoning", "summary": []}
    search = {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": None}
    for bad in (
        {**reasoning, "summary": [{"type": "a long text of a bomb", "text": "x"}]},
        {**reasoning, "id": "how to make a bomb"},
        {**reasoning, "encrypted_content": "take the bomb"},
        {**search, "status": {"a": "the bomb"}},
    ):
        response_says(server, bad, message_item("fine"))
        found = call(how, server, RESPONSES, input="hi", stream=stream)
        assert final(found).incomplete_details.reason == "content_filter"
        assert "bomb" not in str(found)
    for index in ("take a bomb", [{"id": "a bomb"}]):
        chat_says(server, "fine", tool_calls=[{**tool_call("{}"), "status": index}])
        answer = call(how, server, CHAT, **user(), stream=stream)
        assert finishes_of(answer) == {0: "content_filter"}
        assert "bomb" not in repr(answer)
    sealed = {**reasoning, "id": f"rs_bomb{'0a' * 100}", "encrypted_content": "bomb+/aA0=" * 400}
    response_says(server, sealed, message_item("fine"))
    assert final(call(how, server, RESPONSES, input="hi", stream=stream)).status == "completed"


@pytest.mark.parametrize("odd", ["item_id", "content_index", "type"])
def test_a_text_in_place_of_an_id_is_judged_in_the_events_of_an_item(
    server: Server, odd: str
) -> None:
    response_says(server, call_item("{}"), message_item("fine"))
    server.events[2] |= {odd: "how to make a bomb", "obfuscation": "take a bomb"}
    found = call("sync", server, RESPONSES, input="hi", stream=True)
    assert final(found).status == "incomplete"
    assert "bomb" not in str(found)


def test_the_padding_of_an_event_is_not_handed_on(server: Server) -> None:
    response_says(server, call_item("{}"))
    server.events[2]["obfuscation"] = "take a bomb"
    found = call("sync", server, RESPONSES, input="hi", stream=True)
    assert final(found).status == "completed"
    assert "bomb" not in str(found)


def test_an_id_and_a_kind_that_each_delta_of_a_call_repeats_are_no_text(server: Server) -> None:
    chat_says(server, "", tool_calls=[tool_call('{"city": "Paris"}' * 9, id="bomb1")], sizes=(1,))
    for event in server.events[2:-2]:
        event["choices"][0]["delta"]["tool_calls"][0] |= {"id": "bomb1", "type": "function"}
    answer = call("sync", server, CHAT, **user(), stream=True)
    assert finishes_of(answer) == {0: "tool_calls"}


def test_a_stream_of_whole_items_alone_is_judged(server: Server) -> None:
    for text in (HARMLESS, BAD, "x ssn-1234 y"):
        response_says(server, message_item(text))
        keep = ("response.output_item.done", "response.completed")
        server.events = [e for e in server.events if e["type"] in keep]
        found = call("sync", server, RESPONSES, input="hi", stream=True)
        assert leaked_chars(str(found), ["bomb", "ssn-1234"]) == 0
        if text == HARMLESS:
            assert final(found).output_text == text
        server.events = server.events[-1:]
        found = call("sync", server, RESPONSES, input="hi", stream=True)
        assert leaked_chars(str(found), ["bomb", "ssn-1234"]) == 0


def test_closing_events_that_differ_from_the_deltas_are_not_believed(server: Server) -> None:
    response_says(server, message_item("fine"), call_item('{"q": 1}'))
    text = json.dumps(server.events)
    server.events = json.loads(text.replace('"text": "fine"', '"text": "bomb"'))
    found = call("sync", server, RESPONSES, input="hi", stream=True)
    assert text_of(found) == "fine"
    assert "bomb" not in str(found)
    response_says(server, call_item('{"q": "tea"}'))
    for event in server.events:
        if event["type"] == "response.function_call_arguments.delta":
            event["delta"] = "a bomb"
    found = call("sync", server, RESPONSES, input="hi", stream=True)
    assert final(found).status == "incomplete"
    assert "bomb" not in str(found)


def test_a_stored_response_is_judged_when_it_is_read(server: Server) -> None:
    response_says(server, message_item(BAD))
    client = make(server)
    assert client.responses.retrieve("resp_1").status == "incomplete"
    events = list(client.responses.retrieve("resp_1", stream=True))
    assert leaked_chars(str(events), WORDS) == 0


def test_a_tool_loop_has_no_user_text_and_goes_on(server: Server) -> None:
    response_says(server, message_item("fine"))
    item = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
    found = call("sync", server, RESPONSES, input=[item], previous_response_id="resp_0")
    assert found.output_text == "fine"
    first = call("sync", server, RESPONSES, input="hi")
    again = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "ok"}]
    assert call("sync", server, RESPONSES, input=again).output_text == "fine"
    chat_says(server, "fine")
    done = call("sync", server, CHAT, **user())
    turns = [*user()["messages"], done.choices[0].message, {"role": "user", "content": "go on"}]
    assert texts_of(call("sync", server, CHAT, messages=turns)) == ["fine"]
    assert "guardrail" not in json.dumps(server.requests)


# --- side doors ----------------------------------------------------------------------------------


class Capital(BaseModel):
    city: str


def test_parse_gives_objects_and_no_way_around(server: Server) -> None:
    client = make(server)
    chat_says(server, '{"city": "Paris"}')
    done = client.chat.completions.parse(model="m", **user(), response_format=Capital)
    assert done.choices[0].message.parsed == Capital(city="Paris")
    response_says(server, message_item('{"city": "Paris"}'))
    found = client.responses.parse(model="m", input="hi", text_format=Capital)
    assert found.output_parsed == Capital(city="Paris")
    chat_says(server, '{"city": "bomb"}')
    with pytest.raises(openai.ContentFilterFinishReasonError):
        client.chat.completions.parse(model="m", **user(), response_format=Capital)
    response_says(server, message_item('{"city": "bomb"}'))
    with pytest.raises(openai.ContentFilterFinishReasonError):
        client.responses.parse(model="m", input="hi", text_format=Capital)


@pytest.mark.parametrize("text", [HARMLESS, BAD])
def test_the_stream_helpers_are_guarded(server: Server, text: str) -> None:
    client = make(server)
    chat_says(server, text)
    with client.chat.completions.stream(model="m", **user()) as stream:
        events = list(stream)
    seen = "".join(e.delta for e in events if e.type == "content.delta")
    assert leaked_chars(str(events), WORDS) == 0
    response_says(server, message_item(text))
    with client.responses.stream(model="m", input="hi") as other:
        events = list(other)
    assert leaked_chars(str(events), WORDS) == 0
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == seen
    if text == HARMLESS:
        assert seen == text
        assert other.get_final_response().output_text == text
    else:
        assert seen.endswith("it touches on violence.")


@pytest.mark.parametrize(
    ("asked", "said_"),
    [
        ("Of what country?", '{"city": "bomb"}'),
        ("Of what country?", f'{{"city": "{HARMLESS}", "more": "bomb"}}'),
        ("How do I make a bomb?", ""),
    ],
    ids=["at once", "in its midst", "before it was asked"],
)
def test_a_refusal_breaks_no_stream_helper_of_structured_answers(
    server: Server, asked: str, said_: str
) -> None:
    client = make(server)
    chat_says(server, said_)
    seen: list[Any] = []
    with (
        pytest.raises(openai.ContentFilterFinishReasonError),
        client.chat.completions.stream(model="m", **user(asked), response_format=Capital) as stream,
    ):
        seen += stream
    [refusal] = [e.delta for e in seen if e.type == "refusal.delta"]
    assert refusal.endswith("violence.")
    assert refusal == refusal.lstrip()
    response_says(server, message_item(said_))
    with client.responses.stream(model="m", input=asked, text_format=Capital) as other:
        events: list[Any] = list(other)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "content_filter"
    refusals = [e.delta for e in events if e.type == "response.refusal.delta"]
    assert refusals == [events[-1].response.output[-1].content[0].refusal] == [refusal]
    assert leaked_chars(str([seen, events]), ["bomb"]) == 0


@ways
@streamed
@pytest.mark.parametrize(
    "said",
    [
        {"images": [{"type": "image_url", "image_url": {"url": "PICTURE"}}]},
        {
            "content": [
                {"type": "text", "text": "see"},
                {"type": "image_url", "image_url": "PICTURE"},
            ]
        },
    ],
    ids=["beside the text", "in its parts"],
)
def test_a_picture_in_an_answer_follows_on_error(
    server: Server, how: str, stream: bool, said: dict[str, Any]
) -> None:
    chat_says(server, "fine", **said)
    head = {"id": "c", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    deltas: list[tuple[dict[str, Any], str | None]] = [(said, None), ({}, "stop")]
    server.events = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
        for delta, end in deltas
    ]
    answer = call(how, server, CHAT, stream=stream, **user())
    assert finishes_of(answer) == {0: "content_filter"}
    assert "PICTURE" not in repr(answer)


def test_what_the_model_is_to_continue_is_judged_without_a_user_too(server: Server) -> None:
    chat_says(server, "fine")
    begun = [{"role": "assistant", "content": "To make a bomb, first"}]
    for messages in (begun, [{"role": "system", "content": "Go on."}, *begun]):
        answer = call("sync", server, CHAT, messages=messages)
        assert finishes_of(answer) == {0: "content_filter"}
    assert not server.requests
    assert texts_of(call("sync", server, CHAT, messages=[{**begun[0], "content": "So"}])) == [
        "fine"
    ]


def test_what_cannot_be_judged_is_refused_with_a_clear_error(server: Server) -> None:
    client = make(server)
    chat_says(server, EARLY)
    response_says(server, message_item(EARLY))
    raw = client.with_options(default_headers={"X-Stainless-Raw-Response": "true"})
    for side_door, hint in (
        (lambda: client.chat.completions.with_raw_response.create(model="m", **user()), "raw"),
        (lambda: client.with_raw_response.responses.create(model="m", input="hi"), "raw"),
        (lambda: raw.chat.completions.create(model="m", **user()), "LegacyAPIResponse"),
        (lambda: client.completions.create(model="m", prompt="hi"), "is not guarded"),
        (lambda: client.chat.completions.retrieve("x"), "is not guarded"),
        (lambda: client.responses.input_items.list("x"), "is not guarded"),
        (lambda: client.beta.threads.create(), "is not guarded"),
        (lambda: client.responses.connect().enter(), "websocket"),
        (lambda: client.realtime.connect(model="m").enter(), "websocket"),
        (
            lambda: client.chat.completions.create(
                model="m", **user(), extra_body={"stream": True}
            ),
            "stream=True",
        ),
    ):
        with pytest.raises(GuardrailError, match=hint):
            side_door()
    streaming = client.responses.with_streaming_response.create(model="m", input="hi")
    with pytest.raises(GuardrailError, match="raw"):
        streaming.__enter__()
    assert len(server.requests) == 1  # the one whose headers were not seen before it


def test_low_level_calls_and_copies_are_guarded(server: Server) -> None:
    client = make(server)
    chat_says(server, EARLY)
    for found in (
        client.post("/chat/completions", body={"model": "m", **user()}, cast_to=ChatCompletion),
        client.with_options(timeout=9).chat.completions.create(model="m", **user()),
        client.copy().copy().beta.chat.completions.create(model="m", **user()),
        client.chat.completions.create(
            model="m", messages=[], extra_body={"messages": user()["messages"]}
        ),
    ):
        assert finishes_of(found) == {0: "content_filter"}
    found = client.chat.completions.create(model="m", **user(), extra_body=user("bomb"))
    assert "help with violence" in texts_of(found)[0]
    assert len(server.requests) == 4


def test_everything_else_passes_and_the_given_client_stays_as_it_was(server: Server) -> None:
    plain = OpenAI(api_key="k", base_url=server.url, max_retries=0)
    chat_says(server, EARLY)
    plain.chat.completions.create(model="m", **user())
    before = dict(plain.__dict__)
    with guard_openai(plain, make_guard()) as client:
        assert isinstance(client, OpenAI)
        assert (client.api_key, client.base_url) == (plain.api_key, plain.base_url)
        assert client.embeddings.create(model="m", input="bomb").data[0].embedding == [0.5, 0.25]
        assert finishes_of(client.chat.completions.create(model="m", **user())) == {
            0: "content_filter"
        }
        assert finishes_of(plain.chat.completions.create(model="m", **user())) == {0: "stop"}
        assert plain.__dict__ == before
        with pytest.raises(TypeError, match="guarded already"):
            guard_openai(client, make_guard())
    assert plain.is_closed()


# --- bad input and bad luck ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"messages": [{"role": "human", "content": "bomb"}]}, "unknown role 'human'"),
        ({"messages": [{"content": "bomb"}]}, "message 0 must be a dict"),
        ({"messages": "bomb"}, "must be a list"),
        ({**user(), "stream": True, "logprobs": True}, "logprobs"),
        ({**user(), "modalities": ["text", "audio"]}, "audio"),
        ({**user(), "modalities": 5}, "modalities must be a list"),
        ({**user(), "modalities": True, "stream": True}, "modalities must be a list"),
        ({**user("bomb"), "n": "2"}, "n must be a whole number"),
        ({**user("bomb"), "n": True, "stream": True}, "n must be a whole number"),
        ({**user("bomb"), "stream_options": "all", "stream": True}, "stream_options must be"),
        ({"input": [{"type": "hologram"}]}, "'hologram', which cannot be judged"),
        ({"input": [{"type": ["a"]}]}, "which cannot be judged"),
        ({"input": "hi", "include": 5}, "include must be a list"),
        ({"input": "hi", "include": 5, "stream": True}, "include must be a list"),
        ({"prompt": {"id": "pmpt_1", "variables": {"x": "bomb"}}}, "stored prompt"),
        ({"input": "hi", "stream": True, "include": ["message.output_text.logprobs"]}, "logprobs"),
        ({"input": "hi", "top_logprobs": 2}, "top_logprobs name words that were never judged"),
    ],
)
def test_a_request_that_cannot_be_judged_gets_one_clear_line(
    server: Server, request_: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as error:
        call("sync", server, CHAT if "messages" in request_ else RESPONSES, **request_)
    assert "\n" not in str(error.value)
    assert server.requests == []


@streamed
@pytest.mark.parametrize(("title", "kept"), [("Tea, and how", True), ("How to make a bomb", False)])
def test_citations_of_a_response_go_out_where_their_words_may(
    server: Server, stream: bool, title: str, kept: bool
) -> None:
    cited = {"type": "url_citation", "url": "http://a.b/c", "title": title}
    item = message_item("Tea.")
    item["content"][0]["annotations"] = [{**cited, "start_index": 0, "end_index": 3}]
    response_says(server, item)
    answer = call("sync", server, RESPONSES, input="hi", stream=stream)
    whole = answer[-1].response if stream else answer
    assert whole.output_text == "Tea."
    assert [a.title for a in whole.output[0].content[0].annotations] == [title] * kept
    assert "bomb" not in str(answer)


@streamed
def test_a_response_keeps_the_log_probabilities_of_its_own_text_alone(
    server: Server, stream: bool
) -> None:
    other = {"token": "bomb", "bytes": list(b"bomb"), "logprob": -1.0}
    token = {"token": "Tea.", "bytes": list(b"Tea."), "logprob": -0.5, "top_logprobs": [other]}
    for said, kept in ((token, True), ({**other, "top_logprobs": []}, False)):
        item = message_item("Tea.")
        item["content"][0]["logprobs"] = [said]
        response_says(server, item)
        for event in server.events:
            if event["type"] == "response.output_text.done":
                event["logprobs"] = [said]
        answer = call("sync", server, RESPONSES, input="hi", stream=stream)
        whole = answer[-1].response if stream else answer
        logprobs = whole.output[0].content[0].logprobs
        assert [t.token for t in logprobs or []] == (["Tea."] if kept else [])
        assert "bomb" not in str(answer)


def test_an_image_in_the_input_fails_closed(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    found = call("sync", server, CHAT, messages=[{"role": "user", "content": [image]}])
    assert finishes_of(found) == {0: "content_filter"}
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "auto"}
    found = call("sync", server, RESPONSES, input=[{"role": "user", "content": [image]}])
    assert found.guardrail["degraded"]
    assert server.requests == []


@ways
@streamed
def test_a_moderator_that_fails_lets_nothing_out(server: Server, how: str, stream: bool) -> None:
    def fails(pairs: Sequence[Any]) -> None:
        if pairs[0].response is not None:
            raise RuntimeError("the moderator is ill")

    guard = make_guard(on_assess=fails)
    chat_says(server, HARMLESS)
    [text] = texts_of(call(how, server, CHAT, guard, **user(), stream=stream))
    assert text.startswith("I'm sorry, this could not be checked")


@ways
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_stream_that_dies_raises_and_gives_nothing_unjudged(
    server: Server, how: str, path: str
) -> None:
    text = "A fine start, and the bom, "
    chat_says(server, text * 9, sizes=(4,))
    if path == RESPONSES:
        response_says(server, message_item(text * 9), sizes=(4,))
    server.dies_after = 9
    request = user() if path == CHAT else {"input": "hi"}
    with pytest.raises(Exception) as error:  # noqa: PT011 - its module is asked below
        call(how, server, path, **request, stream=True)
    assert type(error.value).__module__.split(".")[0] in ("openai", "httpx", "httpx2")


@ways
@streamed
@pytest.mark.parametrize(
    "choices", [[None], "abc", 5, [{"index": 0}], [{"index": 0, "message": 3}]]
)
def test_a_completion_of_another_shape_is_an_upstream_error(
    server: Server, how: str, stream: bool, choices: Any
) -> None:
    server.body = {"id": "x", "object": "chat.completion", "model": "m", "choices": choices}
    if stream:
        if choices == [{"index": 0}]:  # a chunk may leave its delta out
            choices = [{"index": []}]
        choices = json.loads(json.dumps(choices).replace("message", "delta"))
        server.events = [{**server.body, "choices": choices}]
    with pytest.raises(UpstreamError, match="does not have the shape") as error:
        call(how, server, CHAT, **user(), stream=stream)
    assert "\n" not in str(error.value)


@ways
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("body", [[], None, "a text", "<html>hi</html>"])
def test_an_answer_that_is_no_object_is_an_upstream_error(
    server: Server, how: str, path: str, body: Any
) -> None:
    server.body = body
    request = user() if path == CHAT else {"input": "hi"}
    with pytest.raises(UpstreamError, match="check the client's base_url") as error:
        call(how, server, path, **request)
    assert "\n" not in str(error.value)
    assert "html" not in str(error.value)


@ways
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_an_event_of_null_is_an_error_and_no_end_of_the_stream(
    server: Server, how: str, path: str
) -> None:
    chat_says(server, HARMLESS)
    if path == RESPONSES:
        response_says(server, message_item(HARMLESS))
    server.events = [*server.events[:5], None, *server.events[5:]]  # type: ignore[list-item]
    request = user() if path == CHAT else {"input": "hi"}
    with pytest.raises(UpstreamError, match="does not have the shape"):
        call(how, server, path, **request, stream=True)


@ways
@streamed
def test_what_is_to_be_a_name_and_is_a_text_is_left_out(
    server: Server, how: str, stream: bool
) -> None:
    chat_says(server, "fine. ")
    for name, given_ in (("fp_44-b.1", "fp_44-b.1"), ("take a bomb", None), (["bomb"], None)):
        frame = {"system_fingerprint": name, "service_tier": name}
        server.body |= frame
        server.events = [{**event, **frame} for event in server.events]
        ends = name if given_ else "take a bomb"
        server.body["choices"][0]["finish_reason"] = ends
        server.events[-2]["choices"][0]["finish_reason"] = ends
        answer = call(how, server, CHAT, **user(), stream=stream)
        for item in answer if stream else [answer]:
            assert (item.system_fingerprint, item.service_tier) == (given_, given_)
        assert finishes_of(answer) == {0: given_ or "stop"}


def dumped(answer: Any) -> str:
    """All that an answer, or a stream of pieces of one, holds."""
    items = answer if isinstance(answer, list) else [answer]
    return "".join(item.model_dump_json(warnings=False) for item in items)


TEXTS = ["take a bomb", {"x": "take a bomb"}, ["take", "a", "bomb"], ["take a bomb"]]


@streamed
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_what_stands_around_a_completion_goes_out_as_names_and_numbers_alone(
    server: Server, stream: bool, text: Any
) -> None:
    for odd in (
        {"usage": {**USAGE, "x": text}},
        {"usage": {**USAGE, "prompt_tokens_details": {"cached_tokens": text, "x": text}}},
        {"usage": text},
        *({name: text} for name in ("id", "model", "created", "service_tier", "moderation")),
    ):
        chat_says(server, "fine. ")
        server.body |= odd
        last = {**server.events[-1], **odd}
        spread = {} if "usage" in odd else odd
        server.events = [*({**event, **spread} for event in server.events[:-1]), last]
        answer = call("sync", server, CHAT, **user(), stream=stream)
        assert finishes_of(answer) == {0: "stop"}
        assert "bomb" not in dumped(answer)


@streamed
def test_names_around_an_answer_may_be_paths_and_versions(server: Server, stream: bool) -> None:
    for name in (
        "ft:gpt-4o-mini:org::aB1",
        "models/a/b@001",
        "C:\\\\models\\\\a~1.gguf",
        "a+b=c|d",
    ):
        chat_says(server, "fine. ")
        server.body["model"] = name
        server.events = [{**event, "model": name} for event in server.events]
        answer = call("sync", server, CHAT, **user(), stream=stream)
        assert {item.model for item in (answer if stream else [answer])} == {name}
        assert (answer[-1] if stream else answer).usage.to_dict() == USAGE


@streamed
def test_the_names_of_an_added_field_and_a_role_that_is_a_text_do_not_get_out(
    server: Server, stream: bool
) -> None:
    chat_says(server, "fine. ", **{"take a bomb": "x"})
    server.events[1]["choices"][0]["delta"]["take a bomb"] = "x"
    answer = call("sync", server, CHAT, **user(), stream=stream)
    assert finishes_of(answer) == {0: "content_filter"}
    chat_says(server, "fine. ")
    server.body["choices"][0]["message"]["role"] = "take a bomb"
    assert "bomb" not in dumped(call("sync", server, CHAT, **user()))


@streamed
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_what_stands_around_a_response_goes_out_as_names_and_numbers_alone(
    server: Server, stream: bool, text: Any
) -> None:
    names = ("id", "model", "object", "service_tier", "status", "tool_choice", "usage")
    for odd in (
        *({name: text} for name in (*names, "truncation", "moderation", "incomplete_details")),
        {"incomplete_details": {"reason": text, "x": text}},
        {"reasoning": {"effort": text, "x": text}},
    ):
        response_says(server, message_item("fine"))
        server.body |= odd
        for event in (server.events[0], server.events[-1]):
            event["response"] = {**event["response"], **odd}
        found = call("sync", server, RESPONSES, input="hi", stream=stream)
        assert text_of(found) == "fine"
        assert "bomb" not in dumped(found)
    for name in ("id", "role", "status", "phase"):
        response_says(server, {**message_item("fine"), name: text})
        found = call("sync", server, RESPONSES, input="hi", stream=stream)
        assert text_of(found) == "fine"
        assert "bomb" not in dumped(found)


@streamed
def test_an_item_without_a_text_goes_out_without_what_was_added_to_it(
    server: Server, stream: bool
) -> None:
    sealed = {"id": "cmp_1", "type": "compaction", "encrypted_content": "gAAA+/0=" * 200}
    for kept in (sealed, {"id": "x", "type": "item_reference"}):
        for added in ({"text": "a bomb"}, {"x": {"y": "a bomb"}}, {"content": "a bomb"}):
            response_says(server, {**kept, **added}, message_item("fine"))
            found = call("sync", server, RESPONSES, input="hi", stream=stream)
            assert final(found).status == "completed"
            assert kept.items() <= final(found).output[0].to_dict().items()
            assert "bomb" not in dumped(found)


@streamed
def test_the_reason_of_a_refusal_quotes_no_text_of_the_api(server: Server, stream: bool) -> None:
    message = message_item("fine")
    part = {**message["content"][0], "type": "take a bomb"}
    for item in ({**call_item("{}"), "type": "take a bomb"}, {**message, "content": [part]}):
        response_says(server, item)
        found = call("sync", server, RESPONSES, input="hi", stream=stream)
        assert final(found).status == "incomplete"
        assert "bomb" not in dumped(found)
    chat_says(server, "", images=["x"], content=[{"type": "take a bomb", "x": "y"}])
    assert "bomb" not in dumped(call("sync", server, CHAT, **user()))


def test_a_piece_of_arguments_that_is_no_string_is_judged(server: Server) -> None:
    for delta in ({"x": "take a bomb"}, ["take a bomb"]):
        response_says(server, call_item("{}"))
        server.events[2]["delta"] = delta
        found = call("sync", server, RESPONSES, input="hi", stream=True)
        assert "bomb" not in dumped(found)


@pytest.mark.parametrize("odd", ["item_id", "output_index", "content_index", "x"])
def test_a_text_in_the_place_of_an_events_number_does_not_get_out(server: Server, odd: str) -> None:
    for at in range(len(message_item("fine")) + 1):
        response_says(server, message_item("fine"))
        server.events[at][odd] = "take a bomb"
        found: Any = []
        with suppress(UpstreamError):
            found = call("sync", server, RESPONSES, input="hi", stream=True)
        assert "bomb" not in dumped(found)


@ways
def test_a_response_of_another_shape_is_an_upstream_error(server: Server, how: str) -> None:
    server.body = {"id": "x", "object": "response", "output": 5}
    with pytest.raises(UpstreamError, match="does not have the shape"):
        call(how, server, RESPONSES, input="hi")
    server.events = [{"type": "response.output_item.added", "output_index": 0, "item": None}]
    with pytest.raises(UpstreamError, match="does not have the shape"):
        call(how, server, RESPONSES, input="hi", stream=True)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", "bomb", "x", 1.5, 10**30]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["name", "text", "content"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value in JSON data."""
    if not isinstance(value, dict | list):
        return [at]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [at, *(place for name, part in inner for place in places(part, (*at, name)))]


def replaced(value: Any, at: tuple[Any, ...], junk: Any) -> Any:
    if not at:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], junk)
    return copy


def said(answer: Any) -> str:
    """What a caller would show of an answer: texts and arguments, whole or in pieces."""
    found = []
    for item in answer if isinstance(answer, list) else [answer]:
        choices = getattr(item, "choices", None) or []
        found += [getattr(choice, "message", None) or choice.delta for choice in choices]
        found += [getattr(item, "delta", None)]
        for one in getattr(item, "output", None) or []:
            found += [getattr(one, "arguments", None)]
            found += [getattr(part, "text", None) for part in getattr(one, "content", None) or []]
    return " ".join(str(getattr(one, "content", one)) for one in found)


@given(data=st.data(), how=st.sampled_from(["sync", "async"]), stream=st.booleans())
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@settings(max_examples=60, deadline=None, phases=NO_SHRINKING)
def test_whatever_json_an_api_sends_is_judged_or_a_clear_error(
    the_server: Server, path: str, data: st.DataObject, how: str, stream: bool
) -> None:
    the_server.reset()
    chat_says(the_server, "fine. ", "well. ", tool_calls=[tool_call('{"q": "x"}')])
    if path == RESPONSES:
        response_says(the_server, message_item("fine. "), call_item('{"q": "x"}'))
    sent: Any = the_server.events if stream else the_server.body
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.sampled_from(places(sent)[stream:]))  # a stream is a list of events
        sent = replaced(sent, at, data.draw(JUNK))
    the_server.body, the_server.events = ({}, sent) if stream else (sent, [])
    request = {**user(), "n": 2} if path == CHAT else {"input": "hi"}
    try:
        answer = call(how, the_server, path, **request, stream=stream)
    except (GuardrailError, openai.APIError):
        return
    assert leaked_chars(said(answer), ["bomb"]) == 0


def test_an_api_error_comes_through_as_it_is(server: Server) -> None:
    client = make(server).with_options(base_url=f"{server.url}/nowhere")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="m", **user())


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_closing_a_stream_closes_the_upstream(server: Server, path: str) -> None:
    chat_says(server, HARMLESS * 20)
    if path == RESPONSES:
        response_says(server, message_item(HARMLESS * 20))
    server.pause = 0.01
    request = user() if path == CHAT else {"input": "hi"}
    with make(server) as client:
        stream = _method(client, path)(model="m", **request, stream=True)
        assert isinstance(stream, openai.Stream)
        with stream:
            next(stream)
        assert server.gone.wait(5)
    assert server.sent < len(server.events)


def test_a_refused_stream_closes_the_upstream(server: Server) -> None:
    chat_says(server, EARLY + HARMLESS * 20)
    server.pause = 0.01
    call("sync", server, CHAT, **user(), stream=True)
    assert server.gone.wait(5)
    assert server.sent < len(server.events)


def test_cancelling_the_reader_closes_the_upstream(server: Server) -> None:
    chat_says(server, HARMLESS * 20)
    server.pause = 0.01

    async def run() -> None:
        async with amake(server) as client:

            async def read() -> None:
                stream = await client.chat.completions.create(model="m", **user(), stream=True)
                assert isinstance(stream, openai.AsyncStream)
                async for _ in stream:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.3)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.gone.wait, 5)

    asyncio.run(run())


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(TypeError, match="needs an OpenAI or AsyncOpenAI client, not dict"):
        guard_openai({}, make_guard())  # type: ignore[type-var]
    client = OpenAI(api_key="k")
    with pytest.raises(ValueError, match="on_block must be"):
        guard_openai(client, make_guard(), on_block="explode")  # type: ignore[arg-type]


def test_the_module_needs_no_openai_until_it_is_used() -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from guardrail.openai import guard_openai\n"
        "from guardrail import MissingExtra\n"
        "try: guard_openai(object())\n"
        "except MissingExtra as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'guardrail-severity[openai]'" in run.stdout
