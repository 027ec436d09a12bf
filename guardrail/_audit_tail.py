"""Where the chain of an audit log stands, by its head and its last row. Writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from guardrail._audit_chain import Key, Link, read_head, unseal
from guardrail._audit_files import AuditError, Names, Segment
from guardrail._audit_verify import verify

__all__ = ["sealed_head", "tail"]


def sealed_head(names: Names, key: Key) -> Link:
    """What the head says. Raises AuditError, OSError."""
    try:
        return read_head(key, names.head.read_bytes())
    except FileNotFoundError:
        raise _damaged(names, "its head is missing") from None
    except ValueError as error:
        raise _damaged(names, str(error)) from None


def tail(names: Names, key: Key, head: Link) -> tuple[Link, bytes]:
    """The last row, and what a crash left unfinished after it. Raises AuditError where the log does
    not fit its head; UNREADABLE."""
    line, torn = _last_line(names.log)
    if not line:  # no file yet, or a crash came between two files
        full = names.full()
        line = _last_of(full[-1][1]) if full else b""
    return _link(names, key, line, head), torn


def _link(names: Names, key: Key, line: bytes, head: Link) -> Link:
    if not line:
        last = key.start()
    else:
        try:
            row = unseal(key, line)
        except ValueError as error:
            raise _damaged(names, str(error)) from None
        last = row.link
        if last.seq == head.seq + 1 and row.prev == head.hash:
            return last  # a crash between a row and its head
    if last.seq > head.seq:
        # After a power cut the head may be older than that: the rows prove themselves.
        report = verify(names.log, key, pruned=True, lock=False)
        if report.problems:
            raise _damaged(names, report.problems[0].what)
    elif last != head:
        raise _damaged(names, f"it ends with row {last}, but its head says {head}")
    return last


def _damaged(names: Names, what: str) -> AuditError:
    return AuditError(
        f"{names.log}: {what}: `guardrail audit verify` says more; to go on, move the log and what "
        "lies beside it away, and start a new one"
    )


def _last_line(path: Path, block: int = 1 << 16) -> tuple[bytes, bytes]:
    """The last line that is whole, newline included, and what stands after it."""
    tail = b""
    try:
        with path.open("rb") as file:
            position = file.seek(0, os.SEEK_END)
            while position and tail.count(b"\n") < 2:
                start = max(0, position - block)
                file.seek(start)
                tail = file.read(position - start) + tail
                position = start
                block *= 2
    except FileNotFoundError:
        return b"", b""
    end = tail.rfind(b"\n") + 1
    return tail[tail.rfind(b"\n", 0, max(0, end - 1)) + 1 : end], tail[end:]


def _last_of(path: Path) -> bytes:
    """The last line of a full file, compressed ones too."""
    line = b""
    for line in Segment(path).lines():  # noqa: B007
        pass
    return line
