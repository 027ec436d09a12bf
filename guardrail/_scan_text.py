"""The text formats of `guardrail scan`: JSONL and CSV, compressed or not. Standard library only."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn, cast

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
    name_missing,
)

__all__ = ["Csv", "JsonLines"]

_SPACE = " \t\r\n"  # what JSON calls white space
_UNREAD = len  # an integer is kept as text and never looked at: any will do, and none is too long
_PEEK = 100  # lines of a JSONL file that are looked at for the names of its fields


class _Text:
    """What the two text formats share: compression, and a finish by renaming."""

    def __init__(self, files: Sequence[Path], output: Path, fields: Fields) -> None:
        self.files = files
        self.fields = fields
        self._gzip = output.suffix.lower() == ".gz"

    def pack(self, chunk: bytes) -> bytes:
        return gzip.compress(chunk, 6, mtime=0) if self._gzip else chunk

    def finish(self, partial: Path, output: Path) -> None:
        os.replace(partial, output)


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return cast(IO[bytes], lzma.open(path, "rb")) if suffix == ".xz" else path.open("rb")


_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)


class JsonLines(_Text):
    """One JSON object per line, kept to the letter; those that could be judged have a `guardrail`
    at their end. A line that is no object is kept as text under `raw`; so is an empty one: row n of
    the output is line n of the input."""

    def __init__(self, files: Sequence[Path], output: Path, fields: Fields) -> None:
        super().__init__(files, output, fields)
        self.fields = fields.resolve(self._look_for(fields))

    def _look_for(self, fields: Fields) -> Iterable[str]:
        """The names that the first rows have. Reads on until each field that was asked for was
        seen. Raises ScanUsageError where one is in no row: all would be errors, or prompts alone.
        """
        missing = {fields.prompt, *fields.responses}
        seen: dict[str, None] = {}
        for number, raw in enumerate(self.raw()):
            if number >= _PEEK and not missing:
                break
            row = _parsed(raw)
            if isinstance(row, dict):
                missing.difference_update(row)
                if number < _PEEK or not seen:
                    seen |= dict.fromkeys(row)
        if missing and seen:
            name_missing(f"{self.files[0]}: no row has a field", fields, missing, seen)
        return seen

    def count(self) -> int:
        return sum(1 for _ in self.raw())

    def raw(self, skip: int = 0) -> Iterator[bytes]:
        return islice(self._lines(), skip, None)

    def _lines(self) -> Iterator[bytes]:
        for path in self.files:
            try:
                with _open(path) as file:
                    for number, text in enumerate(file):
                        yield text.removeprefix(b"\xef\xbb\xbf") if number == 0 else text
            except _UNREADABLE as error:
                raise _broken(path, error) from error

    def row(self, raw: bytes) -> Row:
        text = raw.decode("utf-8", "replace").rstrip("\r\n")
        found = _parsed(raw)
        if isinstance(found, str):
            return Row(json_text({"raw": text}), found, raw)
        if not found.keys().isdisjoint(OWN):
            kept = [member for name, member in _members(text) if name not in OWN]
            text = f"{{{', '.join(kept)}}}"
        return Row(text, self.fields.pairs(found), raw)

    def header(self) -> bytes:
        return b""

    def encode(self, row: Row, outcome: Outcome) -> bytes:
        """The row's own text, to the letter, and our field at its end."""
        text: str = row.content
        before = text.strip(_SPACE).removesuffix("}").rstrip(_SPACE)
        comma = "" if before == "{" else ", "
        return (before + comma).encode("utf-8") + line(self.fields.to_json(outcome))[1:]


def _parsed(raw: bytes) -> dict[str, Any] | str:
    """A line's object, or what is wrong with it."""
    try:
        content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_int=_UNREAD)
        json.dumps(content, allow_nan=False)  # 1e999 reads as infinity, which is not JSON
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start} of the line"
    except RecursionError:
        return "broken JSON: nested too deeply"
    except ValueError as error:
        return f"broken JSON: {error}" if raw.strip() else "an empty line"
    return (
        content if isinstance(content, dict) else f"not a JSON object but {type(content).__name__}"
    )


