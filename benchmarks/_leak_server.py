"""A server on loopback that speaks both of OpenAI's APIs and says what its source says, for
`leaks`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from typing import Any

__all__ = ["Source", "serve"]

SIZES = (1, 9, 40, 3, 120, 17)  # characters of a delta


class Source:
    """What the model behind the guard says next."""

    answer = ""

    def deltas(self) -> Iterator[str]:
        at = 0
        for size in cycle(SIZES):
            if at >= len(self.answer):
                return
            yield self.answer[at : at + size]
            at += size


@contextmanager
def serve(source: Source) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            whole, events = _chat(source) if self.path.endswith("completions") else _resp(source)
            if asked.get("stream"):
                lines = [_event(event) for event in events]
                if self.path.endswith("completions"):
                    lines.append("data: [DONE]\n\n")
                self._send("text/event-stream", "".join(lines))
            else:
                self._send("application/json", json.dumps(whole))

        def _send(self, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _event(event: Mapping[str, Any]) -> str:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n"


_Answers = tuple[dict[str, Any], Sequence[dict[str, Any]]]


def _chat(source: Source) -> _Answers:
    head = {"id": "1", "created": 1, "model": "m"}

    def chunk(delta: dict[str, Any], end: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": end}
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    message = {"role": "assistant", "content": source.answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    deltas = [chunk({"content": text}) for text in source.deltas()]
    return (
        {**head, "object": "chat.completion", "choices": [choice]},
        [chunk({"role": "assistant", "content": ""}), *deltas, chunk({}, "stop")],
    )


def _resp(source: Source) -> _Answers:
    def item(text: str, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        head = {"id": "m1", "type": "message", "role": "assistant", "status": status}
        return {**head, "content": [part] if text else []}

    base = {"id": "r1", "object": "response", "created_at": 1, "model": "m", "tools": []}
    base |= {"parallel_tool_calls": True, "tool_choice": "auto"}
    done = item(source.answer, "completed")
    whole = {**base, "status": "completed", "output": [done]}
    here = {"item_id": "m1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}
    delta = {"type": "response.output_text.delta", "logprobs": [], **here}
    text = {"text": source.answer, "logprobs": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**base, "status": "in_progress", "output": []}},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": item("", "in_progress"),
        },
        {"type": "response.content_part.added", "part": part, **here},
        *({**delta, "delta": piece} for piece in source.deltas()),
        {"type": "response.output_text.done", **text, **here},
        {"type": "response.content_part.done", "part": done["content"][0], **here},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {"type": "response.completed", "response": whole},
    ]
    return whole, [{**event, "sequence_number": n} for n, event in enumerate(events)]
