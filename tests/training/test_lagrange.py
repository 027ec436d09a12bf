"""The multiplier moves towards the constraint, and never where it should not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.lagrange import LagrangeMultiplier

costs = st.lists(st.floats(-20, 20), min_size=1, max_size=40)


@given(costs, st.floats(0.01, 9), st.floats(-5, 5))
def test_it_rises_when_cost_is_over_the_limit_and_falls_when_under(
    episodes: list[float], initial: float, limit: float
) -> None:
    multiplier = LagrangeMultiplier(initial=initial, limit=limit, rate=0.01, maximum=1e9)
    before = multiplier.value
    after = multiplier.observe(episodes)
    gap = multiplier.mean_cost - limit
    if gap > 1e-6:
        assert after > before
    elif gap < -1e-6:
        assert 0 < after < before


def test_one_step_is_the_papers_step_in_log_space() -> None:
    multiplier = LagrangeMultiplier(initial=2.0, limit=0.5, rate=0.1)
    assert multiplier.observe([1.0, 3.0]) == pytest.approx(2.0 * math.exp(0.1 * 2.0 * 1.5))


def test_zero_stays_zero_whatever_the_cost() -> None:
    multiplier = LagrangeMultiplier(initial=0.0)
    for _ in range(5):
        assert multiplier.observe([100.0]) == 0.0


@given(costs)
def test_it_never_exceeds_its_maximum(episodes: list[float]) -> None:
    multiplier = LagrangeMultiplier(initial=1.0, rate=10.0, maximum=3.0)
    assert 0 <= multiplier.observe(episodes) <= 3.0 + 1e-12


def test_the_average_covers_the_newest_batches_that_hold_a_window_of_episodes() -> None:
    multiplier = LagrangeMultiplier(window=3)
    for batch in ([100.0, 100.0], [1.0, 1.0], [2.0, 4.0]):
        multiplier.observe(batch)
    assert multiplier.mean_cost == pytest.approx(2.0)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5))
def test_harmful_and_harmless_prompts_count_alike_whatever_the_window(
    window: int, half: int, batches: int
) -> None:
    """A batch has its harmful prompts first: half of one would be a mean of the other half."""
    multiplier = LagrangeMultiplier(window=window)
    for _ in range(batches):
        multiplier.observe([1.0] * half + [-3.0] * half)
    assert multiplier.mean_cost == pytest.approx(-1.0)


@given(costs, costs)
def test_a_restored_multiplier_goes_on_as_the_saved_one_would(
    first: list[float], second: list[float]
) -> None:
    saved, restored = LagrangeMultiplier(rate=0.01), LagrangeMultiplier(rate=0.01)
    saved.observe(first)
    restored.load_state_dict(saved.state_dict())
    assert restored.observe(second) == saved.observe(second)


@pytest.mark.parametrize("bad", [{"initial": -1.0}, {"rate": -0.1}, {"window": 0}])
def test_settings_without_meaning_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="lambda must start within"):
        LagrangeMultiplier(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("episodes", [[], [math.nan]])
def test_no_cost_and_no_number_are_refused(episodes: list[float]) -> None:
    with pytest.raises(ValueError, match="finite costs"):
        LagrangeMultiplier().observe(episodes)
