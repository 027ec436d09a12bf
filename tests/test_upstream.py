"""OpenAICompatible against a real HTTP server on loopback: chunks, faults, retries, cancelling."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from fresh_kit import forks, run_fresh
from loopback import serving

from guardrail import Category, Guard, GuardedChat, Severity, UpstreamError
from guardrail.chat_model import ChatModel, Reply
from guardrail.testing import FakeModerator
from guardrail.upstream import OpenAICompatible

KEY = "sk-very-secret-0123456789"
HELLO = [{"role": "user", "content": "hello"}]


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `script`, or its last; a script entry is a callable
    that writes through the handler."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.times: list[float] = []
        self.gone = threading.Event()  # the client closed the connection during an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.times.append(time.monotonic())
        self.server.requests.append((self.path, dict(self.headers), body))
        script = self.server.script
        script[min(len(self.server.requests), len(script)) - 1](self)

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: str | bytes, kind: str, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.end_headers()  # HTTP/1.0: the stream ends with the connection

    def raw(self, text: str | bytes) -> None:
        self.wfile.write(text.encode() if isinstance(text, str) else text)
        self.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


def whole(text: str, finish: str = "stop") -> Any:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    body = json.dumps({"choices": [choice | {"finish_reason": finish}]})
    return lambda h: h.send(200, body, "application/json")


def event(text: str | None = None, finish: str | None = None, index: int = 0) -> str:
    delta = {} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"


def chunks(*parts: str | bytes) -> Any:
    def answer(h: Handler) -> None:
        h.begin_stream()
        for part in parts:
            h.raw(part)

    return answer


def fails(status: int, body: str = "{}", **headers: str) -> Any:
    return lambda h: h.send(status, body, "application/json", **headers)


def model_at(server: Server, **options: Any) -> OpenAICompatible:
    return OpenAICompatible(f"{server.url}/v1", model="m", **{"timeout": 10} | options)


def ask(model: OpenAICompatible, how: str) -> list[Reply]:
    """All pieces, through any of the four doors; closes the connections."""
    if how in ("complete", "stream"):
        with model:
            return [model.complete(HELLO)] if how == "complete" else list(model.stream(HELLO))

    async def run() -> list[Reply]:
        async with model:
            if how == "acomplete":
                return [await model.acomplete(HELLO)]
            return [piece async for piece in model.astream(HELLO)]

    return asyncio.run(run())


def text_of(pieces: list[Reply]) -> str:
    return "".join(piece.text for piece in pieces)


doors = pytest.mark.parametrize("how", ["complete", "stream", "acomplete", "astream"])
wholes = pytest.mark.parametrize("how", ["complete", "acomplete"])
streams = pytest.mark.parametrize("how", ["stream", "astream"])


def test_it_is_a_chat_model() -> None:
    assert isinstance(OpenAICompatible("http://localhost", model="m"), ChatModel)


@wholes
def test_a_whole_answer_is_read(server: Server, how: str) -> None:
    server.script = [whole("Grüße", "length")]
    options = {"temperature": 0, "stream": True}
    model = model_at(server, api_key=KEY, headers={"X-Team": "blue"}, options=options)
    assert ask(model, how) == [Reply("Grüße", "length")]
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["X-Team"] == "blue"
    assert body == {"model": "m", "messages": HELLO, "stream": False, "temperature": 0}


@streams
def test_a_stream_is_read_in_pieces(server: Server, how: str) -> None:
    server.script = [
        chunks(
            ": keep-alive\n\n",
            'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null}}]}\n\n',
            event("Hel"),
            event("other choice", index=1),
            event("lo\u2028\u0085 "),
            *[bytes([byte]) for byte in event("wörld").encode()],  # split inside a character
            event(None, "stop"),
            'data: {"choices":[],"usage":{"total_tokens":9}}\n\n',
            "data: [DONE]\n\n",
        )
    ]
    pieces = ask(model_at(server), how)
    assert text_of(pieces) == "Hello\u2028\u0085 wörld"
    assert pieces[-1].finish_reason == "stop"
    assert server.requests[0][2]["stream"] is True


@pytest.mark.parametrize("charset", ["latin-1", "utf-16", "nonsense"])
@streams
def test_a_stream_is_utf8_whatever_its_header_says(server: Server, how: str, charset: str) -> None:
    body = event("wörld", "stop") + "data: [DONE]\n\n"
    server.script = [lambda h: h.send(200, body, f"text/event-stream; charset={charset}")]
    assert text_of(ask(model_at(server), how)) == "wörld"


@streams
def test_a_server_that_does_not_stream_is_read_all_the_same(server: Server, how: str) -> None:
    server.script = [whole("all at once")]
    assert ask(model_at(server), how) == [Reply("all at once", "stop")]


@streams
@pytest.mark.parametrize("ending", [event(None, "stop"), "data: [DONE]\n\n"])
def test_either_ending_of_a_stream_will_do(server: Server, how: str, ending: str) -> None:
    server.script = [chunks(event("whole"), ending)]
    assert text_of(ask(model_at(server), how)) == "whole"


@streams
def test_a_stream_cut_short_is_an_error(server: Server, how: str) -> None:
    server.script = [chunks(event("only ha"))]
    with pytest.raises(UpstreamError, match="before its answer was finished"):
        ask(model_at(server), how)
    assert len(server.requests) == 1  # what was begun is never asked again


@streams
def test_a_connection_lost_in_a_stream_is_an_error_and_not_retried(
    server: Server, how: str
) -> None:
    def answer(h: Handler) -> None:
        h.send_response(200)
        h.send_header("content-type", "text/event-stream")
        h.send_header("content-length", "10000")
        h.end_headers()
        h.raw(event("only ha"))

    server.script = [answer]
    with pytest.raises(UpstreamError, match="broke off the answer"):
        ask(model_at(server), how)
    assert len(server.requests) == 1


@streams
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("data: {oops\n\n", "not JSON .*at character 1 of 5"),
        (f"data: {'[' * 99_999}\n\n", "not JSON .nested too deeply"),
        (f"data: [{'1' * 5000}]\n\n", "not JSON .a number is too long"),
        ('data: {"choices":[3]}\n\n', r"without choices\[0\]\.delta"),
        ('data: {"choices":[{"delta":{"content":[1]}}]}\n\n', r"without choices\[0\]\.delta"),
    ],
)
def test_a_bad_event_is_an_error(server: Server, how: str, bad: str, said: str) -> None:
    server.script = [chunks(event("fine"), bad)]
    with pytest.raises(UpstreamError, match=said):
        ask(model_at(server), how)


@streams
def test_a_web_page_instead_of_a_stream_is_an_error(server: Server, how: str) -> None:
    server.script = [lambda h: h.send(200, "<html>hi</html>", "text/html")]
    with pytest.raises(UpstreamError, match="sent no event stream, check the URL"):
        ask(model_at(server), how)


@wholes
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<html>hi</html>", "not JSON .*at character 0 of 15.: check the URL"),
        ("[" * 99_999, "not JSON .nested too deeply"),
        (b"fine \xff\xfe", "not JSON .not UTF-8, at byte"),
        ("[]", r"without choices\[0\]\.message"),
        ('{"choices":[]}', r"without choices\[0\]\.message"),
        ('{"choices":[{"message":{"content":[1]}}]}', r"without choices\[0\]\.message"),
    ],
)
def test_a_bad_answer_is_one_clear_line(
    server: Server, how: str, body: str | bytes, said: str
) -> None:
    server.script = [lambda h: h.send(200, body, "application/json")]
    with pytest.raises(UpstreamError, match=said) as error:
        ask(model_at(server), how)
    assert "\n" not in str(error.value)


@doors
@pytest.mark.parametrize(
    "body",
    [
        '{"id": bad json SECRET',
        '{"choices": [{"message": {"content": "\\SECRET',
        '{"choices": [{"MSG": {"content": [{"type": "image", "text": "SECRET"}]}}]}',
        '{"choices": [{"MSG": {"content": [{"type": "text", "text": ["SECRET"]}]}}]}',
        '{"choices": [{"MSG": {"content": ["SECRET"]}}]}',
        '{"choices": [{"MSG": {"content": {"SECRET": "SECRET"}}}]}',
        '{"choices": [{"MSG": "SECRET"}]}',
        '{"choices": "SECRET"}',
        '{"choices": [{"MSG": {"content": "SECRET"}}], "error": {"code": 1}}',
        '{"choices": [{"MSG": {"content": "SECRET"}}], "error": ["SECRET"]}',
    ],
)
def test_no_error_quotes_what_a_model_says(server: Server, how: str, body: str) -> None:
    is_stream = how in ("stream", "astream")
    body = body.replace("MSG", "delta" if is_stream else "message")
    answer = chunks(f"data: {body}\n\n")
    server.script = [answer if is_stream else lambda h: h.send(200, body, "application/json")]
    with pytest.raises(UpstreamError) as error:
        ask(model_at(server), how)
    assert "SECRET" not in f"{error.value!r} {error.value.__cause__!r}"
    assert "\n" not in str(error.value)


@doors
def test_a_content_of_text_parts_is_one_text(server: Server, how: str) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    is_stream = how in ("stream", "astream")
    choice = {"delta" if is_stream else "message": {"content": parts}, "finish_reason": "length"}
    body = json.dumps({"choices": [choice]})
    answer = chunks(f"data: {body}\n\n")
    server.script = [answer if is_stream else lambda h: h.send(200, body, "application/json")]
    assert ask(model_at(server), how) == [Reply("one two", "length")]


@doors
def test_a_finish_reason_that_is_a_text_is_not_handed_on(server: Server, how: str) -> None:
    answer = (chunks(event("fine", "take a knife")) if how in ("stream", "astream")
              else whole("fine", "take a knife"))  # fmt: skip
    server.script = [answer]
    assert ask(model_at(server), how)[-1].finish_reason == "stop"


@doors
@pytest.mark.parametrize(
    ("status", "said"),
    [(400, "HTTP 400"), (401, "pass api_key="), (404, "check the URL"), (500, "HTTP 500")],
)
def test_a_refused_call_says_why_and_is_not_retried(
    server: Server, how: str, status: int, said: str
) -> None:
    server.script = [fails(status, '{"error":{"message":"because\\nof this"}}')]
    with pytest.raises(UpstreamError, match=said) as error:
        ask(model_at(server), how)
    assert error.value.status == status
    assert error.value.said == "because of this"
    assert ("it says: because of this" in str(error.value)) is (status < 500)
    assert len(server.requests) == 1


@doors
@pytest.mark.parametrize("status", [200, 500])
def test_what_a_server_says_of_failing_midway_is_not_in_the_text_of_the_error(
    server: Server, how: str, status: int
) -> None:
    """Ollama: `error parsing tool call: raw='<what the model wrote>'`."""
    for failed in (
        {"message": "raw='a bomb is built so'"},
        "raw='a bomb is built so'",
        {"code": 1},
    ):
        body = json.dumps({"error": failed})
        midway = chunks(event("fine"), f"data: {body}\n\n")
        answers = how in ("stream", "astream") and status == 200
        server.script = [midway if answers else fails(status, body)]
        with pytest.raises(UpstreamError, match="why is in its log") as error:
            ask(model_at(server), how)
        assert "bomb" not in str(error.value)
        if failed != {"code": 1}:
            assert error.value.said == "raw='a bomb is built so'"


def test_a_refusal_nested_too_deeply_to_be_read_is_an_error(server: Server) -> None:
    server.script = [fails(400, "[" * 99_999)]
    with pytest.raises(UpstreamError, match=r"HTTP 400; it says: \[\[\["):
        ask(model_at(server), "complete")


@doors
@pytest.mark.parametrize("pad", [0, 180])
def test_a_key_that_a_server_echoes_is_not_in_the_error(server: Server, how: str, pad: int) -> None:
    server.script = [fails(401, "x" * pad + f" bad key {KEY} in team {'blue-' * 3}")]
    with pytest.raises(UpstreamError) as error:
        ask(model_at(server, api_key=f" {KEY}\n", headers={"X-Team": "blue-" * 3}), how)
    assert "sk-very" not in str(error.value)
    assert "blue-" not in str(error.value)


@doors
@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEY}"}, {"api-key": KEY}, {"X-Auth": f"bearer  {KEY}"}]
)
def test_a_key_that_is_given_as_a_header_is_not_in_the_error(
    server: Server, how: str, headers: dict[str, str]
) -> None:
    server.script = [fails(401, f"bad key {KEY} for Production")]
    with pytest.raises(UpstreamError, match="for Production") as error:
        ask(model_at(server, headers={**headers, "X-Stage": "In Production"}), how)
    assert "sk-very" not in str(error.value)


@doors
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_fault_is_retried(server: Server, how: str, status: int) -> None:
    good = whole("at last") if "complete" in how else chunks(event("at last", "stop"))
    server.script = [fails(status, retry_after="0"), good]
    assert text_of(ask(model_at(server), how)) == "at last"
    assert len(server.requests) == 2


@doors
def test_retries_end(server: Server, how: str) -> None:
    server.script = [fails(503, '{"error":{"message":"busy"}}', retry_after="0")]
    with pytest.raises(UpstreamError, match="why is in its log") as error:
        ask(model_at(server, retries=2), how)
    assert error.value.status == 503
    assert len(server.requests) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_connections_of_event_loops_that_have_ended_are_let_go(server: Server) -> None:
    server.script = [whole("fine")]
    model = model_at(server)
    for _ in range(5):
        assert asyncio.run(model.acomplete(HELLO)).text == "fine"
    assert len(model._async_clients) == 1


def test_retry_after_is_kept_to_in_seconds_and_as_a_date(server: Server) -> None:
    server.script = [fails(429, retry_after="0.4"), whole("ok")]
    ask(model_at(server), "complete")
    assert server.times[1] - server.times[0] >= 0.4
    server.script = [fails(429, retry_after=formatdate(time.time() - 9, usegmt=True)), whole("ok")]
    server.requests.clear()
    server.times.clear()
    ask(model_at(server), "complete")
    assert server.times[1] - server.times[0] < 0.2


def test_a_wait_of_minutes_is_not_waited_for(server: Server) -> None:
    server.script = [fails(429, retry_after="3600")]
    with pytest.raises(UpstreamError, match="HTTP 429"):
        ask(model_at(server), "complete")
    assert len(server.requests) == 1


def test_without_retry_after_the_waits_grow(server: Server) -> None:
    server.script = [fails(503)]
    with pytest.raises(UpstreamError):
        ask(model_at(server, retries=2), "complete")
    first, second = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
    assert 0.25 <= first <= 0.75
    assert 0.5 <= second <= 1.5


@doors
def test_a_server_that_is_not_there_is_an_error_that_asks_for_it(how: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = OpenAICompatible(f"http://127.0.0.1:{port}", model="m", retries=0)
    with pytest.raises(UpstreamError, match=rf"127\.0\.0\.1:{port}/.* cannot be reached"):
        ask(model, how)


@doors
def test_a_connection_dropped_before_the_answer_is_retried(server: Server, how: str) -> None:
    good = whole("ok") if "complete" in how else chunks(event("ok", "stop"))
    server.script = [lambda h: h.connection.shutdown(socket.SHUT_RDWR), good]
    assert text_of(ask(model_at(server), how)) == "ok"


@doors
def test_a_slow_server_times_out_and_is_not_asked_twice(server: Server, how: str) -> None:
    server.script = [lambda h: time.sleep(1)]
    with pytest.raises(UpstreamError, match=r"within 0\.2 s: raise timeout"):
        ask(model_at(server, timeout=0.2), how)
    assert len(server.requests) == 1


def endless(h: Handler) -> None:
    h.begin_stream()
    try:
        while True:
            h.raw(event("All is well here, and on it goes. "))
            time.sleep(0.002)
    except OSError:
        h.server.gone.set()


def test_closing_a_stream_closes_the_connection(server: Server) -> None:
    server.script = [endless]
    with model_at(server) as model:
        pieces = model.stream(HELLO)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert server.gone.wait(5)


def test_cancelling_the_task_that_reads_closes_the_connection(server: Server) -> None:
    server.script = [endless]
    first = threading.Event()

    async def read(model: OpenAICompatible) -> None:
        async for _ in model.astream(HELLO):
            first.set()

    async def main() -> bool:
        async with model_at(server) as model:
            task = asyncio.create_task(read(model))
            await asyncio.to_thread(first.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await asyncio.to_thread(server.gone.wait, 5)

    assert asyncio.run(main())


def test_one_model_serves_several_event_loops(server: Server) -> None:
    server.script = [whole("ok")]
    model = model_at(server)
    for _ in range(2):
        assert ask(model, "acomplete") == [Reply("ok", "stop")]


def fake_guard() -> Guard:
    return Guard(FakeModerator({"bomb": (Severity.SEVERE, Category.VIOLENCE)}))


def test_a_guard_that_stops_a_stream_closes_the_connection(server: Server) -> None:
    def turns_bad(h: Handler) -> None:
        h.begin_stream()
        h.raw(event("All is well. " * 30) + event("A bomb. "))
        endless_after(h)

    def endless_after(h: Handler) -> None:
        try:
            while True:
                h.raw(event("More of it. "))
                time.sleep(0.002)
        except OSError:
            h.server.gone.set()

    server.script = [turns_bad]
    with model_at(server) as model:
        stream = GuardedChat(model, fake_guard()).stream("hi")
        text = "".join(stream)
        assert server.gone.wait(5)
    assert "bomb" not in text
    assert stream.result.blocked


def test_closing_a_guarded_stream_closes_the_connection(server: Server) -> None:
    server.script = [endless]

    async def main() -> bool:
        async with model_at(server) as model:
            async with GuardedChat(model, fake_guard()).astream("hi") as stream:
                await anext(stream)
            return await asyncio.to_thread(server.gone.wait, 5)

    assert asyncio.run(main())


# --- what is given at the start ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1", "http://h:1/v1/chat/completions"),
        (" http://h:1/v1/ ", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("https://h/openai/v1", "https://h/openai/v1/chat/completions"),
        ("https://h/x?api-version=2", "https://h/x/chat/completions?api-version=2"),
    ],
)
def test_a_url_is_taken_as_users_write_it(url: str, asked: str) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json={"choices": [{"message": {"content": "ok"}}]})

    with OpenAICompatible(url, model="m", transport=httpx.MockTransport(answer)) as model:
        assert model.complete(HELLO) == Reply("ok", "stop")
    assert seen == [asked]


@pytest.mark.parametrize("url", ["", "localhost:11434", "ftp://h/v1", "http://", "http://[::1"])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(UpstreamError, match="URL"):
        OpenAICompatible(url, model="m")


@pytest.mark.parametrize("port", [0, 65_536, 99_999])
def test_a_port_that_is_none_is_refused_at_once(port: int) -> None:
    with pytest.raises(UpstreamError, match=f"{port} is no port: use 1 to 65535"):
        OpenAICompatible(f"http://127.0.0.1:{port}", model="m")


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown() -> None:
    with pytest.raises(UpstreamError, match="the API key holds characters") as error:
        OpenAICompatible("http://h", model="m", api_key="sk-geheim\nX: y")
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize("status", [401, 404])
def test_a_password_in_the_url_is_not_in_the_error(server: Server, status: int) -> None:
    server.script = [fails(status)]
    url = server.url.replace("//", "//me:hush@") + "/v1?key=hush"
    with pytest.raises(UpstreamError) as error:
        ask(OpenAICompatible(url, model="m"), "complete")
    assert "hush" not in str(error.value)


class Echo(Handler):
    """Keeps connections open, and answers with what was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        whole(body["messages"][-1]["content"])(self)


@forks
def test_forked_children_do_not_share_a_connection() -> None:
    """Else one would read what was answered to another."""
    script = """
import os, sys
from guardrail.upstream import OpenAICompatible
def ask(model, text):
    said = model.complete([{"role": "user", "content": text}]).text
    assert said == text, f"{said} was answered to {text}"
with OpenAICompatible(sys.argv[1], model="m", timeout=20) as model:
    ask(model, "warm")
    children = []
    for name in ("alice", "bob", "carol"):
        if (child := os.fork()) == 0:
            for number in range(20):
                ask(model, f"{name} {number}")
            os._exit(0)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    ask(model, "still there")
print(ended)
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    with serving(server):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert run_fresh(script, url) == "[0, 0, 0]\n"


@forks
def test_a_transport_that_was_made_before_a_fork_is_refused_in_the_child() -> None:
    script = """
import os, httpx
from guardrail.errors import UpstreamError
from guardrail.upstream import OpenAICompatible
model = OpenAICompatible("http://127.0.0.1:9", model="m", transport=httpx.HTTPTransport())
if os.fork() == 0:
    try:
        model.complete([{"role": "user", "content": "hi"}])
    except UpstreamError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    assert "make it, and the OpenAICompatible, in the child" in run_fresh(script)
