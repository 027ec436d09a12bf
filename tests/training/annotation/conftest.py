"""A store with people in it, and an OpenAI-compatible server that says what it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from training.annotation.labels import Settings
from training.annotation.queue import Queue
from training.annotation.store import Store


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    """Ann, Cat, and Bob who adjudicates; every task wants two people."""
    store = Store(tmp_path / "store.db", create=True)
    store.set_settings(Settings(overlap_share=1.0))
    for name in ("ann", "cat", "bob"):
        store.add_person(name, adjudicates=name == "bob")
    return Queue(store)


Reply = Callable[[dict[str, Any]], tuple[int, Any]]


class FakeEndpoint:
    """reply: from the request's body to a status and the answer's text (or an error's body)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Reply = lambda body: (200, "{}")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                status, text = outer.reply(body)
                answer: Any = {"error": {"message": text}}
                if status == 200:
                    message = {"role": "assistant", "content": text}
                    answer = {
                        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {
                            "prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110
                        },
                    }  # fmt: skip
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    server = FakeEndpoint()
    yield server
    server.close()
