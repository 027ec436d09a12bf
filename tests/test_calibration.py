"""The mathematics of calibration, against closed forms, simulations and what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail.calibration import (
    clopper_pearson,
    expected_calibration_error,
    expected_error_by_chance,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    log_loss,
    reliability,
    risk_controlling_threshold,
    rows_needed,
    scaled,
    threshold_for_rate,
    upper_bound,
)

shares = st.floats(0, 1, width=32)
samples = st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=1, max_size=60)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def texts(n: int, scale: float, bias: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose true probability is sigmoid(scale * logit + bias), and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, n)
    return logits, rng.random(n) < sigmoid(scale * logits + bias)


# --- scalings ------------------------------------------------------------------------------------


def test_platt_scaling_recovers_the_scale_and_bias_that_made_the_labels() -> None:
    scale, bias = fit_platt(*texts(20_000, 0.6, -0.8))
    assert scale == pytest.approx(0.6, abs=0.03)
    assert bias == pytest.approx(-0.8, abs=0.05)


def test_temperature_scaling_recovers_the_temperature_and_leaves_no_bias() -> None:
    scale, bias = fit_temperature(*texts(20_000, 0.5, 0.0))
    assert scale == pytest.approx(0.5, abs=0.03)
    assert bias == 0


def test_a_strong_prior_holds_and_a_weak_one_gives_way() -> None:
    logits, truth = texts(400, 0.5, 1.0)
    prior = (2.0, -2.0)
    assert fit_platt(logits, truth, prior=prior, strength=1e9) == pytest.approx(prior, abs=1e-3)
    weak = fit_platt(logits, truth, prior=prior, strength=1e-9)
    assert weak == pytest.approx(fit_platt(logits, truth), abs=1e-4)


@given(samples)
def test_no_scaling_ever_turns_the_order_of_texts_round(rows: list[tuple[float, bool]]) -> None:
    logits, truth = (np.array(column) for column in zip(*rows, strict=True))
    for scale, bias in (fit_platt(logits, truth), fit_temperature(logits, truth)):
        assert scale > 0
        assert math.isfinite(scale)
        assert math.isfinite(bias)


@pytest.mark.parametrize("value", [False, True])
def test_one_class_alone_says_nothing_so_the_prior_stays(value: bool) -> None:
    prior = (0.7, 0.1)
    assert fit_platt(np.arange(5.0), np.full(5, value), prior=prior) == prior


def test_calibration_lowers_log_loss_and_calibration_error_on_new_texts() -> None:
    scale = fit_platt(*texts(1000, 0.4, 0.5, seed=1))
    logits, truth = texts(5000, 0.4, 0.5, seed=2)
    before, after = scaled(logits, (1, 0)), scaled(logits, scale)
    assert log_loss(after, truth) < log_loss(before, truth)
    assert expected_calibration_error(after, truth) < 0.03
    assert expected_calibration_error(before, truth) > 0.08


@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans()), min_size=1, max_size=60))
def test_isotonic_regression_is_the_one_of_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    scores, truth = (np.array(column) for column in zip(*rows, strict=True))
    theirs = isotonic.IsotonicRegression().fit(scores, truth).predict(scores)
    assert fit_isotonic(scores, truth)(scores) == pytest.approx(theirs, abs=1e-6)


def test_lengths_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 logits, but 2 labels"):
        fit_platt([1, 2, 3], [0, 1])


# --- how far off ---------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    probability, truth = [0.9, 0.9, 0.1, 0.1], [1, 0, 0, 0]
    assert expected_calibration_error(probability, truth) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)


@given(st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=80))
def test_the_bins_of_a_reliability_diagram_hold_every_text_once(
    rows: list[tuple[float, bool]],
) -> None:
    probability, truth = (np.array(column) for column in zip(*rows, strict=True))
    bins = reliability(probability, truth)
    assert sum(b.n for b in bins) == len(rows)
    assert all(b.low <= b.frequency <= b.high for b in bins)
    gap = sum(abs(b.probability - b.frequency) * b.n for b in bins) / len(rows)
    assert gap == pytest.approx(expected_calibration_error(probability, truth), abs=1e-6)


def test_a_small_sample_shows_an_error_even_where_calibration_is_perfect() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random(100), rng.random(20_000)
    assert expected_error_by_chance(few) > 0.08
    assert expected_error_by_chance(many, rounds=20) < 0.015


# --- exact bounds --------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 50), (50, 50), (7, 2000), (0, 1), (1, 1)])
def test_exact_intervals_are_those_of_the_beta_distribution(k: int, n: int) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    low, high = clopper_pearson(k, n)
    assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0, abs=1e-9)
    assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1, abs=1e-9)


def test_nothing_seen_bounds_nothing() -> None:
    assert clopper_pearson(0, 0) == (0, 1)


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_the_rows_needed_are_just_enough(alpha: float, delta: float) -> None:
    n = rows_needed(alpha, delta)
    assert upper_bound(0, n, delta) <= alpha + 1e-9
    assert n == 1 or upper_bound(0, n - 1, delta) > alpha - 1e-9


# --- thresholds ----------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=80), st.floats(0.001, 0.999))
def test_a_threshold_for_a_rate_is_the_lowest_that_keeps_it(
    scores: list[float], target: float
) -> None:
    found = threshold_for_rate(scores, target)
    values = np.array(scores)
    assert (values >= found.value).mean() <= target + 1e-9
    assert found.value == 0 or (values >= found.value - 2e-4).mean() > target - 1e-9
    assert found.low <= found.value <= found.high
    assert found.rate_low <= found.rate <= found.rate_high


def test_the_interval_of_a_threshold_covers_the_true_one() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = threshold_for_rate(rng.random(300), 0.05)
        covered += found.low <= 0.95 <= found.high
    assert covered / 300 >= 0.93


def test_texts_that_all_score_1_allow_no_threshold() -> None:
    with pytest.raises(ValueError, match="score 1"):
        threshold_for_rate([1.0] * 20, 0.1)


@pytest.mark.parametrize(("alpha", "n"), [(0.1, 60), (0.05, 200)])
def test_a_controlled_risk_holds_with_the_confidence_promised(alpha: float, n: int) -> None:
    """Over many samples of a known distribution, the true miss rate exceeds alpha in at most delta
    of them (and the promise is not a lazy one that nothing ever breaks)."""
    delta, rounds = 0.1, 2000
    rng = np.random.default_rng(0)
    broken = 0
    for scores in rng.random((rounds, n)):  # uniform: the true miss rate is the threshold itself
        broken += risk_controlling_threshold(scores, alpha, delta).value > alpha
    assert broken / rounds <= delta + 3 * math.sqrt(delta * (1 - delta) / rounds)
    assert broken / rounds >= 0.2 * delta


def test_a_controlled_risk_tells_its_bound() -> None:
    found = risk_controlling_threshold(np.linspace(0, 1, 200), 0.1, 0.1)
    assert found.rate <= found.rate_high <= 0.1
    assert found.rate_high == pytest.approx(upper_bound(round(found.rate * 200), 200, 0.1))


def test_too_few_harms_are_told_with_the_number_needed() -> None:
    with pytest.raises(ValueError, match="44 harmful texts, 45 are needed"):
        risk_controlling_threshold(np.ones(44), 0.05, 0.1)


def test_harms_that_pass_whatever_the_threshold_allow_no_promise() -> None:
    with pytest.raises(ValueError, match="whatever the threshold"):
        risk_controlling_threshold([-1.0] * 30 + [1.0] * 30, 0.1, 0.1)
