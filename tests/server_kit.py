"""For the tests of `guardrail serve`: it, and a chat API for it to stand in front of, both real
servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from guardrail import Category, Severity
from guardrail._server_config import Settings
from guardrail.moderator import Moderator
from guardrail.server import create_app
from guardrail.testing import FakeModerator

WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "insult": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
    "ssn-1234": (Severity.MODERATE, Category.PRIVACY_VIOLATION),
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


class Running:
    """An ASGI app behind uvicorn, in a thread of its own."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


class ChatApi:
    """A chat API that says `texts`, a choice each, in `pieces` of so many characters; or fails."""

    def __init__(self) -> None:
        self.reset()
        app = FastAPI()
        app.post("/v1/chat/completions")(self._answer)
        app.get("/v1/models")(self._models)
        self.running = Running(app)
        self.url = self.running.url

    def reset(self) -> None:
        self.texts = ["Paris is the capital of France."]
        self.tool_calls: list[dict[str, Any]] = []
        self.pieces = 7
        self.pause = 0.0
        self.wait = 0.0
        self.ends = True
        self.breaks_after: int | None = None
        self.failure: tuple[int, Any, dict[str, str]] | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.callers: list[Any] = []  # host and port: another port is another connection
        self.open = 0
        self.sent = 0
        self.gone = threading.Event()

    async def _models(self) -> dict[str, Any]:
        rows = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in "ab"]
        return {"object": "list", "data": rows}

    async def _answer(self, request: Request) -> Response:
        self.requests.append(json.loads(await request.body()))
        self.headers.append(dict(request.headers))
        self.callers.append(request.client)
        await asyncio.sleep(self.wait)
        if self.failure is not None:
            status, body, headers = self.failure
            content = body if isinstance(body, str) else json.dumps(body)
            return Response(content, status, headers, media_type="application/json")
        if self.requests[-1].get("stream"):
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        return JSONResponse(self._whole())

    def _whole(self) -> dict[str, Any]:
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, **calls},
                "finish_reason": "tool_calls" if calls else "stop",
            }
            for i, text in enumerate(self.texts)
        ]
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m-1"}
        return {**head, "choices": choices, "usage": USAGE}

    def _chunks(self) -> Iterator[dict[str, Any]]:
        """The choices, interleaved."""
        texts = [
            [text[at : at + self.pieces] for at in range(0, len(text), self.pieces)]
            for text in self.texts
        ]
        for i in range(len(texts)):
            yield _chunk(i, {"role": "assistant", "content": ""})
        for at in range(max(map(len, texts))):
            for i, pieces in enumerate(texts):
                if at < len(pieces):
                    yield _chunk(i, {"content": pieces[at]})
        for i in range(len(texts)):
            if self.tool_calls:
                calls = [{"index": j, **call} for j, call in enumerate(self.tool_calls)]
                yield _chunk(i, {"tool_calls": calls})
            if self.ends:
                yield _chunk(i, {}, "tool_calls" if self.tool_calls else "stop")

    async def _stream(self) -> AsyncIterator[str]:
        self.open += 1
        try:
            for i, chunk in enumerate(self._chunks()):
                if i == self.breaks_after:
                    raise ConnectionResetError("broken off by the test")
                await asyncio.sleep(self.pause)
                yield f"data: {json.dumps(chunk)}\n\n"
                self.sent += 1
            if self.requests[-1].get("stream_options", {}).get("include_usage"):
                yield f"data: {json.dumps({**_chunk(0, {}), 'choices': [], 'usage': USAGE})}\n\n"
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone.set()
            raise
        finally:
            self.open -= 1


def _chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1"}
    return {**head, "choices": [choice]}


@contextlib.contextmanager
def serving(
    *, moderator: Moderator | None = None, upstream: str | None = None, **settings: Any
) -> Iterator[Running]:
    """`guardrail serve` with these settings; words are judged by FakeModerator."""
    if upstream is not None:
        given = {"url": upstream, "retries": 0, "timeout": 5.0, **settings.pop("one", {})}
        settings["upstreams"] = {"local": given}
    app = create_app(Settings.model_validate(settings), moderator=moderator or FakeModerator(WORDS))
    running = Running(app)
    running.service = app.state.service  # type: ignore[attr-defined]
    try:
        yield running
    finally:
        running.stop()


class Process:
    """The real command, with the bundled model; its log lines are read as they come."""

    def __init__(self, *args: str, config: Path | None = None) -> None:
        command = [sys.executable, "-m", "guardrail.cli", "serve", "--port", "0", "--log", "json"]
        command += ["--policy", "audit-only", *args]
        if config is not None:
            command += ["--config", str(config)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        until(lambda: self.port() is not None or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.lines
        self.root = f"http://127.0.0.1:{self.port()}"
        self.url = f"{self.root}/v1"
        until(self._is_ready, 300)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def port(self) -> int | None:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", "".join(self.lines))
        return int(found[1]) if found else None

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.root}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        code = self.process.wait(300)
        self._reader.join(10)
        return code

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@contextlib.contextmanager
def process(*args: str, config: Path | None = None) -> Iterator[Process]:
    running = Process(*args, config=config)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        running._reader.join(60)
        assert not running._reader.is_alive(), "a worker outlived its server"
        assert running.process.stderr is not None
        running.process.stderr.close()


def until(what: Any, seconds: float = 20.0) -> None:
    """Wait until `what()` is true; the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
