"""Put a guard around any OpenAI-compatible API: OpenAI, Ollama, vLLM, llama.cpp, LM Studio, ...

    CHAT_URL=http://localhost:11434/v1 CHAT_MODEL=llama3.2 python examples/openai_compatible_url.py

(CHAT_KEY holds the API key, where one is needed.) Without CHAT_URL a tiny stand-in server is
started on this machine, so that the example runs offline; it always gives the same answer.
"""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from guardrail import GuardedChat
from guardrail.upstream import OpenAICompatible


class StandIn(BaseHTTPRequestHandler):
    """Not a model. Speaks just enough of the API to answer one streamed question."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for piece in ("Paris is ", "the capital ", "of France."):
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


url = os.environ.get("CHAT_URL")
if url is None:
    server = HTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    print("CHAT_URL is not set: a local stand-in answers, which is no model")

model = OpenAICompatible(
    url, model=os.environ.get("CHAT_MODEL", "stand-in"), api_key=os.environ.get("CHAT_KEY")
)
with model:
    stream = GuardedChat(model).stream("What is the capital of France?")
    print("answer: ", end="")
    for text in stream:
        print(text, end="", flush=True)
    print("\nfinish_reason:", stream.result.finish_reason)
