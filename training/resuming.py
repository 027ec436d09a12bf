"""What a run leaves in its folder, so that the same command goes on from there and no other does.

`args.json` and `data.json` say which run a folder is of; checkpoints that TRL writes, and .jsonl
files that grow by batches, are taken up where they are whole. Nothing here knows of models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guardrail._files import sha256_of, write_json
from training.runs import digest_of, make_folder

_MAY_CHANGE = (
    "save_steps", "log_steps", "bases", "steps", "save_every", "plot", "held_out_steps",
)  # fmt: skip
_SHOWN = {"rows_per_update": "batch x accumulate x processes"}
_AT_LEAST_ONE = (
    "epochs", "batch", "accumulate", "limit", "max_tokens", "rank", "save_steps", "log_steps",
    "steps", "held_out_steps", "rollouts", "minibatch", "new_tokens", "prompt_tokens", "window",
    "save_every", "prompts", "draws", "tokens",
)  # fmt: skip
_NOT_BELOW_ZERO = ("pairs", "help_pairs", "held_out")


def refuse_below_one(args: Any) -> None:
    """SystemExit for a count among the arguments, such as --batch, that is less than 1, or than 0
    where none is a choice too."""
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_BELOW_ZERO, 0)):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int) and value < least:
                option = f"--{name.replace('_', '-')}"
                raise SystemExit(f"{option} is {value}: it has to be {least} or more")


def weights_of(policy: str) -> str:
    """What tells a policy from another in the same place: its adapter's sha256, or the base's
    name."""
    path = Path(policy) / "adapter_model.safetensors"
    return sha256_of(path) if path.exists() else policy


def manifest_of(model: Path) -> str | None:
    """What tells a score model from another in the same place; None for one without a manifest."""
    path = model / "manifest.json"
    return sha256_of(path)[:16] if path.exists() else None


def claim(
    out: Path,
    args: Any,
    learnt_from: Mapping[str, Any] | None = None,
    *,
    rows_per_update: int | None = None,
) -> None:
    """Write the arguments (a dataclass) into `out`/args.json; SystemExit if a run with other ones
    is there.

    A policy counts as its weights, so that one that was trained again is another.
    learnt_from: what else decides the result and is no argument, such as a score model's hash.
    rows_per_update: over all processes; where it is given, an update's rows may be spread over
    steps and processes otherwise than before.
    """
    refuse_below_one(args)
    ours = asdict(args) | {"policy_weights": weights_of(args.policy)} | dict(learnt_from or {})
    may_change = _MAY_CHANGE
    if rows_per_update is not None:
        ours["rows_per_update"] = rows_per_update
        may_change += ("batch", "accumulate")
    make_folder(out)
    if (plot := getattr(args, "plot", None)) is not None:
        if plot.suffix not in (".svg", ".png"):  # now, not after hours of training
            raise SystemExit(f"--plot is {plot}: its name has to end in .svg or .png")
        make_folder(plot.parent)
    remember(out / "args.json", ours, may_change, beside=str(out))


def remember(
    path: Path, ours: Mapping[str, Any], may_change: Collection[str] = (), *, beside: str
) -> None:
    """Write to `path` what decides the results `beside` it; SystemExit where it names others.

    beside: a file or folder, for messages. Only the main process writes, whole or not at all.
    """
    ours = json.loads(json.dumps(ours, default=str))
    if path.exists():
        theirs = _read_object(path, beside)
        other = [
            f"{_SHOWN.get(name, name)} ({theirs.get(name)}, now {ours.get(name)})"
            for name in sorted(ours.keys() | theirs.keys())
            if name not in may_change and ours.get(name) != theirs.get(name)
        ]
        if other:
            raise SystemExit(
                f"{beside} is of a run with another {', '.join(other)}: resume it with the same "
                "arguments, remove it, or choose another --out"
            )
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(path, ours)


def remember_rows(out: Path, rows: object) -> None:
    """Write the digest of what is trained on (of what JSON has) to `out`/data.json. SystemExit
    where the run in `out` has begun on other rows, or on ones that nobody knows."""
    path = out / "data.json"
    if not path.exists() and ((out / "pairs").exists() or last_checkpoint(out)):
        raise SystemExit(
            f"{out} has no data.json, which earlier versions did not write, so nobody knows which "
            "rows its run is on: remove it, or choose another --out"
        )
    remember(path, {"data": digest_of(rows)[:16]}, beside=str(out))


def _read_object(path: Path, beside: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except ValueError as error:
        raise SystemExit(
            f"{path} is damaged or half written ({error}), so nobody knows which arguments "
            f"{beside} is of: remove {beside}, or choose another --out"
        ) from error
    return found


def kept_rows(path: Path, size: int, total: int) -> list[Any]:
    """The rows of a .jsonl that grows by batches of `size` up to `total` rows; none where there is
    no file. What a kill cut short, half a line or part of a batch, is cut off the file too: batches
    are made anew as wholes, since the place in one decides the randomness."""
    if not path.exists():
        return []
    # Not splitlines(): answers may hold other ends of line than "\n" unescaped.
    lines = path.read_bytes().split(b"\n")[:-1]
    if len(lines) < total:
        lines = lines[: len(lines) // size * size]
    if (whole := sum(len(line) + 1 for line in lines)) < path.stat().st_size:
        os.truncate(path, whole)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise SystemExit(f"{path}:{number}: not JSON: {error}: remove this file") from error
    return rows


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that is whole: its state is written last."""
    found = [
        path
        for path in (out / "checkpoints").glob("checkpoint-*")
        if (path / "trainer_state.json").exists() and path.name.split("-")[1].isdigit()
    ]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None
