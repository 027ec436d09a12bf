"""What training runs share: a learning rate that warms up and fades, checkpoints that are whole and
of the run that goes on from them, the folder they write to."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

__all__ = [
    "accelerator_of",
    "digest_of",
    "has_finished",
    "identity",
    "load_whole",
    "make_folder",
    "refuse_another",
    "refuse_other_weights",
    "save_whole",
    "warmup_then_linear",
]


def accelerator_of(*, bf16: bool = False) -> Accelerator:
    """What spreads a run over the processes that `accelerate launch` started."""
    # Without a GPU it has to be told: else processes would not know of one another.
    cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=cpu)


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


def load_whole(path: Path, device: torch.device | None = None) -> dict[str, Any]:
    """What `torch.save` wrote of a dict; SystemExit where it is damaged."""
    try:
        state = torch.load(path, weights_only=True, map_location=device)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise SystemExit(
            f"{path} is damaged, or was not written by training: remove it, and what needs it "
            "starts anew"
        ) from error
    return state


def make_folder(folder: Path) -> None:
    """SystemExit where `folder` is not there and can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{folder}: no folder can be made here: {error.strerror}") from error


def digest_of(content: object) -> str:
    """SHA-256 of what JSON has, in hex."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def identity(args: Any, rows: Iterable[object], processes: int = 1) -> str:
    """What tells a run from others: its arguments (a dataclass), but for where it writes and how
    often, what it trains on (`rows`, of what JSON has), and how many processes share its batches
    out."""
    told = {k: v for k, v in asdict(args).items() if k not in ("out", "checkpoint_seconds")}
    told |= {"processes": processes} if processes > 1 else {}
    found = hashlib.sha256(json.dumps(told, default=str, sort_keys=True).encode())
    for row in rows:
        found.update(json.dumps(row).encode())
    return found.hexdigest()


def has_finished(record: Path, run: str) -> bool:
    """Whether `run`, as `identity` tells it, has finished: `record`, written last, names it.
    SystemExit where another has, or one of a version that did not write which it was."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("run") != run:
        raise SystemExit(
            f"{record.parent}: a run with other arguments or data, or of an earlier version, has "
            "finished here: choose another --out, or remove this one"
        )
    return True


def refuse_other_weights(path: Path, theirs: Collection[str], ours: Collection[str]) -> None:
    """SystemExit where the checkpoint at `path` lacks weights that are trained, or has more."""
    if other := set(theirs) ^ set(ours):
        raise SystemExit(
            f"{path} is not of this model: {', '.join(sorted(other)[:5])} ({len(other)} in all) "
            "are in one and not in the other: remove it, or choose another --out"
        )


def refuse_another(path: Path, theirs: str | None, ours: str) -> None:
    """SystemExit where the checkpoint at `path` is not of the run that would go on from it."""
    if theirs != ours:
        raise SystemExit(
            f"{path} is of a run with other arguments or data: resume it with the same ones, "
            "remove it, or choose another --out"
        )
