"""The audit log after kills, a full disk, a power cut: whole, with nothing lost or doubled."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from audit_logs import KEY, VERDICT, WRITER, data, fill

from guardrail import Pair
from guardrail.audit import AuditLog, verify

posix = pytest.mark.skipif(os.name != "posix", reason="kills and file limits are POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@posix
def test_twenty_kills_among_several_writers_lose_and_double_nothing(path: Path) -> None:
    rng = random.Random(1)
    safe: set[str] = set()
    begun = dict.fromkeys("abc", 0)

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(path), name, "100000", str(begun[name])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def end(name: str, writer: subprocess.Popen[str]) -> None:
        writer.kill()
        assert writer.stdout is not None
        said = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.stdout.close()
        writer.wait()
        safe.update(f"{name}:{n}" for n in said)
        # The row after the last one said may be there: its number is not used again.
        begun[name] = max([begun[name], *said]) + 2

    writers = {name: start(name) for name in begun}
    try:
        for _ in range(20):
            time.sleep(rng.uniform(0.1, 0.6))
            name = rng.choice("abc")
            end(name, writers[name])
            writers[name] = start(name)
    finally:
        for name, writer in writers.items():
            end(name, writer)
    AuditLog(path, key=KEY)  # opens what the last kills left
    report = verify(path, KEY)
    assert report.problems == []
    assert report.torn == 0
    logged = [row["text"]["prompt"] for row in data(path)]
    assert len(logged) == len(set(logged))
    assert safe <= set(logged)
    assert len(logged) - len(safe) <= 20 + len(writers)  # at most one unsaid row for each kill
    assert len(safe) > 50


# Kills itself at the nth step that changes a file: before it, or with a write half done.
STEPS = """
import os, signal, sys
from pathlib import Path
from guardrail import Action, Direction, Pair, Verdict
from guardrail.audit import AuditLog
folder = Path(sys.argv[1])
for half in (False, True):
    for step in range(int(sys.argv[2])):
        path = folder / f"{step}-{half}" / "audit.jsonl"
        path.parent.mkdir()
        if os.fork() == 0:
            count = 0
            def crashing(name):
                real = getattr(os, name)
                def call(*args):
                    global count
                    count += 1
                    if count > step:
                        # Not of the head: 256 bytes in one page, the kernel copies all or none.
                        if half and name == "write" and len(args[1]) != 256:
                            real(args[0], bytes(args[1])[: len(args[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args)
                return call
            for name in ("write", "replace", "rename", "truncate", "fsync"):
                setattr(os, name, crashing(name))
            log = AuditLog(path, max_bytes=1500)
            for n in range(3):
                log(Pair("x"), Verdict(Action.ALLOW, Direction.INPUT))
            os._exit(7)
        _, status = os.wait()
        print(step, half, os.waitstatus_to_exitcode(status), flush=True)
"""


@posix
def test_killed_at_any_step_a_log_can_be_opened_and_is_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path), "40"],
        capture_output=True,
        text=True,
        check=True,
    )
    ends = [int(line.split()[2]) for line in done.stdout.splitlines()]
    assert ends[-1] == ends[39] == 7  # there are fewer steps than that
    assert ends.count(-9) >= 20
    torn = 0
    for folder in tmp_path.iterdir():
        path = folder / "audit.jsonl"
        killed = path.exists() or any(folder.glob("*.0*"))
        before = verify(path) if killed else None
        assert before is None or before.problems == []
        log = AuditLog(path)
        after = verify(path)
        assert (after.problems, after.torn) == ([], 0)
        assert after.rows == (before.rows if before else 0)  # what was there, and nothing else
        if before and before.torn:
            torn += 1
            assert (folder / "audit.jsonl.torn").read_bytes().count(b"\n") == 1
        log(Pair("x"), VERDICT)
        assert verify(path).rows == after.rows + 1
    assert torn >= 2  # rows 1 to 3 were half written by some of them


@posix
def test_a_full_disk_fails_the_row_and_leaves_no_half_of_it(path: Path) -> None:
    program = f"""
import resource, sys
from pathlib import Path
from guardrail import Action, Direction, Guard, Pair, Severity, Verdict
from guardrail.audit import AuditLog
from guardrail.testing import FakeModerator
guard = Guard(FakeModerator({{}}), audit=AuditLog(Path({str(path)!r})))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for _ in range(9):
    verdict = guard.check("x")
print(verdict.summary())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("refuse: failed: audit: ")
    assert "File too large" in done.stdout
    report = verify(path)
    assert (report.ok, report.torn) == (True, 0)
    assert 0 < report.rows < 9


def test_a_torn_last_line_is_put_aside_with_what_it_held(path: Path) -> None:
    fill(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq":3,"time"')
    report = verify(path, KEY)
    assert (report.ok, report.torn) == (True, 15)
    AuditLog(path, key=KEY)
    assert path.read_bytes() == whole
    note = json.loads((path.parent / "audit.jsonl.torn").read_text())
    assert (note["after"], note["base64"]) == (2, "eyJzZXEiOjMsInRpbWUi")


def test_a_head_from_before_a_power_cut_is_caught_up_with(path: Path) -> None:
    fill(path, 2)
    head = path.parent / "audit.jsonl.head"
    old = head.read_bytes()
    fill(path, 3)
    head.write_bytes(old)
    assert verify(path, KEY).ok
    fill(path, 1)
    assert verify(path, KEY).head.startswith("6:")
    assert head.read_bytes() != old
