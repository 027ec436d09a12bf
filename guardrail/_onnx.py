"""How a model of ours is opened by ONNX Runtime: providers, threads, the truth about the device.

onnxruntime is imported when a model is opened, not before, and told to send nothing home.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from guardrail._forks import renewed_in_children
from guardrail._int8 import make_exact
from guardrail.errors import ArtifactError, MissingExtra, require

__all__ = ["GPUS", "NO_TELEMETRY", "REPAIR", "Device", "DeviceError", "Session", "runtime"]

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

# What each device asks for, best first; a provider hands on what it cannot compute.
_PROVIDERS: dict[Device, tuple[str, ...]] = {
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


# Read by onnxruntime when it loads. From 1.29 on it else keeps an identifier of the machine, and
# tells Microsoft of processes, models and errors, from a thread that makes forked children hang.
NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
REPAIR = (
    "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'guardrail-severity[cpu]' "
    "(or [gpu])"
)


class DeviceError(ArtifactError):
    """The device that was asked for cannot be had, whatever the model."""


def runtime() -> Any:
    """The onnxruntime package, its telemetry off unless NO_TELEMETRY in the environment says
    otherwise. Raises MissingExtra, also for one that is there and does not load."""
    off = os.environ.setdefault(NO_TELEMETRY, "1") == "1"
    try:
        ort: Any = require("onnxruntime", extra="cpu")
        if off:  # for an app that imported it before us, which is too late for the variable
            ort.disable_telemetry_events()
    except MissingExtra:
        raise
    except Exception as error:  # two runtimes over each other break in any way
        raise MissingExtra(
            f"onnxruntime does not load: {type(error).__name__}: {error}: {REPAIR}"
        ) from error
    return ort


class Session:
    """A model that ONNX Runtime has open, in whichever process uses it. Thread-safe.

    outputs: what the model must have. threads: of one inference, all cores by default.
    `device` is the one it got.
    Raises ArtifactError, ValueError or MissingExtra.

    A forked child opens the model anew when it first runs it: the threads of the parent's session
    are not there, nor is whoever held its locks. With the parent's, one child in five of a busy
    parent hung when it judged, and nearly all when they ended.
    """

    def __init__(
        self, path: Path, device: Device, threads: int | None, outputs: Sequence[str]
    ) -> None:
        self._path, self._threads, self._outputs = path, threads, outputs
        self._file = _identity(path)
        self._session, self.device = _open(path, device, threads, outputs)
        self._inherited = False
        self._inputs = {argument.name for argument in self._session.get_inputs()}
        renewed_in_children(self)

    def run(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """The named outputs for what the model takes of `feed`. Raises whatever onnxruntime
        raises, and ArtifactError."""
        taken = {name: array for name, array in feed.items() if name in self._inputs}
        found: list[Any] = self.here().run(outputs, taken)
        return found

    def here(self) -> Any:
        """onnxruntime's session of this process. Raises ArtifactError when it cannot be opened."""
        if self._inherited:
            if _identity(self._path) != self._file:
                raise ArtifactError(
                    f"{self._path}: another file than the one this process was forked with: "
                    "restart the parent, so that all of its children run the new model"
                )
            self._session, _ = _open(self._path, self.device, self._threads, self._outputs)
            self._inherited = False
        return self._session

    def _after_fork(self) -> None:
        # Never to be freed, at exit neither: that waits for threads which only the parent has.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
        self._inherited = True


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _open(
    path: Path, device: Device, threads: int | None, outputs: Sequence[str]
) -> tuple[Any, Device]:
    """The session, and the device it got."""
    if device not in get_args(Device):
        raise ValueError(f"device={device!r} is none of {', '.join(get_args(Device))}")
    ort = runtime()
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
        raise DeviceError(
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
        make_exact(options, ort)
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
        raise DeviceError(
            f"device={device!r}: onnxruntime fell back to {got}, so its {_LIBRARIES[device]} "
            "libraries are missing or of another version: run `guardrail doctor`, or use "
            "device='auto'"
        )
    return session, got
