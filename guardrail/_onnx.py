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

__all__ = ["Device", "open_session"]

Device = Literal["auto", "cpu", "cuda"]


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
    wanted = ["CPUExecutionProvider"]
    if device == "cuda" or (device == "auto" and "CUDAExecutionProvider" in available):
        wanted.insert(0, "CUDAExecutionProvider")
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise ArtifactError(
            f"device='cuda': this onnxruntime has no CUDA provider, only {', '.join(available)}: "
            "pip uninstall onnxruntime, then pip install 'guardrail-severity[gpu]'"
        )
    if "CUDAExecutionProvider" in wanted and hasattr(ort, "preload_dlls"):
        # CUDA and cuDNN as pip installs them lie where no loader looks. What it does not find it
        # prints on stdout, which may be JSON; the doctor says it better.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    try:
        # The fused kernel is slower than the two it replaces, 1.1 ms of 9 for 128 tokens.
        session = ort.InferenceSession(
            str(path), options, providers=wanted, disabled_optimizers=["SkipLayerNormFusion"]
        )
    except Exception as error:  # onnxruntime raises classes of its own, none public
        raise ArtifactError(f"{path}: onnxruntime cannot open it: {error}") from error
    missing = set(outputs) - {output.name for output in session.get_outputs()}
    if missing:
        raise ArtifactError(f"{path}: the model has no output {' and no '.join(sorted(missing))}")
    got = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
    if device == "cuda" and got != "cuda":
        raise ArtifactError(
            "device='cuda': onnxruntime fell back to the CPU, so its CUDA or cuDNN libraries are "
            "missing or of another version: run `guardrail doctor`, or use device='auto'"
        )
    return session, got
