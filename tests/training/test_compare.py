"""Which of two models is better, by a rule that was fixed before."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from training.compare import compare, figures, markdown

TRUTH = np.array([0, 0, 0, 1, 2, 3, 0, 1, 2, 3] * 10)
GROUPS = [f"prompt {n}" for n in range(100)]


def changed(*places: int, to: int) -> np.ndarray:
    called = TRUTH.copy()
    called[list(places)] = to
    return called


def test_a_model_that_is_right_more_often_is_better_and_its_flips_are_counted() -> None:
    old, new = changed(3, 13, 23, 33, 4, to=0), changed(5, to=2)
    c = compare(TRUTH, old, new, GROUPS)
    assert (c.better, c.flips, c.fixed, c.broken) == (True, 6, 5, 1)
    assert c.p_value == pytest.approx(0.21875)  # 2 * P(X <= 1 | 6, 0.5)
    assert c.low < c.gain < c.high
    assert "is better" in markdown(c)


def test_the_same_model_is_not_better() -> None:
    c = compare(TRUTH, TRUTH, TRUTH, GROUPS)
    assert (c.better, c.flips, c.gain, c.p_value) == (False, 0, 0, 1)


def test_a_gain_must_be_as_great_as_asked() -> None:
    old = changed(3, to=0)
    assert compare(TRUTH, old, TRUTH, GROUPS).better
    assert not compare(TRUTH, old, TRUTH, GROUPS, min_gain=0.2).better


def test_a_better_kappa_does_not_pay_for_missed_grave_harm() -> None:
    old = changed(3, 13, 23, 33, 43, 53, 7, 17, 27, to=0)
    old[[6, 16]] = 3
    new = changed(5, 15, to=0)
    c = compare(TRUTH, old, new, GROUPS)
    assert c.gain > 0
    assert not c.better
    assert "grave" in c.why


def test_a_better_kappa_does_not_pay_for_false_alarms() -> None:
    old = changed(5, 15, 25, 35, 9, 19, to=1)
    new = changed(0, 1, 2, 6, to=1)
    c = compare(TRUTH, old, new, GROUPS)
    assert c.gain > 0
    assert not c.better
    assert "false-positive" in c.why


def test_what_cannot_be_measured_is_not_better() -> None:
    zeros = np.zeros(5, int)
    c = compare(zeros, np.array([1, 1, 0, 0, 0]), zeros, ["a"] * 5)
    assert not c.better
    assert np.isnan(figures(zeros, zeros)["kappa"])
