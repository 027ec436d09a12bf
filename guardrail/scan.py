"""`guardrail scan`: judge a file or a data set, row by row, and survive being killed.

Rows go to `OUT.partial` a chunk at a time. After each chunk the file is on disk, and then
`OUT.partial.state` says how many rows and bytes of it count; a later run sees that those rows still
read as they did, cuts the partial file back to those bytes and goes on. A complete partial file
becomes `OUT` in one step. An engine does the judging: `LocalEngine` here, or Ray.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from guardrail import __version__
from guardrail._audit_files import AuditError
from guardrail._files import MISSHAPEN
from guardrail._paths import beside, mix_up, no_place
from guardrail._rows import Fields, ScanError, ScanUsageError
from guardrail._scan_audit import ScanAudit
from guardrail._scan_local import Engine, Judged, LocalEngine
from guardrail._scan_source import Source, open_format, open_source
from guardrail._scan_tally import Tally
from guardrail.audit import AuditLog

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there two scans into one output are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Engine",
    "Fields",
    "LocalEngine",
    "Scan",
    "ScanError",
    "ScanUsageError",
    "Tally",
    "files_of",
]


def files_of(output: Path) -> list[Path]:
    """What a scan writes: its output, and what is beside that until it is complete."""
    return [output, *(beside(output, s) for s in (".partial", ".partial.state", ".writing"))]


class Scan:
    """One scan, checked for what can be told before a model is opened.

    source: a file, a folder, or `hf:OWNER/NAME[:SPLIT]`, which is downloaded; or found already.
    chunk: rows written together, and lost at most (with a few read ahead) when the process dies.
    overwrite: replace an output that is there, and drop what another scan left behind.
    excerpts: keep the beginnings of the most harmful texts in the tally, for the report.
    audit: has each verdict, once, before its row is written; where that fails, the scan stops.

    Raises ScanUsageError when made; `run` raises ScanError, and ScanUsageError where what an
    earlier run left belongs to another scan.
    """

    def __init__(
        self,
        source: str | Path | Source,
        output: Path,
        *,
        fields: Fields | None = None,
        chunk: int = 256,
        overwrite: bool = False,
        excerpts: bool = False,
        audit: AuditLog | None = None,
    ) -> None:
        self.output = output
        _, self.partial, self.state, _ = files_of(output)
        self._chunk = chunk
        self._overwrite = overwrite
        self._excerpts = excerpts
        self._log = audit
        self._audit: ScanAudit | None = None
        self._seen = b""  # a digest of the rows that are safe, as they were read
        self._check_output()
        self.source = source if isinstance(source, Source) else open_source(str(source))
        read = {"the input": self.source.files, "the audit log": [audit.path] if audit else []}
        if problem := mix_up(read, {"--output": files_of(output)}):
            raise ScanUsageError(problem)
        if output.exists() and not overwrite and self._whole() is None:
            raise self._is_there()
        self._format = open_format(self.source, output, fields or Fields())
        self._total: int | None = None

    @property
    def total(self) -> int:
        """How many rows the input has; of a text file, reads it once."""
        if self._total is None:
            self._total = self._format.count()
        return self._total

    def run(
        self,
        engine: Engine,
        progress: Callable[[Tally], None] = lambda tally: None,
        done: Callable[[Tally], None] = lambda tally: None,
    ) -> Tally:
        """Judge what is left, and make the output. `progress` is called at the start and after
        each chunk, when that chunk is safe on disk; `done` when the output is there. Where `done`
        fails, or the process dies in it, the next run has nothing but that to do."""
        identity = self._identity(engine)
        if not self.partial.exists() and self.output.exists():
            whole = self._whole()
            if whole is not None and whole["scan"] == identity:  # killed when all was judged
                tally = Tally.from_json(whole["tally"])
                self._end(tally, done)
                return tally
            if not self._overwrite:
                raise self._is_there()
        with _locked(self.partial) as file:
            tally, size = self._resume(identity, file)
            size = self._go_on(engine, file, tally, size, identity, progress)
            if self._identity(engine) != identity:
                raise ScanError(
                    f"{self.source.name}: changed while it was scanned: run it again with "
                    "--overwrite"
                )
            self._finish(file, identity, size, tally)
            self._end(tally, done)
        return tally

    def _go_on(
        self,
        engine: Engine,
        file: IO[bytes],
        tally: Tally,
        size: int,
        identity: dict[str, Any],
        progress: Callable[[Tally], None],
    ) -> int:
        """Judge and write the rows that are left; returns how many bytes then count."""

        def save(text: bytes) -> None:
            nonlocal size
            packed = self._format.pack(text) if text else b""
            try:
                file.write(packed)
                _flush(file)
                size += len(packed)
                self._save(identity, size, tally)
            except OSError as error:
                raise self._unwritable(error) from error

        save(b"" if size else self._format.header())  # with this process in the audit's state
        progress(tally)
        with closing(engine.judge(self._format, tally.rows, self._chunk)) as chunks:
            for judged in chunks:
                self._write_audit(judged)
                for row, outcome in judged:
                    tally.add(row, outcome, excerpts=self._excerpts)
                    self._seen = _digest(self._seen, row.raw)
                save(b"".join(self._format.encode(row, outcome) for row, outcome in judged))
                progress(tally)
        return size

    def _write_audit(self, judged: Judged) -> None:
        if self._audit is None:
            return
        try:
            self._audit.write(judged)
        except AuditError as error:
            raise ScanError(
                f"{error}: mend that and run the same command again; it goes on after the rows "
                "that are safe"
            ) from error

    def _finish(self, file: IO[bytes], identity: dict[str, Any], size: int, tally: Tally) -> None:
        try:
            # From here on an output that is there is this scan's own.
            self._save(identity, size, tally, complete=True)
            if fcntl is None:
                file.close()  # Windows renames no file that is open
            self._format.finish(self.partial, self.output)
        except OSError as error:
            raise self._unwritable(error) from error

    def _end(self, tally: Tally, done: Callable[[Tally], None]) -> None:
        done(tally)
        try:
            self.state.unlink()
        except OSError as error:
            raise self._unwritable(error) from error

    # --- what an earlier run left -----------------------------------------------------------------

    def _check_output(self) -> None:
        if problem := no_place(self.output):
            raise ScanUsageError(problem)

    def _is_there(self) -> ScanUsageError:
        return ScanUsageError(
            f"{self.output}: is there already: give another --output, or --overwrite"
        )

    def _identity(self, engine: Engine) -> dict[str, Any]:
        """What must be the same for a scan to be gone on with."""
        return {
            "guardrail": __version__,
            "input": self.source.identity(),
            "prompt field": self._format.fields.prompt,
            "response field": list(self._format.fields.responses),
            "audit log": None if self._log is None else str(self._log.path),
            **engine.identity,
        }

    def _whole(self) -> dict[str, Any] | None:
        """The state of a run that was killed after its last row; None where there is none."""
        try:
            left = json.loads(self.state.read_bytes())
            Tally.from_json(left["tally"])
        except (OSError, *MISSHAPEN):
            return None  # `_left_behind` says what is wrong with it
        return left if left.get("complete") else None

    def _resume(self, identity: dict[str, Any], file: IO[bytes]) -> tuple[Tally, int]:
        """The tally and the size of what counts in the partial file, cut back to it."""
        tally, size, self._seen = Tally(), 0, b""
        left = self._left_behind(file)
        logged: dict[str, Any] | None = None
        if left is not None:
            differs = [k for k, value in identity.items() if left["scan"].get(k) != value]
            seen = b"" if differs else self._read_again(int(left["tally"]["rows"]))
            if not differs and seen.hex() != left["seen"]:
                differs = ["input"]
            if not differs:
                tally, size = Tally.from_json(left["tally"]), int(left["bytes"])
                self._seen, logged = seen, left.get("audit")
            elif not self._overwrite:
                raise ScanUsageError(
                    f"{self.partial}: left by another scan ({', '.join(differs)} differs): repeat "
                    "that one to finish it, give another --output, or --overwrite to drop it"
                )
        self._audit = None if self._log is None else ScanAudit(self._log, logged)
        file.truncate(size)
        file.seek(size)
        return tally, size

    def _read_again(self, rows: int) -> bytes:
        """The digest of the first rows as they are now. An edit may leave the input's size and time
        of change as they were, and old verdicts would then stand beside new texts."""
        seen = b""
        for raw in islice(self._format.raw(), rows):
            seen = _digest(seen, raw)
        return seen

    def _left_behind(self, file: IO[bytes]) -> dict[str, Any] | None:
        """The state of an earlier run; None where it got nowhere."""
        present = file.seek(0, os.SEEK_END)
        try:
            left: dict[str, Any] = json.loads(self.state.read_bytes())
            Tally.from_json(left["tally"])
            str(left["seen"])
            if (logged := left.get("audit")) is not None:
                int(logged["after"]), list(logged["pids"])
            if int(left["bytes"]) <= present and isinstance(left["scan"], dict):
                return left
            problem = f"{self.partial} is shorter than this says"
        except FileNotFoundError:
            return None
        except (OSError, *MISSHAPEN) as error:
            problem = f"cannot be read ({error})"
        if self._overwrite:
            return None
        raise ScanUsageError(f"{self.state}: {problem}: --overwrite starts the scan anew")

    def _save(
        self, identity: dict[str, Any], size: int, tally: Tally, *, complete: bool = False
    ) -> None:
        data = {"scan": identity, "bytes": size, "seen": self._seen.hex(), "complete": complete}
        data["tally"] = tally.to_json()
        if self._audit is not None:
            data["audit"] = self._audit.state
        fresh = beside(self.state, ".new")
        with fresh.open("wb") as file:
            file.write(json.dumps(data, indent=1).encode())
            _flush(file)
        os.replace(fresh, self.state)

    def _unwritable(self, error: OSError) -> ScanError:
        return ScanError(
            f"{self.output}: cannot be written: {error.strerror or error}: mend that and run the "
            "same command again; it goes on after the rows that are safe"
        )


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The partial file, open for this process alone."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb+")
    except OSError as error:
        raise ScanUsageError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScanUsageError(
                    f"{path}: another scan is writing it: wait for that, or give another --output"
                ) from None
            if not _is_still(file, path):
                raise ScanUsageError(
                    f"{path}: another scan has just finished it: look at its output"
                )
        yield file
    finally:
        with suppress(OSError):  # it tries once more to write what a full disk did not take
            file.close()


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _digest(before: bytes, raw: object) -> bytes:
    """Of the rows before, and of this one as it was read."""
    row = raw if isinstance(raw, bytes) else repr(raw).encode("utf-8", "surrogatepass")
    return hashlib.sha256(before + row).digest()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
