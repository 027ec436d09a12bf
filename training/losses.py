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


def masked_bce(logits: Tensor, target: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy over known labels.

    logits, target, mask: (batch, labels), targets in [0, 1] (a teacher's are soft); weight:
    (batch,). Returns a scalar: per text summed over its labels, then averaged over the weight of
    texts that have any. Zero, and without gradient, where nothing is known.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * mask
    known = (mask.sum(dim=1) > 0).to(weight.dtype) * weight
    return (loss.sum(dim=1) * weight).sum() / known.sum().clamp(min=1e-6)
