"""One model out of several that were trained on from one start: the mean of their weights.

    python -m training.soup --models build/seed5 build/seed6 build/seed7 --out build/soup

A model soup (Wortsman et al. 2022, arXiv:2203.05482) costs nothing when it is used, and varies less
with the seed than each of its parts. `--start` puts in what they began with, which keeps more of
what that could (Wortsman et al. 2021, arXiv:2109.01903). `--on-grid` puts the mean on the int8 grid
again, for parts that were trained with `--quantization-aware`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from training.ending import ends_in_a_line
from training.model import ModerationModel, summary_of
from training.quantized import quantization_aware, settle
from training.restore import weights_of


@dataclass
class Args:
    models: tuple[Path, ...]
    """What runs of `training.moderation` wrote, all of one start."""
    out: Path
    start: Path | None = None
    """What they went on from, a run or an artifact, as one part more."""
    start_parts: int = 1
    """As so many parts: the more, the nearer the mean is to it."""
    on_grid: bool = False


def mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of each parameter over `states`. Raises ValueError where they have different ones."""
    first = states[0]
    shapes = {name: tuple(weight.shape) for name, weight in first.items()}
    for number, state in enumerate(states):
        if {name: tuple(weight.shape) for name, weight in state.items()} != shapes:
            raise ValueError(f"model {number + 1} is of another kind than model 1")
    return {name: torch.stack([s[name].float() for s in states]).mean(dim=0) for name in first}


def main(args: Args) -> None:
    if args.start_parts < 1:
        raise SystemExit(f"--start-parts is {args.start_parts}: it has to be 1 or more")
    if len(args.models) + (args.start is not None) < 2:
        raise SystemExit("--models: give two or more, or one and its --start")
    summaries = [summary_of(folder) for folder in args.models]
    bases = {summary["args"]["base"] for summary in summaries}
    starts = {str(summary["args"].get("init")) for summary in summaries}
    if len(bases) > 1 or len(starts) > 1:
        raise SystemExit(
            f"these began apart (bases {sorted(bases)}, starts {sorted(starts)}): the mean of "
            "their weights would be no model"
        )
    states = [weights_of(folder) for folder in args.models]
    if args.start:
        states += [weights_of(args.start)] * args.start_parts
    try:
        state = mean(states)
    except ValueError as error:
        parts = [*args.models, *([args.start] if args.start else [])]
        raise SystemExit(f"{', '.join(map(str, parts))}: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(args.models[0] / name, args.out / name)
    torch.save(state, args.out / "model.pt")
    if args.on_grid:
        model = ModerationModel.load(args.out)
        quantization_aware(model)
        settle(model)
        torch.save(model.state_dict(), args.out / "model.pt")
    merged = {
        **summaries[0],
        "run": None,  # it is no run's, but of several
        "soup_seeds": [one["args"]["seed"] for one in summaries],
        "soup_start": str(args.start) if args.start else None,
        "soup_start_parts": args.start_parts,
    }
    (args.out / "summary.json").write_text(json.dumps(merged, indent=1), encoding="utf-8")
    print(f"{args.out}: the mean of {len(states)} parts")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
