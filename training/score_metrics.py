"""How good scores of held-out pairs are. Pure functions of arrays.

    python -m training.score_metrics --reward build/reward --cost build/cost

prints the correlation of two exported models over the answers of test pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from sklearn.metrics import roc_auc_score

from guardrail.score import ScoreKind
from training.preferences import Preference, read_preferences
from training.scorers import open_scorer


def score_metrics(
    preferences: Sequence[Preference], scores: np.ndarray, kind: ScoreKind
) -> dict[str, float | int]:
    """scores: (pairs, 2). Accuracy over annotated pairs, all and conflicting ones, and over those
    of other sources; for a cost also of its sign, its AUROC, and the gap between unsafe and safe.
    """
    result: dict[str, float | int] = {}
    labels = [p.more_helpful if kind == "reward" else p.less_harmful for p in preferences]
    wanted = np.array([-1 if label is None else label for label in labels])
    called = scores.argmax(axis=1) if kind == "reward" else scores.argmin(axis=1)
    annotated = np.array([p.source == "annotated_pairs" for p in preferences])
    conflicting = np.array([p.conflicting for p in preferences])
    helping = np.array([p.source.startswith("help/") for p in preferences])
    for name, part in (
        ("annotated", annotated),
        ("conflicting", annotated & conflicting),
        ("not_conflicting", annotated & ~conflicting),
        ("other_sources", ~annotated & ~helping),
        ("help", helping),
    ):
        chosen = part & (wanted >= 0)
        if chosen.any():
            result[f"accuracy_{name}"] = round(float((called == wanted)[chosen].mean()), 4)
            result[f"pairs_{name}"] = int(chosen.sum())
    if kind == "cost":
        result |= _sign_metrics(preferences, scores, annotated)
    return result


def _sign_metrics(
    preferences: Sequence[Preference], scores: np.ndarray, annotated: np.ndarray
) -> dict[str, float | int]:
    truth = np.array([[-1 if u is None else int(u) for u in p.unsafe] for p in preferences])
    result: dict[str, float | int] = {}
    for name, part in (("", np.ones(len(truth), bool)), ("_annotated", annotated)):
        known = truth[part] >= 0
        unsafe, cost = truth[part][known], scores[part][known]
        if len(set(unsafe.tolist())) < 2:
            continue
        result[f"sign_accuracy{name}"] = round(float(((cost > 0) == (unsafe == 1)).mean()), 4)
        result[f"auroc_unsafe{name}"] = round(float(roc_auc_score(unsafe, cost)), 4)
        gap = cost[unsafe == 1].mean() - cost[unsafe == 0].mean()
        result[f"cost_unsafe_minus_safe{name}"] = round(float(gap), 4)
        result[f"answers{name}"] = int(known.sum())
    return result


def correlation(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's, of two (n,) arrays."""
    ranks = [np.argsort(np.argsort(x)) for x in (first, second)]
    return {
        "pearson": round(float(np.corrcoef(first, second)[0, 1]), 4),
        "spearman": round(float(np.corrcoef(*ranks)[0, 1]), 4),
    }


def main(
    reward: Path = Path("build/reward"),
    cost: Path = Path("build/cost"),
    data: Path = Path("build/preferences"),
    limit: int | None = None,
) -> None:
    """Reward-cost correlation over the answers of annotated test pairs."""
    scorers = open_scorer(reward, "reward"), open_scorer(cost, "cost")
    preferences = [p for p in read_preferences(data, "test") if p.source == "annotated_pairs"]
    pairs = [(p.prompt, answer) for p in preferences[:limit] for answer in p.answers]
    if len(pairs) < 2:
        raise SystemExit(f"{data}: no annotated test pairs: python -m training.preferences build")
    found = correlation(*(scorer.score(pairs) for scorer in scorers))
    print(json.dumps({"answers": len(pairs), **found}))


if __name__ == "__main__":
    tyro.cli(main)
