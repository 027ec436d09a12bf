"""What `guardrail scan` reads and writes: rows, and the fields to judge in them.

A format (`_scan_text`, `_scan_arrow`) reads *raw* rows, turns each into a `Row` (the pairs to
judge, or what is wrong with it), and writes rows with their outcome, verdicts or an error. Nothing
here judges, or knows of resuming.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

from guardrail.errors import GuardrailError
from guardrail.verdict import Pair, Verdict

__all__ = [
    "OWN",
    "Fields",
    "Format",
    "Outcome",
    "Row",
    "ScanError",
    "ScanUsageError",
    "check_columns",
    "json_text",
    "line",
    "name_missing",
]

# One verdict per judged field, named by the field; or what is wrong with the row.
Outcome: TypeAlias = Mapping[str, Verdict] | str

# What the output says of a row. What the input had there, an earlier scan's for a start, must not
# pass for it.
OWN = ("guardrail", "error")

_NUMBERED = re.compile(r"response_(\d+)")
_SHOWN = 30  # names in a message


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
    """A row as its format keeps it, and its pairs by field; where that is a str, what is wrong.

    raw: the row as it was read, by which a later run tells that it is the same.
    """

    content: Any
    pairs: Mapping[str, Pair] | str
    raw: Any = None


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


def check_columns(source: Path, fields: Fields, columns: Sequence[str]) -> None:
    """Raises ScanUsageError where a named column is not there, or two have one name."""
    if len(set(columns)) < len(columns):
        raise ScanUsageError(f"{source}: two columns have one name: {', '.join(columns)}")
    missing = {fields.prompt, *fields.responses}.difference(columns)
    if missing:
        name_missing(f"{source}: no column", fields, missing, columns)


def name_missing(
    what: str, fields: Fields, missing: Collection[str], there: Iterable[str]
) -> NoReturn:
    """Raises ScanUsageError: the first of the fields that is missing, and what there is."""
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
