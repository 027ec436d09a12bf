"""The audit log against who changes it: what is found, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit_logs import KEY, VERDICT, fill
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail import Pair
from guardrail.audit import AuditError, AuditLog, verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    fill(folder / "audit.jsonl", 9, max_bytes=2000)
    fill(folder / "other.jsonl", 4)
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


LOG_FILES = ("audit.jsonl.000001", "audit.jsonl.000002", "audit.jsonl", "audit.jsonl.head")


@st.composite
def tampering(draw: st.DrawFn, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files after one to three changes, none of which needs the key."""
    files = dict(files)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([n for n in LOG_FILES if n in files] or ["audit.jsonl"]))
        content = files.get(name, b"")
        lines = content.splitlines(keepends=True)
        kind = draw(
            st.sampled_from(["byte", "cut", "drop", "swap", "double", "add", "gone", "move"])
        )
        at = draw(st.integers(0, max(0, len(content) - 1)))
        row = draw(st.integers(0, max(0, len(lines) - 1)))
        if kind == "byte" and content:
            files[name] = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif kind == "cut":
            files[name] = content[:at]
        elif kind == "drop" and lines:
            files[name] = b"".join(lines[:row] + lines[row + 1 :])
        elif kind == "swap" and len(lines) > 1:
            lines[row], lines[row - 1] = lines[row - 1], lines[row]
            files[name] = b"".join(lines)
        elif kind == "double" and lines:
            files[name] = b"".join([*lines[: row + 1], *lines[row:]])
        elif kind == "add":
            foreign = draw(
                st.sampled_from([b"\n", b"{}\n", b"x", *files["other.jsonl"].splitlines(True)])
            )
            files[name] = b"".join([*lines[:row], foreign, *lines[row:]])
        elif kind == "gone":
            files.pop(name, None)
        elif kind == "move" and name in files:
            other = draw(st.sampled_from(LOG_FILES[:3]))
            files[name], files[other] = files.get(other, b""), files[name]
    return files


@given(st.data())
@settings(max_examples=300)
def test_no_change_to_a_log_goes_unseen(original: Path, scratch: Path, data: st.DataObject) -> None:
    before = {file.name: file.read_bytes() for file in original.iterdir()}
    assert {name for name in before if name.startswith("audit.jsonl.0")} == set(LOG_FILES[:2])
    after = data.draw(tampering(before))
    for name in LOG_FILES:
        (scratch / name).unlink(missing_ok=True)
        if name in after:
            (scratch / name).write_bytes(after[name])
    if not any(name in after for name in LOG_FILES):
        with pytest.raises(AuditError, match="no such audit log"):
            verify(scratch / "audit.jsonl", KEY)
        return
    report = verify(scratch / "audit.jsonl", KEY)
    if all(after.get(name) == before.get(name) for name in LOG_FILES):
        assert report.ok
        return
    # The one thing that is no problem: bytes after the last row that never became one.
    more = after.pop("audit.jsonl", b"")
    content = before.pop("audit.jsonl")
    kept = all(after.get(name) == before[name] for name in before)
    only_more = kept and more.startswith(content) and b"\n" not in more[len(content) :]
    assert report.ok == only_more
    assert not only_more or report.torn == len(more) - len(content)


def test_an_old_head_hides_a_cut_from_verify_but_not_from_an_anchor_kept_elsewhere(
    path: Path,
) -> None:
    """The limit, stated in docs/audit.md: who can write log and head alike can roll both back."""
    fill(path, 5)
    then = {name: (path.parent / name).read_bytes() for name in ("audit.jsonl", "audit.jsonl.head")}
    log = fill(path, 5)
    anchor = log.head()
    for name, content in then.items():
        (path.parent / name).write_bytes(content)
    assert verify(path, KEY).ok
    (problem,) = verify(path, KEY, expect=anchor).problems
    assert "the expected head is row 10, but the log ends with row 5" in problem.what


def test_who_has_the_key_can_forge_a_log_but_not_past_an_anchor(path: Path) -> None:
    anchor = fill(path, 5).head()
    for file in path.parent.glob("audit.jsonl*"):
        file.unlink()
    fill(path, 9)
    assert verify(path, KEY).ok
    (problem,) = verify(path, KEY, expect=anchor).problems
    assert "another row now" in problem.what


def test_an_anchor_holds_while_the_log_grows(path: Path) -> None:
    start = AuditLog(path, key=KEY).head()
    anchor = fill(path, 5).head()
    fill(path, 5)
    assert verify(path, KEY, expect=anchor).ok
    assert verify(path, KEY, expect=start).ok
    with pytest.raises(ValueError, match="SEQ:HASH"):
        verify(path, KEY, expect="5")


def test_an_anchor_in_a_removed_file_is_said_not_to_be_comparable(path: Path) -> None:
    anchor = fill(path, 1).head()
    fill(path, 9, max_bytes=1400)
    for file in sorted(path.parent.glob("audit.jsonl.0*"))[:3]:
        file.unlink()
    (problem,) = verify(path, KEY, pruned=True, expect=anchor).problems
    assert "not comparable" in problem.what


@pytest.mark.parametrize("change", ["cut", "edit", "headless", "gone"])
def test_a_log_that_does_not_fit_its_head_is_not_written_on(path: Path, change: str) -> None:
    """So that a writer never covers the tracks of who changed it."""
    fill(path, 3)
    content = path.read_bytes()
    if change == "cut":
        path.write_bytes(b"".join(content.splitlines(keepends=True)[:2]))
    elif change == "edit":
        path.write_bytes(content[:-200] + b"#" + content[-199:])
    elif change == "headless":
        (path.parent / "audit.jsonl.head").unlink()
    else:
        path.unlink()
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(AuditError, match="audit verify"):
        AuditLog(path, key=KEY)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_running_writer_notices_that_its_log_was_cut(path: Path) -> None:
    log = fill(path, 3)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(AuditError, match="it ends with row 2"):
        log(Pair("x"), VERDICT)
