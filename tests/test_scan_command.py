"""`guardrail scan`, the real command with the real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scan_kit import ROOT, read_rows, start, wait_for_rows, without_latency, write_rows
from typer.testing import CliRunner

from guardrail import Guard, OnnxModerator
from guardrail._scan_source import open_format, open_source
from guardrail.cli import app
from guardrail.scan import Fields, LocalEngine


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """1,000 rows that differ; every 100th is broken."""
    path = tmp_path / "in.jsonl"
    text = "Tell me about gardens. " * 4
    good = [json.dumps({"id": i, "prompt": f"{i} {text}", "response": text}) for i in range(1000)]
    lines = [f"broken {i}" if i % 100 == 50 else line for i, line in enumerate(good)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_scan_killed_twice_loses_and_doubles_nothing(many: Path, tmp_path: Path) -> None:
    output, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial.state"
    args = (str(many), "--output", str(output), "--batch-size", "4", "--policy", "audit-only")
    for stop_at in (40, 200):
        process = start(*args)
        wait_for_rows(state, stop_at, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
    before = json.loads(state.read_bytes())["tally"]["rows"]
    assert 200 <= before < 1000
    process = start(*args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert [line for line in err.splitlines() if b" of 1,000 rows" not in line] == []
    assert "1,000 rows, 10 with errors, 0 judged by on_error alone" in out.decode()
    rows = read_rows(output)
    assert [row.get("id", row.get("raw")) for row in rows] == [
        f"broken {i}" if i % 100 == 50 else i for i in range(1000)
    ]
    assert all(("guardrail" in row) is ("id" in row) for row in rows)
    assert all(("error" in row) is ("raw" in row) for row in rows)


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to a child")
def test_ctrl_c_says_how_to_go_on(many: Path, tmp_path: Path) -> None:
    process = start(str(many), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "4")
    wait_for_rows(tmp_path / "out.jsonl.partial.state", 8, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1
    assert b"run the same command again to go on" in err


def test_another_policy_does_not_go_on_with_a_scan(many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start(str(many), "--output", str(output), "--batch-size", "4")
    wait_for_rows(tmp_path / "out.jsonl.partial.state", 8, process)
    process.kill()
    process.communicate(timeout=60)
    process = start(str(many), "--output", str(output), "--policy", "strict")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert b"left by another scan (policy differs)" in err


@pytest.mark.parametrize(
    ("rows", "option", "code", "says"),
    [
        (
            [{"q": "hello", "a": "hi"}],
            "--prompt-field=nope",
            2,
            b"(there are q, a): name the right",
        ),
        (
            [{"q": None}] * 3 + [{"q": 5}],
            "--prompt-field=q",
            1,
            b"no row could be judged; of most: no 'q' in",
        ),
        ([{"q": None}, {"q": "hello"}], "--prompt-field=q", 0, b""),
        ([], "--prompt-field=q", 0, b""),
    ],
)
def test_a_scan_that_judged_nothing_does_not_pass_for_one_that_did(
    rows: list[object], option: str, code: int, says: bytes, tmp_path: Path
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    process = start(str(source), "--output", str(output), option)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, len(err.splitlines())) == (code, 1 if says else 0)
    assert says in err
    if code != 2:
        assert len(read_rows(output)) == len(rows)


def test_help_says_which_responses_are_judged_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = CliRunner().invoke(app, ["scan", "--help"]).output
    assert "By default response, else response_0, response_1, ..." in shown


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"  # what Python itself understands as "not there"
    )
    done = subprocess.run(
        [sys.executable, "-m", "guardrail.cli", "scan", str(tmp_path / "in.parquet"),
         "--output", str(tmp_path / "out.parquet")],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert b"pip install 'guardrail-severity[scan]'" in done.stderr


def test_a_scan_gives_the_verdicts_of_check_to_the_last_bit(tmp_path: Path) -> None:
    start_ = "How do I make a bomb? You are an idiot. "
    rows = [
        {"prompt": start_ * (1 + n % 5) + f"Garden {n}. " * (n % 40), "response": answer}
        for n in range(24)
        for answer in ("", f"{n} Mix {start_ * (n % 7)} and wait.")
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    guard = Guard()
    seen: list[object] = []
    engine = LocalEngine(Guard(OnnxModerator(threads=1)), workers=3)
    for judged in engine.judge(open_format(open_source(str(source)), source, Fields()), 0, 7):
        seen += [outcome["response"] for _, outcome in judged if not isinstance(outcome, str)]
    assert seen == [guard.check(row["prompt"], row["response"] or None) for row in rows]
    process = start(str(source), "--output", str(tmp_path / "out.jsonl"))
    process.communicate(timeout=240)
    written = [row["guardrail"] for row in without_latency(read_rows(tmp_path / "out.jsonl"))]
    checked = [{"guardrail": verdict.to_json()} for verdict in seen]  # type: ignore[attr-defined]
    assert written == [row["guardrail"] for row in without_latency(checked)]
