"""Labelled rows, as `guardrail calibrate` takes them: JSONL with `prompt`[, `response`] and labels.

Labels, any of them: `severity` (none, minor, moderate, severe, or 0-3), `categories` (names of the
19), `unsafe` or `is_safe` (true, false). What they say together must make sense; a row that does
not is listed with its line, and left out.
"""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from guardrail.errors import GuardrailError
from guardrail.moderator import MAX_CHARS
from guardrail.taxonomy import Category, Severity
from guardrail.verdict import Pair

__all__ = ["Labelled", "LabelledFileError", "read_labelled"]


class LabelledFileError(GuardrailError):
    """The file cannot be read at all."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and what people say of it. severity, categories: None where nobody said."""

    pair: Pair
    unsafe: bool
    severity: Severity | None = None
    categories: frozenset[Category] | None = None


def read_labelled(path: Path) -> tuple[list[Labelled], list[str]]:
    """The rows of a .jsonl or .jsonl.gz file, and what is wrong with the others, `line N: ...`.
    Blank lines are none. Raises LabelledFileError."""
    rows, problems = [], []
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = _row(line)
                    if isinstance(row, Labelled):
                        rows.append(row)
                    else:
                        problems.append(f"line {number}: {row}")
    except FileNotFoundError:
        raise LabelledFileError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise LabelledFileError(f"{path}: cannot be read: {error}") from error
    return rows, problems


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _row(line: bytes) -> Labelled | str:
    try:
        # Python reads no integer of thousands of digits; those of labels have one.
        data = json.loads(line.decode("utf-8-sig"), parse_int=lambda digits: int(digits[:20]))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(data, dict):
        return f"not an object but {type(data).__name__}"
    try:
        return _labelled(data)
    except ValueError as error:
        return str(error)


def _labelled(row: Mapping[str, Any]) -> Labelled:
    pair = Pair(_text(row, "prompt") or "", _text(row, "response"))
    if not pair.text.strip():
        raise ValueError("no text: 'prompt' is missing or blank")
    if (longest := max(len(pair.prompt), len(pair.text))) > MAX_CHARS:
        raise ValueError(f"a text of {longest:,} characters, more than {MAX_CHARS:,}: split it")
    severity, categories = _severity(row.get("severity")), _categories(row.get("categories"))
    opinions = dict(_opinions(row, severity, categories))
    if not opinions:
        raise ValueError("no label: give severity, categories, unsafe or is_safe")
    if len(set(opinions.values())) > 1:
        raise ValueError(f"its labels contradict one another: {', '.join(opinions)}")
    unsafe = next(iter(opinions.values()))
    if not unsafe:
        return Labelled(pair, False, Severity.NONE, frozenset())
    return Labelled(pair, True, severity, categories)


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name!r} is not a text but {type(value).__name__}")
    return value if value and value.strip() else None


def _opinions(
    row: Mapping[str, Any], severity: Severity | None, categories: frozenset[Category] | None
) -> Iterator[tuple[str, bool]]:
    """What each label says of the text being harmful."""
    if severity is not None:
        yield f"severity {severity.label}", severity > Severity.NONE
    if categories is not None and (categories or severity is None):
        # a harm may be in none of the 19; then an empty list beside other labels says nothing
        known = severity is not None or _given(row, "unsafe") or _given(row, "is_safe")
        if categories or not known:
            yield f"{len(categories)} categories", bool(categories)
    for name, harmful in (("unsafe", True), ("is_safe", False)):
        if _given(row, name):
            value = row[name]
            if value not in (0, 1):  # True and False are
                raise ValueError(f"{name!r} is neither true nor false but {value!r}")
            yield f"{name} {bool(value)}", bool(value) is harmful


def _given(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _severity(value: object) -> Severity | None:
    if value is None:
        return None
    if isinstance(value, str):
        return Severity.from_label(value.strip().lower())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3:
        return Severity(value)
    raise ValueError(f"'severity' is {value!r}: give none, minor, moderate, severe, or 0-3")


def _categories(value: object) -> frozenset[Category] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("'categories' is not a list of names")
    found = set()
    for name in value:
        try:
            found.add(Category(name))
        except ValueError:
            close = difflib.get_close_matches(name, [c.value for c in Category], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name!r} is not one of the 19 categories{hint}") from None
    return frozenset(found)
