"""`--audit`: a scan and a check leave each verdict in the log, once, whatever stops them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from audit_logs import KEY, data
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_kit import fake_guard, read_rows, scan, start, write_rows

from guardrail import Guard, Pair
from guardrail._audit_files import Names, locked
from guardrail.audit import AuditLog, verify
from guardrail.scan import LocalEngine, Scan, ScanError, ScanUsageError


def log_of(folder: Path, **options: Any) -> AuditLog:
    return AuditLog(folder / "audit.jsonl", key=KEY, fsync="never", **options)


def said(log: AuditLog) -> list[tuple[str, str | None, str]]:
    return [
        (row["prompt"]["hmac"], (row["response"] or {}).get("hmac"), row["verdict"]["action"])
        for row in data(log.path)
    ]


def expected(log: AuditLog, texts: Sequence[str]) -> list[tuple[str, str | None, str]]:
    return [(log.digest(t), None, "refuse" if "bomb" in t else "allow") for t in texts]


def test_each_verdict_is_logged_in_the_order_of_rows_without_text(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "Zanzibar"}, {"no": "prompt"}]
    rows += [{"prompt": "hello", "response": f"a bomb {n}"} for n in range(9)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    log = log_of(tmp_path)
    scan(source, tmp_path / "out.jsonl", workers=3, chunk=2, audit=log)
    pairs = [("Zanzibar", None), *(("hello", f"a bomb {n}") for n in range(9))]
    assert said(log) == [
        (log.digest(p), None if r is None else log.digest(r), "refuse" if r else "allow")
        for p, r in pairs
    ]
    assert verify(log.path, KEY).ok
    assert "Zanzibar" not in log.path.read_text()


def test_several_responses_of_a_row_are_as_many_rows_of_the_log(tmp_path: Path) -> None:
    row = {"prompt": "hello", "response_0": "a bomb", "response_1": "", "response_2": "bread"}
    source = write_rows(tmp_path / "in.jsonl", [row])
    log = log_of(tmp_path)
    scan(source, tmp_path / "out.jsonl", audit=log)
    assert [(r, action) for _, r, action in said(log)] == [
        (log.digest("a bomb"), "refuse"),
        (log.digest("bread"), "allow"),
    ]


class Stopped(BaseException):
    """In the place of a kill."""


TEXTS = st.lists(st.sampled_from(["a bomb", "bread", "a fox"]), min_size=1, max_size=25)
RUNS = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5), st.booleans()), max_size=4)


@settings(deadline=None, max_examples=30)
@given(TEXTS, RUNS)
def test_stopped_between_log_and_rows_nothing_is_logged_twice_and_nothing_is_missing(
    texts: list[str], runs: list[tuple[int, int, bool]]
) -> None:
    """Texts repeat, chunks differ from run to run, files are small, and others write the log."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = write_rows(folder / "in.jsonl", [{"prompt": text} for text in texts])
        log = log_of(folder, max_bytes=3000)
        for chunk, saves, before in runs:
            job = Scan(source, folder / "out.jsonl", chunk=chunk, audit=log)
            save, left = job._save, iter(range(saves))

            def stop(
                *args: Any, save: Any = save, left: Iterator[int] = left, before: bool = before,
                **named: Any,
            ) -> None:  # fmt: skip
                if next(left, None) is not None:
                    save(*args, **named)
                    return
                if not before:
                    save(*args, **named)
                raise Stopped

            job._save = stop  # type: ignore[method-assign]
            try:
                job.run(LocalEngine(fake_guard(), 1))
            except Stopped:
                log_by_another(log, texts[0])
            else:
                break
        if not (folder / "out.jsonl").exists() or (folder / "out.jsonl.partial.state").exists():
            Scan(source, folder / "out.jsonl", audit=log).run(LocalEngine(fake_guard(), 1))
        assert [row["prompt"] for row in read_rows(folder / "out.jsonl")] == texts
        own = [row for row in data(log.path) if row["pid"] == os.getpid()]
        assert [row["prompt"]["hmac"] for row in own] == [log.digest(text) for text in texts]
        assert verify(log.path, KEY).ok


def log_by_another(log: AuditLog, text: str) -> None:
    """Another process, a server say, logs the same verdict on the same text."""
    real = os.getpid
    try:
        os.getpid = lambda: 1  # type: ignore[assignment]
        log(Pair(text), fake_guard().check(text))
    finally:
        os.getpid = real  # type: ignore[assignment]


def test_decided_otherwise_when_judged_again_is_logged_again(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"bread {n}"} for n in range(4)])
    log = log_of(tmp_path)
    job = Scan(source, tmp_path / "out.jsonl", chunk=4, audit=log)
    save, saves = job._save, iter([True])

    def stop(*args: Any, **named: Any) -> None:
        if next(saves, None) is None:
            raise Stopped
        save(*args, **named)

    job._save = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        job.run(LocalEngine(fake_guard(), 1))
    assert len(said(log)) == 4

    def fail(pairs: Sequence[Pair]) -> None:
        raise RuntimeError("a cable was pulled")

    scan(source, tmp_path / "out.jsonl", fake_guard(fail), audit=log)
    assert [action for *_, action in said(log)] == ["allow"] * 4 + ["refuse"] * 4
    assert [r["guardrail"]["action"] for r in read_rows(tmp_path / "out.jsonl")] == ["refuse"] * 4


