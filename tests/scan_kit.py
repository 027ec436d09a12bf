"""What the tests of `guardrail scan` share: rows, guards that need no model, real processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import guardrail
from guardrail import Category, Guard, Pair, Severity
from guardrail.scan import LocalEngine, Scan, Tally
from guardrail.testing import FakeModerator

ROOT = Path(guardrail.__file__).parents[1]
WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "idiot": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
}


def fake_guard(on_assess: Callable[[Sequence[Pair]], None] | None = None) -> Guard:
    return Guard(FakeModerator(WORDS, on_assess=on_assess))


def scan(
    source: str | Path, output: Path, guard: Guard | None = None, workers: int = 1, **options: Any
) -> Tally:
    return Scan(source, output, **options).run(LocalEngine(guard or fake_guard(), workers))


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.decode().splitlines()]


def without_latency(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose verdicts can be compared: how long one took is no part of it."""
    for row in rows:
        row.get("guardrail", {}).pop("latency_ms", None)
    return list(rows)


def stop_after(texts: int) -> Guard:
    """A guard whose process is interrupted after so many texts."""
    left = iter(range(texts))

    def on_assess(pairs: Sequence[Pair]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return fake_guard(on_assess)


def start(*args: str, program: Sequence[str] = ("-m", "guardrail.cli", "scan"), **env: str) -> Any:
    return subprocess.Popen(
        [sys.executable, *program, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        # A test run that was put in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def rows_done(state: Path) -> int:
    return int(json.loads(state.read_bytes())["tally"]["rows"]) if state.exists() else 0


def wait_for_rows(state: Path, rows: int, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        done = rows_done(state)
        if done >= rows:
            return done
        time.sleep(0.005)
    raise AssertionError(f"never came to {rows} rows: {process.communicate(timeout=60)}")
