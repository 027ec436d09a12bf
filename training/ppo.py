"""The update of PPO-Lagrangian, for any policy that tells the log-probabilities of its actions.

PPO with the advantage (A_r - lambda A_c) / (1 + lambda) of two critics, reward's and cost's (Safe
RLHF, Dai et al. 2024). It knows no language model: a table of probabilities is as good a policy,
and is what its tests train (tests/training/test_ppo.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.losses import (
    gae,
    kl_estimate,
    lagrangian_advantage,
    masked_mean,
    policy_loss,
    ptx_loss,
    terminal,
    value_loss,
)
from training.rollout import Sequences


@dataclass
class Ppo:
    """What decides an update."""

    learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-3
    epochs: int = 1
    """Passes over a batch of answers."""
    minibatch: int = 8
    """Answers in a gradient step of the policy; also what has to fit into memory."""
    critic_epochs: int = 8
    """Passes of the critics, on features that are computed once."""
    clip: float = 0.2
    value_clip: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl: float = 0.05
    """Price of a nat of KL to the reference, per token."""
    normalise: bool = True
    """Advantages of a batch to mean 0, deviation 1."""
    ptx: float = 0.0
    """Weight of the likelihood of given answers (PPO-ptx)."""
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """A batch of answers and what was known when they were drawn.

    logprobs, reference: (batch, length), under the policy and the reference; features: (batch,
    length, width), what the critics see before each token; reward, cost: (batch,), of the whole
    answer, cost > 0 meaning unsafe.
    """

    sequences: Sequences
    logprobs: Tensor
    reference: Tensor
    features: Tensor
    reward: Tensor
    cost: Tensor


class NotFiniteError(Exception):
    """A score, loss or gradient is nan or infinite; the step that needed it was not taken."""


class Critics(nn.Module):
    """Two critics, of reward and of cost: small heads on features that do not move.

    Both start at 0 everywhere. Their features are the frozen reference's, so that no gradient of
    theirs disturbs the policy and a pass of theirs costs next to nothing.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.reward, self.cost = self._head(width, hidden), self._head(width, hidden)

    @staticmethod
    def _head(width: int, hidden: int) -> nn.Sequential:
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.Tanh(), last)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length, width) -> value of reward and of cost to come, (batch, length) each."""
        return self.reward(features).squeeze(-1), self.cost(features).squeeze(-1)


def advantages_of(
    rollout: Rollout, values: tuple[Tensor, Tensor], multiplier: float, how: Ppo
) -> tuple[Tensor, Tensor, Tensor]:
    """The advantage of each token, and the returns of reward and cost, (batch, length) each.

    The KL's price is taken from the reward and put on the cost, so that its weight in
    (A_r - lambda A_c) / (1 + lambda) is the same for every lambda.
    """
    mask = rollout.sequences.mask
    kl = how.kl * kl_estimate(rollout.logprobs, rollout.reference, mask)
    gain, returns = gae(
        terminal(rollout.reward, mask) - kl, values[0], mask, how.gamma, how.gae_lambda
    )
    harm, costs = gae(terminal(rollout.cost, mask) + kl, values[1], mask, how.gamma, how.gae_lambda)
    advantage = lagrangian_advantage(gain, harm, multiplier)
    if how.normalise:
        centred = (advantage - masked_mean(advantage, mask)) * mask
        advantage = centred / masked_mean(centred**2, mask).sqrt().clamp(min=1e-6)
    return advantage, returns, costs


class Learner:
    """A policy, its critics and their optimisers.

    logprobs: sequences -> log pi of each action, (batch, length), with a gradient to `parameters`.
    mean: averages a tensor over the processes of a run; the identity where there is one.
    """

    def __init__(
        self,
        logprobs: Callable[[Sequences], Tensor],
        parameters: Sequence[nn.Parameter],
        critics: Critics,
        how: Ppo,
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.logprobs, self.critics, self.how, self.mean = logprobs, critics, how, mean
        self.actor = torch.optim.AdamW(list(parameters), lr=how.learning_rate, weight_decay=0.0)
        heads = [{"params": list(h.parameters())} for h in (critics.reward, critics.cost)]
        self.critic = torch.optim.AdamW(heads, lr=how.critic_learning_rate, weight_decay=0.0)

    def update(
        self,
        rollout: Rollout,
        multiplier: float,
        generator: torch.Generator,
        ptx: Callable[[], Sequences] | None = None,
    ) -> dict[str, float]:
        """Learn from one batch; figures of how it went. Raises NotFiniteError."""
        with torch.no_grad():
            values = self.critics(rollout.features)
        if not torch.isfinite(rollout.reward + rollout.cost).all():
            raise NotFiniteError("a score of reward or cost")
        advantage, returns, costs = advantages_of(rollout, values, multiplier, self.how)
        losses, clipped, ptx_losses = [], [], []
        for _ in range(self.how.epochs):
            order = torch.randperm(len(rollout.sequences), generator=generator)
            for rows in order.split(self.how.minibatch):
                part = rollout.sequences[rows]
                new, old = self.logprobs(part), rollout.logprobs[rows]
                loss = policy_loss(new, old, advantage[rows], part.mask, self.how.clip)
                loss.backward()
                losses.append(loss.item())
                moved = ((new - old).detach().exp() - 1).abs() > self.how.clip
                clipped.append(masked_mean(moved.float(), part.mask).item())
                if ptx is not None:
                    text = ptx()
                    likelihood = ptx_loss(self.logprobs(text), text.mask)
                    (self.how.ptx * likelihood).backward()
                    ptx_losses.append(likelihood.item())
                self._step(self.actor, "the gradient of the policy")
        figures = {"policy_loss": _mean(losses), "clipped": _mean(clipped)}
        if ptx_losses:
            figures["ptx_loss"] = _mean(ptx_losses)
        return figures | self._fit_critics(rollout, values, (returns, costs))

    def _fit_critics(
        self, rollout: Rollout, old: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        mask, first = rollout.sequences.mask, {}
        for _ in range(self.how.critic_epochs):
            new = self.critics(rollout.features)
            losses = [
                value_loss(n, o, t, mask, self.how.value_clip)
                for n, o, t in zip(new, old, targets, strict=True)
            ]
            (losses[0] + losses[1]).backward()
            self._step(self.critic, "the gradient of a critic")
            first = first or {"value_loss": losses[0].item(), "cost_value_loss": losses[1].item()}
        return first

    def _step(self, optimizer: torch.optim.Optimizer, what: str) -> None:
        """Each group of parameters is clipped alone: what cost does to its critic must not reach
        the reward's, or lambda = 0 would not be PPO."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = self.mean(parameter.grad)
            norm = nn.utils.clip_grad_norm_(group["params"], self.how.max_grad_norm)
            if not torch.isfinite(norm):
                raise NotFiniteError(what)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
