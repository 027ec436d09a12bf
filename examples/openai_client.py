"""The official `openai` client, guarded: the same calls, the same types, nothing unjudged.

    OPENAI_API_KEY=... CHAT_MODEL=gpt-4.1-mini python examples/openai_client.py

Set CHAT_URL for another server that speaks the API. Without a key and a URL a tiny stand-in server
is started on this machine, so that the example runs offline; it always gives the same answer.
"""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from openai import OpenAI

from guardrail.openai import guard_openai


class StandIn(BaseHTTPRequestHandler):
    """Not a model. Speaks just enough of the API to answer one streamed question."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for piece, finish in (("Paris is ", None), ("the capital of France.", None), ("", "stop")):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": finish}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "none"}
            self.wfile.write(f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


url, key = os.environ.get("CHAT_URL"), os.environ.get("OPENAI_API_KEY")
if url is None and key is None:
    server = HTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    print("no CHAT_URL and no OPENAI_API_KEY: a local stand-in answers, which is no model")

with guard_openai(OpenAI(base_url=url, api_key=key or "none")) as client:
    stream = client.chat.completions.create(
        model=os.environ.get("CHAT_MODEL", "stand-in"),
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        stream=True,
    )
    print("answer: ", end="")
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            if choice.finish_reason:
                print("\nfinish_reason:", choice.finish_reason)  # content_filter: refused
                print("input verdict:", chunk.guardrail["action"])
