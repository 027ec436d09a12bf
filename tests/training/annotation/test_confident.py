"""Confident learning, against the definition word by word, and against planted errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.annotation.confident import (
    category_errors,
    confident_joint,
    label_errors,
    noise,
    thresholds,
)


def by_definition(labels: list[int], p: list[list[float]]) -> list[list[int]]:
    """Equation 1 of the paper, in loops."""
    k = len(p[0])
    t = []
    for j in range(k):
        own = [row[j] for row, label in zip(p, labels, strict=True) if label == j]
        t.append(sum(own) / len(own) if own else float("inf"))
    counts = [[0] * k for _ in range(k)]
    for row, label in zip(p, labels, strict=True):
        over = [j for j in range(k) if row[j] >= t[j]]
        if over:
            counts[label][max(over, key=lambda j: row[j])] += 1
    return counts


# Sixteenths, so that means are the same in whatever order they are summed up.
rows = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 16), min_size=3, max_size=3)),
    min_size=1,
    max_size=32,
)


@given(rows)
def test_the_confident_joint_is_as_defined(data: list[tuple[int, list[int]]]) -> None:
    labels = [label for label, _ in data]
    p = [[n / 16 for n in row] for _, row in data]
    assert confident_joint(labels, p).tolist() == by_definition(labels, p)


def test_a_worked_example() -> None:
    labels = [0, 0, 0, 1, 1, 1]
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.95, 0.05]])
    assert thresholds(labels, p) == pytest.approx([0.6, 1.55 / 3])
    assert confident_joint(labels, p).tolist() == [[2, 1], [1, 2]]
    found = label_errors(labels, p)
    assert found.index.tolist() == [5, 2]
    assert found.suggested.tolist() == [0, 1]
    assert found.margin == pytest.approx([0.9, 0.8])
    assert noise(labels, p) == pytest.approx(np.array([[1 / 3, 1 / 6], [1 / 6, 1 / 3]]))


def test_planted_errors_are_found_and_their_rate_is_estimated() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 2000)
    logits = rng.normal(0, 1, (2000, 4))
    logits[np.arange(2000), truth] += 5
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    planted = rng.random(2000) < 0.1
    given_ = np.where(planted, (truth + rng.integers(1, 4, 2000)) % 4, truth)
    found = label_errors(given_, p)
    hit = planted[found.index]
    assert hit.mean() > 0.95
    assert hit.sum() / planted.sum() > 0.75
    assert (found.suggested == truth[found.index])[hit].mean() > 0.98
    assert 1 - np.trace(noise(given_, p)) == pytest.approx(0.1, abs=0.02)


def test_categories_are_judged_each_for_itself() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((400, 3)) < [0.5, 0.1, 0.0]
    p = np.clip(truth * 0.8 + 0.1 + rng.normal(0, 0.05, (400, 3)), 0, 1)
    given_ = truth.astype(int)
    given_[7, 0] ^= 1
    given_[11, 1] ^= 1
    found = category_errors(given_, p)
    assert set(found) == {0, 1}
    assert found[0].index[0] == 7
    assert found[1].index[0] == 11


def test_a_class_nobody_was_given_is_never_suggested() -> None:
    found = label_errors([0, 0, 1, 1], np.array([[0.1, 0.1, 0.8]] * 4))
    assert 2 not in found.suggested.tolist()


@pytest.mark.parametrize(
    ("labels", "p", "what"),
    [
        ([0, 1], [[1.0, 0.0]], "do not go with"),
        ([0], [1.0], "do not go with"),
        ([2], [[1.0, 0.0]], "not in 0..1"),
        ([0], [[float("nan"), 0.0]], "not a number"),
    ],
)
def test_what_does_not_fit_together_is_refused(labels: list[int], p: object, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        label_errors(labels, p)  # type: ignore[arg-type]
