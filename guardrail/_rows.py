"""File formats of `guardrail scan`: rows in, judged rows out. One class per format.

A format reads *raw* rows, turns each into a `Row` (a pair to judge, or what is wrong with it), and
writes rows with their outcome, a verdict or an error. Nothing here judges, or knows of resuming.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, cast

from guardrail.errors import GuardrailError, require
from guardrail.verdict import Pair, Verdict

__all__ = ["Fields", "Format", "Row", "ScanError", "ScanUsageError", "open_format"]


class ScanError(GuardrailError):
    """A scan cannot go on; the text says what is safe and what to do."""


class ScanUsageError(ScanError):
    """A scan was asked for that cannot be: wrong path, format, field or options."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a row keeps its prompt and its response."""

    prompt: str = "prompt"
    response: str = "response"

    def pair(self, row: Mapping[str, Any]) -> Pair | str:
        """The pair to judge, or what is wrong with the row. A response that is missing or blank
        is none: the prompt is judged."""
        prompt, response = row.get(self.prompt), row.get(self.response)
        if prompt is None:
            return f"no {self.prompt!r} in this row"
        if not isinstance(prompt, str):
            return f"{self.prompt!r} is not a text but {type(prompt).__name__}"
        if not prompt.strip():
            return f"{self.prompt!r} is blank"
        if response is not None and not isinstance(response, str):
            return f"{self.response!r} is not a text but {type(response).__name__}"
        return Pair(prompt, response if response and response.strip() else None)


@dataclass(frozen=True, slots=True)
class Row:
    """A row as its format keeps it, and its pair; where that is a str, it is what is wrong."""

    content: Any
    pair: Pair | str


class Format(Protocol):
    """How one kind of file is read and written; bytes go to the partial file, row by row."""

    def raw(self) -> Iterator[Any]:
        """Every row of the input, in order. Raises ScanError where it cannot be read on."""
        ...

    def row(self, raw: Any) -> Row: ...

    def header(self) -> bytes:
        """What stands before the first row."""
        ...

    def encode(self, row: Row, outcome: Verdict | str) -> bytes:
        """The row with its verdict, or its error."""
        ...

    def pack(self, chunk: bytes) -> bytes:
        """Encoded rows as they lie on disk; packed chunks may be put one after another."""
        ...

    def finish(self, partial: Path, output: Path) -> None:
        """Make a complete partial file the output, in one step."""
        ...


def open_format(source: Path, output: Path, fields: Fields) -> Format:
    """The format that both names end in. Raises ScanUsageError, MissingExtra."""
    kind = _kind(source)
    if _kind(output) is not kind:
        raise ScanUsageError(f"{output}: the output has the format of the input, {source.name}")
    return kind(source, output, fields)


def _kind(path: Path) -> Callable[[Path, Path, Fields], Format]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return Parquet
    name = name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return JsonLines
    if name.endswith(".csv"):
        return Csv
    raise ScanUsageError(
        f"{path}: not a format that can be scanned: give a file that ends in .jsonl, .csv "
        "(either with .gz after it) or .parquet"
    )


class _Text:
    """What the two text formats share: optional gzip, and a finish by renaming."""

    def __init__(self, source: Path, output: Path, fields: Fields) -> None:
        self.source = source
        self.fields = fields
        self._gzip = output.suffix.lower() == ".gz"

    def _open(self) -> IO[bytes]:
        if self.source.suffix.lower() == ".gz":
            return cast(IO[bytes], gzip.open(self.source, "rb"))
        return self.source.open("rb")

    def _broken(self, error: Exception) -> NoReturn:
        raise ScanError(f"{self.source}: cannot be read to its end: {error}") from error

    def pack(self, chunk: bytes) -> bytes:
        return gzip.compress(chunk, mtime=0) if self._gzip else chunk

    def finish(self, partial: Path, output: Path) -> None:
        os.replace(partial, output)


_UNREADABLE = (OSError, EOFError, zlib.error, csv.Error)


class JsonLines(_Text):
    """One JSON object per line; those that could be judged have a `guardrail`. A line that is no
    object is kept as text under `raw`; so is an empty one: row n of the output is line n of the
    input."""

    def raw(self) -> Iterator[bytes]:
        try:
            with self._open() as file:
                for number, line in enumerate(file):
                    yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        except _UNREADABLE as error:
            self._broken(error)

    def row(self, raw: bytes) -> Row:
        kept = {"raw": raw.decode("utf-8", "replace").rstrip("\r\n")}
        try:
            content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
            json.dumps(content, allow_nan=False)  # 1e999 reads as infinity, which is not JSON
        except UnicodeDecodeError as error:
            return Row(kept, f"invalid UTF-8 at byte {error.start} of the line")
        except RecursionError:
            return Row(kept, "broken JSON: nested too deeply")
        except ValueError as error:
            return Row(kept, f"broken JSON: {error}" if raw.strip() else "an empty line")
        if not isinstance(content, dict):
            return Row(kept, f"not a JSON object but {type(content).__name__}")
        return Row(content, self.fields.pair(content))

    def header(self) -> bytes:
        return b""

    def encode(self, row: Row, outcome: Verdict | str) -> bytes:
        # A verdict of an earlier scan must not pass for one of this scan.
        content = {key: value for key, value in row.content.items() if key != "guardrail"}
        return _line(content | _outcome(outcome))


