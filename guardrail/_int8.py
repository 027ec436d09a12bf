"""Whether this processor multiplies int8 exactly, asked of ONNX Runtime by a product.

x86 processors without VNNI (most desktops, servers from before 2019) multiply unsigned by signed
bytes with an instruction that adds pairs in 16 bits, and what does not fit is cut off. In the
bundled model that turned 1.3 % of 1,000 decisions. onnxruntime can use a slower, exact kernel
instead, but would do so on every x86: hence the question.
"""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["make_exact", "saturates"]

# A model of one MatMulInteger: y (m, n) int32 = a (m, k) uint8 times b (k, n) int8.
_PRODUCT = (
    b"\x08\x08:b\n\x18\n\x01a\n\x01b\x12\x01y"
    b'"\rMatMulInteger\x12\x01g'
    b"Z\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01m\n\x03\x12\x01k"
    b"Z\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01n"
    b"b\x15\n\x01y\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01n"
    b"B\x04\n\x00\x10\r"
)
_LENGTH = 64


def make_exact(options: Any, ort: Any) -> None:
    """Let a session of these options (`SessionOptions`) use exact products. ort: onnxruntime."""
    if saturates(ort):
        options.add_session_config_entry("session.x64quantprecision", "1")


@cache
def saturates(ort: Any) -> bool:
    """ort: the onnxruntime package."""
    import numpy as np  # here, so that the doctor's command line starts without it

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_PRODUCT, options, providers=["CPUExecutionProvider"])
    a, b = np.full((2, _LENGTH), 255, np.uint8), np.full((_LENGTH, 32), 127, np.int8)
    (product,) = session.run(None, {"a": a, "b": b})
    return bool((product != 255 * 127 * _LENGTH).any())
