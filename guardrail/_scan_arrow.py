"""Parquet and Arrow files of `guardrail scan`, by pyarrow (extra `scan`). Written as Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardrail._paths import beside
from guardrail._rows import (
    OWN,
    Fields,
    Outcome,
    Row,
    ScanError,
    ScanUsageError,
    check_columns,
    json_text,
    line,
)
from guardrail.errors import require

__all__ = ["TO_PARQUET", "Arrow"]

_READ = 256  # rows per batch while judging: these are in memory with their texts
_WRITTEN = 8192  # rows per row group of the output
TO_PARQUET = (
    "convert it to Parquet with `python -c "
    '"import sys, pyarrow.feather as f, pyarrow.parquet as p; '
    'p.write_table(f.read_table(sys.argv[1]), sys.argv[2])" IN OUT.parquet`'
)


class Arrow:
    """Parquet or Arrow stream files of one schema; the columns stay as they are.

    Parquet's footer comes last, so the partial file holds the outcomes alone, as JSON lines, and
    `finish` sets them beside the columns of the input: `guardrail` (the verdict JSON, a string) and
    `error`.
    """

    def __init__(self, files: Sequence[Path], output: Path, fields: Fields) -> None:
        require("pyarrow", extra="scan")
        self.files = files
        self._schema = _schema(files[0])
        for path in files[1:]:
            if not _schema(path).equals(self._schema):
                raise ScanUsageError(f"{path}: has another schema than {files[0]}")
        columns = self._schema.names
        check_columns(files[0], fields, columns)
        self._check_writable()
        self.fields = fields.resolve(columns)
        self._read = [c for c in (fields.prompt, *self.fields.responses) if c in columns]

    def count(self) -> int:
        return sum(_count(path) for path in self.files)

    def raw(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        for path in self.files:
            for batch in _batches(path, _READ, self._read):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                yield from _rows(batch.slice(skip))
                skip = 0

    def row(self, raw: dict[str, Any]) -> Row:
        bad = next((f"{n!r} {c.why}" for n, c in raw.items() if isinstance(c, _Unread)), None)
        return Row({}, bad or self.fields.pairs(raw), raw)

    def header(self) -> bytes:
        return b""

    def encode(self, row: Row, outcome: Outcome) -> bytes:
        return line(self.fields.to_json(outcome))

    def pack(self, chunk: bytes) -> bytes:
        return chunk

    def finish(self, partial: Path, output: Path) -> None:
        parquet = require("pyarrow.parquet", extra="scan")
        whole = beside(output, ".writing")
        schema = self._written()
        with (
            partial.open("rb") as outcomes,
            parquet.ParquetWriter(whole, schema, compression="zstd") as writer,
        ):
            group: list[Any] = []
            batches = (batch for path in self.files for batch in _batches(path, _WRITTEN))
            for batch in batches:
                group.append(_with_outcomes(batch, outcomes, schema))
                if sum(part.num_rows for part in group) >= _WRITTEN:
                    _write_group(writer, group)
            _write_group(writer, group)
        with whole.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(whole, output)
        partial.unlink()

    def _check_writable(self) -> None:
        """Raises ScanUsageError for columns that Arrow has and Parquet has not, such as unions."""
        arrow = require("pyarrow", extra="scan")
        parquet = require("pyarrow.parquet", extra="scan")
        schema = self._written()
        try:
            parquet.ParquetWriter(arrow.BufferOutputStream(), schema).close()
            for field in schema:  # the writer above takes these, and gives up at their first row
                if _nests_in_dictionary(field.type):
                    raise ValueError(f"{field.name!r}, a dictionary of values with fields or lists")
        except (ValueError, NotImplementedError) as error:
            raise ScanUsageError(
                f"{self.files[0]}: the output is Parquet, which cannot hold its columns: {error}"
            ) from error

    def _written(self) -> Any:
        arrow = require("pyarrow", extra="scan")
        kept = [field for field in self._schema if field.name not in OWN]
        # `datasets` takes the features from here, and these lack the two new columns.
        metadata = {k: v for k, v in (self._schema.metadata or {}).items() if k != b"huggingface"}
        return arrow.schema([*kept, *(arrow.field(name, _text()) for name in OWN)], metadata)


@dataclass(frozen=True, slots=True)
class _Unread:
    """A cell that Python has no value for, and why."""

    why: str


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. pyarrow checks a text only when it is read, and then gives up on the
    batch; so where it does, each cell is read alone."""
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
    except Exception:  # by what a cell holds: `_cell`
        return [
            {name: _cell(batch.column(name)[n]) for name in batch.schema.names}
            for n in range(batch.num_rows)
        ]
    return found


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return _Unread(f"is not valid UTF-8 at byte {error.start}")
    except Exception as error:  # a time beyond Python's, a time zone that is none, ...
        return _Unread(f"cannot be read: {error}")


