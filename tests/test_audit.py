"""The audit log: what is written, into which files, by several writers at once."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from audit_logs import KEY, VERDICT, WORDS, WRITER, data, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail import Guard, Pair
from guardrail.audit import AuditError, AuditLog, verify
from guardrail.testing import FakeModerator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


# --- what a row says ------------------------------------------------------------------------------


def test_a_guard_logs_each_verdict_and_no_text(path: Path) -> None:
    guard = Guard(FakeModerator(WORDS), audit=AuditLog(path))
    verdicts = [guard.check("build a bomb"), guard.check("hi", "you fool"), guard.check("hi")]
    logged = data(path)
    assert [row["verdict"] for row in logged] == [verdict.to_json() for verdict in verdicts]
    assert [row["seq"] for row in logged] == [1, 2, 3]
    assert logged[0]["response"] is None
    assert logged[1]["response"]["chars"] == len("you fool")
    assert logged[1]["prompt"] == logged[2]["prompt"]  # equal texts are told to be equal
    everything = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"build" not in everything
    assert b"you fool" not in everything


def test_the_digest_of_a_text_depends_on_the_key(tmp_path: Path) -> None:
    one, two = (AuditLog(tmp_path / name) for name in "ab")
    assert one.digest("hi") != two.digest("hi")
    assert one.digest("hi") == AuditLog(tmp_path / "a").digest("hi")
    assert one.digest("hi") == AuditLog(tmp_path / "c", key=tmp_path / "a.key").digest("hi")


def test_an_error_that_quotes_the_user_is_cut_to_its_kind(path: Path) -> None:
    def quote(pairs: object) -> None:
        raise ValueError(f"cannot judge {pairs}")

    verdict = Guard(FakeModerator(WORDS, on_assess=quote), audit=AuditLog(path)).check("secret")
    assert "secret" in str(verdict.error)
    assert data(path)[0]["verdict"]["error"] == "moderation: ValueError"
    assert b"secret" not in path.read_bytes()


def test_texts_are_written_only_with_consent(path: Path) -> None:
    log = AuditLog(path, consent=lambda pair, verdict: pair.prompt.startswith("I agree"))
    log(Pair("I agree \ud800 ü"), VERDICT)
    log(Pair("I do not"), VERDICT)
    first, second = data(path)
    assert (first["consent"], second["consent"]) == (True, False)
    assert first["text"] == {"prompt": "I agree \ud800 ü", "response": None}
    assert "text" not in second
    assert verify(path).ok


@given(st.lists(st.tuples(st.text(), st.none() | st.text()), max_size=5))
@settings(max_examples=30)
def test_whatever_the_texts_the_chain_is_whole_and_gives_them_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str | None]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "audit.jsonl"
    log = AuditLog(path, key=KEY, consent=True, fsync="never", max_bytes=2000)
    for prompt, response in texts:
        log(Pair(prompt, response), VERDICT)
    assert [(r["text"]["prompt"], r["text"]["response"]) for r in data(path)] == texts
    assert verify(path, KEY).ok


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_the_chain_goes_on_over_files_and_reopenings(path: Path, fsync: str) -> None:
    for n in range(12):
        log = AuditLog(path, max_bytes=2000, fsync=fsync)  # type: ignore[arg-type]
        log(Pair(str(n)), VERDICT)
    report = verify(path)
    assert (report.ok, report.rows, report.head) == (True, 12, log.head())
    assert report.files == len(list(path.parent.glob("audit.jsonl.0*"))) + 1 > 3
    assert all(file.stat().st_size <= 2000 for file in path.parent.glob("audit.jsonl*"))
    assert [row["seq"] for row in data(path)] == list(range(1, 13))


def test_full_files_may_be_compressed_and_old_ones_removed(path: Path) -> None:
    fill(path, 12, max_bytes=2000)
    first, second, *_ = sorted(path.parent.glob("audit.jsonl.0*"))
    with gzip.open(f"{second}.gz", "wb") as file:
        file.write(second.read_bytes())
    assert verify(path, KEY).rows == 12  # while both are there
    second.unlink()
    assert verify(path, KEY).rows == 12
    first.unlink()
    assert "those before it were removed" in str(verify(path, KEY).problems[0])
    report = verify(path, KEY, pruned=True)
    assert report.ok
    assert report.first == 12 - report.rows + 1
    fill(path, 1)
    assert verify(path, KEY, pruned=True).head.startswith("13:")


def test_a_full_file_may_be_compressed_while_it_is_verified(path: Path) -> None:
    fill(path, 12, max_bytes=2000)
    *_, last = sorted(path.parent.glob("audit.jsonl.0*"))

    def compress(*_: object) -> None:
        if last.exists():
            with gzip.open(f"{last}.gz", "wb") as file:
                file.write(last.read_bytes())
            last.unlink()

    report = verify(path, KEY, progress=compress)
    assert (report.ok, report.rows, last.exists()) == (True, 12, False)


def test_all_files_are_for_their_owner_alone(path: Path) -> None:
    log = AuditLog(path)
    log(Pair("x"), VERDICT)
    if os.name == "posix":
        assert {file.stat().st_mode & 0o077 for file in path.parent.iterdir()} == {0}


def test_threads_and_processes_share_one_log(path: Path) -> None:
    log = AuditLog(path, key=KEY, fsync="never", max_bytes=20_000)

    def write() -> None:
        for _ in range(25):
            log(Pair("x"), VERDICT)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    others = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n), "25"],
                               stdout=subprocess.DEVNULL) for n in range(2)]  # fmt: skip
    assert [other.wait(120) for other in others] == [0, 0]
    for thread in threads:
        thread.join()
    report = verify(path, KEY)
    assert (report.ok, report.rows) == (True, 150)


@pytest.mark.skipif(os.name != "posix", reason="forks are POSIX")
def test_a_log_opened_before_a_fork_is_shared_after_it(path: Path) -> None:
    """As a server does that loads its app and then forks workers, threads running."""
    program = f"""
