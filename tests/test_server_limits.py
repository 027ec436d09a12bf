"""What `guardrail serve` does not take on: it says so at once, in OpenAI's shape, and recovers."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from batching_kit import ENDLESS, Counting
from fastapi import FastAPI
from openai import OpenAI
from server_kit import WORDS, ChatApi, Running, serving, until

from guardrail import Pair
from guardrail._server_config import Settings
from guardrail.server import create_app
from guardrail.testing import FakeModerator


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with serving(limits={"body_bytes": 2000, "body_seconds": 0.5}) as running:
        yield running


def test_a_body_of_the_right_size_is_taken(small: Running) -> None:
    answer = httpx.post(f"{small.url}/moderations", json={"input": "x" * 1900}, timeout=30)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [gzip.compress(b'{"input": "hi"}'), b'{"input": "caf\xe9"}'],
    ids=["compressed", "not UTF-8"],  # a gzip header has the time in it: workers would disagree
)
def test_a_body_that_is_compressed_or_not_utf8_is_told(small: Running, body: bytes) -> None:
    answer = httpx.post(f"{small.url}/moderations", content=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "it is not UTF-8, or compressed" in answer.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [2001, 3_000_000])
def test_a_body_that_is_too_large_is_a_413(small: Running, chunked: bool, size: int) -> None:
    def pieces() -> Iterator[bytes]:
        for at in range(0, size, 65_536):
            yield b"x" * min(65_536, size - at)

    body: Any = pieces() if chunked else b"x" * size
    answer = httpx.post(f"{small.url}/moderations", content=body, timeout=30)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_come_is_a_408(small: Running) -> None:
    host, port = small.root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        said = sock.recv(65_536)
    assert said.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_trickles_is_a_408(small: Running) -> None:
    said, _ = _trickled(small.root, pieces=1500)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in said


def test_the_time_of_a_call_begins_with_its_body() -> None:
    held = Held()
    with serving(moderator=held.moderator(), limits={"request_seconds": 4.0}) as server:
        said, took = _trickled(server.root, pieces=60)  # 3 s of it
        held.go.set()
    assert said.startswith(b"HTTP/1.1 504 ")
    assert took < 6.9
    with serving(limits={"request_seconds": 0.3}) as server:
        said, _ = _trickled(server.root, pieces=10_000)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"within 0.3 s" in said


def _trickled(root: str, pieces: int) -> tuple[bytes, float]:
    """What is said to a body that comes character by character, 20 a second, and after how long."""
    host, port = root.removeprefix("http://").split(":")
    body = b'{"input": "%s"}' % b"wait ".ljust(pieces - 13)
    head = b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    started = time.monotonic()
    said = b""
    with socket.create_connection((host, int(port)), timeout=0.05) as sock:
        sock.sendall(head)
        for at in range(len(body)):
            with contextlib.suppress(OSError):  # nothing is said yet, or it is closed already
                sock.sendall(body[at : at + 1])
                said = sock.recv(65_536)
            if said:
                break
        sock.settimeout(60)
        while b"}}" not in said:
            more = sock.recv(65_536)
            assert more, said
            said += more
        return said, time.monotonic() - started


@pytest.mark.parametrize("path", ["/v1/moderations/", "/v1/chat/completions/", "/healthz/"])
def test_a_slash_too_many_is_a_404_and_no_redirect(small: Running, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(method, f"{small.root}{path}", timeout=30)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_url"
        assert f"no such path: {path}" in answer.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there_are_errors_in_openais_shape(small: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/moderations", 405),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/", 404),
    ):
        answer = httpx.request(method, f"{small.root}{path}", timeout=30)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


class Held:
    """A moderator whose texts wait until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = 0

    def moderator(self) -> FakeModerator:
        return FakeModerator(WORDS, on_assess=self._wait)

    def _wait(self, pairs: Sequence[Pair]) -> None:
        if any("wait" in pair.prompt for pair in pairs):
            self.begun += 1
            assert self.go.wait(60)


@pytest.mark.parametrize("batching", [True, False])
def test_beyond_its_limit_there_is_a_429_and_then_it_recovers(batching: bool) -> None:
    held = Held()
    with (
        serving(
            moderator=held.moderator(),
            limits={"moderations": 2, "texts": 64},
            model={"batching": batching},
        ) as server,
        ThreadPoolExecutor(2) as pool,
        OpenAI(base_url=server.url, api_key="x", max_retries=5) as client,
    ):
        url = f"{server.url}/moderations"
        open_ = [pool.submit(httpx.post, url, json={"input": "wait"}, timeout=60) for _ in "ab"]
        service = server.service  # type: ignore[attr-defined]
        until(lambda: service.admissions["/v1/moderations"].open == 2)
        turned = httpx.post(url, json={"input": "bomb"}, timeout=30)
        assert turned.status_code == 429
        assert int(turned.headers["retry-after"]) >= 1
        assert turned.json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{server.root}/readyz", timeout=30).status_code == 200
        held.go.set()
        assert [one.result().status_code for one in open_] == [200, 200]
        assert httpx.post(url, json={"input": "bomb"}, timeout=30).status_code == 200
        assert client.moderations.create(input="bomb").results[0].flagged


