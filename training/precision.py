"""Whether this machine is faster in bfloat16 than in float32."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch

__all__ = ["DType", "bf16_pays", "fast_dtype"]

DType = Literal["float32", "bfloat16"]
_WORTH = 1.2  # times faster; less is not worth the digits, and might be chance


@cache
def bf16_pays() -> bool:
    """Whether bfloat16 is the faster one here. A processor without instructions for it (AVX2 and no
    more, as most desktops) needs sixty times as long for a product in bfloat16 as in float32. Of
    those that have them not all are faster, so that is measured: a Zen 5 needs half the time, a
    Sapphire Rapids whose host hides its AMX twice."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # as torch.compile asks
        return False
    return _seconds(torch.float32) > _WORTH * _seconds(torch.bfloat16)


def fast_dtype() -> DType:
    """What frozen weights are held in where nothing else is asked for."""
    return "bfloat16" if bf16_pays() else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """The least processor time of one product of an encoder's size on one thread, which says the
    same on a machine that is busy."""
    texts, weights = torch.ones(256, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    least = float("inf")
    for _ in range(6):  # the first also makes ready
        started = time.thread_time()
        torch.nn.functional.linear(texts, weights)
        least = min(least, time.thread_time() - started)
    torch.set_num_threads(threads)
    return least