class Csv(_Text):
    """Comma separated, with a header, UTF-8. Adds the columns `guardrail` (JSON) and `error`."""

    def __init__(self, source: Path, output: Path, fields: Fields) -> None:
        super().__init__(source, output, fields)
        columns = next(self._records(), None)
        if columns is None:
            raise ScanUsageError(f"{source}: empty; the first line of a CSV names its columns")
        if any(map(_undecoded, columns)):
            raise ScanUsageError(f"{source}: its first line is not valid UTF-8: save it as UTF-8")
        if len(set(columns)) < len(columns):
            raise ScanUsageError(f"{source}: two columns have one name: {', '.join(columns)}")
        _need_column(source, fields, columns)
        self._columns = columns
        self._written = columns + [c for c in ("guardrail", "error") if c not in columns]

    def _records(self) -> Iterator[list[str]]:
        csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
        try:
            with (
                self._open() as file,
                io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
            ):
                yield from csv.reader(text)
        except _UNREADABLE as error:
            self._broken(error)

    def raw(self) -> Iterator[list[str]]:
        records = self._records()
        next(records, None)
        yield from records

    def row(self, raw: list[str]) -> Row:
        cells = [_replace_undecoded(cell) for cell in raw]
        content = dict(zip(self._columns, cells, strict=False))
        if cells != raw:
            return Row(content, "invalid UTF-8")
        if not raw:
            return Row(content, "an empty line")
        if len(raw) != len(self._columns):
            over = raw[len(self._columns) :]
            rest = f"; left over: {json.dumps(over, ensure_ascii=False)}" if over else ""
            return Row(content, f"{len(raw)} fields, but the header has {len(self._columns)}{rest}")
        return Row(content, self.fields.pair(content))

    def header(self) -> bytes:
        return self._encode(self._written)

    def encode(self, row: Row, outcome: Verdict | str) -> bytes:
        cells = {**row.content, "guardrail": ""}
        for key, value in _outcome(outcome).items():
            cells[key] = value if isinstance(value, str) else _json(value)
        return self._encode([cells.get(column, "") for column in self._written])

    @staticmethod
    def _encode(cells: list[str]) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer).writerow(cells)
        return buffer.getvalue().encode("utf-8")


class Parquet:
    """Parquet, by pyarrow. Its footer comes last, so the partial file holds the outcomes alone, as
    JSON lines, and `finish` sets them beside the columns of the input, which stay as they are."""

    def __init__(self, source: Path, output: Path, fields: Fields) -> None:
        self._arrow = require("pyarrow", extra="scan")
        self._parquet = require("pyarrow.parquet", extra="scan")
        self.source = source
        self.fields = fields
        with self._file() as file:
            schema = file.schema_arrow
        columns = schema.names
        _need_column(source, fields, columns)
        if "error" in columns and schema.field("error").type != self._arrow.string():
            raise ScanUsageError(f"{source}: its column 'error' is not of type string: rename it")
        self._read = [c for c in (fields.prompt, fields.response) if c in columns]

    def _file(self) -> Any:
        try:
            return self._parquet.ParquetFile(self.source)
        except (OSError, self._arrow.ArrowException) as error:
            raise ScanError(f"{self.source}: not a readable Parquet file: {error}") from error

    def raw(self) -> Iterator[dict[str, Any]]:
        with self._file() as file:
            try:
                for batch in file.iter_batches(256, columns=self._read):
                    yield from batch.to_pylist()
            except (OSError, ValueError, self._arrow.ArrowException) as error:
                raise ScanError(f"{self.source}: cannot be read to its end: {error}") from error

    def row(self, raw: dict[str, Any]) -> Row:
        return Row({}, self.fields.pair(raw))

    def header(self) -> bytes:
        return b""

    def encode(self, row: Row, outcome: Verdict | str) -> bytes:
        return _line(_outcome(outcome))

    def pack(self, chunk: bytes) -> bytes:
        return chunk

    def finish(self, partial: Path, output: Path) -> None:
        whole = output.with_name(output.name + ".writing")
        text = self._arrow.string()
        with self._file() as file, partial.open("rb") as outcomes:
            kept = [name for name in file.schema_arrow.names if name not in ("guardrail", "error")]
            schema = self._arrow.schema([file.schema_arrow.field(name) for name in kept])
            schema = schema.append(self._arrow.field("guardrail", text))
            schema = schema.append(self._arrow.field("error", text))
            with self._parquet.ParquetWriter(whole, schema) as writer:
                for batch in file.iter_batches(1024):
                    lines = [json.loads(next(outcomes)) for _ in range(batch.num_rows)]
                    found = [line.get("guardrail") for line in lines]
                    verdicts = [None if verdict is None else _json(verdict) for verdict in found]
                    own = _column(batch, "error")
                    errors = [line.get("error", o) for line, o in zip(lines, own, strict=True)]
                    columns = [batch.column(name) for name in kept]
                    columns += [self._arrow.array(verdicts, text), self._arrow.array(errors, text)]
                    writer.write_batch(self._arrow.record_batch(columns, schema=schema))
        with whole.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(whole, output)
        partial.unlink()


def _column(batch: Any, name: str) -> list[Any]:
    if name in batch.schema.names:
        return list(batch.column(name).to_pylist())
    return [None] * int(batch.num_rows)


def _need_column(source: Path, fields: Fields, columns: list[str]) -> None:
    if fields.prompt not in columns:
        raise ScanUsageError(
            f"{source}: no column {fields.prompt!r} (it has {', '.join(columns)}): "
            "name the right one with --prompt-field"
        )


def _outcome(outcome: Verdict | str) -> dict[str, Any]:
    if isinstance(outcome, str):
        return {"error": outcome}
    return {"guardrail": outcome.to_json()}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _line(content: object) -> bytes:
    try:
        return _json(content).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair: JSON can say it, UTF-8 cannot
        return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _undecoded(text: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in text)


def _replace_undecoded(text: str) -> str:
    if not _undecoded(text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
