"""What was decided, read back: verdicts from an audit log or from the output of a scan.

Nothing is dropped: what is no verdict comes out as a text that says why.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from guardrail._audit_chain import read_row
from guardrail._audit_files import Names
from guardrail._files import MISSHAPEN
from guardrail.audit import rows
from guardrail.errors import GuardrailError, require
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action, Assessment, Reason, Verdict

__all__ = ["ReplayError", "Unjudged", "read_verdict", "recorded"]


class ReplayError(GuardrailError):
    """There is nothing to replay, or it cannot be read."""


@dataclass(frozen=True, slots=True)
class Unjudged:
    """Why a row has no verdict to replay. scan_error: the scan itself had said so."""

    why: str
    scan_error: bool = False


def recorded(path: Path) -> Iterator[tuple[str, Verdict | Unjudged]]:
    """Every row of a file, by its id: `seq` in an audit log, all its files together; the number of
    the row, from 1, in the output of a scan, with the field's name where it has several responses.
    Raises ReplayError, AuditError, MissingExtra."""
    name = path.name.lower().removesuffix(".gz")
    rotated = path.parent.is_dir() and bool(Names(path).full())  # then the log itself may be gone
    if not path.is_file() and not rotated:
        raise ReplayError(f"{path}: no such file")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        elif rotated or _is_audit_log(path):
            for where, row in rows(path):
                found = row or {}
                yield str(found.get("seq", where)), _verdict(found, "verdict")
        else:
            yield from _jsonl(path)
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise ReplayError(f"{path}: cannot be read to its end: {error}") from error


def _is_audit_log(path: Path) -> bool:
    """By the first row that has a verdict."""
    with _open(path) as file:
        for line in file:
            row = read_row(line)
            if row is not None and "verdict" in row:
                return True
            other = _parsed(line)
            if isinstance(other, dict) and "guardrail" in other:
                return False
    return False


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _jsonl(path: Path) -> Iterator[tuple[str, Verdict | Unjudged]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            row = _parsed(line)
            yield from _verdicts(str(number), row if isinstance(row, dict) else {})


def _csv(path: Path) -> Iterator[tuple[str, Verdict | Unjudged]]:
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as text:
        for number, row in enumerate(csv.DictReader(text), 1):
            yield from _verdicts(str(number), row)


def _parquet(path: Path) -> Iterator[tuple[str, Verdict | Unjudged]]:
    arrow, parquet = (require(m, extra="scan") for m in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(path) as file:
            known = [c for c in ("guardrail", "error") if c in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(1024, columns=known):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                    yield from _verdicts(str(number), row)
    except arrow.ArrowException as error:
        raise ReplayError(f"{path}: not a readable Parquet file: {error}") from error


def _parsed(text: bytes | str) -> Any:
    try:
        return json.loads(text, parse_int=float)  # an int may be too long; verdicts need none
    except (ValueError, RecursionError):
        return None


def _verdicts(number: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Verdict | Unjudged]]:
    """The verdict of a scanned row, or each of those on its several responses (`3:response_0`);
    a response that was not there has none, and is nothing to replay."""
    said = row.get("guardrail")
    several = _parsed(said) if isinstance(said, str) else said
    if isinstance(several, dict) and "action" not in several and any(several.values()):
        for name, one in several.items():
            if one is not None:
                yield f"{number}:{name}", _verdict({"guardrail": one}, "guardrail")
    else:
        yield number, _verdict(row, "guardrail")


def _verdict(row: Mapping[str, Any], field: str) -> Verdict | Unjudged:
    said: Any = row.get(field)
    if isinstance(said, str):  # a column of CSV or Parquet
        said = _parsed(said) if said else None
    if said is None and row.get("error"):
        return Unjudged(str(row["error"]), scan_error=True)
    try:
        return read_verdict(said)
    except MISSHAPEN as error:
        return Unjudged(f"no verdict: {error}")


def read_verdict(said: Mapping[str, Any]) -> Verdict:
    """A verdict from its JSON, its probabilities as rounded there. Raises one of MISSHAPEN where
    it is none."""
    direction = Direction(said["direction"])
    return Verdict(
        action=Action(said["action"]),
        direction=direction,
        severity=Severity.from_label(said["severity"]),
        reasons=tuple(
            Reason(
                Category(r["category"]), Severity.from_label(r["severity"]),
                float(r["probability"]), float(r["threshold"]),
            )
            for r in said["reasons"]
        ),
        assessment=None if said["categories"] is None else _assessment(said, direction),
        policy=str(said["policy"]),
        degraded=bool(said["degraded"]),
        error=said.get("error"),
    )  # fmt: skip


def _assessment(said: Mapping[str, Any], direction: Direction) -> Assessment:
    words: Callable[[str], Severity] = Severity.from_label
    return Assessment(
        direction=direction,
        severity_probabilities={
            words(k): float(v) for k, v in said["severity_probabilities"].items()
        },
        categories={Category(k): float(v) for k, v in said["categories"].items()},
        model=str(said["model"]),
        unreadable=bool(said.get("unreadable", False)),
    )