def test_what_is_decided_otherwise_costs_no_other_row_its_place_in_the_log(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"bread {n}"} for n in range(6)])
    log = log_of(tmp_path)
    job = Scan(source, tmp_path / "out.jsonl", chunk=6, audit=log)
    save, saves = job._save, iter([True])

    def stop(*args: Any, **named: Any) -> None:
        if next(saves, None) is None:
            raise Stopped
        save(*args, **named)

    def hiccup(pairs: Sequence[Pair]) -> None:
        if any(pair.prompt == "bread 2" for pair in pairs):
            raise RuntimeError("a cable was pulled")

    job._save = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        job.run(LocalEngine(fake_guard(hiccup), 1))
    scan(source, tmp_path / "out.jsonl", audit=log)
    refused = [p for p, _, action in said(log)[:6] if action == "refuse"]
    assert [(p, action) for p, _, action in said(log)[6:]] == [(p, "allow") for p in refused]


def test_a_log_that_cannot_be_written_stops_the_scan_before_a_row_is(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"bread {n}"} for n in range(9)])
    log = log_of(tmp_path, timeout=0.05)
    output = tmp_path / "out.jsonl"
    job = Scan(source, output, chunk=3, audit=log)
    holding = locked(Names(log.path).lock, 1)

    def hold(tally: Any) -> None:
        if tally.rows == 3:
            holding.__enter__()

    with pytest.raises(ScanError, match=r"held by another process.*run the same command again"):
        job.run(LocalEngine(fake_guard(), 1), hold)
    holding.__exit__(None, None, None)
    assert len(read_rows(job.partial)) == 3
    with pytest.raises(ScanUsageError, match="audit log differs"):
        scan(source, output)
    scan(source, output, chunk=3, audit=log)
    assert [p for p, *_ in said(log)] == [log.digest(f"bread {n}") for n in range(9)]
    assert len(read_rows(output)) == 9


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files by their descriptors")
def test_verdicts_are_on_disk_before_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"bread {n}"} for n in range(6)])
    log = log_of(tmp_path)
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    scan(source, tmp_path / "out.jsonl", chunk=3, audit=log)
    files = [name for name in synced if name in ("audit.jsonl", "out.jsonl.partial")]
    assert files == ["out.jsonl.partial", *["audit.jsonl", "out.jsonl.partial"] * 2]


# --- the commands --------------------------------------------------------------------------------


def run(*args: str) -> tuple[int, str]:
    process = start(*args, program=("-m", "guardrail.cli"))
    _, err = process.communicate(timeout=300)
    return process.returncode, err.decode()


def test_check_and_scan_append_to_one_log_that_verifies_under_its_key(tmp_path: Path) -> None:
    path, key = tmp_path / "audit.jsonl", tmp_path / "secret"
    key.write_text(KEY.hex())
    audit = ("--audit", str(path), "--audit-key", str(key))
    code, err = run("check", "--prompt", "Zanzibar", "--policy", "audit-only", *audit)
    assert (code, err) == (0, "")
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "response": "c"}])
    output = tmp_path / "out.jsonl"
    code, err = run("scan", str(source), "--output", str(output), "--policy", "audit-only", *audit)
    assert (code, err) == (0, "")
    report = verify(path, KEY)
    assert (report.ok, report.rows) == (True, 3)
    first, *rest = data(path)
    assert first["prompt"]["hmac"] == AuditLog(path, key=KEY).digest("Zanzibar")
    assert [row["verdict"] for row in rest] == [row["guardrail"] for row in read_rows(output)]
    assert "Zanzibar" not in path.read_text()
    assert not (tmp_path / "audit.jsonl.key").exists()


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        (
            "check",
            ["--audit", "{}/nowhere/audit.jsonl"],
            "--audit {}/nowhere/audit.jsonl: the",
        ),
        ("scan", ["--audit", "{}/nowhere/audit.jsonl"], "--audit {}/nowhere: no such folder"),
        ("scan", ["--audit", "{}"], "--audit {}: is a folder"),
        ("check", ["--audit-key", "{}/key"], "--audit-key is of --audit: add --audit LOG"),
        ("scan", ["--audit", "{}/a", "--audit-key", "{}/key"], "--audit {}/key: cannot be read"),
    ],
)
def test_a_log_that_cannot_be_is_one_line_before_a_model_is_opened(
    command: str, options: list[str], says: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    asked = ["--prompt", "hello"]
    if command == "scan":
        asked = [str(source), "--output", f"{folder}/out.jsonl"]
    code, err = run(command, *asked, *(option.format(folder) for option in options))
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: {says.format(folder)}")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_check_that_cannot_be_logged_is_not_delivered(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", timeout=0.05)
    guard = Guard(fake_guard().moderator, audit=log)
    with locked(Names(log.path).lock, 1):
        assert not guard.check("bread").delivers
    assert guard.check("bread").delivers
    assert json.loads(log.path.read_text())["verdict"]["action"] == "allow"
