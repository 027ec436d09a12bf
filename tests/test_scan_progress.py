"""How far a scan is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from scan_kit import read_rows, start, write_rows

from guardrail._render import progress_line, scan_progress


class Clocked:
    """The bar of a scan, under a clock that the test sets."""

    def __init__(self, total: int, before: int = 0, name: str = "[in].jsonl") -> None:
        self.now = 0.0
        self.bar = scan_progress()
        self.bar.get_time = lambda: self.now
        self.task = self.bar.add_task(name, total=total)
        self.bar.reset(self.task, completed=before)

    def chunks(self, rows: int, seconds: float, times: int) -> None:
        for _ in range(times):
            self.now += seconds
            done = self.bar.tasks[0].completed + rows
            self.bar.update(self.task, completed=done)

    @property
    def shown(self) -> str:
        out = Console(file=io.StringIO(), width=80)
        out.print(self.bar.make_tasks_table(self.bar.tasks))
        assert isinstance(out.file, io.StringIO)
        return out.file.getvalue().splitlines()[-1]


def test_rate_and_time_left_are_of_the_rows_of_this_run() -> None:
    clocked = Clocked(total=10_000, before=4_000)
    assert "rows/s" not in clocked.shown
    clocked.chunks(rows=250, seconds=2, times=8)
    assert re.search(r"\[in\]\.jsonl .* 6000/10000 125 rows/s 0:00:32", clocked.shown)
    assert progress_line(clocked.bar.tasks[0]) == (
        "[in].jsonl: 6,000 of 10,000 rows, 125 rows/s, 0:00:32 left"
    )


def test_the_rate_follows_a_scan_that_becomes_slower() -> None:
    clocked = Clocked(total=1_000_000)
    clocked.chunks(rows=1000, seconds=1, times=600)
    assert " 1,000 rows/s " in clocked.shown
    clocked.chunks(rows=100, seconds=10, times=60)
    assert re.search(r" 606000/1000000 10.0 rows/s 10:56:40", clocked.shown)


def test_chunks_that_take_minutes_have_a_rate() -> None:
    clocked = Clocked(total=100_000)
    clocked.chunks(rows=10_000, seconds=120, times=3)
    assert "83.3 rows/s, 0:14:00 left" in progress_line(clocked.bar.tasks[0])


def test_the_end_leaves_no_time() -> None:
    clocked = Clocked(total=1_000)
    clocked.chunks(rows=500, seconds=1, times=2)
    assert progress_line(clocked.bar.tasks[0]).endswith(
        "1,000 of 1,000 rows, 500 rows/s, 0:00:00 left"
    )


def test_a_long_path_leaves_room_for_the_numbers() -> None:
    clocked = Clocked(total=250_000_000, name="/data/[bold]/" + "long/" * 20 + "file.jsonl")
    clocked.chunks(rows=1000, seconds=1, times=5)
    end = r"5000/250000000 1,000 rows/s 69:26:35"
    assert re.match(rf"…long/long/long/file.jsonl .* {end}", clocked.shown)


# --- the command ---------------------------------------------------------------------------------


def test_where_no_terminal_is_a_line_comes_now_and_then(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"hello {n}"} for n in range(200)])
    program = (
        "from guardrail import _cli_scan; from guardrail.cli import app;"
        "_cli_scan._LINE_EVERY = 0.1; app()"  # 30 s are long for a test
    )
    args = ("scan", str(source), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "2")
    process = start(*args, program=("-c", program))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    lines = err.decode().splitlines()
    assert lines
    form = r"(.*): ([\d,]+) of 200 rows(?:, [\d,.]+ rows/s, \d:\d\d:\d\d left)?"
    found = [re.fullmatch(form, line) for line in lines]
    assert all(found), lines
    done = [int(match[2]) for match in found if match]
    assert done == sorted(set(done))
    assert {match[1] for match in found if match} == {str(source)}
    assert b"200 rows, 0 with errors" in out


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
def test_a_terminal_has_a_bar_with_rate_and_rows_and_then_the_summary(tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"hello {n}"} for n in range(60)])
    output, seen = tmp_path / "out.jsonl", b""
    args = ["-m", "guardrail.cli", "scan", str(source), "--output", str(output), "--batch-size=1"]
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.execve(sys.executable, [sys.executable, *args], os.environ | {"TERM": "xterm"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert re.search(r"\d+/60 [\d.]+ rows/s \d:\d\d:\d\d", text), text
    assert text.index("60/60") < text.index("60 rows, 0 with errors")
    assert len(read_rows(output)) == 60
