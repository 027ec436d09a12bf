"""Rows of files and of published data sets as what the recipes know; one that is none is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from guardrail.taxonomy import Category

if TYPE_CHECKING:
    from training.data import Example

Made = TypeVar("Made")

_CATEGORIES = {category.value for category in Category}


def each(
    name: object,
    rows: Iterable[dict[str, Any]],
    convert: Callable[[dict[str, Any]], Made | None],
) -> Iterator[Made]:
    """What `convert` makes of each row, but for None; SystemExit names the row that it can't."""
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise TypeError(f"a {type(row).__name__}, not an object with fields")
            made = convert(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else error
            raise SystemExit(f"{name}:{number}: {said}: mend or remove this row") from error
        if made is not None:
            yield made


def published(name: str, split: str = "train") -> Iterable[dict[str, Any]]:
    """The rows of a data set on the hub, or of a copy of it in a folder; SystemExit without any."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows: Iterable[dict[str, Any]] = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        said = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"--source {name}: neither a folder of the labelled data nor a data set: {said}"
        ) from error
    return rows


def checked(example: Example) -> Example:
    """The same; ValueError where a field is none that training knows."""
    severity, categories = example.severity, example.categories
    if not isinstance(example.prompt, str) or not isinstance(example.response, str | None):
        raise ValueError("its prompt or response is no text")
    if not isinstance(example.source, str):
        raise ValueError(f"source is {example.source!r}, not a text")
    if severity is not None and (type(severity) is not int or not 0 <= severity <= 3):
        raise ValueError(f"severity is {severity!r}, not 0 to 3 or null")
    if unknown := set(categories or ()) - _CATEGORIES:
        raise ValueError(f"categories has {', '.join(map(repr, unknown))}, which none is")
    return example
