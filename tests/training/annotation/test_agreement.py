"""Coefficients against the worked examples of the papers that define them, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.annotation.agreement import (
    cohen_kappa,
    confusion,
    fleiss_kappa,
    interval,
    krippendorff_alpha,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")
_ = np.nan


def test_alpha_of_two_observers_and_binary_data() -> None:
    """Krippendorff (2011), example A."""
    meg = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    owen = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([meg, owen]) == pytest.approx(0.095, abs=5e-4)


def test_alpha_of_two_observers_and_nominal_data() -> None:
    """Krippendorff (2011), example B."""
    ben, gerry = "aabbdcccedda", "babbbccceddd"
    data = [[ord(letter) for letter in who] for who in (ben, gerry)]
    assert krippendorff_alpha(data) == pytest.approx(0.692, abs=5e-4)


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_four_observers_with_missing_data(level: str, alpha: float) -> None:
    """Krippendorff (2011), examples C and D."""
    data = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
    assert krippendorff_alpha(data, level) == pytest.approx(alpha, abs=5e-4)  # type: ignore[arg-type]


def test_fleiss_kappa_of_the_psychiatric_diagnoses() -> None:
    """Fleiss (1971), table 1: 30 patients, 6 psychiatrists, 5 diagnoses."""
    rows = (
        "00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031"
        " 00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"
    )
    table = np.array([[int(n) for n in row] for row in rows.split()])
    assert (table.sum(axis=0) / 180).round(3).tolist() == [0.144, 0.144, 0.167, 0.306, 0.239]
    assert fleiss_kappa(table) == pytest.approx(0.430, abs=5e-4)


def test_fleiss_kappa_of_unequal_ratings_is_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        fleiss_kappa([[2, 0], [1, 2]])


COHEN = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]


def test_cohen_kappa_of_the_clinicians() -> None:
    """Cohen (1960), table 1, as counts of 200."""
    assert cohen_kappa(COHEN) == pytest.approx(0.492, abs=5e-4)


def test_weighted_kappa_of_the_clinicians() -> None:
    """Cohen (1968), table 1, with its own weights of disagreement."""
    weights = [[0, 1, 3], [1, 0, 6], [3, 6, 0]]
    assert cohen_kappa(COHEN, weights) == pytest.approx(0.348, abs=5e-4)


levels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40)


@given(levels, st.sampled_from([None, "linear", "quadratic"]))
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[int, int]], weights: str | None) -> None:
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    ours = cohen_kappa(confusion(first, second, 4), weights)  # type: ignore[arg-type]
    if len(set(first) | set(second)) == 1:
        assert np.isnan(ours)
        return
    theirs = sklearn_metrics.cohen_kappa_score(first, second, weights=weights, labels=[0, 1, 2, 3])
    assert ours == pytest.approx(theirs, abs=1e-9)
    table = sklearn_metrics.confusion_matrix(first, second, labels=[0, 1, 2, 3])
    assert (confusion(first, second, 4) == table).all()


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=12))
def test_alpha_does_not_depend_on_the_order_of_raters_or_units(units: list[list[int]]) -> None:
    data = np.array(units, float).T
    for level in ("nominal", "ordinal"):
        alpha = krippendorff_alpha(data, level)  # type: ignore[arg-type]
        for other in (data[::-1], data[:, ::-1]):
            assert krippendorff_alpha(other, level) == pytest.approx(alpha, nan_ok=True)  # type: ignore[arg-type]
        assert np.isnan(alpha) or alpha <= 1 + 1e-12


def test_what_is_not_defined_is_no_number() -> None:
    assert np.isnan(krippendorff_alpha([[1, _], [_, 2]]))
    assert np.isnan(krippendorff_alpha([[1, 1], [1, 1]]))
    assert np.isnan(cohen_kappa(np.zeros((2, 2))))
    assert np.isnan(interval(lambda i: 1.0, 1)[0])


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        sample = rng.normal(size=80)
        low, high = interval(lambda i, s=sample: float(s[i].mean()), 80, draws=200, seed=trial)  # type: ignore[misc]
        covered += low <= 0 <= high
    assert covered >= 50
