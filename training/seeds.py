"""How much of a figure is the seed's: one recipe, several seeds, the spread.

    python -m training.seeds --seeds 5 6 7 --out build/seeds --train.epochs 1 ...
    python -m training.seeds --models build/seed5 build/seed6      # of runs that are there

The first trains with each seed in turn (`training.moderation`, which resumes), into `--out`/SEED.
What two recipes differ by on these figures says something where it is more than their seeds do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from training import moderation
from training.ending import ends_in_a_line

FIGURES = ("auroc", "f1", "recall", "fpr", "grave_recall", "kappa", "category_micro_f1", "ece")
_OWN = {"seed", "out", "checkpoint_seconds", "bf16"}  # in which runs of one recipe may differ


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    out: Path = Path("build/seeds")
    models: tuple[Path, ...] = ()
    """Finished runs of one recipe: nothing is trained then."""
    train: moderation.Args = field(default_factory=moderation.Args)
    """The recipe; `seed` and `out` are set here."""


def spread(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """direction -> figure -> mean, deviation (of a sample), lowest and highest, of the last
    validation of each run. Raises SystemExit where the runs are not of one recipe."""
    first = _recipe(summaries[0])
    for summary in summaries[1:]:
        other = _recipe(summary)
        differing = sorted(k for k in {*first, *other} if first.get(k) != other.get(k))
        if differing:
            raise SystemExit(f"these are not runs of one recipe: they differ in {differing}")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for direction in ("output", "input"):
        last = [s["history"][-1].get(direction) for s in summaries]
        if not all(last):
            continue
        table[direction] = {name: _of(np.array([row[name] for row in last])) for name in FIGURES}
    return table


def _of(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)),
        "low": float(values.min()),
        "high": float(values.max()),
    }


def _recipe(summary: dict[str, Any]) -> dict[str, Any]:
    """An option that a run did not know yet is as it is by default now."""
    known = json.loads(json.dumps(vars(moderation.Args()), default=str))
    return {k: v for k, v in {**known, **summary["args"]}.items() if k not in _OWN}


def markdown(table: dict[str, dict[str, dict[str, float]]], seeds: Sequence[int]) -> str:
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; validation, at probability 0.5, uncalibrated.",
        "",
    ]
    lines += [
        "| direction | figure | mean | deviation | lowest | highest |",
        "|---|---|---|---|---|---|",
    ]
    for direction, figures in table.items():
        for name, row in figures.items():
            cells = " | ".join(f"{row[k]:.4f}" for k in ("mean", "deviation", "low", "high"))
            lines.append(f"| {direction} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    models = args.models or tuple(args.out / str(seed) for seed in args.seeds)
    if len(set(models)) < 2:
        raise SystemExit("a spread takes two runs or more")
    if not args.models:
        for seed, model in zip(args.seeds, models, strict=True):
            if not (model / "summary.json").exists():
                moderation.main(replace(args.train, seed=seed, out=model))
    summaries = []
    for model in models:
        path = model / "summary.json"
        if not path.exists():
            raise SystemExit(f"{model}: no finished run of training.moderation")
        summaries.append(json.loads(path.read_text(encoding="utf-8")))
    table = spread(summaries)
    text = markdown(table, [summary["args"]["seed"] for summary in summaries])
    print(text)
    if not args.models:
        (args.out / "spread.md").write_text(text, encoding="utf-8")
        (args.out / "spread.json").write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("the runs are kept: the same command goes on from there"):
        main(args)
