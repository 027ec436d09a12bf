"""Curves of a training run: written as it goes, to TensorBoard and to a file, and drawn.

python -m training.plots build/ppo_lag build/ppo --out docs/ppo_lag.svg
python -m training.plots build/dpo build/dpo-single --out dpo.svg
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from training.ending import ends_in_a_line

Row = dict[str, float]
FILE = "curves.jsonl"
# What a figure shows of what there is: the key of a row, and its axis.
PANELS = {
    "loss": "loss",
    "reward": "reward",
    "cost": "cost (> 0: unsafe)",
    "lambda": "lambda",
    "kl": "KL to the reference, nats per answer",
    "length": "length, tokens",
    "entropy": "entropy, nats per token",
    "rewards/accuracies": "better answer gained on the other, share",
    "rewards/margins": "margin: beta x what the better gained more",
    "learning_rate": "learning rate",
}
HELD_OUT = "eval_"  # before a key: of texts that are not trained on


class Curves:
    """The figures of each step, in `curves.jsonl` and as TensorBoard events in `folder`/events.

    A run that goes on from step n drops what was written after n, in both.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / FILE
        kept = [row for row in read(folder) if row["step"] <= step] if step else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = SummaryWriter(folder / "events", purge_step=step + 1)

    def add(self, step: int, row: Row) -> None:
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: Path) -> list[Row]:
    """The rows of a run; a last line that a kill cut short is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the bias of its start (Adam's correction)."""
    average, out = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def draw(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    panels: tuple[str, ...] = (),
    smoothing: float = 0.8,
) -> None:
    """Draw the curves of `runs` (folders) side by side into `out` (.svg or .png).

    panels: all that the runs have, by default. Dots are held-out figures.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "guardrail"  # the same curves give the same file
    from matplotlib import pyplot

    rows = {run.name: read(run) for run in runs}
    if missing := [str(run) for run in runs if not rows[run.name]]:
        raise SystemExit(f"no curves in {', '.join(missing)}: name the --out of a training run")
    known = {key for run_rows in rows.values() for row in run_rows for key in row}
    panels = panels or tuple(panel for panel in PANELS if panel in known)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4 * columns, 2.8 * lines), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name, run_rows in rows.items():
            points = [(row["step"], row[panel]) for row in run_rows if panel in row]
            if points:
                steps, values = zip(*points, strict=True)
                weight = 0.0 if panel == "learning_rate" else smoothing
                (line,) = axis.plot(steps, smooth(values, weight), label=name)
                axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
                key = HELD_OUT + panel
                if held := [(row["step"], row[key]) for row in run_rows if key in row]:
                    axis.plot(
                        *zip(*held, strict=True), "o:", color=line.get_color(), label="held out"
                    )
            limits = [(row["step"], row["cost_limit"]) for row in run_rows if "cost_limit" in row]
            if panel == "cost" and limits:
                axis.plot(*zip(*limits, strict=True), color="grey", linestyle="--", linewidth=0.8)
        axis.set_title(PANELS.get(panel, panel), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=120)
    pyplot.close(figure)
    print(out)


if __name__ == "__main__":
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        tyro.cli(draw)
