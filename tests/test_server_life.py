"""`guardrail serve` as a process: how it starts, ends, is seen, and runs in several workers."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from batching_kit import ENDLESS
from openai import OpenAI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from server_kit import ChatApi, process, serving, until

from guardrail._server_keys import hash_key
from guardrail._server_telemetry import _Lines
from guardrail.audit import verify

ASKED: Any = [{"role": "user", "content": "Where is Paris, seen from Zanzibar?"}]
LONG = "Paris lies on the Seine. " * 100


@pytest.fixture
def api() -> Iterator[ChatApi]:
    api = ChatApi()
    yield api
    api.running.stop()


def test_on_sigterm_open_streams_end_well_and_nothing_new_is_taken(
    api: ChatApi, tmp_path: Path
) -> None:
    api.texts, api.pause = [LONG], 0.005
    config = tmp_path / "guardrail.toml"
    config.write_text("[limits]\nshutdown_seconds = 120\n")
    with (
        process("--upstream", api.url, config=config) as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="m", messages=ASKED, stream=True)
        first = next(iter(stream))
        server.terminate()
        until(lambda: _is_refused(server.root))
        text = (first.choices[0].delta.content or "") + "".join(
            choice.delta.content or "" for chunk in stream for choice in chunk.choices
        )
        assert text == LONG
        assert server.end() == 0
        records = server.records()
    (request,) = [r for r in records if r.get("path") == "/v1/chat/completions"]
    assert (request["status"], request["model"], request["action"]) == (200, "m", "allow")
    assert "Zanzibar" not in "".join(server.lines)
    assert api.open == 0


def _is_refused(root: str) -> bool:
    try:
        return httpx.get(f"{root}/readyz", timeout=5).status_code == 503
    except httpx.TransportError:
        return True


def test_streams_that_do_not_end_in_time_are_ended_and_the_upstream_is_let_go(
    api: ChatApi, tmp_path: Path
) -> None:
    api.texts, api.pause = [LONG * 100], 0.02
    config = tmp_path / "guardrail.toml"
    config.write_text("[limits]\nshutdown_seconds = 0.5\n")
    body = {"model": "m", "messages": ASKED, "stream": True}
    with process("--upstream", api.url, config=config) as server, httpx.Client() as http:
        with http.stream("POST", f"{server.url}/chat/completions", json=body, timeout=60) as stream:
            pieces = stream.iter_text()
            next(pieces)
            server.terminate()
            rest = "".join(pieces)
        assert '"code":"shutting_down"' in rest
        assert "[DONE]" not in rest
        assert server.end() == 0
    assert api.gone.wait(20)
    assert api.open == 0


@pytest.mark.parametrize(("batching", "workers"), [("true", 1), ("false", 1), ("true", 2)])
def test_a_long_text_that_is_being_judged_does_not_keep_it_from_ending_well(
    batching: str, workers: int, tmp_path: Path
) -> None:
    config = tmp_path / "guardrail.toml"
    config.write_text(
        f"workers = {workers}\n[limits]\nshutdown_seconds = 0.5\n[model]\nbatching = {batching}\n"
    )
    with process(config=config) as server, ThreadPoolExecutor(2) as pool:
        url = f"{server.url}/moderations"
        calls = [pool.submit(httpx.post, url, json={"input": ENDLESS}, timeout=300) for _ in "ab"]
        open_ = 'guardrail_open_requests{route="/v1/moderations"} 2.0'
        until(lambda: open_ in httpx.get(f"{server.root}/metrics", timeout=60).text, 60)
        time.sleep(1)  # both bodies are there, and the model is at work
        server.terminate()
        answers = [call.result() for call in calls]
        assert [answer.json()["error"]["code"] for answer in answers] == ["shutting_down"] * 2
        assert server.end() == 0


def test_workers_answer_together_and_end_together(api: ChatApi, tmp_path: Path) -> None:
    config = tmp_path / "guardrail.toml"
    keys = [
        f'[[keys]]\nname = "key-{n}"\nhash = "{hash_key(f"token-{n}")}"\npolicy = "audit-only"\n'
        for n in range(1000)  # more than a variable of the environment could carry to a worker
    ]
    config.write_text('[audit]\npath = "audit.jsonl"\nfsync = "never"\n' + "".join(keys))
    own = {"Authorization": "Bearer token-999"}
    with process("--workers", "2", "--upstream", api.url, config=config) as server:
        seen = set()
        calls = 0
        deadline = time.monotonic() + 300
        while len(seen) < 2 and time.monotonic() < deadline:
            seen.add(httpx.get(f"{server.root}/healthz", timeout=30).json()["worker"])
            asked = {"json": {"input": "hi"}, "headers": own, "timeout": 30}
            assert httpx.post(f"{server.url}/moderations", **asked).status_code == 200
            calls += 1
        assert len(seen) == 2
        metrics = httpx.get(f"{server.root}/metrics", timeout=30).text
        server.terminate()
        server.end()
    pattern = r'guardrail_requests_total\{route="/v1/moderations",status="200"\} (\d+)'
    found = re.search(pattern, metrics)
    assert found
    assert int(found[1]) == calls
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    report = verify(tmp_path / "audit.jsonl")
    assert not report.problems
    assert report.rows == calls


def test_flooded_it_says_429_and_answers_the_first_request_after_the_flood(tmp_path: Path) -> None:
    """Clients that do not wait as told. How soon it is as fast as idle: benchmarks.serve."""
    config = tmp_path / "guardrail.toml"
    config.write_text("[limits]\nmoderations = 4\n")
    with process(config=config) as server:
        end = time.monotonic() + 3

        def flood(_: int) -> Counter[int]:
            statuses: Counter[int] = Counter()
            with httpx.Client(timeout=120) as http:
                while time.monotonic() < end:
                    answer = http.post(f"{server.url}/moderations", json={"input": "hello " * 50})
                    statuses[answer.status_code] += 1
                    if answer.status_code == 429:
                        assert int(answer.headers["retry-after"]) >= 1
                        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                    else:
                        assert not answer.json()["results"][0]["guardrail"]["degraded"]
            return statuses

        with ThreadPoolExecutor(24) as pool:
            total: Counter[int] = sum(pool.map(flood, range(24)), Counter())
        ended = time.monotonic()
        after = httpx.post(f"{server.url}/moderations", json={"input": "hello"}, timeout=60)
        took = time.monotonic() - ended
        metrics = httpx.get(f"{server.root}/metrics", timeout=60).text
    assert set(total) == {200, 429}
    assert after.status_code == 200
    assert took < 10  # a second on a machine that does nothing else
    assert "guardrail_queue_depth 0.0" in metrics


def test_workers_do_not_outlive_a_server_that_is_killed() -> None:
    with process("--workers", "2") as server:
        pid = httpx.get(f"{server.root}/healthz", timeout=60).json()["worker"]
        server.process.kill()
        server.process.wait()
        until(lambda: not Path(f"/proc/{pid}").exists() or _is_refused(server.root), 300)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        command = [sys.executable, "-m", "guardrail.cli", "serve", "--port"]
        done = subprocess.run(
            [*command, str(sock.getsockname()[1])], capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert done.stderr.count("\n") == 1


# --- what is seen of it --------------------------------------------------------------------------


def test_health_names_the_policies_that_fail_open(tmp_path: Path) -> None:
    (tmp_path / "open.toml").write_text('name = "open"\non_error = "allow"\n')
    with serving(policies={"open": str(tmp_path / "open.toml")}) as server:
        health = httpx.get(f"{server.root}/healthz").json()
    assert health["status"] == "ok"
    assert health["fails_open"] == ["open@1"]
    assert health["policies"] == {
        "balanced@1": {"on_error": "refuse"},
        "open@1": {"on_error": "allow"},
    }


def test_metrics_count_actions_by_category_and_severity_without_text(api: ChatApi) -> None:
    api.texts = ["Take the bomb."]
    with (
        serving(upstream=api.url) as server,
        OpenAI(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        client.moderations.create(input="an insult")
        client.chat.completions.create(model="m", messages=ASKED)
        list(client.chat.completions.create(model="m", messages=ASKED, stream=True))
        metrics = httpx.get(f"{server.root}/metrics").text
    for line in (
        'guardrail_verdicts_total{action="flag",category="Insulting Behavior",direction="input",'
        'severity="minor"} 1.0',
        'guardrail_verdicts_total{action="refuse",category="Violence",direction="output",'
        'severity="severe"} 2.0',
        'guardrail_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        "guardrail_queue_depth 0.0",
        "guardrail_open_streams 0.0",
        'guardrail_request_seconds_count{route="/v1/moderations"} 1.0',
        'guardrail_upstream_seconds_count{upstream="local"} 2.0',
        "guardrail_first_event_seconds_count 1.0",
    ):
        assert line in metrics
    assert "Zanzibar" not in metrics


def test_two_apps_count_apart() -> None:
    with serving() as one, serving() as two:
        httpx.post(f"{one.url}/moderations", json={"input": "x"})
        assert 'route="/v1/moderations"' in httpx.get(f"{one.root}/metrics").text
        assert 'route="/v1/moderations"' not in httpx.get(f"{two.root}/metrics").text


@pytest.mark.parametrize("keep", [False, True])
def test_a_log_line_holds_text_only_where_asked_for(
    keep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "guardrail.server")
    with serving(log={"text": keep}) as server:
        headers = {"X-Request-ID": "abc-1"}
        answer = httpx.post(
            f"{server.url}/moderations", json={"input": "Zanzibar bomb"}, headers=headers
        )
    assert answer.headers["x-request-id"] == "abc-1"
    (facts,) = [r.facts for r in caplog.records if r.getMessage() == "request"]  # type: ignore[attr-defined]
    assert facts["id"] == "abc-1"
    assert (facts["action"], facts["categories"]) == ("refuse", ["Violence"])
    assert ("Zanzibar" in str(facts)) is keep


def test_no_caller_writes_a_line_of_the_log_or_steers_the_terminal_it_is_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "guardrail.server")
    with serving() as server:
        httpx.get(f"{server.url}/models/%1b[2J%0a12:00:00.000 error faked")
    (record,) = [record for record in caplog.records if record.getMessage() == "request"]
    line = _Lines(as_json=False).format(record)
    assert r"path=/v1/models/\u001b[2J\u000a12:00:00.000 error faked  status=404" in line


def test_spans_tell_of_the_request_its_checks_and_its_upstream(api: ChatApi) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": "m", "messages": ASKED, "stream": True}
    with serving(upstream=api.url) as server:
        httpx.post(
            f"{server.url}/chat/completions", json=body, headers={"traceparent": parent}, timeout=30
        )
        until(lambda: any(s.name.startswith("POST") for s in exporter.get_finished_spans()))
    spans = exporter.get_finished_spans()
    names = [span.name for span in spans]
    assert {"guardrail.check", "guardrail.upstream", "POST /v1/chat/completions"} <= set(names)
    ours = [span for span in spans if span.context and f"{span.context.trace_id:032x}" in parent]
    assert len(ours) >= 4  # all of one trace, the caller's
    assert api.headers[0]["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert "Zanzibar" not in "".join(span.to_json() for span in spans)
