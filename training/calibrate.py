"""Calibration of an exported artifact: probabilities that mean what they say, and thresholds.

    python -m training.calibrate --model guardrail/models/small --data build/data

On the validation split, per direction: Platt scaling per severity level and per category (Platt
1999; pooled over categories with few positives), then the thresholds. `minor` maximises F1 on the
annotated texts among thresholds that flag at most a target share of the benign ones; `moderate` and
`severe` maximise quadratic kappa; the category threshold maximises micro F1. Writes the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, f1_score

from guardrail.artifact import Calibration, write_manifest
from guardrail.moderator import OnnxModerator, calibrated
from guardrail.policy import LEVELS
from guardrail.taxonomy import Category, Direction
from guardrail.verdict import Pair
from training.data import Example, read_examples, targets
from training.scoring import text_logits

Scale = tuple[float, float]


@dataclass
class Args:
    model: Path = Path("guardrail/models/small")
    data: Path = Path("build/data")
    target_fpr: float = 0.01
    """Benign answers that may be flagged, as a share."""
    target_fpr_input: float = 0.05
    """The same for prompts, where the benign ones are over-refusal questions, hard on purpose."""
    few: int = 25
    """Categories with fewer positives share one scaling."""


def platt(logits: np.ndarray, truth: np.ndarray) -> Scale:
    """(scale, bias) that make sigmoid(scale * logit + bias) a probability; scale stays positive."""
    if truth.min() == truth.max():
        return 1.0, 0.0
    fit = LogisticRegression(C=10.0).fit(logits[:, None], truth)
    scale = float(fit.coef_[0, 0])
    return (scale, float(fit.intercept_[0])) if scale > 0 else (1.0, 0.0)


def fit_calibration(
    severity: np.ndarray, categories: np.ndarray, examples: Sequence[Example], few: int
) -> Calibration:
    """severity (n, 3) and categories (n, 19) are logits of texts that have both labels."""
    truth = np.array([e.severity for e in examples])
    names = np.stack([targets(e)[2] for e in examples])
    pooled = platt(categories.ravel(), names.ravel())
    return Calibration(
        severity=[platt(severity[:, k], truth > k) for k in range(3)],
        categories=[
            platt(categories[:, c], names[:, c]) if names[:, c].sum() >= few else pooled
            for c in range(len(Category))
        ],
    )


def fit_thresholds(
    severity: np.ndarray,
    categories: np.ndarray,
    examples: Sequence[Example],
    benign: np.ndarray,
    target_fpr: float,
) -> dict[str, Any]:
    """severity (n, 3) and categories (n, 19) are calibrated probabilities of annotated texts;
    benign (m,) P(>= minor) of texts known to be harmless."""
    truth = np.array([e.severity for e in examples])
    names = np.stack([targets(e)[2] for e in examples])
    grid = np.arange(0.1, 0.91, 0.01)
    allowed = [t for t in grid if not len(benign) or (benign >= t).mean() <= target_fpr]
    minor = max(allowed or grid[-1:], key=lambda t: f1_score(truth > 0, severity[:, 0] >= t))
    levels = {"minor": minor, "moderate": 0.5, "severe": 0.5}

    def called(moderate: float, severe: float) -> np.ndarray:
        reached = severity >= np.array([minor, moderate, severe])
        result: np.ndarray = reached.cumprod(axis=1).sum(axis=1)
        return result

    coarse = np.arange(0.15, 0.81, 0.025)
    levels["moderate"], levels["severe"] = max(
        ((m, s) for m in coarse for s in coarse),
        key=lambda ms: cohen_kappa_score(truth, called(*ms), weights="quadratic"),
    )
    flagged = severity[:, :1] >= minor
    one = max(grid, key=lambda t: f1_score(names, flagged & (categories >= t), average="micro"))
    return {
        "severity": {level.label: round(float(levels[level.label]), 3) for level in LEVELS},
        "categories": {c.value: round(float(one), 3) for c in Category},
    }


def _is_benign(example: Example) -> bool:
    return example.severity == 0 and example.source.startswith(("benign/", "over_refusal/"))


def main(args: Args) -> None:
    moderator = OnnxModerator(args.model, device="cpu", locate=False)
    labelled = [e for e in read_examples(args.data, "validation") if e.origin.get("severity")]
    calibration: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}
    for direction in Direction:
        rows = [e for e in labelled if Pair(e.prompt, e.response).direction is direction]
        annotated = [e for e in rows if e.source.startswith("annotated/")]
        benign = [e for e in rows if _is_benign(e)]
        pairs = [Pair(e.prompt, e.response) for e in annotated + benign]
        s, c = text_logits(moderator, pairs, label=direction.value)
        split = len(annotated)
        is_input = direction is Direction.INPUT
        target_fpr = args.target_fpr_input if is_input else args.target_fpr
        fitted = fit_calibration(s[:split], c[:split], annotated, args.few)
        severity, categories = calibrated(s, c, fitted)
        thresholds[direction.value] = fit_thresholds(
            severity[:split], categories[:split], annotated, severity[split:, 0], target_fpr
        )
        calibration[direction.value] = {
            "severity": [[round(x, 4) for x in pair] for pair in fitted.severity],
            "categories": [[round(x, 4) for x in pair] for pair in fitted.categories],
        }
        print(
            f"{direction.value}: {split} annotated, {len(benign)} benign: "
            f"{thresholds[direction.value]['severity']}"
        )
    write_manifest(
        args.model,
        replace(moderator.manifest, calibration=calibration, thresholds=thresholds),
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
