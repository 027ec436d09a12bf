"""The clients of `benchmarks.serve`, as locust users: one moderates, one chats and streams.

    python -m locust -f benchmarks/_serve_users.py --host http://127.0.0.1:8000 Moderator

Requests are counted under what came of them: the status, or `broken` for a stream without an end.
A client that is told to come back later waits that long, as the official ones do; with
GUARDRAIL_RUDE=1 it does not.
"""

from __future__ import annotations

import os
import random
import time

from locust import FastHttpUser, constant, task

from benchmarks._words import text

_RUDE = os.environ.get("GUARDRAIL_RUDE") == "1"
_CHANCE = random.Random()


class _Client(FastHttpUser):
    abstract = True
    wait_time = constant(0)
    network_timeout = 120.0
    connection_timeout = 30.0

    def ask(self, path: str, body: dict, end: str | None = None) -> None:
        with self.client.post(path, json=body, catch_response=True, name=path) as answer:
            status = answer.status_code
            whole = status != 200 or end is None or (answer.text or "").rstrip().endswith(end)
            answer.request_meta["name"] = str(status) if whole else "broken"
            if status == 200 and whole:
                answer.success()
            else:
                answer.failure(answer.request_meta["name"])
        if status == 429 and not _RUDE:
            time.sleep(float(answer.headers.get("Retry-After", "1")) * random.uniform(0.5, 1.0))


class Moderator(_Client):
    @task
    def moderate(self) -> None:
        self.ask("/v1/moderations", {"input": text(_CHANCE)})


class Chatter(_Client):
    @task
    def chat(self) -> None:
        messages = [{"role": "user", "content": text(_CHANCE)}]
        body = {"model": "fast", "messages": messages, "stream": True}
        self.ask("/v1/chat/completions", body, end="data: [DONE]")
