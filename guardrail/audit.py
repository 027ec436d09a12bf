"""The audit log: every verdict as one line of JSON, chained so that no change goes unseen.

    guard = Guard(audit=AuditLog("audit.jsonl"))

Each row seals, under a key, what it says and the hash of the row before. By default no user text is
written: a keyed digest and the length of each text, and the verdict JSON. Several threads and
processes may append to one log; a process killed at any moment leaves a valid chain.

`verify` finds what was changed; `rows` reads a log. `docs/audit.md` says what an attacker with
write access can and cannot hide. Wants a local disk: network file systems keep locks less well. On
Windows the lock is another one (msvcrt), and not yet tested.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from guardrail._audit_chain import Link, read_row, seal, write_head
from guardrail._audit_files import (
    UNREADABLE,
    AuditError,
    Names,
    fsync_folder,
    locked,
    open_key,
    reading,
    replace,
)
from guardrail._audit_tail import sealed_head, tail
from guardrail._audit_verify import Problem, Report, verify
from guardrail.verdict import Pair, Verdict, stage_of

__all__ = ["AuditError", "AuditLog", "Problem", "Report", "rows", "verify"]

Fsync = Literal["always", "interval", "never"]
_INTERVAL = 1.0  # seconds between two fsyncs of "interval"


class AuditLog:
    """Appends verdicts to a log; give it to `Guard(audit=...)`, or call it with each pair.

    path: of the file appended to. What belongs to the log lies beside it, see `_audit_files`.
    key: 16 secret bytes or more, or a file with 32 hexadecimal digits or more; None keeps one at
        `<path>.key`, made when there is no log yet. Who has the key can forge the log, and can test
        guesses of a text: keep it elsewhere where that matters.
    consent: whether a text itself may be written: False for none, True for all, or a function that
        is asked for each pair. A row with texts says `"consent": true`.
    max_bytes: size from which a file is full, so that the next row starts a new one; the chain goes
        on through all of them.
    fsync: `always` has each row on disk before its verdict is returned; `interval` does so at most
        once a second; `never` leaves it to the operating system. A killed process loses nothing
        under any of them; a power cut loses what was not on disk.
    timeout: seconds to wait for other writers.

    Raises AuditError: when made, for a log that cannot be written or does not fit its head; when
    called, for a row that could not be written, so that a guard fails closed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        key: bytes | str | Path | None = None,
        consent: bool | Callable[[Pair, Verdict], bool] = False,
        max_bytes: int = 64 * 2**20,
        fsync: Fsync = "always",
        timeout: float = 10.0,
    ) -> None:
        if fsync not in get_args(Fsync):
            raise ValueError(f"fsync={fsync!r} is none of {', '.join(get_args(Fsync))}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r} must be above 0")
        self.path = Path(path).absolute()
        self._names = Names.to_write(self.path)
        self._consent = consent if callable(consent) else lambda pair, verdict: bool(consent)
        self._max_bytes, self._fsync, self._timeout = max_bytes, fsync, timeout
        self._synced = 0.0
        self._known: tuple[int, int, Link] | None = None  # inode, size, link when last left
        if self.path.exists() and not self._names.head.exists():  # no log: leave no lock beside it
            sealed_head(self._names, open_key(key, self._names))
        with self._writing():
            self._key = open_key(key, self._names, create=True)
            self._start()
            self._tail()

    def __call__(self, pair: Pair, verdict: Verdict) -> None:
        """Append a row. Thread-safe. Raises AuditError."""
        content = self._content(pair, verdict)
        with self._writing():
            last = self._tail()
            line, link = seal(self._key, last, content)
            size = self._size()
            if size and size + len(line) > self._max_bytes:
                self._rotate()
                size = 0
            self._append(line, size)
            self._write_head(link)
            self._known = (self.path.stat().st_ino, size + len(line), link)

    def digest(self, text: str) -> str:
        """What stands for a text in this log's rows; finds what was decided on a known text."""
        return self._key.digest(text)

    def head(self) -> str:
        """How far the chain has got, as `SEQ:HASH`. Kept elsewhere, it anchors the log: `verify`
        with `expect` finds any change up to that row, whoever made it. Raises AuditError."""
        with self._writing():
            return str(self._tail())

    def sync(self) -> None:
        """Have on disk, whatever `fsync` is, what is in the file appended to. Raises AuditError."""
        with self._writing():
            if self.path.exists():
                with self.path.open("rb+") as file:
                    os.fsync(file.fileno())
                fsync_folder(self.path.parent)

    # --- what a row says --------------------------------------------------------------------------

    def _content(self, pair: Pair, verdict: Verdict) -> dict[str, Any]:
        agreed = self._consent(pair, verdict)
        said = verdict.to_json()
        if not agreed and verdict.error is not None:
            said["error"] = stage_of(verdict.error)
        content: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),
            "pid": os.getpid(),
            "prompt": self._trace(pair.prompt),
            "response": None if pair.response is None else self._trace(pair.response),
            "consent": agreed,
            "verdict": said,
        }
        if agreed:
            content["text"] = {"prompt": pair.prompt, "response": pair.response}
        return content

    def _trace(self, text: str) -> dict[str, Any]:
        return {"hmac": self.digest(text), "chars": len(text)}

    # --- files, all under the lock ----------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with locked(self._names.lock, self._timeout):
                yield
        except UNREADABLE as error:
            why = getattr(error, "strerror", None) or error
            raise AuditError(f"{self.path}: the audit log cannot be written: {why}") from error

    def _start(self) -> None:
        """Make the head of a log that has no rows yet."""
        names = self._names
        if not (names.head.exists() or self.path.exists() or names.full()):
            replace(names.head, write_head(self._key, self._key.start()))

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def _tail(self) -> Link:
        """Where the chain stands, an unfinished row of a crash put aside. Raises AuditError where
        the log does not fit its head."""
        head = sealed_head(self._names, self._key)
        if self._known is not None and self._known[2] == head:
            inode, size, _ = self._known
            found = self.path.stat()
            if (found.st_ino, found.st_size) == (inode, size):
                return head
        last, torn = tail(self._names, self._key, head)
        if torn:
            self._put_aside(torn, last)
        return last

    def _put_aside(self, torn: bytes, last: Link) -> None:
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        note = {"time": now, "after": last.seq, "base64": base64.b64encode(torn).decode()}
        fd = os.open(self._names.torn, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, json.dumps(note).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        os.truncate(self.path, self._size() - len(torn))

    def _append(self, line: bytes, size: int) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            try:
                rest = memoryview(line)
                while rest:  # a write falls short where the disk gets full
                    rest = rest[os.write(fd, rest) :]
            except OSError:
                os.ftruncate(fd, size)
                raise
            now = time.monotonic()
            if self._fsync == "always" or (
                self._fsync == "interval" and now - self._synced >= _INTERVAL
            ):
                os.fsync(fd)
                self._synced = now
        finally:
            os.close(fd)
        if not size and self._fsync != "never":
            fsync_folder(self.path.parent)

    def _write_head(self, link: Link) -> None:
        # In place: a rename per row costs more, and may leave an empty file after a power cut. Not
        # synced: a head that is too old does no harm.
        fd = os.open(self._names.head, os.O_WRONLY)
        try:
            os.write(fd, write_head(self._key, link))
        finally:
            os.close(fd)

    def _rotate(self) -> None:
        full = self._names.full()
        if self._fsync != "never":
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
        number = full[-1][0] + 1 if full else 1
        os.rename(self.path, self._names.beside(f"{number:06d}"))


def rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Every line of a log, oldest first, with where it stands (`file:line`); None for a line that
    is no row. Needs no key and checks no hash: `verify` does. Raises AuditError."""
    with reading(Path(path)) as (segments, _):
        for segment in segments:
            try:
                for number, line in enumerate(segment.lines(), 1):
                    yield f"{segment.path.name}:{number}", read_row(line)
            except UNREADABLE as error:
                raise AuditError(f"{segment.path}: cannot be read to its end: {error}") from error
