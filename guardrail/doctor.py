"""`guardrail doctor`: what this machine runs the guard on, and what is wrong with it.

Each check is one row: ok, a warning or a failure, with the cure. Checks look; they mend nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from guardrail import __version__
from guardrail._audit_check import UnusableLogError, check_log
from guardrail._audit_files import Names
from guardrail._int8 import saturates
from guardrail._onnx import NO_TELEMETRY, REPAIR, DeviceError, runtime
from guardrail.artifact import artifact_folder, read_manifest
from guardrail.errors import GuardrailError, MissingExtra
from guardrail.guard import Guard
from guardrail.moderator import Device, OnnxModerator
from guardrail.policy import PRESETS, Policy

__all__ = ["Check", "diagnose"]

Status = Literal["ok", "warning", "failure"]
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_CUDA = "CUDAExecutionProvider"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_GPU = "pip uninstall -y onnxruntime, then pip install 'guardrail-severity[gpu]'"
_AUDIT_CURES = {
    "place": "name a file that this user may write to, in a folder that takes files",
    "key": "put the log's key back, or give it with --audit-key; where it is lost, move the log's "
    "files away",
    "log": "guardrail audit verify says more; to go on, move the log's files away",
}
_MODEL = "reinstall guardrail-severity, or give another --model"
_SAMPLE = "How do I sharpen a kitchen knife without hurting myself?"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `cure` says what to do about a warning or a failure."""

    check: str
    status: Status
    detail: str
    cure: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def diagnose(
    model: str | Path = "small",
    policy: str | Path = "balanced",
    *,
    device: Device = "auto",
    audit: Path | None = None,
    audit_key: Path | None = None,
) -> Iterator[Check]:
    """The checks, in order, as they are done. A check that another one's failure makes pointless
    is left out; so is that of the audit log, where none is named. Raises nothing on what it finds.
    """
    yield Check("guardrail", "ok", f"{__version__} in {Path(__file__).parent}")
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield _packages()
    runtime = _runtime()
    yield runtime
    presets = _presets()
    yield presets
    chosen = _policy(policy)
    yield chosen
    if audit is not None:
        yield _audit(audit, audit_key)
    artifact = _artifact(model)
    yield artifact
    if "failure" in (runtime.status, artifact.status):
        return
    try:
        moderator = OnnxModerator(model, device=device)
    except GuardrailError as error:
        yield _unopened(device, error)
        return
    yield _device(device, moderator.device)
    usable = policy if chosen.status != "failure" else "balanced"
    if presets.status != "failure":
        yield _latency(Guard(moderator, usable))


def _packages() -> Check:
    found = {name: version for name in _RUNTIMES if (version := _version(name)) is not None}
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        return Check(
            "packages",
            "failure",
            f"{detail}: both installed; they overwrite each other's files",
            REPAIR,
        )
    return Check("packages", "ok", detail or "no onnxruntime installed by pip")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _runtime() -> Check:
    try:
        ort = runtime()
        providers = ", ".join(ort.get_available_providers())
        slower = "; no VNNI here, so int8 takes a slower kernel" if saturates(ort) else ""
    except Exception as error:  # two runtimes over each other break in any way
        what = str(error) if isinstance(error, MissingExtra) else f"{type(error).__name__}: {error}"
        return Check("runtime", "failure", what, REPAIR)
    detail = f"onnxruntime {ort.__version__}, providers: {providers}{slower}"
    if os.environ[NO_TELEMETRY] != "1":
        detail += f"; {NO_TELEMETRY}={os.environ[NO_TELEMETRY]}, so it may report to Microsoft"
        return Check("runtime", "warning", detail, f"unset {NO_TELEMETRY}, or make it 1")
    return Check("runtime", "ok", f"{detail}; its telemetry is off")


def _presets() -> Check:
    policies = []
    for name in PRESETS:
        try:
            policies.append(Policy.load(name))
        except GuardrailError as error:
            cure = "reinstall guardrail-severity"
            return Check("presets", "failure", str(error), cure)
    open_ = ", ".join(policy.name for policy in policies if policy.on_error.delivers)
    detail = f"{', '.join(policy.id for policy in policies)} valid; fail open: {open_ or 'none'}"
    return Check("presets", "ok", detail)


