"""Weights over source and class."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

pytest.importorskip("tyro")

from training.balance import MOST, balanced
from training.data import Example


def rows() -> list[Example]:
    large = [Example(f"p{n}", "r", "big/x/part", n % 4 == 0) for n in range(80)]
    small = [Example(f"q{n}", "r", "small/y", True, weight=0.5) for n in range(10)]
    return large + small


def test_cells_come_nearer_to_one_another_and_the_whole_weighs_as_much() -> None:
    before, after = rows(), balanced(rows(), 0.5)
    assert sum(e.weight for e in after) == pytest.approx(sum(e.weight for e in before))
    weight: dict[tuple[str, bool | None], float] = defaultdict(float)
    for e in after:
        weight[e.source, e.unsafe] += e.weight
    assert weight["big/x/part", False] / weight["big/x/part", True] == pytest.approx(3**0.5)


def test_cells_of_one_weight_are_equal_at_power_one() -> None:
    examples = [e for e in rows() if e.source.startswith("big")]
    totals: Counter[bool | None] = Counter()
    for e in balanced(examples, 1.0):
        totals[e.unsafe] += e.weight  # type: ignore[assignment]
    assert totals[True] == pytest.approx(totals[False])


def test_no_weight_goes_beyond_the_bound_and_power_nought_changes_nothing() -> None:
    lone = [Example("p", "r", "lone/z", True), *rows() * 20]
    found = balanced(lone, 1.0)
    ratio = [new.weight / old.weight for new, old in zip(found, lone, strict=True)]
    assert max(ratio) / min(ratio) <= MOST**2 + 1e-9
    assert balanced(lone, 0.0) == lone
    assert balanced([], 1.0) == []


def test_a_text_without_a_label_is_of_the_class_that_its_teacher_sees() -> None:
    soft = {"severity": [0.9, 0.1, 0.0], "categories": [0.0] * 19}
    one, other, third = (
        Example("a", "r", "s/t", unsafe=None, soft=soft),
        Example("b", "r", "s/t", unsafe=True),
        Example("c", "r", "s/t", unsafe=False),
    )
    weights = [e.weight for e in balanced([one, other, third], 1.0)]
    assert weights[0] == weights[1] < weights[2]
