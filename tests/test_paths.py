"""No command takes a file of its own for something else: an input, a policy, a log are safe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from scan_kit import fake_guard, write_rows
from typer.testing import CliRunner

from guardrail import Guard
from guardrail._paths import mix_up
from guardrail.audit import AuditLog
from guardrail.cli import app
from guardrail.policy import policy_files
from guardrail.scan import Scan, ScanUsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that a command may be given, and links to it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "hello", "unsafe": False}])
    (tmp_path / "base.toml").write_text('name = "base"\nextends = "strict"\n')
    (tmp_path / "mine.toml").write_text('name = "mine"\nextends = "base.toml"\n')
    guard = Guard(fake_guard().moderator, audit=AuditLog("log.jsonl", max_bytes=1))
    for text in ("a bomb", "hello"):
        guard.check(text)
    assert Path("log.jsonl.000001").exists()
    (tmp_path / "secret").write_text("00" * 16)
    for name in ("in.jsonl", "base.toml"):
        (tmp_path / f"soft-{name}").symlink_to(name)
        os.link(tmp_path / name, tmp_path / f"hard-{name}")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(folder: Path, *args: str) -> str:
    """The one line that a command ends in, having touched nothing."""
    before = contents(folder)
    done = CliRunner().invoke(app, args)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert contents(folder) == before
    return line


TO_REPORT = ["--output", "o.jsonl", "--report"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([*TO_REPORT, "in.jsonl"], "in.jsonl: cannot be --report, since it belongs to the input"),
        ([*TO_REPORT, "./in.jsonl"], "belongs to the input"),
        ([*TO_REPORT, "soft-in.jsonl"], "belongs to the input"),
        ([*TO_REPORT, "hard-in.jsonl"], "belongs to the input"),
        ([*TO_REPORT, "o.jsonl"], "o.jsonl: cannot be --report, since it belongs to --output"),
        ([*TO_REPORT, "o.jsonl.partial"], "belongs to --output"),
        ([*TO_REPORT, "mine.toml", "--policy", "mine.toml"], "belongs to the policy"),
        ([*TO_REPORT, "hard-base.toml", "--policy", "mine.toml"], "belongs to the policy"),
        ([*TO_REPORT, "log.jsonl", "--audit", "log.jsonl"], "belongs to --audit"),
        ([*TO_REPORT, "log.jsonl.head", "--audit", "log.jsonl"], "belongs to --audit"),
        ([*TO_REPORT, "log.jsonl.key", "--audit", "log.jsonl"], "belongs to --audit"),
        ([*TO_REPORT, "log.jsonl.000001", "--audit", "log.jsonl"], "belongs to --audit"),
        ([*TO_REPORT, "new.jsonl", "--audit", "./new.jsonl"], "belongs to --audit"),
        (
            [*TO_REPORT, "secret", "--audit", "log.jsonl", "--audit-key", "secret"],
            "belongs to --audit-key",
        ),
        (["--output", "in.jsonl", "--overwrite"], "cannot be --output"),
        (["--output", "log.jsonl", "--overwrite", "--audit", "log.jsonl"], "belongs to --output"),
        (["--output", "x.jsonl", "--audit", "x.jsonl"], "belongs to --output"),
        (["--output", "x.jsonl", "--audit", "in.jsonl"], "in.jsonl: cannot be --audit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_scan_writes_over_nothing_it_reads_or_writes_otherwise(
    args: Sequence[str], says: str, folder: Path
) -> None:
    assert says in refused(folder, "scan", "in.jsonl", *args)


@pytest.mark.parametrize("option", ["--output", "--report", "--audit"])
@pytest.mark.parametrize("path", [".", "", "/", ".."])
def test_a_folder_is_no_file_to_write(option: str, path: str, folder: Path) -> None:
    output = [] if option == "--output" else ["--output", "o.jsonl"]
    line = refused(folder, "scan", "in.jsonl", *output, option, path)
    assert line == f"error: {option} {path or '.'}: is a folder: name a file in it"


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("mine.toml", "mine.toml: cannot be --output, since it belongs to the policy"),
        ("./mine.toml", "belongs to the policy"),
        ("base.toml", "belongs to the policy"),
        ("soft-base.toml", "belongs to the policy"),
        ("in.jsonl", "belongs to the labelled rows"),
        ("hard-in.jsonl", "belongs to the labelled rows"),
        (".", ".: is a folder: name a file in it"),
        ("", ".: is a folder: name a file in it"),
        ("/", "/: is a folder: name a file in it"),
        ("nowhere/p.toml", "nowhere: no such folder: make it first"),
        (None, "--overwrite is of --output"),
    ],
)
def test_a_calibration_writes_over_nothing_it_reads(
    output: str | None, says: str, folder: Path
) -> None:
    args = ["in.jsonl", "--target-fpr", "0.2", "--policy", "mine.toml", "--overwrite"]
    args += [] if output is None else ["--output", output]
    assert says in refused(folder, "calibrate", *args)


def test_a_scan_from_python_does_not_replace_its_own_log(folder: Path) -> None:
    with pytest.raises(ScanUsageError, match="belongs to the audit log"):
        Scan("in.jsonl", Path("log.jsonl"), overwrite=True, audit=AuditLog("log.jsonl"))


def test_a_log_may_have_the_key_that_is_beside_it_named(folder: Path) -> None:
    args = ["--output", "o.jsonl", "--audit", "log.jsonl", "--audit-key", "log.jsonl.key"]
    done = CliRunner().invoke(app, ["scan", "in.jsonl", *args])
    assert done.exit_code == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
@pytest.mark.parametrize(
    "args",
    [
        ["scan", "in.jsonl", "--overwrite", "--output", "pipe.jsonl"],
        ["calibrate", "in.jsonl", "--overwrite", "--output", "pipe.jsonl"],
        ["keys", "new", "--config", "pipe.jsonl"],
        ["check", "--prompt", "a", "--audit", "pipe.jsonl"],
        ["audit", "show", "pipe.jsonl"],
    ],
    ids=" ".join,
)
def test_nothing_takes_the_place_of_a_device_or_a_pipe(args: Sequence[str], folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    assert "pipe.jsonl: is a device or a pipe: name a file" in refused(folder, *args)
    assert (folder / "pipe.jsonl").is_fifo()


def test_a_file_may_be_read_for_two_things(folder: Path) -> None:
    path = folder / "in.jsonl"
    assert mix_up({"one": [path], "other": [path]}, {"out": [folder / "o.jsonl"]}) is None


def test_the_files_of_a_policy_are_all_that_it_extends(folder: Path) -> None:
    assert policy_files("strict") == []
    assert policy_files("mine.toml") == [Path("mine.toml"), Path("base.toml")]
