"""`guardrail audit`, as users run it."""

from __future__ import annotations

import errno
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from audit_logs import WORDS
from typer.testing import CliRunner

from guardrail import Guard
from guardrail.audit import AuditLog
from guardrail.cli import app
from guardrail.testing import FakeModerator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def run(*args: str | Path, stdin: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["audit", *map(str, args)], input=stdin)
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def busy(path: Path) -> Path:
    guard = Guard(FakeModerator(WORDS), audit=AuditLog(path))
    for prompt, response in [
        ("a bomb", None),
        ("hi", None),
        ("hi", "you fool"),
        ("fool", "a bomb"),
    ]:
        guard.check(prompt, response)
    return path


def test_verify_prints_a_head_that_it_takes_back(busy: Path, tmp_path: Path) -> None:
    code, out, _ = run("verify", busy)
    assert code == 0
    assert out.startswith("whole: 4 rows in 1 files, head 4:")
    anchor = tmp_path / "anchor"
    anchor.write_text(out)
    assert run("verify", busy, "--expect", anchor)[0] == 0
    assert run("verify", busy, "--expect", out.split()[-1])[0] == 0
    code, out, _ = run("verify", busy, "--expect", "9:" + "0" * 64, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_a_log_rolled_back_with_its_head_is_found_by_a_head_kept_elsewhere(busy: Path) -> None:
    head = busy.with_name("audit.jsonl.head")
    then = {file: file.read_bytes() for file in (busy, head)}
    Guard(FakeModerator(WORDS), audit=AuditLog(busy)).check("a bomb")
    kept = run("verify", busy)[1].split()[-1]
    busy.write_bytes(then[busy])
    code, out, _ = run("verify", busy)
    assert (code, "row 5, but the log ends with row 4: it was cut off" in out) == (1, True)
    head.write_bytes(then[head])
    assert run("verify", busy)[0] == 0  # nothing there tells it from the log of that moment
    code, out, _ = run("verify", busy, "--expect", kept)
    assert (code, "the expected head is row 5, but the log ends with row 4" in out) == (1, True)


def test_verify_names_the_line_that_was_edited(busy: Path) -> None:
    busy.write_bytes(busy.read_bytes().replace(b'"action":"refuse"', b'"action":"allow"', 1))
    code, out, _ = run("verify", busy)
    assert code == 1
    assert out.splitlines()[0].startswith("audit.jsonl:1: row 1 was edited")
    assert out.splitlines()[-1] == "BROKEN: 3 rows in 1 files"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["verify", "{}/nothing"], "nothing: no such audit log"),
        (["verify", "{}/audit.jsonl", "--key", "{}/nothing"], "nothing: cannot be read"),
        (
            ["verify", "{}/audit.jsonl.key"],
            "audit.jsonl.key.key is missing: put the log's key back there",
        ),
        (["verify", "."], ".: is a folder: name a file in it"),
        (["verify", "{}"], "is a folder: name a file in it"),
        (["show", "."], ".: is a folder: name a file in it"),
        (["show", "{}", "--text", "a"], "is a folder: name a file in it"),
        (["verify", "{}/audit.jsonl", "--expect", "7"], "neither SEQ:HASH nor a readable file"),
        (["verify", "{}/audit.jsonl", "--expect", "7:xyz"], "is no head"),
        (["verify", "{}/audit.jsonl", "--expect", ""], "--expect is empty: give a head"),
        (["verify", "{}/audit.jsonl", "--expect", "{}"], "readable file: Is a directory"),
        (["show", "{}/nothing"], "no such audit log"),
        (["show", "{}/audit.jsonl", "--since", "soon"], "neither a time"),
        (["show", "{}/audit.jsonl", "--since", "99999999999w"], "neither a time"),
        (["show", "{}/audit.jsonl", "--text", " "], "the text is empty"),
        (["show", "{}/audit.jsonl", "--text", "a", "--key", "{}/nothing"], "cannot be read"),
        (["show", "{}/audit.jsonl", "--action", "alow"], "alow"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(busy: Path, args: list[str], says: str) -> None:
    code, out, error = run(*(arg.replace("{}", str(busy.parent)) for arg in args))
    assert (code, out) == (2, "")
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], [1, 2, 3, 4]),
        (["--action", "refuse"], [1, 4]),
        (["--action", "refuse", "--action", "flag", "--direction", "output"], [3, 4]),
        (["--category", "violence"], [1, 4]),
        (["--severity", "minor"], [1, 3, 4]),
        (["--severity", "severe", "--direction", "output"], [4]),
        (["--since", "1h"], [1, 2, 3, 4]),
        (["--since", "2999-01-01"], []),
        (["--tail", "2"], [3, 4]),
        (["--degraded"], []),
        (["--text", "hi"], [2, 3]),
        (["--text", "-"], [1, 4]),
    ],
)
def test_show_filters(busy: Path, args: list[str], expected: list[int]) -> None:
    code, out, error = run("show", busy, "--json", *args, stdin="a bomb")
    assert (code, error) == (0, "")
    assert [json.loads(line)["seq"] for line in out.splitlines()] == expected
    table = run("show", busy, *args, stdin="a bomb")[1].splitlines()
    assert [int(line.split()[0]) for line in table[1:]] == expected


