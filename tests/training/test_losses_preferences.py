"""Losses on preferences against hand-computed and finite-difference values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from training.losses import bradley_terry, dpo_loss, magnitude, sign_loss  # noqa: E402

number = st.floats(-20, 20)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nll(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def test_bradley_terry_is_the_mean_over_known_pairs() -> None:
    loss = bradley_terry(tensor(2, 0, 9), tensor(1, 3, -9), tensor(1, 1, 0))
    assert loss.item() == pytest.approx((nll(1) + nll(-3)) / 2)


def test_pairs_without_a_label_cost_nothing_and_teach_nothing() -> None:
    better = tensor(1, 2).requires_grad_()
    loss = bradley_terry(better, tensor(5, 0), tensor(0, 0))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(better.grad, tensor(0, 0))


@given(number, number, number)
def test_bradley_terry_sees_only_the_difference(better: float, worse: float, shift: float) -> None:
    one = tensor(1)
    plain = bradley_terry(tensor(better), tensor(worse), one).item()
    assert plain == pytest.approx(
        bradley_terry(tensor(better + shift), tensor(worse + shift), one).item(), abs=1e-9
    )
    assert plain == pytest.approx(nll(better - worse), abs=1e-9)


def test_the_sign_loss_puts_unsafe_answers_above_zero_and_safe_ones_below() -> None:
    cost, sign = tensor(2, -1, 7), tensor(1, -1, 0)
    assert sign_loss(cost, sign).item() == pytest.approx((nll(2) + nll(1)) / 2)
    at = tensor(0, 0, 0).requires_grad_()
    sign_loss(at, sign).backward()
    assert at.grad[0] < 0 < at.grad[1]  # a step downhill raises the first and lowers the second
    assert at.grad[2] == 0


def test_magnitude_is_the_mean_square() -> None:
    assert magnitude(tensor(3, -1, 2)).item() == pytest.approx(14 / 3)


def test_dpo_by_hand() -> None:
    loss = dpo_loss(tensor(-10, -20), tensor(-12, -15), tensor(-11, -20), tensor(-10, -18), 0.1)
    assert loss.item() == pytest.approx((nll(0.1 * 3) + nll(0.1 * -3)) / 2)


@given(number, number, st.floats(0.01, 2))
def test_dpo_starts_at_log_two(better: float, worse: float, beta: float) -> None:
    b, w = tensor(better), tensor(worse)
    assert dpo_loss(b, w, b, w, beta).item() == pytest.approx(math.log(2))


A, B = tensor(-1.0, 2.0, 0.5), tensor(0.3, -1.5, 0.4)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: bradley_terry(x, B, tensor(1, 0, 1)),
        lambda x: bradley_terry(A, x, tensor(1, 1, 1)),
        lambda x: sign_loss(x, tensor(1, -1, 0)),
        magnitude,
        lambda x: dpo_loss(x, A, B, A, 0.3),
        lambda x: dpo_loss(A, x, B, A, 0.3),
    ],
    ids=["better", "worse", "sign", "magnitude", "dpo better", "dpo worse"],
)
def test_gradients_agree_with_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    at = tensor(0.2, -0.7, 1.9).requires_grad_()
    loss(at).backward()
    for index in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[index] = 1e-6
        with torch.no_grad():
            slope = (loss(at + step) - loss(at - step)).item() / 2e-6
        assert at.grad[index].item() == pytest.approx(slope, abs=1e-7)