@pytest.mark.parametrize("root", ["/guard", "/guard/"])
def test_mounted_in_another_app_it_keeps_its_limits_and_streams(root: str) -> None:
    api = ChatApi()
    settings = Settings.model_validate(
        {"limits": {"moderations": 1}, "upstreams": {"local": {"url": api.url}}}
    )
    app = create_app(settings, moderator=FakeModerator(WORDS))
    outer = FastAPI()
    outer.mount(root, app)
    running, service = Running(outer), app.state.service
    try:
        url = f"{running.root}/guard/v1/moderations"
        with service.admissions["/v1/moderations"].slot():
            assert httpx.post(url, json={"input": "hi"}, timeout=30).status_code == 429
        assert httpx.post(url, json={"input": "hi"}, timeout=30).status_code == 200
        with OpenAI(base_url=f"{running.root}/guard/v1", api_key="x", max_retries=0) as client:
            asked: Any = [{"role": "user", "content": "hello"}]
            chunks = list(client.chat.completions.create(model="m", messages=asked, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == api.texts[0]
    finally:
        running.stop()
        api.running.stop()


def test_texts_are_counted_not_calls_alone() -> None:
    held = Held()
    limits = {"inputs": 8, "texts": 8}
    with (
        serving(moderator=held.moderator(), limits=limits) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        url = f"{server.url}/moderations"
        first = pool.submit(httpx.post, url, json={"input": ["wait"] * 5}, timeout=60)
        until(lambda: held.begun > 0)
        turned = httpx.post(url, json={"input": ["x"] * 4}, timeout=30)
        held.go.set()
        assert first.result().status_code == 200
        after = httpx.post(url, json={"input": ["x"] * 8}, timeout=30)
    assert (turned.status_code, after.status_code) == (429, 200)


def test_at_saturation_nothing_but_429_is_said_and_no_verdict_is_degraded() -> None:
    def slow(pairs: Sequence[Pair]) -> None:
        time.sleep(0.005 * len(pairs))

    with serving(
        moderator=FakeModerator(WORDS, on_assess=slow), limits={"moderations": 4}
    ) as server:

        def hammer(_: int) -> Counter[tuple[int, bool | None]]:
            seen: Counter[tuple[int, bool | None]] = Counter()
            with httpx.Client(timeout=60) as http:
                for _ in range(15):
                    answer = http.post(f"{server.url}/moderations", json={"input": "a bomb"})
                    degraded = None
                    if answer.status_code == 200:
                        degraded = answer.json()["results"][0]["guardrail"]["degraded"]
                    seen[answer.status_code, degraded] += 1
            return seen

        with ThreadPoolExecutor(24) as pool:
            total: Counter[tuple[int, bool | None]] = sum(pool.map(hammer, range(24)), Counter())
        assert set(total) == {(200, False), (429, None)}
        after = httpx.post(f"{server.url}/moderations", json={"input": "a bomb"}, timeout=30)
        assert after.status_code == 200


def test_no_chat_of_many_turns_is_degraded_by_others() -> None:
    api = ChatApi()
    turns = [
        {"role": role, "content": f"{role} says this."} for role in ("user", "assistant", "user")
    ]
    limits = {"chats": 8, "choices": 1, "texts": 1, "inputs": 1}
    go = threading.Event()
    go.set()
    moderator = FakeModerator(WORDS, on_assess=lambda pairs: go.wait(60))
    with (
        serving(moderator=moderator, upstream=api.url, limits=limits) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        go.clear()
        url, body = f"{server.url}/chat/completions", {"model": "m", "messages": turns}
        calls = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(8)]
        chats = server.service.admissions["/v1/chat/completions"]  # type: ignore[attr-defined]
        until(lambda: chats.open == 8)
        time.sleep(0.5)  # all of them ask
        go.set()
        answers = [call.result().json() for call in calls]
    api.running.stop()
    assert not [answer for answer in answers if answer["guardrail"]["degraded"]]


def test_streams_hold_their_slot_until_they_end() -> None:
    api = ChatApi()
    api.texts, api.pause = ["Paris lies on the Seine. " * 40], 0.05
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Where is Paris?"}],
        "stream": True,
    }
    try:
        with serving(upstream=api.url, limits={"chats": 1}) as server, httpx.Client() as http:
            url = f"{server.url}/chat/completions"
            with http.stream("POST", url, json=body, timeout=60) as stream:
                pieces = stream.iter_bytes()  # dropped, it would close the connection
                next(pieces)
                turned = httpx.post(url, json=body, timeout=30)
                assert turned.status_code == 429
                assert "retry-after" in turned.headers
            assert api.gone.wait(20)
            api.pause = 0.0
            until(lambda: httpx.post(url, json=body, timeout=30).status_code == 200)
    finally:
        api.running.stop()


def test_a_call_that_takes_too_long_is_a_504() -> None:
    held = Held()
    with serving(moderator=held.moderator(), limits={"request_seconds": 0.3}) as server:
        answer = httpx.post(f"{server.url}/moderations", json={"input": "wait"}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        held.go.set()


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("ends", ["the caller leaves", "the time is up"])
def test_a_long_text_that_nobody_waits_for_any_more_frees_its_core(
    ends: str, batching: bool
) -> None:
    model = Counting()
    seconds = 6.0 if ends == "the time is up" else 300.0
    with serving(
        moderator=model, model={"batching": batching}, limits={"request_seconds": seconds}
    ) as server:
        url = f"{server.url}/moderations"
        if ends == "the time is up":
            answer = httpx.post(url, json={"input": ENDLESS}, timeout=120)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json={"input": ENDLESS}, timeout=httpx.Timeout(60, read=6))
        service = server.service  # type: ignore[attr-defined]
        until(lambda: service.admissions["/v1/moderations"].open == 0)
        until(lambda: not _moves(lambda: model.windows), 60)
        assert model.windows < 800  # of more than 1,000
        after = httpx.post(url, json={"input": "Hello"}, timeout=60)
        assert after.status_code == 200


def _moves(number: Callable[[], int]) -> bool:
    """Whether it changes within a second."""
    before = number()
    time.sleep(1)
    return number() != before