def _write_group(writer: Any, group: list[Any]) -> None:
    """One row group of what was gathered; the input's may be tiny."""
    if not group:
        return
    try:
        writer.write_table(require("pyarrow", extra="scan").Table.from_batches(group))
    except (ValueError, NotImplementedError) as error:
        raise ScanError(f"the output is Parquet, which cannot hold a value: {error}") from error
    group.clear()


def _with_outcomes(batch: Any, outcomes: Iterator[bytes], schema: Any) -> Any:
    arrow = require("pyarrow", extra="scan")
    found = [json.loads(next(outcomes)) for _ in range(batch.num_rows)]
    verdicts = [json_text(row["guardrail"]) if "guardrail" in row else None for row in found]
    errors = [row.get("error") for row in found]
    columns = [batch.column(name) for name in schema.names if name not in OWN]
    columns += [arrow.array(verdicts, _text()), arrow.array(errors, _text())]
    return arrow.record_batch(columns, schema=schema)


def _text() -> Any:
    return require("pyarrow", extra="scan").string()


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _parquet(path: Path) -> Any:
    return require("pyarrow.parquet", extra="scan").ParquetFile(path)


def _stream(path: Path) -> Any:
    """An Arrow stream, the format of `Dataset.save_to_disk`; mapped, not read into memory."""
    arrow = require("pyarrow", extra="scan")
    return require("pyarrow.ipc", extra="scan").open_stream(arrow.memory_map(str(path)))


def _storable(type_: Any) -> Any:
    """The type that a column of an Arrow stream has in Parquet. Of a dictionary that is numbered
    otherwise pyarrow writes, and reads, only what is UTF-8."""
    arrow = require("pyarrow", extra="scan")
    if not arrow.types.is_dictionary(type_):
        return type_
    return arrow.dictionary(arrow.int32(), type_.value_type, type_.ordered)


def _nests_in_dictionary(type_: Any) -> bool:
    types = require("pyarrow", extra="scan").types
    if types.is_dictionary(type_):
        return bool(types.is_nested(type_.value_type) or types.is_dictionary(type_.value_type))
    return any(_nests_in_dictionary(type_.field(n).type) for n in range(type_.num_fields))


def _stored(column: Any) -> Any:
    """A column of an Arrow stream in its storable type. Parquet's dictionaries hold no nulls."""
    arrow = require("pyarrow", extra="scan")
    if not arrow.types.is_dictionary(column.type):
        return column
    ordered = column.type.ordered
    if column.dictionary.null_count:
        column = column.dictionary_decode().dictionary_encode()
    numbers = column.indices.cast(arrow.int32())
    return arrow.DictionaryArray.from_arrays(numbers, column.dictionary, ordered=ordered)


def _unreadable(path: Path, error: Exception) -> ScanError:
    if _starts(path) in (b"ARROW1", b"FEA1"):
        return ScanUsageError(f"{path}: an Arrow IPC (Feather) file, not a stream: {TO_PARQUET}")
    kind = "Parquet" if _is_parquet(path) else "Arrow stream"
    what = " ".join(str(error).split())
    if "UTF8" in what:  # pyarrow reads any bytes, but for one kind of column
        what += " in a dictionary column not numbered by int32: save it as a column of texts"
    return ScanError(f"{path}: not a readable {kind} file: {what}")


def _starts(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(6).rstrip(b"\0")
    except OSError:
        return b""


def _schema(path: Path) -> Any:
    try:
        if _is_parquet(path):
            with _parquet(path) as file:
                return file.schema_arrow
        with _stream(path) as stream:
            schema = stream.schema
            for n, field in enumerate(schema):
                schema = schema.set(n, field.with_type(_storable(field.type)))
            return schema
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise _unreadable(path, error) from error


def _count(path: Path) -> int:
    if _is_parquet(path):
        with _parquet(path) as file:
            return int(file.metadata.num_rows)
    with closing(_batches(path, 1 << 16)) as batches:
        return sum(batch.num_rows for batch in batches)


def _batches(
    path: Path, rows: int, columns: Sequence[str] | None = None
) -> Generator[Any, None, None]:
    """Record batches of at most `rows` rows, in order. Raises ScanError."""
    arrow = require("pyarrow", extra="scan")
    try:
        if _is_parquet(path):
            with _parquet(path) as file:
                yield from file.iter_batches(rows, columns=columns)
            return
        with _stream(path) as stream:
            for batch in stream:
                batch = batch.select(columns) if columns else batch
                stored = [_stored(column) for column in batch.columns]
                batch = arrow.record_batch(stored, batch.schema.names)
                for first in range(0, batch.num_rows, rows):
                    yield batch.slice(first, rows)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
