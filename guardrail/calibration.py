"""The mathematics of calibration, shared by training and by `guardrail calibrate`. Numpy alone.

- Probabilities that mean what they say: Platt scaling with a prior, temperature, isotonic.
- How far they are off: log-loss, expected calibration error, reliability.
- Thresholds: for a target rate of false positives, and risk-controlling ("of severe harms at most
  alpha pass, with confidence 1 - delta"), both with exact binomial bounds, so for any sample size.

A score `flags` a text when it reaches the threshold: score >= threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Bin",
    "Isotonic",
    "Scale",
    "Threshold",
    "clopper_pearson",
    "expected_calibration_error",
    "expected_error_by_chance",
    "fit_isotonic",
    "fit_platt",
    "fit_temperature",
    "log_loss",
    "reliability",
    "risk_controlling_threshold",
    "rows_needed",
    "scaled",
    "threshold_for_rate",
    "upper_bound",
]

Floats = NDArray[np.float64]
Scale = tuple[float, float]  # (scale, bias): probability = sigmoid(scale * logit + bias)
_STEP = 1e-4  # thresholds are written with four decimals


# --- probabilities -------------------------------------------------------------------------------


def scaled(logits: ArrayLike, scale: Scale) -> Floats:
    """sigmoid(scale * logit + bias), never exactly 0 or 1."""
    z = np.asarray(logits, dtype=np.float64) * scale[0] + scale[1]
    result: Floats = 1.0 / (1.0 + np.exp(-np.clip(z, -30, 30)))
    return result


def fit_platt(
    logits: ArrayLike, truth: ArrayLike, *, prior: Scale = (1.0, 0.0), strength: float = 0.0
) -> Scale:
    """Platt scaling (Platt 1999, his smoothed targets): (scale, bias) of least log-loss.

    prior, strength: Gaussian around a scaling known from more data; `strength` is its precision, so
    0 ignores it and a large one keeps it. The scale stays positive, so that the order of texts
    stays; where the data say otherwise, or hold one class alone, the prior is the answer.
    """
    x, y = _columns(logits, truth)
    positives = y.sum()
    if positives in (0, len(y)):
        return prior
    high, low = (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2)
    scale, bias = _newton(
        np.stack([x, np.ones_like(x)], axis=1), np.where(y > 0, high, low), prior, strength
    )
    return (float(scale), float(bias)) if scale > 0 else prior


def fit_temperature(logits: ArrayLike, truth: ArrayLike) -> Scale:
    """Temperature scaling (Guo et al. 2017): (1 / temperature, 0)."""
    x, y = _columns(logits, truth)
    if y.sum() in (0, len(y)):
        return 1.0, 0.0
    (scale,) = _newton(x[:, None], y, (1.0,), 1e-6)
    return (float(scale), 0.0) if scale > 0 else (1.0, 0.0)


def _columns(logits: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(logits, np.float64).ravel(), np.asarray(truth, np.float64).ravel()
    if len(x) != len(y):
        raise ValueError(f"{len(x)} logits, but {len(y)} labels")
    return x, y


def _newton(design: Floats, target: Floats, prior: tuple[float, ...], strength: float) -> Floats:
    """Penalised logistic regression by Newton's method with halved steps; design (n, k)."""
    centre = np.array(prior)
    weights = centre.copy()

    def loss(w: Floats) -> float:
        z = design @ w
        fit = np.logaddexp(0, z) - target * z
        return float(fit.sum() + strength / 2 * ((w - centre) ** 2).sum())

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (p - target) + strength * (weights - centre)
        curvature = (design * (p * (1 - p))[:, None]).T @ design
        curvature += (strength + 1e-9) * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return weights


@dataclass(frozen=True, slots=True)
class Isotonic:
    """A rising step function: `values[i]` from `starts[i]` on."""

    starts: Floats
    values: Floats

    def __call__(self, scores: ArrayLike) -> Floats:
        index = np.searchsorted(self.starts, np.asarray(scores, np.float64), side="right") - 1
        result: Floats = self.values[np.maximum(index, 0)]
        return result


