"""Metrics of a moderation model, from arrays alone."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score


def moderation_metrics(
    severity: np.ndarray,
    categories: np.ndarray,
    true_severity: np.ndarray,
    true_categories: np.ndarray,
) -> dict[str, float]:
    """Scores at probability 0.5.

    severity: (n, 3) P(>= minor, moderate, severe); categories: (n, 19) probabilities;
    true_severity: (n,) 0-3; true_categories: (n, 19) in {0, 1}.
    """
    unsafe = true_severity > 0
    flagged = severity[:, 0] >= 0.5
    called = (severity >= 0.5).cumprod(axis=1).sum(axis=1)
    grave = true_severity >= 2
    return {
        "n": len(unsafe),
        "auroc": _auroc(unsafe, severity[:, 0]),
        "f1": float(f1_score(unsafe, flagged, zero_division=0)),
        "recall": float(flagged[unsafe].mean()) if unsafe.any() else float("nan"),
        "fpr": float(flagged[~unsafe].mean()) if (~unsafe).any() else float("nan"),
        "grave_recall": float(flagged[grave].mean()) if grave.any() else float("nan"),
        "kappa": _kappa(true_severity, called),
        "category_micro_f1": float(
            f1_score(true_categories >= 0.5, categories >= 0.5, average="micro", zero_division=0)
        ),
        "ece": expected_calibration_error(severity[:, 0], unsafe),
    }


def _auroc(truth: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else float("nan")


def _kappa(truth: np.ndarray, called: np.ndarray) -> float:
    """Quadratic weighted kappa on the four severities."""
    if len(set(truth) | set(called)) < 2:
        return float("nan")
    return float(cohen_kappa_score(truth, called, weights="quadratic", labels=[0, 1, 2, 3]))


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """Mean |confidence - frequency| over equal-width bins, weighted by size (Guo et al. 2017)."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [
        abs(probability[index == b].mean() - truth[index == b].mean()) * (index == b).mean()
        for b in range(bins)
        if (index == b).any()
    ]
    return float(sum(gaps))
