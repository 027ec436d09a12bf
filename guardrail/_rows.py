"""What `guardrail scan` reads and writes: rows, the fields to judge in them, and the text formats.

A format reads *raw* rows, turns each into a `Row` (the pairs to judge, or what is wrong with it),
and writes rows with their outcome, verdicts or an error. Nothing here judges, or knows of resuming.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, TypeAlias, cast

from guardrail.errors import GuardrailError
from guardrail.verdict import Pair, Verdict

__all__ = [
    "OWN",
    "Csv",
    "Fields",
    "Format",
    "JsonLines",
    "Outcome",
    "Row",
    "ScanError",
    "ScanUsageError",
    "check_columns",
    "json_text",
    "line",
]

# One verdict per judged field, named by the field; or what is wrong with the row.
Outcome: TypeAlias = Mapping[str, Verdict] | str

# What the output says of a row. What the input had there, an earlier scan's for a start, must not
# pass for it.
OWN = ("guardrail", "error")

_NUMBERED = re.compile(r"response_(\d+)")
_SPACE = " \t\r\n"  # what JSON calls white space
_SHOWN = 30  # names in a message
_PEEK = 100  # lines of a JSONL file that are looked at for the names of its fields


class ScanError(GuardrailError):
    """A scan cannot go on; the text says what is safe and what to do."""


class ScanUsageError(ScanError):
    """A scan was asked for that cannot be: wrong path, format, field or options."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a row keeps its prompt and its responses.

    responses: each is judged with the prompt. () takes what the rows have: `response`, or the
        numbered ones (`response_0`, `response_1`) of preference data such as PKU-SafeRLHF.
    """

    prompt: str = "prompt"
    responses: tuple[str, ...] = ()

    def resolve(self, columns: Iterable[str]) -> Fields:
        """These fields, with the responses that rows of such columns have."""
        if self.responses:
            return self
        columns = set(columns)
        numbered = sorted((int(m[1]), name) for name in columns if (m := _NUMBERED.fullmatch(name)))
        if "response" in columns or not numbered:
            return replace(self, responses=("response",))
        return replace(self, responses=tuple(name for _, name in numbered))

    def pairs(self, row: Mapping[str, Any]) -> dict[str, Pair] | str:
        """The pairs to judge, by field, or what is wrong with the row. A response that is missing
        or blank is none; where there is one field, the prompt is then judged."""
        prompt = row.get(self.prompt)
        if prompt is None:
            return f"no {self.prompt!r} in this row"
        if not isinstance(prompt, str):
            return f"{self.prompt!r} is not a text but {type(prompt).__name__}"
        if not prompt.strip():
            return f"{self.prompt!r} is blank"
        found = {}
        for name in self.responses:
            response = row.get(name)
            if response is not None and not isinstance(response, str):
                return f"{name!r} is not a text but {type(response).__name__}"
            if response and response.strip():
                found[name] = Pair(prompt, response)
        if not found and len(self.responses) > 1:
            return f"no {' and no '.join(map(repr, self.responses))} in this row"
        return found or {self.responses[0]: Pair(prompt)}

    def to_json(self, outcome: Outcome) -> dict[str, Any]:
        """What a row gets: `guardrail`, the verdict (of several fields, one for each, by name; null
        where there was no response), or `error`."""
        if isinstance(outcome, str):
            return {"error": outcome}
        if len(self.responses) == 1:
            return {"guardrail": outcome[self.responses[0]].to_json()}
        found = {name: outcome.get(name) for name in self.responses}
        return {"guardrail": {n: None if v is None else v.to_json() for n, v in found.items()}}


@dataclass(frozen=True, slots=True)
class Row:
    """A row as its format keeps it, and its pairs by field; where that is a str, what is wrong."""

    content: Any
    pairs: Mapping[str, Pair] | str


class Format(Protocol):
    """How files of one kind are read, and one is written. Bytes go to the partial file, row by row.

    Can be pickled: other machines read the same files.
    """

    files: Sequence[Path]
    fields: Fields

    def count(self) -> int:
        """How many rows there are."""
        ...

    def raw(self, skip: int = 0) -> Iterator[Any]:
        """Every row but the first `skip`, in order. Raises ScanError where it cannot read on."""
        ...

    def row(self, raw: Any) -> Row: ...

    def header(self) -> bytes:
        """What stands before the first row."""
        ...

    def encode(self, row: Row, outcome: Outcome) -> bytes:
        """The row with its verdicts, or its error."""
        ...

    def pack(self, chunk: bytes) -> bytes:
        """Encoded rows as they lie on disk; packed chunks may be put one after another."""
        ...

    def finish(self, partial: Path, output: Path) -> None:
        """Make a complete partial file the output, in one step that may be repeated."""
        ...


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
            _name_missing(f"{self.files[0]}: no row has a field", fields, missing, seen)
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
            return Row(json_text({"raw": text}), found)
        if not found.keys().isdisjoint(OWN):
            kept = [member for name, member in _members(text) if name not in OWN]
            text = f"{{{', '.join(kept)}}}"
        return Row(text, self.fields.pairs(found))

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
        content = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
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

    read = json.JSONDecoder().raw_decode
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
        if cells != raw:
            return Row(content, "invalid UTF-8")
        if not raw:
            return Row(content, "an empty line")
        if len(raw) != len(self._columns):
            over = raw[len(self._columns) :]
            rest = f"; left over: {json.dumps(over, ensure_ascii=False)}" if over else ""
            return Row(content, f"{len(raw)} fields, but the header has {len(self._columns)}{rest}")
        return Row(content, self.fields.pairs(content))

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


def _records(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    try:
        with (
            _open(path) as file,
            io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
        ):
            yield from csv.reader(text)
    except _UNREADABLE as error:
        raise _broken(path, error) from error


def check_columns(source: Path, fields: Fields, columns: Sequence[str]) -> None:
    """Raises ScanUsageError where a named column is not there, or two have one name."""
    if len(set(columns)) < len(columns):
        raise ScanUsageError(f"{source}: two columns have one name: {', '.join(columns)}")
    missing = {fields.prompt, *fields.responses}.difference(columns)
    if missing:
        _name_missing(f"{source}: no column", fields, missing, columns)


def _name_missing(
    what: str, fields: Fields, missing: Collection[str], there: Iterable[str]
) -> NoReturn:
    option, name = "prompt", fields.prompt
    if name not in missing:
        option, name = "response", next(r for r in fields.responses if r in missing)
    names = ", ".join(islice(there, _SHOWN)) or "none"
    raise ScanUsageError(
        f"{what} {name!r} (there are {names}): name the right one with --{option}-field"
    )


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def line(content: object) -> bytes:
    """A line of JSON."""
    try:
        return json_text(content).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair: JSON can say it, UTF-8 cannot
        return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"


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
