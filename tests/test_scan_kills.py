"""SIGKILL at 20 random moments: no row is lost, none is doubled, none changes place, neither in the
output nor in the audit log, whose chain is whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from audit_logs import data
from scan_kit import read_rows, rows_done, scan, start, write_rows

from guardrail.audit import AuditLog, verify
from guardrail.scan import ScanError

KILLS = 10  # of each of two formats
ROWS = 400
# The real scan with a moderator of its own that takes a moment: kills shall hit it at work.
PROGRAM = """
import sys, time
from pathlib import Path
from scan_kit import fake_guard, scan
from guardrail.audit import AuditLog
output = Path(sys.argv[2])
log = AuditLog(output.with_name("audit.jsonl"), fsync="interval", max_bytes=100_000)
guard = fake_guard(lambda pairs: time.sleep(0.02))
scan(sys.argv[1], output, guard, workers=2, chunk=3, audit=log)
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9")


def run(source: Path, output: Path, moment: float | None) -> int:
    """One process; killed so many seconds after it is at work, or left to end."""
    tests = str(Path(__file__).parent)
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, tests])
    process = start(str(source), str(output), program=("-c", PROGRAM), PYTHONPATH=path)
    if moment is not None:
        partial = output.with_name(output.name + ".partial")
        deadline = time.monotonic() + 60
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), err.decode()
    return int(process.returncode)


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        rows: list[dict[str, Any]] = table.to_pylist()
        return [row | {"guardrail": json.loads(row["guardrail"])} for row in rows]
    return read_rows(path)


def test_a_full_disk_is_told_and_the_same_scan_goes_on(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"hello {n}"} for n in range(40)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ScanError, match="cannot be written: File too large: mend that and run"):
            scan(source, tmp_path / "out.jsonl", chunk=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tally = scan(source, tmp_path / "out.jsonl", chunk=3)
    found = [row["prompt"] for row in read_rows(tmp_path / "out.jsonl")]
    assert found == [f"hello {n}" for n in range(40)]
    assert tally.rows == 40


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_killed_at_random_moments_a_scan_loses_and_doubles_nothing(
    suffix: str, tmp_path: Path
) -> None:
    rows = [{"id": i, "prompt": "a bomb" if i % 7 == 0 else f"hello {i}"} for i in range(ROWS)]
    source, output = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), source)
    else:
        write_rows(source, rows)
    moments = random.Random(suffix)
    state = output.with_name(output.name + ".partial.state")
    killed, done = 0, [0]
    while killed < KILLS:
        code = run(source, output, moments.uniform(0, 0.2))
        assert code == -signal.SIGKILL, "the scan ended before it was killed so often"
        killed += 1
        done.append(rows_done(state))
    assert done == sorted(done), "what was safe stays safe"
    assert done[-1] < ROWS
    assert run(source, output, None) == 0
    found = rows_of(output)
    assert [row["id"] for row in found] == list(range(ROWS))
    assert [row["guardrail"]["action"] for row in found] == [
        "refuse" if i % 7 == 0 else "allow" for i in range(ROWS)
    ]
    log = output.with_name("audit.jsonl")
    report = verify(log)
    assert (report.problems, report.torn, report.rows) == ([], 0, ROWS)
    digest = AuditLog(log).digest
    assert [row["prompt"]["hmac"] for row in data(log)] == [digest(row["prompt"]) for row in rows]
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("audit.jsonl")}
    assert left == {source.name, output.name}
