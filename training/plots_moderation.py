"""Pictures of an evaluation: confusion of severity, reliability, precision and recall."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from sklearn.metrics import precision_recall_curve

from guardrail.calibration import expected_calibration_error, reliability
from guardrail.taxonomy import Severity
from training.decisions import Decisions
from training.eval_sets import EvalSet

Drawn = Mapping[str, tuple[EvalSet, Decisions]]
_SETS = ("annotated answers", "annotated prompts")
_MAX_CURVES = 8


def draw(drawn: Drawn, folder: Path) -> list[Path]:
    """Write the pictures that the sets allow; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Any] = {
        "severity-confusion": _confusion(drawn),
        "reliability": _reliability(drawn),
        "precision-recall": _precision_recall(drawn),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is None:
            continue
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def _axes(count: int, width: float = 4.6) -> tuple[Any, Any]:
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, 4.2), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


def _confusion(drawn: Drawn) -> Any:
    """Rows sum to 1: of the texts annotated so, how many are called what."""
    names = [n for n in _SETS if n in drawn]
    if not names:
        return None
    figure, axes = _axes(len(names))
    labels = [s.label for s in Severity]
    for axis, name in zip(axes, names, strict=True):
        each, seen = drawn[name]
        truth = np.array([e.severity for e in each.examples])
        counts = np.zeros((4, 4))
        np.add.at(counts, (truth, seen.severity), 1)
        share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(share):
            colour = "white" if value > 0.5 else "black"
            axis.text(j, i, f"{value:.0%}\n{int(counts[i, j])}", ha="center", va="center", c=colour)
        axis.set(
            xticks=range(4), yticks=range(4), xticklabels=labels, yticklabels=labels,
            xlabel="called", ylabel="annotated", title=name,
        )  # fmt: skip
    return figure


def _reliability(drawn: Drawn) -> Any:
    names = [n for n in _SETS if n in drawn]
    if not names:
        return None
    figure, axes = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        each, seen = drawn[name]
        unsafe = np.array([bool(e.unsafe) for e in each.examples])
        axis.plot([0, 1], [0, 1], c="grey", lw=1, ls="--")
        for label, scores, colour in (
            ("before", seen.uncalibrated[:, 0], "tab:orange"),
            ("after", seen.probabilities[:, 0], "tab:blue"),
        ):
            bins = reliability(scores, unsafe, bins=10)
            x, y = [b.probability for b in bins], [b.frequency for b in bins]
            error = [[b.frequency - b.low for b in bins], [b.high - b.frequency for b in bins]]
            ece = expected_calibration_error(scores, unsafe)
            axis.errorbar(
                x, y, yerr=error, c=colour, marker="o", ms=4, capsize=2, lw=1,
                label=f"{label}, ECE {ece:.3f}",
            )  # fmt: skip
        axis.set(xlabel="P(harmful) said", ylabel="share harmful", title=name)
        axis.legend(loc="upper left")
    return figure


def _precision_recall(drawn: Drawn) -> Any:
    curves = {}
    for name, (each, seen) in drawn.items():
        unsafe = np.array([bool(e.unsafe) for e in each.examples])
        if unsafe.any() and not unsafe.all() and len(unsafe) >= 50:
            curves[name] = precision_recall_curve(unsafe, seen.probabilities[:, 0])
    if not curves:
        return None
    figure, (axis,) = _axes(1, 6.4)
    for name, (precision, recall, _) in list(curves.items())[:_MAX_CURVES]:
        axis.plot(recall, precision, lw=1.2, label=name)
    axis.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title="harmful or not")
    axis.legend(fontsize="small", loc="lower left")
    return figure
