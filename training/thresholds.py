"""Thresholds of a calibrated model, from validation probabilities alone. Pure functions.

Severity levels, categories (one threshold for all, or each its own for a target rate of false
positives), and what it costs to promise that few harms pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_high
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score, f1_score

from guardrail.calibration import (
    Threshold,
    risk_controlling_threshold,
    rows_needed,
    threshold_for_rate,
)
from guardrail.policy import LEVELS
from guardrail.taxonomy import Severity

ALPHAS = (0.01, 0.02, 0.05, 0.1)
CATEGORY_RATES = (0.005, 0.01, 0.02, 0.03, 0.05)
MIN_CATEGORY_THRESHOLD = 0.05
LEVEL = 0.005  # quadratic kappa that is nothing on a thousand texts: its standard error is 0.02
WORTH = 0.01  # micro F1 that thresholds of their own must gain over one for all


def fit_levels(
    probability: np.ndarray,
    truth: np.ndarray,
    benign: np.ndarray,
    target_fpr: float,
    slack: float = 0.0,
    others: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> dict[str, float]:
    """probability (n, 3) and truth (n,) of annotated texts; benign (m,) P(>= minor); others: of
    further sets P(>= minor) (k,) and whether each text is harmful (k,) bool.

    `minor` flags at most `target_fpr` of the benign, and is the middle one of those whose F1 is
    within `slack` of the best: on few texts F1 is a plateau, and where on it the highest lies is
    chance. F1 is the mean over the annotated texts and each further set, so that small sets are
    heard. Of the `moderate` and `severe` whose quadratic kappa is level with the best, the lowest
    `moderate` is taken (where the labels cannot tell, harm is called the graver, as PKU's own
    annotators do) and the middle `severe`, of which few texts tell anything.
    """
    grid = np.arange(0.1, 0.91, 0.01)
    floor = threshold_for_rate(benign, target_fpr).value if len(benign) else 0.0
    allowed = [t for t in grid if t >= floor] or [max(floor, grid[-1])]
    labelled = [(probability[:, 0], truth > 0), *others]
    scores = [np.mean([f1_score(unsafe, p >= t) for p, unsafe in labelled]) for t in allowed]
    minor = median_high(
        t for t, f1 in zip(allowed, scores, strict=True) if f1 >= max(scores) - slack
    )

    def called(moderate: float, severe: float) -> np.ndarray:
        reached = probability >= np.array([minor, moderate, severe])
        result: np.ndarray = reached.cumprod(axis=1).sum(axis=1)
        return result

    coarse = np.arange(0.15, 0.81, 0.025)
    kappas = {
        (m, s): cohen_kappa_score(truth, called(m, s), weights="quadratic")
        for m in coarse
        for s in coarse
    }
    level = [at for at, kappa in kappas.items() if kappa >= max(kappas.values()) - LEVEL]
    moderate = min(m for m, _ in level)
    severe = median_high(s for m, s in level if m == moderate)
    return dict(
        zip((level.label for level in LEVELS), map(float, (minor, moderate, severe)), strict=True)
    )


def category_thresholds(
    probability: np.ndarray, names: np.ndarray, flagged: np.ndarray, rate: float, few: int
) -> list[Threshold | None]:
    """Per category, the threshold that holds it against at most `rate` of the texts it is not in;
    None where it has too few positives to say. A text that is not flagged holds nothing."""
    scores = np.where(flagged[:, None], probability, 0.0)
    return [
        threshold_for_rate(scores[names[:, c] == 0, c], rate) if names[:, c].sum() >= few else None
        for c in range(names.shape[1])
    ]


def fit_categories(
    probability: np.ndarray, names: np.ndarray, flagged: np.ndarray, groups: Sequence[str], few: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Thresholds (19,), and the micro F1 of every way to set them on folds it has not seen."""

    def shared(rows: np.ndarray) -> np.ndarray:
        grid = np.arange(0.1, 0.91, 0.01)
        held = flagged[rows, None]
        best = max(
            grid,
            key=lambda t: f1_score(
                names[rows], held & (probability[rows] >= t), average="micro", zero_division=0
            ),
        )
        return np.full(names.shape[1], best)

    def by_rate(rows: np.ndarray, rate: float) -> np.ndarray:
        found = category_thresholds(probability[rows], names[rows], flagged[rows], rate, few)
        one = shared(rows)
        return np.array(
            [
                one[c] if t is None else max(t.value, MIN_CATEGORY_THRESHOLD)
                for c, t in enumerate(found)
            ]
        )

    ways = {"one for all": shared} | {
        f"each at {rate:.1%}": (lambda rows, rate=rate: by_rate(rows, rate))
        for rate in CATEGORY_RATES
    }
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    fold = (np.random.default_rng(0).permutation(group.max() + 1) % 5)[group]
    scores = {}
    for name, way in ways.items():
        held = np.zeros(names.shape, bool)
        for k in np.unique(fold):
            out = fold == k
            held[out] = flagged[out, None] & (probability[out] >= way(np.flatnonzero(~out)))
        scores[name] = float(f1_score(names, held, average="micro", zero_division=0))
    best = max(ways, key=lambda name: scores[name] - (0 if name == "one for all" else WORTH))
    return ways[best](np.arange(len(names))), scores


def risk_control(
    probability: np.ndarray, truth: np.ndarray, benign: np.ndarray, delta: float
) -> list[dict[str, Any]]:
    """What promises cost: per harm and alpha the threshold on P(>= minor), and how many harmless
    texts it flags. `needed` stands alone where there are too few harms to promise anything."""
    rows: list[dict[str, Any]] = []
    for harm in (Severity.SEVERE, Severity.MODERATE):
        scores = probability[truth >= harm, 0]
        for alpha in ALPHAS:
            row: dict[str, Any] = {"harm": harm.label, "alpha": alpha, "n": len(scores)}
            if len(scores) < rows_needed(alpha, delta):
                rows.append(row | {"needed": rows_needed(alpha, delta)})
                continue
            found = risk_controlling_threshold(scores, alpha, delta)
            rows.append(
                row
                | {
                    "threshold": found.value,
                    "passed": found.rate,
                    "bound": found.rate_high,
                    "harmless_flagged": _share(probability[truth == 0, 0] >= found.value),
                    "benign_flagged": _share(benign >= found.value),
                }
            )
    return rows


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if len(flags) else None
