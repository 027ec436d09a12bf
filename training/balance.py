"""Weights that even out sources and classes, so that no large source outvotes the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from training.data import Example

__all__ = ["balanced"]

MOST = 4.0
"""How far a weight may go up or down: a rare cell must not teach by heart."""


def balanced(examples: Sequence[Example], power: float) -> list[Example]:
    """The examples with their weights times (mean size of a cell / size of its own) ** power,
    within 1 / `MOST` and `MOST`, on the whole as heavy as before. A cell is a source, a direction
    and a class. power: 0 changes nothing, 1 makes cells equal as far as the bounds let it."""
    if not power or not examples:
        return list(examples)
    cells = [_cell(example) for example in examples]
    size = Counter(cells)
    mean = len(examples) / len(size)
    factors = [min(MOST, max(1 / MOST, (mean / size[cell]) ** power)) for cell in cells]
    before = sum(e.weight for e in examples)
    after = sum(e.weight * factor for e, factor in zip(examples, factors, strict=True))
    return [
        replace(e, weight=e.weight * factor * before / after)
        for e, factor in zip(examples, factors, strict=True)
    ]


def _cell(example: Example) -> tuple[str, bool, str]:
    """A source by the first two parts of its name; the class by the label, else by a teacher's."""
    source = "/".join(example.source.split("/")[:2])
    unsafe = example.unsafe
    if unsafe is None and example.soft is not None:
        unsafe = example.soft["severity"][0] >= 0.5
    graded = example.severity if example.severity is not None else unsafe
    return source, example.response is None, str(graded)
