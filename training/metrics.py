"""Metrics of a moderation model, from arrays alone. What labels do not allow is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)

from guardrail.calibration import (
    clopper_pearson,
    expected_calibration_error,
    expected_error_by_chance,
    log_loss,
)

__all__ = [
    "binary_metrics",
    "bootstrap",
    "calibration_metrics",
    "category_metrics",
    "expected_calibration_error",
    "intervals",
    "moderation_metrics",
    "recall_at_fpr",
    "severity_metrics",
]

LEVELS = [0, 1, 2, 3]


def moderation_metrics(
    severity: np.ndarray,
    categories: np.ndarray,
    true_severity: np.ndarray,
    true_categories: np.ndarray,
) -> dict[str, float]:
    """Scores at probability 0.5, for watching a training run.

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


def binary_metrics(unsafe: np.ndarray, flagged: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Harmful or not: unsafe, flagged (n,) bool; score (n,) P(harmful)."""
    figures: dict[str, Any] = {"n": len(unsafe), "unsafe": int(unsafe.sum())}
    if not unsafe.all():
        figures["fpr"] = float(flagged[~unsafe].mean())
    if unsafe.any():
        figures["recall"] = float(flagged[unsafe].mean())
        figures["f1"] = _f1(unsafe, flagged)
    if unsafe.any() and not unsafe.all():
        figures["auroc"] = _auroc(unsafe, score)
        figures["auprc"] = float(average_precision_score(unsafe, score))
        figures["recall_at_1_fpr"] = recall_at_fpr(unsafe, score, 0.01)
        figures["recall_at_5_fpr"] = recall_at_fpr(unsafe, score, 0.05)
        figures["ece"] = expected_calibration_error(score, unsafe)
        figures["ece_by_chance"] = expected_error_by_chance(score)
    return figures


def severity_metrics(truth: np.ndarray, called: np.ndarray) -> dict[str, Any]:
    """Four severities: truth, called (n,) 0-3.

    off_by_two: share called two levels or more off; severe_caught, grave_recall: severe texts, and
    moderate or severe ones, that are flagged at all, with exact intervals, since that of a rate of
    1 has no width by bootstrap.
    """
    figures: dict[str, Any] = {
        "kappa": _kappa(truth, called),
        "severity_macro_f1": float(
            f1_score(truth, called, labels=sorted(set(truth)), average="macro", zero_division=0)
        ),
        "severity_exact": float((truth == called).mean()),
        "off_by_two": float((np.abs(truth - called) >= 2).mean()),
    }
    for name, level in (("grave_recall", 2), ("severe_caught", 3)):
        flagged = called[truth >= level] > 0
        if len(flagged):
            bounds = clopper_pearson(int(flagged.sum()), len(flagged))
            figures[name] = float(flagged.mean())
            figures[f"{name}_low"], figures[f"{name}_high"] = bounds
    return figures


def calibration_metrics(
    truth: np.ndarray, before: np.ndarray, after: np.ndarray, levels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Per severity level, how far probabilities are off without the calibration and with it.

    truth: (n,) 0-3; before, after: (n, 3) P(>= level)."""
    table = {}
    for k, name in enumerate(levels):
        reached = truth > k
        table[name] = {
            "n": len(truth),
            "reached": int(reached.sum()),
            "ece_before": expected_calibration_error(before[:, k], reached),
            "ece_after": expected_calibration_error(after[:, k], reached),
            "ece_by_chance": expected_error_by_chance(after[:, k]),
            "log_loss_before": log_loss(before[:, k], reached),
            "log_loss_after": log_loss(after[:, k], reached),
        }
    return table


def category_metrics(
    truth: np.ndarray,
    held: np.ndarray,
    score: np.ndarray,
    flagged: np.ndarray,
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Per category with texts in it: truth, held, score (n, k); flagged (n,) bool.

    f1, auroc, auprc, recall at a rate of false positives: of the category; recall: its texts that
    are flagged at all.
    """
    table = {}
    for c, name in enumerate(names):
        inside = truth[:, c] > 0
        if not inside.any() or inside.all():
            continue
        table[name] = {
            "n": int(inside.sum()),
            "f1": _f1(inside, held[:, c]),
            "auroc": _auroc(inside, score[:, c]),
            "auprc": float(average_precision_score(inside, score[:, c])),
            "recall_at_1_fpr": recall_at_fpr(inside, score[:, c], 0.01),
            "recall_at_5_fpr": recall_at_fpr(inside, score[:, c], 0.05),
            "recall": float(flagged[inside].mean()),
        }
    return table


def recall_at_fpr(unsafe: np.ndarray, score: np.ndarray, rate: float) -> float:
    """The best recall of a threshold that flags at most `rate` of the harmless texts."""
    fpr, tpr, _ = roc_curve(unsafe, score, drop_intermediate=False)
    return float(tpr[fpr <= rate].max())


def _f1(truth: np.ndarray, called: np.ndarray) -> float:
    both, either = (truth & called).sum(), truth.sum() + called.sum()
    return float(2 * both / either) if either else 0.0


def _auroc(truth: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else float("nan")


def _of_both(
    truth: np.ndarray, score: np.ndarray, figure: Callable[..., float], *more: float
) -> float:
    """A figure that needs texts of both kinds."""
    return float(figure(truth, score, *more)) if 0 < truth.sum() < len(truth) else float("nan")


def _kappa(truth: np.ndarray, called: np.ndarray) -> float:
    """Quadratic weighted kappa on the four severities."""
    if len(set(truth) | set(called)) < 2:
        return float("nan")
    return float(cohen_kappa_score(truth, called, weights="quadratic", labels=LEVELS))


# --- intervals -----------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[object],
    rounds: int = 300,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval (95 %) of a statistic of resampled indices. Texts of one group (a prompt)
    are drawn together: they are not independent."""
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group = np.array([number[name] for name in groups])
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1])
    rng = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))]))
        for _ in range(rounds)
    ]
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def intervals(
    figures: Mapping[str, Any],
    groups: Sequence[object],
    unsafe: np.ndarray,
    flagged: np.ndarray,
    score: np.ndarray,
    severities: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, float]:
    """`<name>_low` and `<name>_high` of the headline figures among `figures`."""
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "f1": lambda i: _f1(unsafe[i], flagged[i]),
        "auroc": lambda i: _auroc(unsafe[i], score[i]),
        "auprc": lambda i: _of_both(unsafe[i], score[i], average_precision_score),
        "recall_at_1_fpr": lambda i: _of_both(unsafe[i], score[i], recall_at_fpr, 0.01),
        "recall_at_5_fpr": lambda i: _of_both(unsafe[i], score[i], recall_at_fpr, 0.05),
        "fpr": lambda i: float(flagged[i][~unsafe[i]].mean()) if not unsafe[i].all() else np.nan,
    }
    if severities is not None:
        truth, called = severities
        statistics["kappa"] = lambda i: _kappa(truth[i], called[i])
    bounds = {}
    for name, statistic in statistics.items():
        if name in figures:
            bounds[f"{name}_low"], bounds[f"{name}_high"] = bootstrap(statistic, groups)
    return bounds
