"""The update of PPO-Lagrangian finds a known constrained optimum that plain PPO violates.

The toy: two actions in a row out of refuse, careful help, harmful help. Help pays, harm costs, the
best unconstrained answer is harmful, and at most every second answer may be. With a price on the KL
to a uniform reference, the optimum for a multiplier lambda is known in closed form,

    pi(a) ~ exp((r(a) - lambda c(a)) / ((1 + lambda) kl)),

and the constrained one is where lambda makes E[c] = limit.
"""

from __future__ import annotations

from itertools import product

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from training.lagrange import LagrangeMultiplier  # noqa: E402
from training.ppo import (  # noqa: E402
    Critics,
    Learner,
    NotFiniteError,
    Ppo,
    Rollout,
    advantages_of,
)
from training.rollout import Sequences  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PAY = torch.tensor([0.0, 0.6, 1.0])  # refuse, careful, harmful
ANSWERS = torch.tensor(list(product(range(3), repeat=2)))
LIMIT = 0.0
HOW = Ppo(
    learning_rate=0.05,
    critic_learning_rate=0.02,
    epochs=2,
    critic_epochs=2,
    minibatch=256,
    kl=0.3,
)


def reward_of(answers: Tensor) -> Tensor:
    return PAY[answers].sum(dim=1)


def cost_of(answers: Tensor) -> Tensor:
    """+1 for an answer with any harm in it, else -1."""
    return torch.where((answers == 2).any(dim=1), 1.0, -1.0)


def optimum(multiplier: float, kl: float = HOW.kl) -> Tensor:
    """Probabilities of the 9 answers, in closed form."""
    score = reward_of(ANSWERS) - multiplier * cost_of(ANSWERS)
    return torch.softmax(score / ((1 + multiplier) * kl), dim=0)


def constrained_multiplier() -> float:
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        over = (optimum(middle) * cost_of(ANSWERS)).sum() > LIMIT
        low, high = (middle, high) if over else (low, middle)
    return low


class Table(nn.Module):
    """A policy of two actions: probabilities of the first, and of the second given the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 3))

    def forward(self, sequences: Sequences) -> Tensor:
        a, b = sequences.answers.T
        return torch.stack([self.first.log_softmax(0)[a], self.second.log_softmax(1)[a, b]], dim=1)

    def answers(self, count: int, generator: torch.Generator) -> Tensor:
        a = torch.multinomial(self.first.softmax(0), count, True, generator=generator)
        b = torch.multinomial(self.second.softmax(1)[a], 1, generator=generator)[:, 0]
        return torch.stack([a, b], dim=1)

    def probabilities(self) -> Tensor:
        return self(sequences_of(ANSWERS)).sum(dim=1).exp().detach()


def sequences_of(answers: Tensor) -> Sequences:
    prompts = torch.zeros(len(answers), 1, dtype=torch.long)
    return Sequences(prompts, torch.ones_like(prompts), answers, torch.ones(answers.shape))


@torch.no_grad()
def rollout_of(policy: Table, count: int, generator: torch.Generator) -> Rollout:
    answers = policy.answers(count, generator)
    sequences = sequences_of(answers)
    logprobs = policy(sequences)
    features = torch.zeros(count, 2, 4)  # what was said so far: nothing, or the first action
    features[:, 0, 3] = 1
    features[torch.arange(count), 1, answers[:, 0]] = 1
    uniform = torch.full_like(logprobs, 1 / 3).log()
    return Rollout(sequences, logprobs, uniform, features, reward_of(answers), cost_of(answers))


def train(initial: float, steps: int = 200, seed: int = 0) -> tuple[Tensor, float]:
    """The policy and the multiplier, averaged over the last 100 of `steps`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = Table()
    learner = Learner(policy, list(policy.parameters()), Critics(4, 16), HOW)
    multiplier = LagrangeMultiplier(initial=initial, limit=LIMIT, rate=0.1, window=512)
    tail, multipliers = torch.zeros(9), 0.0
    for step in range(steps):
        rollout = rollout_of(policy, 256, generator)
        current = multiplier.observe(rollout.cost.tolist())
        learner.update(rollout, current, generator)
        if step >= steps - 100:
            tail += policy.probabilities() / 100
            multipliers += current / 100
    return tail, multipliers


def mean(values: Tensor, probabilities: Tensor) -> float:
    return float((values * probabilities).sum())


def test_ppo_lagrangian_reaches_the_constrained_optimum() -> None:
    best = optimum(constrained_multiplier())
    found, multiplier = train(initial=0.3)
    assert mean(cost_of(ANSWERS), found) == pytest.approx(LIMIT, abs=0.05)
    assert mean(reward_of(ANSWERS), found) == pytest.approx(
        mean(reward_of(ANSWERS), best), abs=0.03
    )
    assert 0.5 * (found - best).abs().sum() < 0.03
    assert multiplier == pytest.approx(constrained_multiplier(), rel=0.1)


