"""What training runs share: a learning rate that warms up and fades, checkpoints kept whole, and
that none is resumed as another run, the folder
they write to, and errors in one line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "digest_of",
    "identity",
    "in_a_line",
    "make_folder",
    "refuse_another",
    "save_whole",
    "warmup_then_linear",
]


def warmup_then_linear(
    optimizer: torch.optim.Optimizer, steps: int, share: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rises over the first `share` of the steps, and falls to 0 at the last."""
    warmup = max(1, int(steps * share))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
    )


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a kill at any moment leaves the last whole one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def make_folder(folder: Path) -> None:
    """SystemExit where `folder` is not there and can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder}: no folder can be made here: {error.strerror}") from error


def in_a_line(error: Exception) -> str:
    """What libraries say over many lines, in one."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]}..."


def digest_of(content: object) -> str:
    """SHA-256 of what JSON has, in hex."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def identity(args: Any, rows: Iterable[object]) -> str:
    """What tells a run from others: its arguments (a dataclass), but for where it writes and how
    often, and what it trains on (`rows`, of what JSON has)."""
    told = {k: v for k, v in asdict(args).items() if k not in ("out", "checkpoint_seconds")}
    found = hashlib.sha256(json.dumps(told, default=str, sort_keys=True).encode())
    for row in rows:
        found.update(json.dumps(row).encode())
    return found.hexdigest()


def refuse_another(path: Path, theirs: str | None, ours: str) -> None:
    """SystemExit where the checkpoint at `path` is not of the run that would go on from it."""
    if theirs != ours:
        raise SystemExit(
            f"{path} is of a run with other arguments or data: resume it with the same ones, "
            "remove it, or choose another --out"
        )
