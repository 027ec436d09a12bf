"""Quantisation-aware weights: a model trained on the grid that its int8 export can hold exactly.

Straight-through estimation (Bengio et al. 2013, arXiv:1308.3432): the forward pass sees rounded
weights, the gradient passes as if they were not. The grids are those of
`training.quantize`, before smoothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["BLOCK", "on_grid", "quantization_aware", "settle"]

BLOCK = 128
"""Weights along the input dimension that share a scale, in block-wise products."""


def on_grid(weight: Tensor, block: int | None) -> Tensor:
    """`weight` (rows, columns) rounded to symmetric int8: a scale per row, or per row and block of
    columns. Applied twice it changes nothing more."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, -1, block or columns)
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (torch.round(parts / scale) * scale).reshape(rows, columns)


class _OnGrid(nn.Module):
    def __init__(self, block: int | None) -> None:
        super().__init__()
        self.block = block

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (on_grid(weight, self.block) - weight).detach()


def block_of(name: str) -> int | None:
    """The block length of the weights of the module `name`, None for a scale per row: the product
    that narrows a feed-forward layer is block-wise."""
    narrows = name.endswith(".down_proj") or (".output." in name and ".attention." not in name)
    return BLOCK if narrows else None


def quantization_aware(model: nn.Module) -> None:
    """Let every linear map and embedding of the encoder and the heads see its weights rounded."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            grid = _OnGrid(block_of(name))
            parametrize.register_parametrization(module, "weight", grid, unsafe=True)


def settle(model: nn.Module) -> None:
    """Keep the rounded weights, as plain parameters again."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