def test_plain_ppo_reaches_the_unconstrained_optimum_and_violates_the_limit() -> None:
    found, multiplier = train(initial=0.0)
    assert multiplier == 0.0
    assert 0.5 * (found - optimum(0.0)).abs().sum() < 0.03
    assert mean(cost_of(ANSWERS), found) > LIMIT + 0.4


def test_the_limit_binds_in_this_toy() -> None:
    assert mean(cost_of(ANSWERS), optimum(0.0)) > LIMIT + 0.4
    assert 0.1 < constrained_multiplier() < 5


def one_update(multiplier: float, cost_sign: float, how: Ppo = HOW) -> list[Tensor]:
    torch.manual_seed(1)
    policy = Table()
    learner = Learner(policy, list(policy.parameters()), Critics(4, 16), how)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        rollout = rollout_of(policy, 64, torch.Generator().manual_seed(3))
        rollout = Rollout(**vars(rollout) | {"cost": cost_sign * rollout.cost})
        learner.update(rollout, multiplier, generator)
    return [p.detach().clone() for p in policy.parameters()]


def test_with_lambda_zero_the_cost_changes_nothing_of_the_policy() -> None:
    for a, b in zip(one_update(0.0, 1.0), one_update(0.0, -7.0), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(one_update(0.5, 1.0), one_update(0.5, -7.0), strict=True)
    )


def test_one_gradient_step_with_lambda_zero_is_reinforce_with_a_baseline() -> None:
    policy = Table()
    rollout = rollout_of(policy, 64, torch.Generator().manual_seed(3))
    how = Ppo(minibatch=64, kl=0.3, normalise=False, max_grad_norm=1e9, learning_rate=0.1)
    learner = Learner(policy, list(policy.parameters()), Critics(4, 16), how)
    learner.actor = torch.optim.SGD(policy.parameters(), lr=0.1)
    values = torch.zeros(64, 2)
    advantage, _, _ = advantages_of(rollout, (values, values), 0.0, how)
    loss = -(advantage * policy(rollout.sequences)).sum() / advantage.numel()
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    expected = [p - 0.1 * g for p, g in zip(policy.parameters(), gradients, strict=True)]
    learner.update(rollout, 0.0, torch.Generator().manual_seed(0))
    for now, then in zip(policy.parameters(), expected, strict=True):
        assert torch.allclose(now, then, atol=1e-6)


@pytest.mark.parametrize("multiplier", [0.0, 1.0, 4.0])
def test_the_price_of_kl_is_the_same_for_every_lambda(multiplier: float) -> None:
    rollout = rollout_of(Table(), 8, torch.Generator().manual_seed(0))
    far = Rollout(**vars(rollout) | {"reference": rollout.reference - 1.0})  # KL of 1 per token
    values = (torch.zeros(8, 2), torch.zeros(8, 2))
    how = Ppo(kl=0.3, normalise=False, gae_lambda=1.0)
    near = advantages_of(rollout, values, multiplier, how)[0]
    moved = advantages_of(far, values, multiplier, how)[0]
    assert torch.allclose(near - moved, torch.tensor([0.6, 0.3]).expand(8, 2), atol=1e-5)


@pytest.mark.parametrize("field", ["reward", "cost", "reference"])
def test_a_number_that_is_none_stops_the_update_before_the_policy_moves(field: str) -> None:
    policy = Table()
    rollout = rollout_of(policy, 8, torch.Generator().manual_seed(0))
    broken = getattr(rollout, field).clone()
    broken[3] = float("nan")
    rollout = Rollout(**vars(rollout) | {field: broken})
    learner = Learner(policy, list(policy.parameters()), Critics(4, 16), HOW)
    with pytest.raises(NotFiniteError):
        learner.update(rollout, 1.0, torch.Generator().manual_seed(0))
    assert all((p == 0).all() for p in policy.parameters())


def test_the_ptx_loss_pulls_the_policy_to_given_answers() -> None:
    torch.manual_seed(0)
    policy = Table()
    how = Ppo(learning_rate=0.05, minibatch=64, ptx=5.0)
    learner = Learner(policy, list(policy.parameters()), Critics(4, 16), how)
    generator = torch.Generator().manual_seed(0)
    text = sequences_of(torch.tensor([[0, 1]]))
    before = policy(text).sum().item()
    for _ in range(20):
        figures = learner.update(rollout_of(policy, 64, generator), 0.0, generator, lambda: text)
    assert policy(text).sum().item() > before + 0.5
    assert figures["ptx_loss"] < -before / 2


def test_the_critics_learn_what_is_to_come() -> None:
    torch.manual_seed(0)
    policy = Table()
    learner = Learner(policy, list(policy.parameters()), Critics(4, 16), HOW)
    generator = torch.Generator().manual_seed(0)
    losses = [learner.update(rollout_of(policy, 256, generator), 0.0, generator) for _ in range(20)]
    assert losses[-1]["value_loss"] < 0.5 * losses[0]["value_loss"]
    assert losses[-1]["cost_value_loss"] < 0.9 * losses[0]["cost_value_loss"]