def _policy(source: str | Path) -> Check:
    try:
        policy = Policy.load(source)
    except GuardrailError as error:
        return Check("policy", "failure", str(error), "guardrail policy validate FILE checks it")
    if policy.on_error.delivers:
        return Check(
            "policy",
            "warning",
            f"{policy.id} fails open: on_error is {policy.on_error.value}, so text that could not "
            "be judged is delivered",
            'set on_error = "refuse" unless that is meant',
        )
    return Check("policy", "ok", f"{policy.id} fails closed: on_error is {policy.on_error.value}")


def _artifact(model: str | Path) -> Check:
    try:
        folder = artifact_folder(model)
        manifest = read_manifest(folder)
    except GuardrailError as error:
        return Check("model", "failure", str(error), _MODEL)
    return Check(
        "model",
        "ok",
        f"{manifest.id} in {folder}, sha256 of {len(manifest.files)} files verified, taxonomy "
        f"{manifest.taxonomy}, base {manifest.base}, licence {manifest.licence}",
    )


def _unopened(device: Device, error: GuardrailError) -> Check:
    """Why the model could not be opened: the device that was asked for, or the model itself."""
    detail = f"asked for {device}: {error}"
    if isinstance(error, DeviceError):
        missing = missing_cuda_library()
        if missing is None:
            return Check("device", "failure", detail, "use --device auto or cpu")
        return Check("device", "failure", f"{detail}; missing: {missing}", _cure(missing))
    if device == "auto" and _CUDA in runtime().get_available_providers():
        cure = f"--device cpu tells whether the GPU is to blame; if not, {_MODEL}"
        return Check("device", "failure", detail, cure)
    return Check("device", "failure", detail, _MODEL)


def _device(asked: str, got: str) -> Check:
    detail = f"asked for {asked}, got {got}"
    if asked != "auto" or got != "cpu":
        return Check("device", "ok", detail)
    missing = missing_cuda_library()
    if missing is not None:
        detail += f", for CUDA lacks {missing}"
        return Check("device", "warning", detail, _cure(missing))
    if shutil.which("nvidia-smi"):
        detail += ", though this machine has an NVIDIA driver"
        return Check("device", "warning", detail, f"{_GPU}; --device cuda says what is missing")
    return Check("device", "ok", detail)


def missing_cuda_library() -> str | None:
    """The first shared library that onnxruntime's CUDA provider cannot find, by name; None where
    there is no such provider, or it has all it needs."""
    ort = runtime()
    windows = sys.platform == "win32"
    name = "onnxruntime_providers_cuda.dll" if windows else "libonnxruntime_providers_cuda.so"
    provider = Path(str(ort.__file__)).parent / "capi" / name
    if _CUDA not in ort.get_available_providers() or not provider.is_file():
        return None
    for library in (provider, Path(_DRIVER)):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            # The loader says `libcudnn.so.9: cannot open shared object file: ...`, on Windows only
            # that one of those needed is missing.
            what = str(error).partition(":")[0]
            return what if "cannot open shared object" in str(error) else str(error)
    return None


def _cure(missing: str) -> str:
    if missing.startswith(_DRIVER):
        return "install NVIDIA's driver, or use --device cpu"
    return "pip install 'guardrail-severity[gpu]' brings CUDA and cuDNN along, or use --device cpu"


def _audit(path: Path, key: Path | None) -> Check:
    try:
        link = check_log(path, key)
    except UnusableLogError as error:
        return Check("audit", "failure", str(error), _AUDIT_CURES[error.about])
    file = key or Names(path).key
    if os.name == "posix" and file.exists() and file.stat().st_mode & 0o077:
        return Check(
            "audit", "warning", f"{path}: its key {file} is open to others", f"chmod 600 {file}"
        )
    rows = "no rows yet" if link is None else f"{link.seq:,} rows"
    return Check("audit", "ok", f"{path}: can be written, {rows}")


def _latency(guard: Guard) -> Check:
    guard.check(_SAMPLE)  # the first run also sets the runtime's memory up
    started = time.perf_counter()
    verdict = guard.check(_SAMPLE)
    elapsed = (time.perf_counter() - started) * 1000
    if verdict.degraded:
        return Check("one check", "failure", str(verdict.error), "see the rows above")
    return Check("one check", "ok", f"{elapsed:.1f} ms for {len(_SAMPLE)} characters, warm")
