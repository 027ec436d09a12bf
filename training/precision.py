"""Whether this machine computes in bfloat16, or only imitates it."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

__all__ = ["DType", "fast_dtype", "knows_bf16"]

DType = Literal["float32", "bfloat16"]


@cache
def knows_bf16() -> bool:
    """Whether bfloat16 is the faster one here. A processor without instructions for it (AVX2 and no
    more, as most desktops) needs sixty times as long for a product in bfloat16 as in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # as torch.compile asks


def fast_dtype() -> DType:
    """What frozen weights are held in where nothing else is asked for."""
    return "bfloat16" if knows_bf16() else "float32"
