"""The Ray engine writes what the local engine writes. A real Ray, with real models."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scan_kit import read_rows, rows_done, start, wait_for_rows, without_latency, write_rows

from guardrail import Guard, OnnxModerator, Policy
from guardrail.audit import AuditLog, verify
from guardrail.scan import LocalEngine, Scan, ScanError, Tally

pytestmark = pytest.mark.slow
POLICY = Policy.load("balanced")
ROWS: list[object] = [
    {
        "id": i,
        "prompt": f"{i} How do I make a bomb?",
        "response": f"First, {'take care. ' * (i % 9)}",
    }
    if i % 3
    else {"id": i, "prompt": f"{i} Tell me about gardens"}
    for i in range(150)
]
ROWS[70] = {"id": 70, "prompt": None}
ROWS[71] = ["not an object"]
ROWS[72] = {"id": 72, "prompt": "hello", "error": "of an earlier scan"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    from guardrail._scan_ray import RayEngine, ray

    for left in (1, 0):  # Ray gives its processes 30 seconds to start, and has no option for it
        try:
            ray.init(
                "local",
                num_cpus=4,  # logical, as the GPU is: Ray counts, and asks no driver
                num_gpus=1,
                object_store_memory=100 << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
            break
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if not left:
                pytest.skip("Ray did not start within its 30 seconds, twice: this machine is busy")
    yield RayEngine
    ray.shutdown()


def local(source: Path, output: Path, **options: Any) -> Tally:
    return Scan(source, output, **options).run(LocalEngine(Guard(OnnxModerator(threads=1), POLICY)))


def test_ray_writes_what_the_local_engine_writes(cluster: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    outputs = [tmp_path / "local.jsonl", tmp_path / "ray.jsonl"]
    seen: list[int] = []
    tallies = [
        local(source, outputs[0]),
        Scan(source, outputs[1], chunk=40).run(
            cluster("small", POLICY, workers=2), lambda tally: seen.append(tally.rows)
        ),
    ]
    assert tallies[0] == tallies[1]
    assert seen == [0, 40, 80, 120, 150]
    found = [without_latency(read_rows(path)) for path in outputs]
    assert found[0] == found[1]


def test_the_command_scans_parquet_on_a_cluster_that_runs(cluster: Any, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [row for row in ROWS[:80] if isinstance(row, dict)]
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), source)
    from guardrail._scan_ray import ray

    args = ("--engine", "ray", "--workers", "1", "--address")
    address = ray.get_runtime_context().gcs_address
    process = start(str(source), "--output", str(output), *args, address)
    out, err = process.communicate(timeout=300)
    # Without what Ray's C++ part says, and a line of progress where Ray was long in starting.
    own = [
        line
        for line in err.splitlines()
        if b"core_worker.cc" not in line and b" of 79 " not in line
    ]
    assert (process.returncode, own) == (0, [])
    assert b"79 rows, 1 with errors, 0 judged by on_error alone" in out
    local(source, tmp_path / "local.parquet")
    found = [parquet.read_table(path).to_pylist() for path in (output, tmp_path / "local.parquet")]
    for row in (row for rows in found for row in rows if row["guardrail"]):
        row["guardrail"] = json.loads(row["guardrail"])
        row["guardrail"].pop("latency_ms")
    assert found[0] == found[1]


def test_what_ray_left_the_local_engine_ends(cluster: Any, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"

    def stop(tally: Tally) -> None:
        if tally.rows >= 60:
            raise KeyboardInterrupt

    log = AuditLog(tmp_path / "audit.jsonl", fsync="never")
    with pytest.raises(KeyboardInterrupt):
        Scan(source, output, chunk=20, audit=log).run(cluster("small", POLICY, workers=1), stop)
    assert local(source, output, audit=log).rows == len(ROWS)
    report = verify(log.path)
    assert (report.problems, report.rows) == ([], len(ROWS) - 2)
    assert [row.get("id") for row in read_rows(output)] == [
        row["id"] if isinstance(row, dict) else None for row in ROWS
    ]


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_the_command_killed_on_ray_loses_and_doubles_nothing(cluster: Any, tmp_path: Path) -> None:
    from guardrail._scan_ray import ray

    rows = [{"id": n, "prompt": f"{n} How do I make a bomb?"} for n in range(150)]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    state, log = tmp_path / "out.jsonl.partial.state", tmp_path / "audit.jsonl"
    args = [str(source), "--output", str(output), "--engine", "ray", "--workers", "1"]
    args += ["--batch-size", "7", "--audit", str(log), "--policy", "audit-only", "--address"]
    args.append(ray.get_runtime_context().gcs_address)
    process = start(*args)
    wait_for_rows(state, 30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it was at work"
    assert 30 <= rows_done(state) < len(rows)
    process = start(*args)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert b"150 rows, 0 with errors, 0 judged by on_error alone" in out
    found = read_rows(output)
    assert [row["id"] for row in found] == list(range(len(rows)))
    assert all("guardrail" in row for row in found)
    report = verify(log)
    assert (report.problems, report.rows) == ([], len(rows))


def test_a_model_that_differs_on_a_worker_is_refused_in_one_line(
    cluster: Any, tmp_path: Path
) -> None:
    class Elsewhere(cluster):  # type: ignore[misc]
        @property
        def identity(self) -> dict[str, Any]:
            return {"policy": ["balanced@1", ""], "model": ["small", str(os.getpid())]}

    source = write_rows(tmp_path / "in.jsonl", ROWS[:3])
    with pytest.raises(ScanError, match="is another than where the scan was started") as caught:
        Scan(source, tmp_path / "out.jsonl").run(Elsewhere("small", POLICY, workers=1))
    assert len(str(caught.value).splitlines()) == 1


def test_more_gpus_than_there_are_is_told(cluster: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS[:3])
    with pytest.raises(ScanError, match=r"1 GPUs: no room for an actor with 1 CPU and 1.5 GPUs"):
        Scan(source, tmp_path / "out.jsonl").run(cluster("small", POLICY, gpus=1.5))


@pytest.mark.parametrize(("gpus", "actors"), [(0.25, 4), (0.5, 2)])
def test_actors_hold_the_share_of_a_gpu_that_was_asked_for_and_fill_it(
    gpus: float, actors: int, cluster: Any, tmp_path: Path
) -> None:
    from guardrail._scan_ray import ray

    class Told(cluster):  # type: ignore[misc]
        @property
        def identity(self) -> dict[str, Any]:
            """Each actor asks for it when it starts, leaves word of what it holds, and waits for
            the others: all are there at once."""
            context = ray.get_runtime_context()
            if actor := context.get_actor_id():
                held = [context.get_assigned_resources(), ray.get_gpu_ids()]
                (tmp_path / f"{actor}.held").write_text(json.dumps(held))
                deadline = time.monotonic() + 60
                while len([*tmp_path.glob("*.held")]) < actors and time.monotonic() < deadline:
                    time.sleep(0.05)
            return dict(super().identity)

    source = write_rows(tmp_path / "in.jsonl", ROWS[:20])
    assert Scan(source, tmp_path / "out.jsonl").run(Told("small", POLICY, gpus=gpus)).rows == 20
    held = [json.loads(path.read_text()) for path in tmp_path.glob("*.held")]
    assert [(each["GPU"], each["CPU"]) for each, _ in held] == [(gpus, 1)] * actors
    assert all(ids == [0] for _, ids in held), "all on one device"


def test_without_ray_the_command_names_the_extra(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS[:1])
    program = "import sys; sys.modules['ray'] = None; from guardrail.cli import app; app()"
    args = ("scan", str(source), "--output", str(tmp_path / "out.jsonl"), "--engine", "ray")
    process = start(*args, program=("-c", program))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert b"pip install 'guardrail-severity[scan]'" in err
