"""`guardrail doctor`: what this machine runs the guard on, and what is wrong with it.

Each check is one row: ok, a warning or a failure, with the cure. Checks look; they mend nothing.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from guardrail import __version__
from guardrail.artifact import artifact_folder, read_manifest
from guardrail.errors import GuardrailError, MissingExtra, require
from guardrail.guard import Guard
from guardrail.moderator import Device, OnnxModerator
from guardrail.policy import PRESETS, Policy

__all__ = ["Check", "diagnose"]

Status = Literal["ok", "warning", "failure"]
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
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
    model: str | Path = "small", policy: str | Path = "balanced", *, device: Device = "auto"
) -> Iterator[Check]:
    """The checks, in order, as they are done. A check that another one's failure makes pointless
    is left out. Raises nothing on what it finds."""
    yield Check("guardrail", "ok", f"{__version__} in {Path(__file__).parent}")
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield _packages()
    runtime = _runtime()
    yield runtime
    presets = _presets()
    yield presets
    chosen = _policy(policy)
    yield chosen
    artifact = _artifact(model)
    yield artifact
    if "failure" in (runtime.status, artifact.status):
        return
    try:
        moderator = OnnxModerator(model, device=device)
    except GuardrailError as error:
        yield Check("device", "failure", f"asked for {device}: {error}", "use --device auto or cpu")
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
            "pip uninstall -y onnxruntime onnxruntime-gpu, then "
            "pip install 'guardrail-severity[gpu]' (or [cpu])",
        )
    return Check("packages", "ok", detail or "no onnxruntime installed by pip")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _runtime() -> Check:
    try:
        ort = require("onnxruntime", extra="cpu")
        providers = ", ".join(ort.get_available_providers())
    except MissingExtra as error:
        return Check("runtime", "failure", str(error), "pip install 'guardrail-severity[cpu]'")
    except Exception as error:  # two runtimes over each other break in any way
        return Check(
            "runtime",
            "failure",
            f"onnxruntime does not load: {type(error).__name__}: {error}",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then "
            "pip install 'guardrail-severity[cpu]'",
        )
    return Check("runtime", "ok", f"onnxruntime {ort.__version__}, providers: {providers}")


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
        return Check(
            "model", "failure", str(error), "reinstall guardrail-severity, or give another --model"
        )
    return Check(
        "model",
        "ok",
        f"{manifest.id} in {folder}, sha256 of {len(manifest.files)} files verified, taxonomy "
        f"{manifest.taxonomy}, base {manifest.base}, licence {manifest.licence}",
    )


def _device(asked: str, got: str) -> Check:
    detail = f"asked for {asked}, got {got}"
    if asked == "auto" and got == "cpu" and shutil.which("nvidia-smi"):
        return Check(
            "device",
            "warning",
            f"{detail}, though this machine has an NVIDIA driver",
            "pip uninstall -y onnxruntime, then pip install 'guardrail-severity[gpu]'; "
            "--device cuda says what is missing",
        )
    return Check("device", "ok", detail)


def _latency(guard: Guard) -> Check:
    guard.check(_SAMPLE)  # the first run also sets the runtime's memory up
    started = time.perf_counter()
    verdict = guard.check(_SAMPLE)
    elapsed = (time.perf_counter() - started) * 1000
    if verdict.degraded:
        return Check("one check", "failure", str(verdict.error), "see the rows above")
    return Check("one check", "ok", f"{elapsed:.1f} ms for {len(_SAMPLE)} characters, warm")
