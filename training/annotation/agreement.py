"""Coefficients of agreement, from arrays alone. 1 is perfect, 0 what chance gives.

NaN where a coefficient is not defined: nobody labelled anything twice, or all said one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(values: ArrayLike, level: Level = "nominal") -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability").

    values: (raters, units), NaN where a rater did not label a unit. Ordinal: the order of values.
    """
    data = np.asarray(values, float)
    words = np.unique(data[~np.isnan(data)])
    # counts (units, words): how many raters gave which value; units with one label tell nothing
    counts = (data.T[:, :, None] == words).sum(axis=1).astype(float)
    counts = counts[counts.sum(axis=1) > 1]
    if not len(counts):
        return float("nan")
    raters = counts.sum(axis=1)
    # coincidences: pairs of values within a unit, each unit weighing as many as its labels
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs -= np.eye(len(words)) * counts[:, :, None]
    coincidences = (pairs / (raters - 1)[:, None, None]).sum(axis=0)
    totals = coincidences.sum(axis=1)
    distance = _distance(words, totals, level)
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    observed = (coincidences * distance).sum()
    return float(1 - observed / expected) if expected > 0 else float("nan")


def _distance(words: Floats, totals: Floats, level: Level) -> Floats:
    """Squared distance between values, (words, words)."""
    if level == "nominal":
        return 1.0 - np.eye(len(words))
    if level == "interval":
        return np.asarray((words[:, None] - words[None, :]) ** 2, np.float64)
    # Ordinal: how many labels lie between two values, each end counting half.
    middle = np.cumsum(totals) - totals / 2
    return np.asarray((middle[:, None] - middle[None, :]) ** 2, np.float64)


def confusion(first: ArrayLike, second: ArrayLike, size: int) -> NDArray[np.int64]:
    """Counts (size, size) of labels 0..size-1: rows what the first said, columns the second."""
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (np.asarray(first, int), np.asarray(second, int)), 1)
    return table


def cohen_kappa(
    table: ArrayLike, weights: Literal["linear", "quadratic"] | ArrayLike | None = None
) -> float:
    """Cohen's kappa (1960) of a confusion table, or weighted kappa (Cohen 1968).

    weights: None, every disagreement is as bad; linear, quadratic; or a matrix of disagreement.
    """
    counts = np.asarray(table, float)
    size = len(counts)
    steps = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)
    if weights is None:
        cost = (steps > 0).astype(float)
    elif isinstance(weights, str):
        cost = steps if weights == "linear" else steps**2
    else:
        cost = np.asarray(weights, float)
    total = counts.sum()
    if total == 0:
        return float("nan")
    expected = (np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total * cost).sum()
    return float(1 - (counts * cost).sum() / expected) if expected > 0 else float("nan")


def fleiss_kappa(counts: ArrayLike) -> float:
    """Fleiss' kappa (1971). counts: (subjects, categories), each subject with the same number of
    ratings, two at least. Raises ValueError on anything else."""
    table = np.asarray(counts, float)
    raters = table.sum(axis=1)
    if not len(table) or raters[0] < 2 or (raters != raters[0]).any():
        raise ValueError("Fleiss' kappa needs the same number of ratings, 2 or more, per subject")
    n = raters[0]
    observed = ((table**2).sum(axis=1) - n).mean() / (n * (n - 1))
    expected = ((table.sum(axis=0) / table.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def interval(
    statistic: Callable[[NDArray[np.int64]], float], units: int, *, draws: int = 400, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic by bootstrap over units (Efron 1979); NaN where it has none.

    statistic: takes the indices of the units drawn, with repetition.
    """
    if units < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, units, units)) for _ in range(draws)])
    values = values[~np.isnan(values)]
    if len(values) < draws / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