def _members(text: str) -> Iterator[tuple[str, str]]:
    """The name and the text of each member of an object, whose text is known to be JSON."""

    def past_space(at: int) -> int:
        while text[at] in _SPACE:
            at += 1
        return at

    read = json.JSONDecoder(parse_int=_UNREAD).raw_decode
    at = past_space(past_space(0) + 1)
    while text[at] != "}":
        name, end = read(text, at)
        _, end = read(text, past_space(past_space(end) + 1))  # beyond the colon
        yield name, text[at:end]
        at = past_space(end)
        at = past_space(at + 1) if text[at] == "," else at


class Csv(_Text):
    """Comma separated, with a header, UTF-8. Adds the columns `guardrail` (JSON) and `error`."""

    def __init__(self, files: Sequence[Path], output: Path, fields: Fields) -> None:
        super().__init__(files, output, fields)
        self._columns = self._header(files[0])
        for path in files[1:]:
            if self._header(path) != self._columns:
                raise ScanUsageError(f"{path}: has other columns than {files[0]}")
        if len(self._columns) == 1 and fields.prompt != self._columns[0]:
            _check_commas(files[0], self._columns[0])
        check_columns(files[0], fields, self._columns)
        self.fields = fields.resolve(self._columns)
        self._written = self._columns + [c for c in OWN if c not in self._columns]

    @staticmethod
    def _header(path: Path) -> list[str]:
        columns = next(_records(path), None)
        if columns is None:
            raise ScanUsageError(f"{path}: empty; the first line of a CSV names its columns")
        if any(map(_undecoded, columns)):
            raise ScanUsageError(f"{path}: its first line is not valid UTF-8: save it as UTF-8")
        return columns

    def count(self) -> int:
        return sum(1 for _ in self.raw())

    def raw(self, skip: int = 0) -> Iterator[list[str]]:
        rows = (row for path in self.files for row in islice(_records(path), 1, None))
        return islice(rows, skip, None)

    def row(self, raw: list[str]) -> Row:
        cells = [_replace_undecoded(cell) for cell in raw]
        content = dict(zip(self._columns, cells, strict=False))
        return Row(content, self._problem(cells, raw) or self.fields.pairs(content), raw)

    def _problem(self, cells: list[str], raw: list[str]) -> str | None:
        if cells != raw:
            return "invalid UTF-8"
        if isinstance(raw, _Unclosed):
            return "a quote that is never closed: all that comes after it is in this row"
        if not raw:
            return "an empty line"
        if len(raw) == len(self._columns):
            return None
        over = raw[len(self._columns) :]
        rest = f"; left over: {json.dumps(over, ensure_ascii=False)}" if over else ""
        return f"{len(raw)} fields, but the header has {len(self._columns)}{rest}"

    def header(self) -> bytes:
        return self._encode(self._written)

    def encode(self, row: Row, outcome: Outcome) -> bytes:
        cells = {**row.content, **dict.fromkeys(OWN, "")}
        for key, value in self.fields.to_json(outcome).items():
            cells[key] = value if isinstance(value, str) else json_text(value)
        return self._encode([cells.get(column, "") for column in self._written])

    @staticmethod
    def _encode(cells: list[str]) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer).writerow(cells)
        return buffer.getvalue().encode("utf-8")


def _check_commas(path: Path, header: str) -> None:
    for mark in (";", "\t", "|"):
        if mark in header:
            raise ScanUsageError(
                f"{path}: its first line is parted by {mark!r}, not commas: save it with commas"
            )


class _Unclosed(list[str]):
    """The last record of a file that ends within quotes."""


def _records(path: Path) -> Iterator[list[str]]:
    ended = False

    def lines(text: Iterable[str]) -> Iterator[str]:
        nonlocal ended
        yield from text
        ended = True
        yield ""  # a record of its own, [], unless it is within quotes

    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    try:
        with (
            _open(path) as file,
            io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
        ):
            for record in csv.reader(lines(text)):
                if not ended:
                    yield record
                elif record:
                    yield _Unclosed(record)
    except _UNREADABLE as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ScanError:
    return ScanError(f"{path}: cannot be read to its end: {error}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _undecoded(text: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in text)


def _replace_undecoded(text: str) -> str:
    if not _undecoded(text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
