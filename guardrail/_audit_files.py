"""Files of an audit log: their names, the lock, the key, and reading them while others append.

For a log `audit.jsonl` there are, beside it:

    audit.jsonl.000001, .000002, ...   full files, oldest first; may be compressed (.gz) by others
    audit.jsonl.head                   how far the chain has got, sealed
    audit.jsonl.key                    the key, where none is kept elsewhere
    audit.jsonl.lock                   held by whoever appends
    audit.jsonl.torn                   what a crash left of a row that never was finished
"""

from __future__ import annotations

import gzip
import os
import re
import secrets
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from guardrail._audit_chain import Key
from guardrail.errors import GuardrailError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "UNREADABLE",
    "AuditError",
    "Names",
    "Segment",
    "fsync_folder",
    "lock_if_there",
    "locked",
    "open_key",
    "reading",
    "replace",
]

UNREADABLE = (OSError, EOFError, zlib.error)


class AuditError(GuardrailError):
    """An audit log cannot be opened, read or written; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Names:
    """The paths that belong to a log. Raises AuditError for what is there and no file."""

    log: Path

    def __post_init__(self) -> None:
        if self.log.is_dir():
            raise AuditError(f"{self.log}: is a folder: name a file in it")
        if self.log.exists() and not self.log.is_file():
            raise AuditError(f"{self.log}: is a device or a pipe: name a file")

    @classmethod
    def to_write(cls, log: Path) -> Names:
        """Of a log that is appended to. Raises AuditError."""
        if log.suffix.lower() == ".gz":
            raise AuditError(
                f"{log}: rows are appended as plain text, and a file named .gz is read as "
                f"compressed: name it {log.stem}; full files may be compressed later"
            )
        return cls(log)

    def beside(self, suffix: str) -> Path:
        return self.log.with_name(f"{self.log.name}.{suffix}")

    @property
    def head(self) -> Path:
        return self.beside("head")

    @property
    def key(self) -> Path:
        return self.beside("key")

    @property
    def lock(self) -> Path:
        return self.beside("lock")

    @property
    def torn(self) -> Path:
        return self.beside("torn")

    def all(self, *, key: bool) -> list[Path]:
        """Every file of the log that is there or may come, but the full ones to come."""
        own = [self.log, self.head, self.lock, self.torn, *(path for _, path in self.full())]
        return [*own, self.key] if key else own

    def full(self) -> list[tuple[int, Path]]:
        """The numbered files, oldest first, each with its number."""
        pattern = re.compile(re.escape(self.log.name) + r"\.(\d{6,})(\.gz)?\Z")
        try:
            names = os.listdir(self.log.parent)
        except OSError as error:
            raise unreadable(self.log.parent, error) from error
        found: dict[int, Path] = {}
        for match in filter(None, map(pattern.match, sorted(names))):
            # While one is being compressed both are there: the plain one, sorted first, is whole.
            found.setdefault(int(match[1]), self.log.with_name(match[0]))
        return sorted(found.items())


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a log, to be read from its start to `size`; None reads to the end."""

    path: Path
    file: IO[bytes] | None = None
    size: int | None = None

    def lines(self) -> Iterator[bytes]:
        """Lines as they are, newline included; the last may have none. Raises UNREADABLE."""
        with ExitStack() as stack:
            file = self.file or stack.enter_context(_open_full(self.path))
            position = 0
            for line in file:
                position += len(line)
                if self.size is not None and position > self.size:
                    return
                yield line


@contextmanager
def reading(log: Path, *, lock: bool = True) -> Iterator[tuple[list[Segment], bytes | None]]:
    """The files of a log as they were at one moment, and the head of that moment; None where there
    is none. Takes the lock for that moment, where there is one to take. Raises AuditError."""
    names = Names(log)
    with ExitStack() as stack:
        with lock_if_there(names.lock) if lock else nullcontext():
            try:
                # First, in case there is no lock: rows beyond a head are right, not the reverse.
                head = names.head.read_bytes() if names.head.exists() else None
                segments = [Segment(path) for _, path in names.full()]
                with suppress(FileNotFoundError):
                    file = stack.enter_context(_open(log))
                    size = None if log.suffix == ".gz" else os.fstat(file.fileno()).st_size
                    segments.append(Segment(log, file, size))
            except OSError as error:
                raise unreadable(log, error) from error
        if not segments and head is None:
            raise AuditError(f"{log}: no such audit log")
        yield segments, head


def _open_full(path: Path) -> IO[bytes]:
    """A full file, which may have been compressed since it was listed."""
    try:
        return _open(path)
    except FileNotFoundError:
        compressed = path.with_name(f"{path.name}.gz")
        if path.suffix == ".gz" or not compressed.exists():
            raise
        return _open(compressed)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def open_key(source: bytes | str | Path | None, names: Names, *, create: bool = False) -> Key:
    """The key given, or kept in the file given, or else beside the log; `create` makes the last
    where there is no log yet. Raises AuditError."""
    if isinstance(source, bytes):
        try:
            return Key.of(source)
        except ValueError as error:
            raise AuditError(str(error)) from None
    path = names.key if source is None else Path(source)
    if create and source is None and not path.exists():
        if names.head.exists() or names.log.exists() or names.full():
            raise _no_key(path)
        replace(path, secrets.token_hex(32).encode() + b"\n")
    try:
        return Key.of(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except OSError as error:
        if source is None and isinstance(error, FileNotFoundError):
            raise _no_key(path) from None
        raise unreadable(path, error) from error
    except ValueError:
        raise AuditError(
            f"{path}: not an audit key, which is at least 32 hexadecimal digits: "
            "`openssl rand -hex 32` makes one"
        ) from None


def _no_key(path: Path) -> AuditError:
    return AuditError(f"{path} is missing: put the log's key back there, or give it by path")


@contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock for this thread alone, among all threads and processes of the machine.

    Opened anew each time, so that threads and forked processes never share it by accident. Raises
    AuditError when others hold it for `timeout` seconds.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _acquire(fd, path, timeout)
        try:
            yield
        finally:
            _release(fd)  # closing is not enough where a fork has copied the descriptor meanwhile
    finally:
        os.close(fd)


@contextmanager
def lock_if_there(path: Path) -> Iterator[None]:
    """The lock, where it can be had: a copy of a log, or one on a read-only disk, has no writer."""
    if os.path.exists(path) and os.access(path, os.W_OK):
        with locked(path, 10):
            yield
    else:
        yield


def _acquire(fd: int, path: Path, timeout: float) -> None:
    until = time.monotonic() + timeout
    pause = 0.0002
    while not _try(fd):
        if time.monotonic() > until:
            raise AuditError(f"{path}: held by another process for {timeout:g} s: is one stuck?")
        time.sleep(pause)
        pause = min(2 * pause, 0.005)


if sys.platform == "win32":

    def _try(fd: int) -> bool:
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _release(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

    def fsync_folder(path: Path) -> None:
        """Windows opens no folders; a rename is in its journal."""

else:

    def _try(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def fsync_folder(path: Path) -> None:
        """Make a rename or a new file in a folder last."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def replace(path: Path, data: bytes) -> None:
    """Write a small file in one step, for its owner alone, and make it last."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(fresh, path)
    fsync_folder(path.parent)


def unreadable(path: Path, error: OSError) -> AuditError:
    return AuditError(f"{path}: cannot be read: {error.strerror or error}")
