"""The command line, as one would use it: real processes, one line for what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from typer.testing import CliRunner

from training.annotate import app
from training.annotation.labels import SafetyLabel
from training.annotation.queue import Queue
from training.annotation.store import Store

ROOT = Path(__file__).parents[3]


def run(folder: Path, *words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*words, "--store", str(folder / "s.db")])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rows = [{"prompt": f"p{n}", "response": f"kill r{n}"} for n in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "6 rows taken in, 0 malformed" in run(tmp_path, "import", str(tmp_path / "in.jsonl"))
    return tmp_path


def test_a_session_from_import_to_export(store: Path) -> None:
    key = run(store, "annotators", "add", "ann").strip()
    run(store, "annotators", "add", "bob", "--adjudicates")
    assert "overlap_share = 1.0" in run(store, "settings", "--overlap-share", "1")
    target = Store(store / "s.db")
    assert target.sign_in("ann", key) is not None
    queue = Queue(target)
    while task := queue.claim("ann"):
        queue.save("ann", task.id, SafetyLabel(True))
    while task := queue.claim("bob"):
        queue.save("bob", task.id, SafetyLabel(False, 2, ("Violence",)))
    assert "| severity | 6 |" in run(store, "stats")
    assert json.loads(run(store, "stats", "--json"))["labels"]["human"] == 12
    shown = run(store, "adjudicate", "bob")
    assert "task 1 (item)" in shown
    assert 'ann: {"safe": true' in shown
    words = ["--task", "1", "--severity", "1", "--category", "Violence"]
    assert "5 disputes are left" in run(store, "adjudicate", "bob", *words)
    out = store / "out.jsonl"
    assert "1 rows" in run(store, "export", str(out), "--settled-only")
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["severity"], row["label_source"], row["agreed"]) == (1, "human", True)
    assert "bob\thuman, adjudicates" in run(store, "annotators", "list")


def test_an_endpoint_labels_from_the_command_line_and_shows_cost(
    store: Path, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    answer = '{"reason": "", "severity": 2, "categories": ["Violence"]}'
    endpoint.reply = lambda body: (200, answer)
    words = ["label", "--model", "m", "--url", endpoint.url, "--price-in", "1000"]
    said = run(store, *words, "--limit", "4")
    assert "ai:m: 4 labelled, 0 without a usable answer, 0 left; 440 tokens, cost 0.4000" in said
    assert "2 labelled" in run(store, *words)
    endpoint.reply = lambda body: (200, "no")
    said = run(store, "label", "--model", "n", "--url", endpoint.url, "--limit", "1", code=3)
    assert "no usable answer" in said


def test_a_url_that_is_none_is_told_before_it_is_asked(store: Path) -> None:
    pytest.importorskip("openai")
    words = ["label", "--model", "m", "--url", "notaurl"]
    result = CliRunner().invoke(app, [*words, "--store", str(store / "s.db")])
    assert result.exit_code != 0
    assert "'notaurl' is not an http:// or https:// URL: give its base" in result.output


def test_progress_tokens_and_cost_are_shown_while_an_endpoint_labels(
    store: Path, endpoint: Any
) -> None:
    pytest.importorskip("openai")
    endpoint.reply = lambda body: (200, '{"reason": "", "severity": 0, "categories": []}')
    terminal, theirs = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    words = [
        "label", "--model", "m", "--url", endpoint.url, "--price-in", "1000",
        "--store", str(store / "s.db"),
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "training.annotate", *words], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
            while chunk := os.read(terminal, 4096):
                shown += chunk
    os.close(terminal)
    assert process.returncode == 0, shown
    bar = shown.decode()
    assert "ai:m:" in bar
    assert "6/6" in bar
    assert "660 tokens, cost 0.6000" in bar


def test_the_moderator_labels_and_next_brings_forward(store: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert "6 labelled" in run(store, "label", "--moderator", "small")
    lines = run(store, "next", "3").splitlines()
    assert len(lines) == 3
    assert all("kill" in line for line in lines)


def test_suspected_errors_are_listed_and_queued(tmp_path: Path) -> None:
    rows = []
    for n in range(60):
        unsafe = (n % 2 == 1) != (n == 10)
        text = "hurt beat kick" if n % 2 else "tea cake song"
        label = {"severity": 2, "categories": ["Violence"]} if unsafe else {"severity": 0}
        rows.append({"prompt": f"number {n}", "response": text, **label})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, "import", str(tmp_path / "in.jsonl"))
    said = run(tmp_path, "errors", "--limit", "1", "--queue")
    assert said.startswith("11\t")
    assert "1 queued for another look" in said


def test_malformed_rows_are_listed_and_the_exit_code_says_so(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "p"}\n{"prompt": 1}\n')
    said = run(tmp_path, "import", str(tmp_path / "in.jsonl"), code=3)
    assert "in.jsonl:2: prompt is not a text but int" in said
    assert "1 rows taken in, 1 malformed" in said


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["stats"], "no such store: make one with `import`"),
        (["import", "missing.jsonl"], "no such file"),
        (["annotators", "add", "a:b"], "has no colon"),
        (["annotators", "add", "a\nb"], "one line of text: leave out control characters"),
        (["label", "--moderator", "small", "--limit", "-1"], "greater than or equal to 1"),
        (["settings", "--overlap-share", "2"], "between 0 and 1"),
        (["label"], "no such store|--moderator"),
        (["settings", "--suggestions", "always"], "always"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, words: list[str], what: str) -> None:
    import re

    path = str(tmp_path / "s.db")
    result = subprocess.run(
        [sys.executable, "-m", "training.annotate", *words, "--store", path],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode in (1, 2)
    assert re.search(what, result.stderr)
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
