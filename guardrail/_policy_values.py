"""Values of a policy's TOML, checked: an error names the file, the key and the nearest right word.

`where` is the file, `key` what stands in it, as a person would name it. Imports only the standard
library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from guardrail._toml import nearest
from guardrail.errors import PolicyError
from guardrail.taxonomy import Category
from guardrail.verdict import Action

__all__ = [
    "action_of",
    "category_of",
    "check_keys",
    "probability_of",
    "table_of",
    "value_of",
]

_T = TypeVar("_T")


def action_of(value: object, where: str, key: str) -> Action:
    try:
        return Action(value)  # type: ignore[arg-type]
    except ValueError:
        words = [action.value for action in Action]
        raise PolicyError(
            f"{where}: key '{key}': {value!r} is not an action "
            f"({', '.join(words)}){nearest(str(value), words)}"
        ) from None


def category_of(name: str, where: str, key: str) -> Category:
    try:
        return Category(name)
    except ValueError:
        raise PolicyError(
            f"{where}: key '{key}': {name!r} is not one of the 19 categories"
            f"{nearest(name, [c.value for c in Category])}"
        ) from None


def probability_of(value: object, where: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PolicyError(f"{where}: key '{key}': {value!r} is not a probability between 0 and 1")
    return float(value)


def table_of(value: object, where: str, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PolicyError(f"{where}: key '{key}': expected a table, found {value!r}")
    return value


def value_of(data: Mapping[str, Any], key: str, kind: type[_T], default: _T, where: str) -> _T:
    value = data.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PolicyError(f"{where}: key '{key}': expected {kind.__name__}, found {value!r}")
    return value


def check_keys(table: Mapping[str, Any], known: Sequence[str], where: str, key: str) -> None:
    for name in table:
        if name not in known:
            at = f"{key}.{name}" if key else name
            raise PolicyError(f"{where}: unknown key {at!r}{nearest(name, known)}")
