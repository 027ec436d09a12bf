"""TOML as policies and the server's settings are written in. Imports only the standard library."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from typing import Any

__all__ = ["nearest", "read_toml"]


def read_toml(text: str) -> dict[str, Any]:
    """What a TOML text says. Raises ValueError, its text in a line, for what is none."""
    try:
        data = tomllib.loads(text)
        _check_numbers(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "set_int_max_str_digits" not in str(error):  # how a program reads longer ones
            raise
        raise ValueError("a number has thousands of digits: 64 bits are the most") from None
    return data


def _check_numbers(value: object) -> None:
    """The standard's integers have 64 bits. Python reads longer ones too, but may not be able to
    say them: in hexadecimal no length is too much."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError("a number has more than 64 bits")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check_numbers(part)


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'refuse'?`, or nothing."""
    by_folded = {w.casefold(): w for w in words}
    match = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.5)
    return f"; did you mean {by_folded[match[0]]!r}?" if match else ""
