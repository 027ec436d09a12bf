"""Model artifacts: a folder with `model.onnx`, `tokenizer.json` and a `manifest.json` written last.

The manifest is what training hands to serving: identity, data and licences, encoding, calibration,
thresholds, metrics, and the sha256 of every file. A file whose hash differs is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from guardrail._files import MISSHAPEN, sha256_of, verify_file, write_json
from guardrail.encoding import EncoderConfig
from guardrail.errors import ArtifactError
from guardrail.policy import Thresholds
from guardrail.taxonomy import TAXONOMY_VERSION, Category, Direction, Severity

__all__ = [
    "Calibration",
    "Manifest",
    "artifact_folder",
    "known_artifacts",
    "read_manifest",
    "write_manifest",
]

BUNDLED = "small"
_BUILT = "base"  # too large for the wheel
_FILES = ("model.onnx", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling per output: probability = sigmoid(scale * logit + bias) (Platt 1999).

    severity: 3 pairs (scale, bias) for P(>= minor, moderate, severe); categories: 19 pairs.
    Raises ValueError on anything else.
    """

    severity: Sequence[tuple[float, float]] = ((1.0, 0.0),) * 3
    categories: Sequence[tuple[float, float]] = ((1.0, 0.0),) * 19

    def __post_init__(self) -> None:
        for name, pairs, count in (
            ("severity", self.severity, 3),
            ("categories", self.categories, 19),
        ):
            if len(pairs) != count or not all(
                math.isfinite(x) for scale, bias in pairs for x in (scale, bias)
            ):
                raise ValueError(f"calibration: {name} must be {count} pairs (scale, bias)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of a model artifact; `manifest.json` holds these fields."""

    id: str
    base: str
    licence: str
    data: Sequence[Mapping[str, Any]]
    command: str
    seed: int
    created: str
    taxonomy: str = TAXONOMY_VERSION
    encoding: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    thresholds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig(**self.encoding)

    def calibration_of(self, direction: Direction) -> Calibration:
        """The direction's calibration; none where the manifest has none."""
        return Calibration(**self.calibration.get(direction.value, {}))

    def thresholds_of(self, direction: Direction) -> Thresholds:
        """The direction's calibrated thresholds."""
        own = self.thresholds.get(direction.value, {})
        return Thresholds(
            {Severity.from_label(k): float(v) for k, v in own.get("severity", {}).items()},
            {Category(k): float(v) for k, v in own.get("categories", {}).items()},
        )


def artifact_folder(model: str | Path = BUNDLED) -> Path:
    """Where a model is: a folder, or the name of one that is bundled or installed.

    Names are looked up in the package, then in `$GUARDRAIL_MODELS`
    (default `~/.local/share/guardrail/models`).
    """
    if isinstance(model, Path) or is_path(model):
        return Path(model)
    known = known_artifacts()
    if model in known:
        return known[model]
    if model == _BUILT:
        raise ArtifactError(
            f"model {model!r} does not come with the package: `python -m training.base`, in a "
            f"checkout of guardrail, builds it and installs it in {installed_models()}; the model "
            f"that is bundled is {BUNDLED!r}"
        )
    raise ArtifactError(
        f"model {model!r}: not bundled and not in {installed_models()} (there: "
        f"{', '.join(sorted(known)) or 'none'}); give one of these names, or a path as ./my-model"
    )


def is_path(model: str) -> bool:
    """Whether it names a folder, not a model."""
    return model in (".", "..") or "/" in model or os.sep in model


def known_artifacts() -> dict[str, Path]:
    """The folders of all models that have a name here, by name."""
    bundled = Path(str(resources.files("guardrail"))) / "models"
    roots = [root for root in (installed_models(), bundled) if root.is_dir()]
    return {path.name: path for root in roots for path in root.iterdir() if path.is_dir()}


def installed_models() -> Path:
    """Where models that do not come with the package are looked for."""
    home = os.environ.get("GUARDRAIL_MODELS", "~/.local/share/guardrail/models")
    return Path(os.path.expanduser(home))  # unlike Path.expanduser, for a user without a home


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """The manifest of an artifact, every file checked against its sha256. Raises ArtifactError."""
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**data)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: not a model folder, or one half written") from None
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(f"{path}: not a readable manifest: {error}") from error
    if manifest.taxonomy != TAXONOMY_VERSION:
        raise ArtifactError(
            f"{path}: made for taxonomy {manifest.taxonomy!r}, this version of guardrail has "
            f"{TAXONOMY_VERSION!r}: train or install the model anew"
        )
    try:
        if not isinstance(manifest.id, str):  # it stands in each verdict
            raise TypeError(f"id {manifest.id!r} is no name")
        manifest.encoder_config()
        for direction in Direction:
            manifest.calibration_of(direction)
            manifest.thresholds_of(direction)
        missing = [name for name in _FILES if not isinstance(manifest.files.get(name), str)]
    except MISSHAPEN as error:
        raise ArtifactError(f"{path}: says what it cannot mean: {error}") from error
    if missing:
        raise ArtifactError(f"{path}: names no {missing[0]}: the artifact is incomplete")
    if verify:
        for name, expected in manifest.files.items():
            verify_file(folder / name, expected)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the artifact's files and write `manifest.json` last; returns what was written."""
    hashes = {
        path.name: sha256_of(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.stem != "manifest" and not path.name.startswith(".")
    }
    data = {f.name: getattr(manifest, f.name) for f in fields(Manifest)} | {"files": hashes}
    write_json(folder / "manifest.json", data, default=_plain)
    return read_manifest(folder)


def _plain(value: object) -> object:
    if isinstance(value, Calibration | EncoderConfig):
        return asdict(value)
    raise TypeError(f"{value!r} cannot be written as JSON")
