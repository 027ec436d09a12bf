"""What training runs share: a learning rate that warms up and fades, and checkpoints kept whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["save_whole", "warmup_then_linear"]


def warmup_then_linear(
    optimizer: torch.optim.Optimizer, steps: int, share: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rises over the first `share` of the steps, and falls to 0 at the last."""
    warmup = max(1, int(steps * share))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
    )


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a kill at any moment leaves the last whole one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