def fit_isotonic(scores: ArrayLike, truth: ArrayLike) -> Isotonic:
    """Isotonic regression by pooling adjacent violators (Zadrozny & Elkan 2002)."""
    x, y = _columns(scores, truth)
    starts, first = np.unique(x, return_inverse=True)
    sizes = np.bincount(first).astype(float)
    sums = np.bincount(first, weights=y)
    blocks: list[list[float]] = []  # start, sum, size
    for start, total, size in zip(starts, sums, sizes, strict=True):
        blocks.append([float(start), float(total), float(size)])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            _, more, count = blocks.pop()
            blocks[-1][1] += more
            blocks[-1][2] += count
    return Isotonic(np.array([b[0] for b in blocks]), np.array([b[1] / b[2] for b in blocks]))


# --- how far they are off ------------------------------------------------------------------------


def log_loss(probability: ArrayLike, truth: ArrayLike) -> float:
    """Mean negative log-likelihood, in nats; probabilities are kept 1e-6 away from 0 and 1."""
    p, y = _columns(probability, truth)
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


@dataclass(frozen=True, slots=True)
class Bin:
    """Texts of like probability: its mean, how many are harmful, and the 95 % interval of that."""

    probability: float
    frequency: float
    low: float
    high: float
    n: int


def reliability(probability: ArrayLike, truth: ArrayLike, bins: int = 15) -> list[Bin]:
    """The bins of a reliability diagram, equal in width, empty ones left out."""
    p, y = _columns(probability, truth)
    index = np.minimum((p * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        inside = index == b
        if n := int(inside.sum()):
            low, high = clopper_pearson(int(y[inside].sum()), n)
            found.append(Bin(float(p[inside].mean()), float(y[inside].mean()), low, high, n))
    return found


def expected_calibration_error(probability: ArrayLike, truth: ArrayLike, bins: int = 15) -> float:
    """Mean |confidence - frequency| over equal-width bins, weighted by size (Guo et al. 2017)."""
    p, y = _columns(probability, truth)
    index = np.minimum((p * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(index, p - y, minlength=bins)).sum() / max(1, len(p)))


def expected_error_by_chance(
    probability: ArrayLike, bins: int = 15, rounds: int = 300, seed: int = 0
) -> float:
    """The ECE that a perfectly calibrated model would show on so few texts: its mean over labels
    drawn from the probabilities themselves. An ECE near it says nothing against a model."""
    p = np.asarray(probability, np.float64).ravel()
    draws = np.random.default_rng(seed).random((rounds, len(p))) < p
    return float(np.mean([expected_calibration_error(p, draw, bins) for draw in draws]))


# --- exact binomial bounds -----------------------------------------------------------------------


@lru_cache(maxsize=16)
def _log_factorials(n: int) -> Floats:
    result: Floats = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return result


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) of a binomial; 0 < p < 1."""
    i = np.arange(k + 1)
    log = _log_factorials(n)
    terms = log[n] - log[i] - log[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    return float(min(1.0, np.exp(terms).sum()))


@lru_cache(maxsize=4096)
def upper_bound(k: int, n: int, delta: float) -> float:
    """The rate above which k or fewer of n would be seen with probability `delta` at most: an exact
    upper confidence bound at 1 - delta (Clopper & Pearson 1934). 1 where n is 0."""
    if k >= n:
        return 1.0
    return _root(lambda p: _binomial_cdf(k, n, p) - delta)


def lower_bound(k: int, n: int, delta: float) -> float:
    """The mirror image of `upper_bound`."""
    return 1 - upper_bound(n - k, n, delta) if n else 0.0


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a rate of which k of n were seen; (0, 1) where n is 0."""
    tail = (1 - confidence) / 2
    return lower_bound(k, n, tail), upper_bound(k, n, tail)


def _root(falling: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high


# --- thresholds ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold and what it does on the n texts it was fitted on.

    low, high: between these lie the thresholds that the sample does not tell from this one.
    rate: share of the texts that go wrong (flagged harmless ones; harms that pass), and its exact
        interval: two-sided for a target rate, [0, bound] for a controlled risk.
    """

    value: float
    low: float
    high: float
    rate: float
    rate_low: float
    rate_high: float
    n: int


def threshold_for_rate(scores: ArrayLike, target: float, confidence: float = 0.95) -> Threshold:
    """The lowest threshold that flags at most `target` of these (harmless) texts.

    low, high: every threshold whose exact interval holds the target lies between them: the
    distribution-free interval of the quantile. Raises ValueError without scores, or where even
    threshold 1 flags too many.
    """
    falling = np.sort(np.asarray(scores, np.float64).ravel())[::-1]
    n = len(falling)
    if n == 0:
        raise ValueError("no scores to find a threshold on")
    allowed = min(math.floor(target * n + 1e-9), n)
    tail = (1 - confidence) / 2
    most = _last(n, lambda k: lower_bound(k, n, tail) <= target)
    least = _last(n, lambda k: upper_bound(k, n, tail) < target)
    value = _above(falling, allowed)
    flagged = int((falling >= value).sum())
    if flagged > allowed:
        raise ValueError(f"{flagged} of {n} texts score 1, more than {target:.2%} of them")
    low, high = _above(falling, most), _above(falling, least) if least >= 0 else 1.0
    return Threshold(value, low, high, flagged / n, *clopper_pearson(flagged, n, confidence), n)


def _last(n: int, holds: Callable[[int], bool]) -> int:
    """The last k of 0..n for which `holds`, which turns false once; -1 where it never does."""
    low, high = -1, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _above(falling: Floats, allowed: int) -> float:
    """The lowest threshold of four decimals that at most `allowed` scores reach."""
    if allowed >= len(falling):
        return 0.0
    value = _floor(falling[allowed])
    while value <= falling[allowed] and value < 1:
        value = round(value + _STEP, 4)
    return min(max(value, 0.0), 1.0)


def _floor(score: float) -> float:
    """The score, cut to four decimals."""
    value = round(math.floor(score / _STEP) * _STEP, 4)
    return value if value <= score else round(value - _STEP, 4)


def rows_needed(alpha: float, delta: float) -> int:
    """Texts below which no threshold can be shown to control the risk: (1 - alpha)^n <= delta."""
    return math.ceil(round(math.log(delta) / math.log1p(-alpha), 9))


def risk_controlling_threshold(scores: ArrayLike, alpha: float, delta: float) -> Threshold:
    """The highest threshold under which at most `alpha` of such (harmful) texts pass, with
    confidence 1 - delta over the draw of the sample, whatever the distribution of the scores.

    Risk-controlling prediction sets (Bates et al. 2021) with the exact binomial bound in place of
    Hoeffding's; the miss rate rises with the threshold, so that the thresholds are tested in a
    fixed sequence and none of the confidence is spent on their number (Learn then Test,
    Angelopoulos et al. 2021). Texts must come independently from the traffic the promise is for.
    low = high = value: it is a bound, not an estimate. Raises ValueError for fewer than
    `rows_needed` texts, or where even threshold 0 lets too many pass.
    """
    rising = np.sort(np.asarray(scores, np.float64).ravel())
    n = len(rising)
    if n < (needed := rows_needed(alpha, delta)):
        raise ValueError(f"{n} harmful texts, {needed} are needed for {alpha:g} at {delta:g}")
    misses = _last(n - 1, lambda k: upper_bound(k, n, delta) <= alpha)
    if rising[misses] < 0:
        raise ValueError(f"more than {misses} of {n} texts pass whatever the threshold")
    value = _floor(min(1.0, rising[misses]))
    passed = int((rising < value).sum())
    return Threshold(value, value, value, passed / n, 0.0, upper_bound(passed, n, delta), n)
