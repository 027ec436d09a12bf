"""How a model of ours is opened by ONNX Runtime: providers, threads, the truth about the device.

onnxruntime is imported when a model is opened, not before.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from guardrail.errors import ArtifactError, require

__all__ = ["GPUS", "Device", "open_session"]

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

# What each device asks for, best first; a provider hands on what it cannot compute.
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": (
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ),
}
GPUS = ("cuda", "tensorrt")
_LIBRARIES = {"cuda": "CUDA or cuDNN", "tensorrt": "TensorRT, CUDA or cuDNN"}


def open_session(
    path: Path, device: Device, threads: int | None, outputs: Sequence[str]
) -> tuple[Any, str]:
    """The session, and the device it got. outputs: what the model must have. threads: of one
    inference, all cores by default. Raises ArtifactError, ValueError or MissingExtra."""
    if device not in get_args(Device):
        raise ValueError(f"device={device!r} is none of {', '.join(get_args(Device))}")
    ort: Any = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    # Idle spinning would take cores from the chat model that runs beside the guard.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    available = ort.get_available_providers()
    chosen = device
    if device == "auto":
        chosen = "cuda" if _PROVIDERS["cuda"][0] in available else "cpu"
    if _PROVIDERS[chosen][0] not in available:
        raise ArtifactError(
            f"device={device!r}: this onnxruntime has no {_PROVIDERS[chosen][0]}, only "
            f"{', '.join(available)}: pip uninstall onnxruntime, then pip install "
            "'guardrail-severity[gpu]'"
        )
    if chosen != "cpu" and hasattr(ort, "preload_dlls"):
        # CUDA and cuDNN as pip installs them lie where no loader looks. What it does not find it
        # prints on stdout, which may be JSON; the doctor says it better.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    try:
        # The fused kernel is slower than the two it replaces, 1.1 ms of 9 for 128 tokens.
        session = ort.InferenceSession(
            str(path),
            options,
            providers=list(_PROVIDERS[chosen]),
            disabled_optimizers=["SkipLayerNormFusion"],
        )
    except Exception as error:  # onnxruntime raises classes of its own, none public
        raise ArtifactError(f"{path}: onnxruntime cannot open it: {error}") from error
    missing = set(outputs) - {output.name for output in session.get_outputs()}
    if missing:
        raise ArtifactError(f"{path}: the model has no output {' and no '.join(sorted(missing))}")
    got = next(d for d, order in _PROVIDERS.items() if order[0] == session.get_providers()[0])
    if device not in ("auto", got):
        raise ArtifactError(
            f"device={device!r}: onnxruntime fell back to {got}, so its {_LIBRARIES[device]} "
            "libraries are missing or of another version: run `guardrail doctor`, or use "
            "device='auto'"
        )
    return session, got
