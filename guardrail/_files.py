"""Files that models are made of: their hashes, and JSON that is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from guardrail.errors import ArtifactError

__all__ = ["MISSHAPEN", "sha256_of", "verify_file", "write_json"]

# What comes of reading data that was damaged, or made by something else, as if it were one's own.
MISSHAPEN = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def sha256_of(path: Path) -> str:
    """Hexadecimal, of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, expected: str) -> None:
    """Raises ArtifactError for a file that cannot be read, or whose sha256 is not `expected`."""
    try:
        found = sha256_of(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    if found != expected:
        raise ArtifactError(
            f"{path}: altered or damaged (sha256 {found[:12]}..., the manifest says "
            f"{expected[:12]}...): reinstall guardrail-severity, or the model, from a trusted place"
        )


def write_json(
    path: Path, data: Mapping[str, Any], *, default: Callable[[Any], object] | None = None
) -> None:
    """Until the new text is complete, what was there stands. default: as of `json.dumps`."""
    partial = path.with_suffix(".partial")
    text = json.dumps(data, indent=1, ensure_ascii=False, default=default)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
