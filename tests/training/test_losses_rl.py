"""The losses of PPO-Lagrangian against hand-computed and finite-difference values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from training.losses import (  # noqa: E402
    gae,
    kl_estimate,
    lagrangian_advantage,
    masked_mean,
    policy_loss,
    ptx_loss,
    terminal,
    value_loss,
)

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
number = st.floats(-5, 5)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def finite_difference(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at).view(-1)
        shift[index] = step
        shift = shift.view_as(at)
        gradient.view(-1)[index] = (f(at + shift) - f(at - shift)).item() / (2 * step)
    return gradient


def gradient_of(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    f(at).backward()
    assert at.grad is not None
    return at.grad


def test_a_score_lands_on_the_last_token_of_each_answer() -> None:
    spread = terminal(torch.tensor([2.0, -1.0], dtype=torch.float64), MASK)
    assert torch.equal(spread, tensor([0, 0, 2], [0, -1, 0]))


def test_an_empty_answer_gets_no_reward_and_no_advantage() -> None:
    mask = torch.zeros(1, 3)
    assert torch.equal(terminal(torch.tensor([5.0]), mask), torch.zeros(1, 3))
    assert torch.equal(gae(torch.ones(1, 3), torch.ones(1, 3), mask)[0], torch.zeros(1, 3))


def test_gae_on_a_known_case() -> None:
    # gamma 0.9, lambda 0.5: deltas by hand, the second answer ends a token earlier.
    rewards, values = tensor([0, 0, 1], [0, 2, 9]), tensor([0.5, 0.4, 0.2], [1.0, 0.5, 9])
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.5)
    third = 1 - 0.2
    second = (0.9 * 0.2 - 0.4) + 0.45 * third
    first = (0.9 * 0.4 - 0.5) + 0.45 * second
    other = 2 - 0.5
    expected = tensor([first, second, third], [(0.9 * 0.5 - 1.0) + 0.45 * other, other, 0])
    assert torch.allclose(advantages, expected)
    assert torch.allclose(returns, (expected + values) * MASK)


@given(st.lists(number, min_size=4, max_size=4), st.lists(number, min_size=4, max_size=4))
def test_gae_with_lambda_one_is_the_return_less_the_value(r: list[float], v: list[float]) -> None:
    rewards, values = tensor(r), tensor(v)
    advantages, returns = gae(rewards, values, torch.ones_like(rewards), gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, to_go)
    assert torch.allclose(advantages, to_go - values)


@given(st.lists(number, min_size=4, max_size=4), st.lists(number, min_size=4, max_size=4))
def test_gae_with_lambda_zero_is_the_temporal_difference(r: list[float], v: list[float]) -> None:
    rewards, values = tensor(r), tensor(v)
    advantages, _ = gae(rewards, values, torch.ones_like(rewards), gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(1, 1, dtype=values.dtype)], dim=1)
    assert torch.allclose(advantages, rewards + 0.9 * following - values)


@given(st.lists(number, min_size=3, max_size=3), st.lists(number, min_size=3, max_size=3))
def test_without_a_multiplier_the_advantage_is_the_rewards_own(
    reward: list[float], cost: list[float]
) -> None:
    assert torch.equal(lagrangian_advantage(tensor(reward), tensor(cost), 0.0), tensor(reward))


def test_the_lagrangian_advantage_weighs_cost_by_lambda_and_keeps_its_size() -> None:
    assert lagrangian_advantage(tensor([3.0]), tensor([1.0]), 2.0).item() == pytest.approx(1 / 3)
    far = lagrangian_advantage(tensor([3.0]), tensor([1.0]), 1e9).item()
    assert far == pytest.approx(-1.0, abs=1e-6)


def test_the_policy_loss_clips_only_what_would_move_too_far() -> None:
    ratios = tensor([1.5, 0.5, 1.1], [1.5, 0.5, 7.0])  # the last is padding
    advantages = tensor([1.0, 1.0, 1.0], [-1.0, -1.0, 1.0])
    loss = policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, MASK, clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 + 1.1 - 1.5 - 0.8) / 5)


def test_a_clipped_token_gives_no_gradient() -> None:
    ratios = tensor([1.5, 0.5, 1.1], [1.5, 0.5, 7.0])
    advantages = tensor([1.0, 1.0, 1.0], [-1.0, -1.0, 1.0])
    gradient = gradient_of(
        lambda x: policy_loss(x, torch.zeros_like(x), advantages, MASK, 0.2), ratios.log()
    )
    assert torch.allclose(gradient, tensor([0, -0.5 / 5, -1.1 / 5], [1.5 / 5, 0, 0]))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    old, advantages = tensor([-1.0, -2.0, -0.5], [-3.0, -0.1, 0.0]), tensor([1, -2, 3], [4, -5, 6])
    gradient = gradient_of(lambda x: policy_loss(x, old, advantages, MASK, 0.2), old)
    assert torch.allclose(gradient, -advantages * MASK / MASK.sum())


def test_the_value_loss_takes_the_worse_of_clipped_and_free() -> None:
    values, old = tensor([1.0, 0.1, 2.0], [0.0, -1.0, 9.0]), torch.zeros_like(MASK)
    returns = tensor([1.0, 0.1, 0.0], [0.0, 0.0, 0.0])
    # held at 0.2: 0.8^2 is worse than 0; 0.1 is free; 2^2 is worse than 0.2^2; 0; 1^2.
    loss = value_loss(values, old, returns, MASK, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0 + 4 + 0 + 1) / 5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: policy_loss(x, OLD, OTHER, MASK, 0.2),
        lambda x: value_loss(x, OLD, OTHER, MASK, 0.3),
        lambda x: ptx_loss(x, MASK),
        lambda x: masked_mean(x**2, MASK),
    ],
    ids=["policy", "value", "ptx", "mean"],
)
def test_gradients_agree_with_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        at = OLD + 0.5 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
        assert torch.allclose(gradient_of(loss, at), finite_difference(loss, at), atol=1e-6)


OLD = tensor([-1.0, -2.0, -0.5], [-3.0, -0.1, -0.7])
OTHER = tensor([1.0, -2.0, 0.5], [-0.3, 1.1, 4.0])


def test_nothing_but_the_new_logprobs_carries_a_gradient() -> None:
    rewards, values = OLD.clone().requires_grad_(), OTHER.clone().requires_grad_()
    advantages, returns = gae(rewards, values, MASK)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_the_ptx_loss_is_the_mean_negative_log_likelihood_of_tokens() -> None:
    assert ptx_loss(OLD, MASK).item() == pytest.approx((1 + 2 + 0.5 + 3 + 0.1) / 5)


def test_the_kl_estimate_averages_to_the_kl_divergence() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    estimate = (p * kl_estimate(p.log(), q.log(), torch.ones_like(p))).sum().item()
    assert estimate == pytest.approx(exact)
    assert math.isclose(kl_estimate(p.log(), q.log(), torch.zeros_like(p)).sum().item(), 0.0)


def test_a_mean_over_nothing_is_zero() -> None:
    assert masked_mean(OLD, torch.zeros_like(OLD)).item() == 0.0
