"""What `guardrail serve` and its upstream say to each other: connections, secrets, and the wire as
curl sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from server_kit import ChatApi, process, serving

ASKED: Any = [{"role": "user", "content": "Where is Paris?"}]
KEY = "sk-very-secret-1234567890"


@pytest.fixture
def api() -> Iterator[ChatApi]:
    api = ChatApi()
    yield api
    api.running.stop()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_gets_a_whole_chat_from_the_command_as_it_is_run(api: ChatApi) -> None:
    body = json.dumps({"model": "m", "messages": ASKED})
    with process("--upstream", api.url) as server:
        done = subprocess.run(
            ["curl", "-s", "-i", "--json", body, f"{server.url}/chat/completions"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    head, _, answer = done.stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 200 ")
    assert "content-type: application/json" in head.lower()
    assert "x-request-id: req_" in head.lower()
    completion = json.loads(answer)
    assert completion["object"] == "chat.completion"
    assert completion["guardrail"]["direction"] == "input"
    (choice,) = completion["choices"]
    assert choice["message"]["content"] == "Paris is the capital of France."
    assert choice["finish_reason"] == "stop"
    assert choice["guardrail"]["direction"] == "output"
    assert not choice["guardrail"]["degraded"]


@pytest.mark.parametrize("stream", [False, True])
def test_requests_one_after_the_other_share_a_connection_to_the_upstream(
    api: ChatApi, stream: bool
) -> None:
    with (
        serving(upstream=api.url) as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        for _ in range(6):
            answer: Any = client.chat.completions.create(model="m", messages=ASKED, stream=stream)
            if stream:
                assert [*answer]
    assert len(api.callers) == 6
    assert len(set(api.callers)) == 1


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": f"Bearer {KEY}"}, {"api-key": KEY}, {"x-auth": f"bearer  {KEY}"}],
    ids=str,
)
@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_key_that_is_configured_as_a_header_is_sent_and_never_told(
    api: ChatApi, headers: dict[str, str], status: int
) -> None:
    error = {"message": f"bad key {KEY} in Europe", "type": KEY, "param": KEY, "code": f"c {KEY}"}
    told = "bad key .* in Europe" if status < 500 else "why is in its log"
    with (
        serving(upstream=api.url, one={"headers": {**headers, "x-place": "In Europe"}}) as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        client.chat.completions.create(model="m", messages=ASKED)
        for stream in (False, True):
            api.failure = (status, {"error": error}, {})
            with pytest.raises(openai.APIStatusError, match=told) as raised:
                client.chat.completions.create(model="m", messages=ASKED, stream=stream)
            assert KEY not in raised.value.response.text
    assert KEY in str(api.headers[0])
