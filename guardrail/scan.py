"""`guardrail scan`: judge a file of prompts and responses, row by row, and survive being killed.

Rows go to `OUT.partial` a chunk at a time. After each chunk the file is on disk, and then
`OUT.partial.state` says how many rows and bytes of it count; a later run cuts the partial file
back to those bytes and goes on. A complete partial file becomes `OUT` in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from guardrail import __version__
from guardrail._rows import Fields, Row, ScanError, ScanUsageError, open_format
from guardrail.guard import Guard
from guardrail.moderator import OnnxModerator
from guardrail.taxonomy import Category, Severity
from guardrail.verdict import Action, Pair, Verdict

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there two scans into one output are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["Fields", "Scan", "ScanError", "ScanUsageError", "Tally"]


@dataclass(slots=True)
class Tally:
    """Counts over the rows written so far, earlier runs of the same scan included.

    held: rows per (category, severity) held against them; a row may count in several.
    degraded: rows that have a verdict without an assessment behind it.
    """

    rows: int = 0
    errors: int = 0
    degraded: int = 0
    actions: Counter[Action] = field(default_factory=Counter)
    held: Counter[tuple[Category, Severity]] = field(default_factory=Counter)

    def add(self, outcome: Verdict | str) -> None:
        self.rows += 1
        if isinstance(outcome, str):
            self.errors += 1
            return
        self.degraded += outcome.degraded
        self.actions[outcome.action] += 1
        self.held.update((reason.category, reason.severity) for reason in outcome.reasons)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "errors": self.errors,
            "degraded": self.degraded,
            "actions": {action.value: n for action, n in self.actions.items()},
            "held": [[c.value, s.label, n] for (c, s), n in self.held.items()],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        held = {(Category(c), Severity.from_label(s)): n for c, s, n in data["held"]}
        actions = {Action(action): n for action, n in data["actions"].items()}
        counts = (int(data["rows"]), int(data["errors"]), int(data["degraded"]))
        return cls(*counts, Counter(actions), Counter(held))


class Scan:
    """One scan, checked for what can be told before a model is opened.

    chunk: rows judged together, and lost at most when the process is killed.
    overwrite: replace an output that is there, and drop what another scan left behind.

    Raises ScanUsageError when made; `run` raises ScanError, and ScanUsageError where what an
    earlier run left belongs to another scan.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        fields: Fields | None = None,
        chunk: int = 256,
        overwrite: bool = False,
    ) -> None:
        self.source, self.output = source, output
        self.partial = output.with_name(output.name + ".partial")
        self.state = output.with_name(output.name + ".partial.state")
        self._fields = fields or Fields()
        self._chunk = chunk
        self._overwrite = overwrite
        self._check_paths()
        self._format = open_format(source, output, self._fields)
        self._total: int | None = None

    @property
    def total(self) -> int:
        """How many rows the input has; reads it once."""
        if self._total is None:
            self._total = sum(1 for _ in self._format.raw())
        return self._total

    def run(self, guard: Guard, progress: Callable[[Tally], None] = lambda tally: None) -> Tally:
        """Judge what is left, and make the output. `progress` is called at the start and after
        each chunk, when that chunk is safe on disk."""
        identity = self._identity(guard)
        with _locked(self.partial) as file:
            tally, size = self._resume(identity, file)
            rows = islice(self._format.raw(), tally.rows, None)
            self._go_on(guard, rows, file, tally, size, identity, progress)
            if self._identity(guard) != identity:
                raise ScanError(
                    f"{self.source}: changed while it was scanned: run it again with --overwrite"
                )
            if fcntl is None:
                file.close()  # Windows renames no file that is open
            try:
                self._format.finish(self.partial, self.output)
                self.state.unlink()
            except OSError as error:
                raise self._unwritable(error) from error
        return tally

    def _go_on(
        self,
        guard: Guard,
        rows: Iterator[Any],
        file: IO[bytes],
        tally: Tally,
        size: int,
        identity: dict[str, Any],
        progress: Callable[[Tally], None],
    ) -> None:
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

        if not size:
            save(self._format.header())
        progress(tally)
        while chunk := list(islice(rows, self._chunk)):
            judged = _judge(guard, [self._format.row(raw) for raw in chunk])
            for _, outcome in judged:
                tally.add(outcome)
            save(b"".join(self._format.encode(row, outcome) for row, outcome in judged))
            progress(tally)

    # --- what an earlier run left -----------------------------------------------------------------

    def _check_paths(self) -> None:
        if not self.source.is_file():
            raise ScanUsageError(f"{self.source}: no such file")
        if not self.output.parent.is_dir():
            raise ScanUsageError(f"{self.output.parent}: no such folder: make it first")
        if self.output.exists() and self.output.samefile(self.source):
            raise ScanUsageError(f"{self.output}: is the input itself: give another --output")
        if self.output.is_dir():
            raise ScanUsageError(f"{self.output}: is a folder: name a file in it")
        if self.output.exists() and not self._overwrite:
            raise ScanUsageError(
                f"{self.output}: is there already: give another --output, or --overwrite"
            )

    def _identity(self, guard: Guard) -> dict[str, Any]:
        """What must be the same for a scan to be gone on with."""
        found = self.source.stat()
        model = guard.moderator
        seen = model.manifest if isinstance(model, OnnxModerator) else model.thresholds
        return {
            "guardrail": __version__,
            "input": [found.st_size, found.st_mtime_ns],
            "prompt field": self._fields.prompt,
            "response field": self._fields.response,
            "policy": [guard.policy.id, _digest(guard.policy)],
            "model": [model.id, _digest(seen)],
        }

    def _resume(self, identity: dict[str, Any], file: IO[bytes]) -> tuple[Tally, int]:
        """The tally and the size of what counts in the partial file, cut back to it."""
        tally, size = Tally(), 0
        left = self._left_behind(file)
        if left is not None:
            differs = [k for k, value in identity.items() if left["scan"].get(k) != value]
            if not differs:
                tally, size = Tally.from_json(left["tally"]), int(left["bytes"])
            elif not self._overwrite:
                raise ScanUsageError(
                    f"{self.partial}: left by another scan ({', '.join(differs)} differs): repeat "
                    "that one to finish it, give another --output, or --overwrite to drop it"
                )
        file.truncate(size)
        file.seek(size)
        return tally, size

    def _left_behind(self, file: IO[bytes]) -> dict[str, Any] | None:
        """The state of an earlier run; None where it got nowhere."""
        present = file.seek(0, os.SEEK_END)
        try:
            left: dict[str, Any] = json.loads(self.state.read_bytes())
            Tally.from_json(left["tally"])
            if int(left["bytes"]) <= present and isinstance(left["scan"], dict):
                return left
            problem = f"{self.partial} is shorter than this says"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"cannot be read ({error})"
        if self._overwrite:
            return None
        raise ScanUsageError(f"{self.state}: {problem}: --overwrite starts the scan anew")

    def _save(self, identity: dict[str, Any], size: int, tally: Tally) -> None:
        data = {"scan": identity, "bytes": size, "tally": tally.to_json()}
        fresh = self.state.with_name(self.state.name + ".new")
        with fresh.open("wb") as file:
            file.write(json.dumps(data, indent=1).encode())
            _flush(file)
        os.replace(fresh, self.state)

    def _unwritable(self, error: OSError) -> ScanError:
        return ScanError(
            f"{self.output}: cannot be written: {error.strerror or error}: mend that and run the "
            "same command again; it goes on after the rows that are safe"
        )


def _judge(guard: Guard, rows: Sequence[Row]) -> list[tuple[Row, Verdict | str]]:
    pairs = [row.pair for row in rows if isinstance(row.pair, Pair)]
    verdicts = iter(guard.check_many(pairs) if pairs else [])
    return [(row, row.pair if isinstance(row.pair, str) else next(verdicts)) for row in rows]


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The partial file, open for this process alone."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb+")
    except OSError as error:
        raise ScanUsageError(f"{path}: cannot be written: {error.strerror or error}") from error
    with file:
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


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:16]
