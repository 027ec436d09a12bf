"""What a moderation model is trained to do: the loss of one batch, with its options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.losses import bernoulli_divergence, masked_bce, ranking


@dataclass
class Objective:
    """The options of the loss; what some were worth is in docs/experiments.md, run 20."""

    category_weight: float = 0.5
    severity_weight: tuple[float, float, float] = (1.0, 1.0, 1.0)
    focal: float = 0.0
    """Exponent that makes labels the model has right already count less (focal loss)."""
    r_drop: float = 0.0
    """Weight of agreeing with oneself under another dropout, for twice the time (R-Drop)."""
    absent: float | None = None
    """The exponent of categories that a text lacks, where it is another (asymmetric loss)."""
    ranking: float = 0.0
    """Weight of having the worse of any two texts in a batch above the other."""
    in_prompt: float = 0.0
    """The same within a prompt: of two answers to it, which then come in one batch."""


def loss_of(model: nn.Module, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    """Severity BCE + category_weight x category BCE, over known labels, and what is asked for
    besides. batch: as `training.batching.tensors` makes it. A scalar."""
    heads = _heads(model, batch)
    loss = _supervised(heads, batch, objective)
    if objective.r_drop:
        again = _heads(model, batch)
        loss = (loss + _supervised(again, batch, objective)) / 2
        for one, other in zip(heads, again, strict=True):
            loss = loss + objective.r_drop * bernoulli_divergence(one, other)
    known = batch["severity_mask"].prod(dim=1)
    if objective.ranking:
        loss = loss + objective.ranking * ranking(heads[0], batch["severity"], known)
    if objective.in_prompt:
        within = ranking(heads[0], batch["severity"], known, batch["prompt"])
        loss = loss + objective.in_prompt * within
    return loss


def _heads(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    severity, categories = model(
        batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    )
    return severity.float(), categories.float()


def _supervised(
    heads: tuple[Tensor, Tensor], batch: dict[str, Tensor], objective: Objective
) -> Tensor:
    severity, categories = heads
    levels = torch.tensor(objective.severity_weight, device=severity.device)
    weight, focal = batch["weight"], objective.focal
    return masked_bce(
        severity, batch["severity"], batch["severity_mask"] * levels, weight, focal
    ) + objective.category_weight * masked_bce(
        categories, batch["categories"], batch["category_mask"], weight, focal, objective.absent
    )