def test_a_text_is_not_said_to_be_in_no_row_under_another_key(busy: Path, tmp_path: Path) -> None:
    key = tmp_path / "other.key"
    key.write_text("00" * 32)
    for _ in range(2):
        code, out, error = run("show", busy, "--text", "hi", "--key", key)
        assert (code, out) == (2, "")
        assert "other.key: another key than that of" in error
        busy.with_name("audit.jsonl.head").unlink(missing_ok=True)  # a copy of the rows alone
    own = busy.rename(tmp_path / "mine.jsonl").with_name("audit.jsonl.key")
    code, out, _ = run("show", tmp_path / "mine.jsonl", "--text", "hi", "--key", own, "--json")
    assert (code, len(out.splitlines())) == (0, 2)


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_a_time_at_an_end_of_the_calendar_is_one_in_any_zone(
    busy: Path, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert len(run("show", busy, "--since", "0001-01-01")[1].splitlines()) == 5
        assert run("show", busy, "--since", "9999-12-31T23:59")[1] == ""
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_log_that_may_not_be_read_is_not_said_to_be_broken(
    busy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    code, out, error = run("verify", busy)
    assert (code, out) == (2, "")
    assert "audit.jsonl: Permission denied" in error


def test_show_counts_what_is_no_row_and_lets_none_steer_the_terminal(busy: Path) -> None:
    first, *rest = busy.read_bytes().splitlines(keepends=True)
    evil = first.replace(b'"Violence","sev', b'"\\u001b[2J","sev')
    busy.write_bytes(
        evil + b"".join(rest) + b'nonsense\n{"seq":1,"prev":"","hash":"","verdict":{}}\n'
    )
    code, out, error = run("show", busy)
    assert code == 0
    assert len(out.splitlines()) == 5
    assert "\x1b" not in out
    assert "2 lines are no rows, the first at audit.jsonl:5" in error


@pytest.mark.parametrize(("key", "value"), [("time", "0001-01-01T00:00:00+14:00"), ("p", 10**400)])
def test_show_counts_a_row_whose_values_are_out_of_range(busy: Path, key: str, value: Any) -> None:
    row = json.loads(busy.read_bytes().splitlines()[0])
    if key == "time":
        row["time"] = value
    else:
        row["verdict"]["reasons"][0]["probability"] = value
    busy.write_bytes(json.dumps(row).encode() + b"\n" + busy.read_bytes())
    code, out, error = run("show", busy)
    assert (code, len(out.splitlines())) == (0, 5)
    assert "1 lines are no rows, the first at audit.jsonl:1" in error


def test_a_copy_on_a_read_only_disk_can_be_verified(busy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for suffix in ("", ".head", ".key"):
        shutil.copy(f"{busy}{suffix}", copy)
    assert run("verify", copy / "audit.jsonl")[0] == 0
    assert len(list(copy.iterdir())) == 3
