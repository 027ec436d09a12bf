"""The guarded proxy: unmodified clients against the real server, before a real upstream."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from server_kit import WORDS, ChatApi, Running, serving, until

from guardrail.testing import leaked_chars

HARMLESS = "Paris is the capital of France. It lies on the Seine. " * 12
BAD = f"{HARMLESS}Now take the bomb and go. {HARMLESS}"
ASKED: Any = [{"role": "user", "content": "Where is Paris?"}]
TOOL_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"what": "Paris"}'},
}
# Each example is a call over HTTP: a failing one is found soon, and would be shrunk for minutes.
NO_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]


@pytest.fixture(scope="module")
def the_api() -> Iterator[ChatApi]:
    api = ChatApi()
    yield api
    api.running.stop()


@pytest.fixture(scope="module")
def server(the_api: ChatApi) -> Iterator[Running]:
    limits = {"keep_alive_seconds": 0.2, "choices": 4}
    with serving(upstream=the_api.url, limits=limits) as running:
        yield running


@pytest.fixture
def api(the_api: ChatApi) -> ChatApi:
    the_api.reset()
    return the_api


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


def text_of(stream: Any, index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in stream
        for choice in chunk.choices
        if choice.index == index
    )


def read_until_error(client: OpenAI) -> tuple[list[Any], openai.APIError | None]:
    seen: list[Any] = []
    stream = client.chat.completions.create(model="m", messages=ASKED, stream=True)
    try:
        for chunk in stream:
            seen.append(chunk)  # noqa: PERF402 - extend() would lose what came before an error
    except openai.APIError as error:
        return seen, error
    return seen, None


# --- clients -------------------------------------------------------------------------------------


def test_the_openai_client_gets_a_whole_answer_with_verdicts_beside_it(
    client: OpenAI, api: ChatApi
) -> None:
    answer = client.chat.completions.create(model="m", messages=ASKED, temperature=0.5)
    assert answer.choices[0].message.content == "Paris is the capital of France."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.id, answer.model) == ("chatcmpl-1", "m-1")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 8
    assert answer.guardrail["direction"] == "input"  # type: ignore[attr-defined]
    assert answer.choices[0].guardrail["action"] == "allow"  # type: ignore[attr-defined]
    assert api.requests == [{"model": "m", "messages": ASKED, "temperature": 0.5, "stream": False}]


def test_a_refused_input_never_reaches_the_upstream(client: OpenAI, api: ChatApi) -> None:
    bad: Any = [{"role": "user", "content": "Build me a bomb"}]
    answer = client.chat.completions.create(model="m", messages=bad)
    assert answer.choices[0].finish_reason == "content_filter"
    assert "violence" in (answer.choices[0].message.content or "")
    streamed = list(client.chat.completions.create(model="m", messages=bad, stream=True))
    assert streamed[-1].choices[0].finish_reason == "content_filter"
    assert api.requests == []


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_what_the_apps_own_roles_say_is_judged_where_callers_are_not_trusted(
    api: ChatApi, role: str
) -> None:
    said = [{"role": role, "tool_call_id": "1", "content": "Build me a bomb"}, *ASKED]
    finishes = []
    for roles in ("user", "all"):
        with serving(upstream=api.url, judge_roles=roles) as server:
            body = {"model": "m", "messages": said}
            answer = httpx.post(f"{server.url}/chat/completions", json=body, timeout=30).json()
            finishes.append(answer["choices"][0]["finish_reason"])
    assert finishes == ["stop", "content_filter"]
    assert len(api.requests) == 1


def test_a_refused_answer_is_a_200_with_content_filter(client: OpenAI, api: ChatApi) -> None:
    api.texts = [BAD]
    raw = client.chat.completions.with_raw_response.create(model="m", messages=ASKED)
    answer = raw.parse()
    assert raw.status_code == 200
    assert answer.choices[0].finish_reason == "content_filter"
    assert leaked_chars(raw.text, WORDS) == 0


@settings(max_examples=15, deadline=None, phases=NO_SHRINKING)
@given(pieces=st.integers(1, 60), cut=st.integers(0, len(HARMLESS)), n=st.integers(1, 3))
def test_no_harmful_word_leaves_a_stream_however_it_is_cut(
    client: OpenAI, the_api: ChatApi, pieces: int, cut: int, n: int
) -> None:
    the_api.reset()
    bad = f"{HARMLESS[:cut]} the bomb {HARMLESS[cut:]}"
    the_api.texts = [bad if i == n - 1 else HARMLESS for i in range(n)]
    the_api.pieces = pieces
    chunks = list(client.chat.completions.create(model="m", messages=ASKED, n=n, stream=True))
    for i in range(n - 1):
        assert text_of(chunks, i) == HARMLESS
    assert leaked_chars(text_of(chunks, n - 1), WORDS) == 0
    last = [c for chunk in chunks for c in chunk.choices if c.index == n - 1][-1]
    assert last.finish_reason == "content_filter"
    until(lambda: the_api.open == 0)


def test_a_harmless_stream_arrives_byte_for_byte_with_its_usage(
    client: OpenAI, api: ChatApi
) -> None:
    api.texts = ["Grüße, 世界! \U0001f600\n\n" + HARMLESS]
    stream = client.chat.completions.create(
        model="m", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert text_of(chunks) == api.texts[0]
    assert [c.usage.total_tokens for c in chunks if c.usage] == [8]


def test_personal_data_is_blanked_out_of_a_stream(client: OpenAI, api: ChatApi) -> None:
    api.texts = [f"Her number is ssn-1234, you know. {HARMLESS}"]
    chunks = list(client.chat.completions.create(model="m", messages=ASKED, stream=True))
    assert text_of(chunks) == api.texts[0].replace("ssn-1234", "[redacted]")
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_pass_and_their_arguments_are_judged(
    client: OpenAI, api: ChatApi, stream: bool
) -> None:
    def ask() -> Any:
        answer: Any = client.chat.completions.create(model="m", messages=ASKED, stream=stream)
        if not stream:
            return answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        chunks = list(answer)
        calls = [c.delta.tool_calls for k in chunks for c in k.choices if c.delta.tool_calls]
        return calls[0] if calls else None, chunks[-1].choices[0].finish_reason

    api.texts, api.tool_calls = [""], [TOOL_CALL]
    calls, finish = ask()
    assert calls[0].function.arguments == '{"what": "Paris"}'
    assert finish == "tool_calls"
    bad = {**TOOL_CALL, "function": {"name": "look_up", "arguments": '{"what": "\\u0062omb"}'}}
    api.tool_calls = [bad]
    assert ask() == (None, "content_filter")


async def _async_round(url: str) -> tuple[str, str]:
    async with AsyncOpenAI(base_url=url, api_key="unused") as client:
        answer = await client.chat.completions.create(model="m", messages=ASKED)
        stream = await client.chat.completions.create(model="m", messages=ASKED, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        return answer.choices[0].message.content or "", text


def test_the_async_openai_client_works(server: Running, api: ChatApi) -> None:
    whole, streamed = asyncio.run(_async_round(server.url))
    assert whole == streamed == "Paris is the capital of France."


def test_the_stream_helper_of_the_openai_client_works(client: OpenAI, api: ChatApi) -> None:
    with client.chat.completions.stream(model="m", messages=ASKED) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Paris is the capital of France."


def test_langchains_chat_openai_works(server: Running, api: ChatApi) -> None:
    model = ChatOpenAI(model="m", base_url=server.url, api_key="unused")  # type: ignore[arg-type]
    assert model.invoke("Where is Paris?").content == "Paris is the capital of France."
    pieces = [str(piece.content) for piece in model.stream([HumanMessage("Where is Paris?")])]
    assert "".join(pieces) == "Paris is the capital of France."
    api.texts = [BAD]
    refused = model.invoke("Where is Paris?")
    assert refused.response_metadata["finish_reason"] == "content_filter"


def test_curl_gets_a_stream_of_events(server: Running, api: ChatApi) -> None:
    body = json.dumps({"model": "m", "messages": ASKED, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", "-i", f"{server.url}/chat/completions", "-d", body],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "content-type: text/event-stream" in done.stdout.lower()
    assert "x-request-id: req_" in done.stdout.lower()
    assert done.stdout.endswith("data: [DONE]\n\n")


# --- streams -------------------------------------------------------------------------------------


def test_comments_keep_a_slow_stream_open(server: Running, api: ChatApi) -> None:
    api.wait = 0.7
    body = {"model": "m", "messages": ASKED, "stream": True}
    answer = httpx.post(f"{server.url}/chat/completions", content=json.dumps(body), timeout=30)
    assert answer.text.count(": keep-alive\n\n") >= 2
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_cancels_the_upstream(
    server: Running, api: ChatApi, stream: bool
) -> None:
    api.texts, api.pause, api.wait = [HARMLESS * 50], 0.01, 0.0 if stream else 1.0
    body = {"model": "m", "messages": ASKED, "stream": stream}
    with httpx.Client(timeout=0.3 if not stream else 30) as http:
        if stream:
            with http.stream("POST", f"{server.url}/chat/completions", json=body) as answer:
                next(answer.iter_bytes())
            assert api.gone.wait(20)
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{server.url}/chat/completions", json=body)
    service = server.service  # type: ignore[attr-defined]
    until(lambda: service.admissions["/v1/chat/completions"].open == 0)
    assert api.open == 0


def test_a_stream_lasts_no_longer_than_it_may(api: ChatApi) -> None:
    api.texts, api.pause = [HARMLESS * 50], 0.01
    body = {"model": "m", "messages": ASKED, "stream": True}
    with serving(upstream=api.url, limits={"stream_seconds": 1.0}) as server:
        answer = httpx.post(f"{server.url}/chat/completions", content=json.dumps(body), timeout=30)
    said = json.loads(answer.text.split("data: ")[-1])["error"]
    assert (said["code"], said["type"]) == ("stream_timeout", "server_error")
    assert "[DONE]" not in answer.text
    until(lambda: api.open == 0)


def test_a_stream_that_breaks_off_ends_with_an_error(client: OpenAI, api: ChatApi) -> None:
    api.texts, api.breaks_after = [HARMLESS], 60
    seen, error = read_until_error(client)
    assert re.search(r"broke off|ended the stream", str(error))
    assert HARMLESS.startswith(text_of(seen))
    assert text_of(seen)


def test_a_stream_without_an_end_is_an_error_and_loses_nothing_judged(
    client: OpenAI, api: ChatApi
) -> None:
    api.ends = False
    seen, error = read_until_error(client)
    assert re.search(r"before its answer was finished", str(error))
    assert text_of(seen) == "Paris is the capital of France."


def test_an_event_of_null_is_an_error_and_no_end_of_the_stream(
    client: OpenAI, api: ChatApi
) -> None:
    events = [json.dumps(chunk) for chunk in api._chunks()]
    body = "".join(f"data: {event}\n\n" for event in [*events[:2], "null", *events[2:]])
    api.failure = (200, body, {"content-type": "text/event-stream"})
    _, error = read_until_error(client)
    assert "answered with what is no chat completion" in str(error)


def test_what_is_to_be_a_name_and_is_a_text_is_left_out(client: OpenAI, api: ChatApi) -> None:
    text = "First, take a bomb"
    whole = {**api._whole(), "system_fingerprint": text}
    whole["choices"][0]["finish_reason"] = text
    api.failure = (200, whole, {})
    answer = client.chat.completions.create(model="m", messages=ASKED)
    chunks = [{**chunk, "system_fingerprint": text} for chunk in api._chunks()]
    chunks[-1]["choices"][0]["finish_reason"] = text
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    api.failure = (200, body, {"content-type": "text/event-stream"})
    streamed, error = read_until_error(client)
    assert error is None
    for item in (answer, *streamed):
        assert "bomb" not in item.to_json()
    assert answer.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == "stop"


# --- faults --------------------------------------------------------------------------------------

ERROR = {"error": {"message": "it says", "type": "odd", "param": "top_p", "code": "bad_top_p"}}
FAULTS = [
    ((400, ERROR, {}), 400, "bad_top_p"),
    ((404, ERROR, {}), 404, "bad_top_p"),
    ((422, {"detail": "x"}, {}), 422, None),
    ((401, ERROR, {}), 502, "upstream_auth"),
    ((403, ERROR, {}), 502, "upstream_auth"),
    ((429, ERROR, {"Retry-After": "7"}), 429, "upstream_rate_limit"),
    ((500, ERROR, {}), 502, "upstream_500"),
    ((503, "not JSON", {}), 502, "upstream_503"),
    ((200, "not JSON", {}), 502, "upstream_invalid"),
    ((200, {"choices": []}, {}), 502, "upstream_invalid"),
    ((200, {"choices": [{"index": 0, "message": 3}]}, {}), 502, "upstream_invalid"),
    ((200, [1, 2], {}), 502, "upstream_invalid"),
    ((200, '"hello"', {}), 502, "upstream_invalid"),
    ((200, {"choices": "abc"}, {}), 502, "upstream_invalid"),
    ((200, {"choices": [None]}, {}), 502, "upstream_invalid"),
    ((400, {"error": {"message": "an emoji \ud83d cut"}}, {}), 400, None),
]


@pytest.mark.parametrize(("failure", "status", "code"), FAULTS)
def test_what_goes_wrong_upstream_is_an_openai_error(
    client: OpenAI, api: ChatApi, failure: Any, status: int, code: str | None
) -> None:
    api.failure = failure
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="m", messages=ASKED)
    assert raised.value.status_code == status
    assert raised.value.code == code


WROTE = "error parsing tool call: raw='a bomb is built so'"


@pytest.mark.parametrize(
    ("failure", "streamed"),
    [
        ((500, {"error": {"message": WROTE, "type": WROTE, "code": WROTE}}, {}), False),
        ((503, {"error": WROTE}, {}), True),
        ((400, {"error": {"message": "no", "type": WROTE, "code": WROTE}}, {}), True),
        (
            (200, f"data: {json.dumps({'error': {'message': WROTE, 'code': WROTE}})}\n\n",
             {"content-type": "text/event-stream"}),
            True,
        ),
    ],
)  # fmt: skip
def test_what_an_upstream_quotes_of_its_model_is_not_handed_on(
    client: OpenAI, api: ChatApi, failure: Any, streamed: bool
) -> None:
    api.failure = failure
    with pytest.raises(openai.APIError) as raised:
        for _ in client.chat.completions.create(model="m", messages=ASKED, stream=streamed):
            pass
    assert "bomb" not in f"{raised.value} {raised.value.body}"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("7", "7"),
        ("0.2", "1"),
        ("-5", "0"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "0"),
        ("inf", "1"),
        ("nan", "1"),
        ("\xe2\x98\x83", "1"),  # UTF-8, which no header of an answer can say
    ],
)
def test_when_an_upstream_wants_to_be_asked_again_is_told_in_seconds(
    client: OpenAI, api: ChatApi, asked: str, said: str
) -> None:
    api.failure = (429, ERROR, {"Retry-After": asked})
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(model="m", messages=ASKED)
    assert raised.value.response.headers["retry-after"] == said


@pytest.mark.parametrize(("failure", "status", "code"), FAULTS[:8])
def test_before_a_stream_has_begun_its_errors_have_their_status(
    client: OpenAI, api: ChatApi, failure: Any, status: int, code: str | None
) -> None:
    api.failure = failure
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="m", messages=ASKED, stream=True)
    assert raised.value.status_code == status
    assert raised.value.code == code


def test_an_upstream_that_does_not_stream_is_told_apart(client: OpenAI, api: ChatApi) -> None:
    api.failure = (200, {"choices": []}, {})
    with pytest.raises(openai.InternalServerError, match="does it stream at all") as raised:
        client.chat.completions.create(model="m", messages=ASKED, stream=True)
    assert raised.value.code == "upstream_cut_short"


def test_an_upstream_that_is_not_there_is_a_502_and_one_that_hangs_a_504(api: ChatApi) -> None:
    with (
        serving(upstream="http://127.0.0.1:9/v1") as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as raised,
    ):
        client.chat.completions.create(model="m", messages=ASKED)
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_unreachable")
    api.wait = 3
    with (
        serving(upstream=api.url, one={"timeout": 0.3}) as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as raised,
    ):
        client.chat.completions.create(model="m", messages=ASKED)
    assert (raised.value.status_code, raised.value.code) == (504, "upstream_timeout")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": ASKED}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "m", "messages": []}, None),
        ({"model": "m", "messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"model": "m", "messages": ASKED, "n": 10**9}, "n"),
        ({"model": "m", "messages": ASKED, "n": True}, "n"),
        ({"model": "m", "messages": ASKED, "stream": "yes"}, "stream"),
        ({"model": "m", "messages": ASKED, "stream": True, "logprobs": True}, "logprobs"),
        ({"model": "m", "messages": ASKED, "modalities": ["audio"]}, "modalities"),
        ({"model": "m", "messages": ASKED, "modalities": 5}, "modalities"),
        ({"model": "m", "messages": ASKED, "modalities": True}, "modalities"),
        ({"model": "m", "messages": ASKED, "stream_options": 5}, "stream_options"),
        ({"model": "m", "messages": [{"role": "user", "content": "hi \ud83d"}]}, "messages"),
        ({"model": "m", "messages": ASKED, "user": "\ude00"}, "user"),
        ({"model": "m \ud83d", "messages": ASKED}, "model"),
        ({"model": "m", "messages": ASKED, "x\ud83d": 1}, "x?"),
    ],
)
def test_a_request_that_means_nothing_is_a_400(
    server: Running, api: ChatApi, body: dict[str, Any], param: str | None
) -> None:
    answer = httpx.post(f"{server.url}/chat/completions", content=json.dumps(body), timeout=30)
    if param is None:  # a prompt without a user's turn is lawful
        assert answer.status_code == 200
        return
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert api.requests == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_number_that_json_does_not_have_is_the_callers_fault(
    server: Running, api: ChatApi, number: str, stream: str
) -> None:
    body = (
        f'{{"model": "m", "messages": {json.dumps(ASKED)}, "stream": {stream}, "seed": {number}}}'
    )
    before = httpx.get(f"{server.root}/metrics").text
    answer = httpx.post(f"{server.url}/chat/completions", content=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert number in answer.json()["error"]["message"]
    assert api.requests == []
    after = httpx.get(f"{server.root}/metrics").text
    errors = [
        [line for line in text.splitlines() if line.startswith("guardrail_upstream_errors_total")]
        for text in (before, after)
    ]
    assert errors[0] == errors[1]


def test_a_number_of_thousands_of_digits_is_told_plainly(server: Running) -> None:
    body = f'{{"model": "m", "messages": [], "seed": {"7" * 5000}}}'
    answer = httpx.post(f"{server.url}/chat/completions", content=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "of 5,000 digits is too long" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["a\ud83d b", "\ude00", "Paris \ud83d\ud83d and \ude00 Rome"])
def test_half_an_emoji_from_the_upstream_is_the_same_whole_and_streamed(
    client: OpenAI, api: ChatApi, text: str
) -> None:
    api.failure = (200, api._whole() | {"choices": _choice(text)}, {})
    whole = client.chat.completions.create(model="m", messages=ASKED)
    api.failure, api.texts = None, [text]
    streamed = client.chat.completions.create(model="m", messages=ASKED, stream=True)
    assert whole.choices[0].message.content == text_of(streamed)
    assert text_of_whole(whole) == re.sub("[\ud800-\udfff]", "?", text)


def test_a_probability_of_nothing_is_null_and_the_answer_goes_out(
    client: OpenAI, api: ChatApi
) -> None:
    logprob = {"token": "fine", "logprob": float("-inf"), "bytes": None, "top_logprobs": []}
    [choice] = _choice("fine")
    api.failure = (
        200,
        api._whole() | {"choices": [choice | {"logprobs": {"content": [logprob]}}]},
        {},
    )
    whole = client.chat.completions.create(model="m", messages=ASKED, logprobs=True)
    assert text_of_whole(whole) == "fine"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content[0].logprob is None  # type: ignore[index]


def _choice(text: str) -> list[dict[str, Any]]:
    message = {"role": "assistant", "content": text}
    return [{"index": 0, "message": message, "finish_reason": "stop"}]


def text_of_whole(completion: Any) -> str:
    return str(completion.choices[0].message.content)


# --- upstreams and models ------------------------------------------------------------------------


def test_models_go_to_the_upstream_that_is_named_for_them(api: ChatApi) -> None:
    other = ChatApi()
    upstreams = {"a": {"url": api.url}, "b": {"url": other.url}}
    models = {
        "fast": {"upstream": "a", "name": "llama3.2:1b"},
        "good": {"upstream": "b"},
    }
    try:
        with (
            serving(upstreams=upstreams, models=models) as server,
            OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
        ):
            client.chat.completions.create(model="fast", messages=ASKED)
            client.chat.completions.create(model="good", messages=ASKED)
            listed = [(model.id, model.owned_by) for model in client.models.list()]
            assert client.models.retrieve("fast").id == "fast"
            with pytest.raises(openai.NotFoundError, match=r"did you mean 'fast'\?"):
                client.chat.completions.create(model="fats", messages=ASKED)
    finally:
        other.running.stop()
    assert [request["model"] for request in api.requests] == ["llama3.2:1b"]
    assert [request["model"] for request in other.requests] == ["good"]
    assert listed == [("fast", "a"), ("good", "b"), ("fake", "guardrail")]


def test_where_no_models_are_named_the_upstreams_are_asked_for_theirs(api: ChatApi) -> None:
    upstreams = {"a": {"url": api.url}, "gone": {"url": "http://127.0.0.1:9/v1"}}
    with (
        serving(upstreams=upstreams, default_upstream="a") as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["a", "b", "fake"]
        for name in ("b", "a/b"):  # as a chat may call it
            assert client.models.retrieve(name).id == name
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gone/b")
        client.chat.completions.create(model="a/b", messages=ASKED)
        client.chat.completions.create(model="org/b", messages=ASKED)
    assert [request["model"] for request in api.requests] == ["b", "org/b"]


def test_the_upstream_gets_its_own_key_and_never_the_callers(
    api: ChatApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream")
    for one, sent in (
        ({}, None),
        ({"api_key_env": "UPSTREAM_KEY"}, "Bearer sk-upstream"),
        ({"forward_key": True}, "Bearer sk-caller"),
    ):
        api.reset()
        with (
            serving(upstream=api.url, one=one) as server,
            OpenAI(base_url=server.url, api_key="sk-caller", max_retries=0) as client,
        ):
            client.chat.completions.create(model="m", messages=ASKED)
            assert api.headers[0].get("authorization") == sent
            api.failure = (400, {"error": {"message": "bad key sk-upstream"}}, {})
            with pytest.raises(openai.BadRequestError) as raised:
                client.chat.completions.create(model="m", messages=ASKED)
            assert ("sk-upstream" in str(raised.value)) == (sent != "Bearer sk-upstream")


def test_the_slots_are_free_again_after_all_of_this(server: Running) -> None:
    service = server.service  # type: ignore[attr-defined]
    until(lambda: all(a.open == 0 for a in service.admissions.values()))
    deadline = time.monotonic() + 10
    while "guardrail_open_streams 0.0" not in httpx.get(f"{server.root}/metrics").text:
        assert time.monotonic() < deadline
