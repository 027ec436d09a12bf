"""Losses as pure functions of tensors; shapes and sources in the docstrings."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def monotone_logits(raw: Tensor) -> Tensor:
    """Cumulative severity logits that cannot cross.

    raw: (batch, 3), unconstrained. Returns (batch, 3): logits of P(severity >= 1, 2, 3), each at
    most the one before it, since what is taken away is a softplus. (Proportional odds, McCullagh
    1980, with steps that depend on the text.)
    """
    steps = F.softplus(raw[:, 1:])
    return torch.cat([raw[:, :1], raw[:, :1] - steps.cumsum(dim=1)], dim=1)


def masked_bce(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    weight: Tensor,
    focal: float = 0.0,
    absent: float | None = None,
) -> Tensor:
    """Binary cross-entropy over known labels.

    logits, target, mask: (batch, labels), targets in [0, 1] (a teacher's are soft); weight:
    (batch,); focal: a label counts |target - p| ** focal, which for hard labels is the focal loss
    (Lin et al. 2017; for soft ones Li et al. 2020); absent: the exponent of labels that a text
    rather lacks, where it is another (asymmetric loss, Ridnik et al. 2021). Returns a scalar: per
    text summed over its labels, then averaged over the weight of texts that have any. Zero, and
    without gradient, where nothing is known.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * mask
    absent = focal if absent is None else absent
    if focal or absent:
        exponent = torch.where(target >= 0.5, focal, absent)
        loss = loss * (target - logits.sigmoid()).abs() ** exponent
    known = (mask.sum(dim=1) > 0).to(weight.dtype) * weight
    return (loss.sum(dim=1) * weight).sum() / known.sum().clamp(min=1e-6)


def bernoulli_divergence(one: Tensor, other: Tensor) -> Tensor:
    """How far two passes over the same texts are apart: KL(p || q) + KL(q || p) over two, summed
    over labels and averaged over texts. Logits, (batch, labels). (R-Drop, Liang et al. 2021.)"""
    return ((one.sigmoid() - other.sigmoid()) * (one - other)).sum(dim=1).mean() / 2


APART = 0.5
"""Levels by which two severities differ that are told apart."""


def ranking(
    severity: Tensor, target: Tensor, known: Tensor, prompt: Tensor | None = None
) -> Tensor:
    """Over pairs of texts in a batch whose severities differ by `APART` or more: the logistic loss
    of having the worse one above (RankNet, Burges et al. 2005), averaged.

    severity: cumulative logits, target: probabilities, (batch, 3); known: (batch,), 1 where the
    target is; prompt: (batch,), a number per prompt: then pairs of answers to one prompt alone,
    else all. 0 where there is no such pair.
    """
    level, score = target.sum(dim=1), severity.sum(dim=1)
    worse = (level.unsqueeze(1) - level.unsqueeze(0) >= APART) * known.unsqueeze(1) * known
    if prompt is not None:
        worse = worse * (prompt.unsqueeze(1) == prompt)
    return masked_mean(F.softplus(score.unsqueeze(0) - score.unsqueeze(1)), worse)


# --- reinforcement learning: answers are (batch, length), padded on the right, mask 1 on tokens ---


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is 1, both of one shape; 0 where nothing is. A scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def terminal(score: Tensor, mask: Tensor) -> Tensor:
    """A score per answer, (batch,), as a reward on its last token: (batch, length)."""
    last = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)
    return score.unsqueeze(1) * last * mask


def kl_estimate(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log pi(a|s) - log pi_ref(a|s) of sampled tokens, (batch, length); 0 on padding.

    Its mean under pi is KL(pi || pi_ref), in nats. (Estimator k1, Schulman 2020.)
    """
    return (logprobs - reference) * mask


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016), per answer.

    rewards, values, mask: (batch, length); values[:, t] is V of the text before token t, and an
    answer ends after its last token. Returns advantages and returns (advantage + value), 0 on
    padding; neither carries a gradient.
    """
    rewards, values = rewards.detach() * mask, values.detach() * mask
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t], next_value = following, values[:, t]
    return advantages, (advantages + values) * mask


def lagrangian_advantage(reward: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """(A_r - lambda A_c) / (1 + lambda), any one shape (Safe RLHF, Dai et al. 2024).

    The divisor keeps the step's size as lambda grows; lambda = 0 is the reward's own advantage.
    """
    return (reward - multiplier * cost) / (1.0 + multiplier)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated: to be minimised.

    All (batch, length); only `logprobs` carries a gradient. A scalar, the mean over tokens.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Half the squared error of a critic, clipped like PPO2's: the worse of the value itself and
    the value held within `clip` of what it was. All (batch, length). A scalar."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns) ** 2, (held - returns) ** 2)
    return 0.5 * masked_mean(worse, mask)


def ptx_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of given answers' tokens, (batch, length): what keeps the policy near
    good text while it learns (PPO-ptx, Ouyang et al. 2022). A scalar."""
    return -masked_mean(logprobs, mask)


# --- preferences: scores and log-probabilities are (batch,), one per answer ----------------------


def bradley_terry(better: Tensor, worse: Tensor, known: Tensor) -> Tensor:
    """-log sigmoid(better - worse), averaged over pairs with `known` 1 (Bradley & Terry 1952; as a
    reward model's loss Ouyang et al. 2022, eq. 1).

    better, worse, known: (batch,). A scalar; zero, and without gradient, where no pair is known.
    """
    return -masked_mean(F.logsigmoid(better - worse), known)


def sign_loss(cost: Tensor, sign: Tensor) -> Tensor:
    """-log sigmoid(sign * cost), averaged over answers whose sign is known: what makes 0 the border
    between safe and unsafe (Safe RLHF, Dai et al. 2024, eq. 7, its last two terms).

    cost: (batch,); sign: (batch,), +1 for unsafe, -1 for safe, 0 for unknown. A scalar.
    """
    return -masked_mean(F.logsigmoid(sign * cost), sign.abs())


def magnitude(scores: Tensor) -> Tensor:
    """Mean square of scores, any shape: what keeps them near 0, since preferences alone leave the
    scale and the offset open. A scalar."""
    return (scores**2).mean()


def dpo_loss(
    better: Tensor, worse: Tensor, reference_better: Tensor, reference_worse: Tensor, beta: float
) -> Tensor:
    """-log sigmoid(beta * ((better - reference_better) - (worse - reference_worse))), averaged
    (DPO, Rafailov et al. 2023, eq. 7).

    All (batch,): log-probabilities of whole answers, summed over tokens, under the policy and the
    reference. A scalar; log 2 where the policy is the reference.
    """
    margin = (better - reference_better) - (worse - reference_worse)
    return -F.logsigmoid(beta * margin).mean()
