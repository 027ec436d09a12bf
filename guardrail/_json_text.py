"""Texts that are JSON themselves: escapes such as `\\u0062` hide words from a moderator. Pure."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parsed"]


def parsed(text: str) -> list[Any] | None:
    """What `text` holds, objects as lists of pairs, in a list; None where it is no JSON but of a
    number or a word."""
    if not text.lstrip().startswith(("{", "[", '"')):
        return None
    try:
        # Pairs, not dicts: of a key that stands there twice, a dict would hold one.
        # Integers as they stand there, for Python reads none of thousands of digits.
        found = json.loads(
            text, object_pairs_hook=lambda pairs: [list(pair) for pair in pairs], parse_int=str
        )
    except (ValueError, RecursionError):
        return None
    return [found]