import os, threading
from guardrail import Action, Direction, Pair, Verdict
from guardrail.audit import AuditLog
log = AuditLog({str(path)!r}, fsync="never", max_bytes=20_000, timeout=60)
def write():
    for _ in range(25):
        log(Pair("x"), Verdict(Action.ALLOW, Direction.INPUT))
thread = threading.Thread(target=write)
thread.start()
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        write()
        os._exit(0)
    children.append(child)
write()
thread.join()
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    report = verify(path)
    assert (report.ok, report.rows) == (True, 125)


def test_a_lock_that_is_never_given_up_fails_the_row_not_the_process(path: Path) -> None:
    from guardrail._audit_files import Names, locked

    log = AuditLog(path, timeout=0.05)
    with locked(Names(path).lock, 1), pytest.raises(AuditError, match="held by another process"):
        log(Pair("x"), VERDICT)
    log(Pair("x"), VERDICT)
    assert verify(path).rows == 1


def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="is a folder"):
        AuditLog(tmp_path)
    with pytest.raises(AuditError, match="cannot be written: No such file"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl")
    with pytest.raises(AuditError, match="at least 16 bytes"):
        AuditLog(tmp_path / "a", key=b"short")
    (tmp_path / "k").write_text("no key")
    with pytest.raises(AuditError, match="openssl rand -hex 32"):
        AuditLog(tmp_path / "a", key=tmp_path / "k")
    with pytest.raises(ValueError, match="fsync="):
        AuditLog(tmp_path / "a", fsync="sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["audit.jsonl.gz", "audit.GZ"])
def test_a_log_is_not_named_as_if_it_were_compressed(tmp_path: Path, name: str) -> None:
    """It would be written plain, and then be told broken."""
    with pytest.raises(AuditError, match=r"is read as compressed: name it audit"):
        AuditLog(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_key_may_be_named_as_a_path_or_as_text(path: Path, tmp_path: Path) -> None:
    key = tmp_path / "k"
    key.write_text("ab" * 32)
    log = AuditLog(str(path), key=str(key))
    assert log.digest("hi") == AuditLog(path, key=key).digest("hi")
    assert verify(path, str(key)).ok
    with pytest.raises(AuditError, match="nowhere: cannot be read: No such file"):
        AuditLog(path, key=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("key", [None, KEY])
def test_a_file_that_is_no_log_is_refused_with_nothing_left_beside_it(
    path: Path, key: bytes | None
) -> None:
    path.write_text("notes\n")
    with pytest.raises(AuditError, match="is missing"):
        AuditLog(path, key=key)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text() == "notes\n"


def test_a_log_whose_key_was_lost_is_not_gone_on_with_under_another(path: Path) -> None:
    AuditLog(path)(Pair("x"), VERDICT)
    (path.parent / "audit.jsonl.key").unlink()
    with pytest.raises(AuditError, match="put the log's key back"):
        AuditLog(path)
    with pytest.raises(AuditError, match="another key"):
        AuditLog(path, key=KEY)
    assert "another key" in str(verify(path, KEY).problems[0])
    assert len(verify(path, KEY).problems) == 1
