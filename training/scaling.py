"""Which calibration a head gets: the best by cross-validation, or with few texts the simplest that
cross-validation does not tell from the best.

Candidates, simplest first: none, temperature (Guo et al. 2017), Platt with a prior fitted on more
data, Platt alone (1999). Isotonic regression is measured beside them for the record. Folds keep a
prompt together. The one-standard-error rule (Breiman et al. 1984) keeps a head with few texts from
chasing their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from guardrail.calibration import Scale, fit_isotonic, fit_platt, fit_temperature, scaled

FOLDS, ROUNDS, STRENGTH = 10, 3, 10.0
ENOUGH = 400  # texts on either side of a level: two numbers fitted to them chase no noise
Predictor = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray], Predictor]


@dataclass(frozen=True)
class Choice:
    """A head's scaling, and the cross-validated log-loss of every candidate."""

    name: str
    scale: Scale
    losses: dict[str, float]


def choose(
    logits: np.ndarray,
    truth: np.ndarray,
    groups: Sequence[str],
    prior: Scale,
    *,
    near: bool = False,
) -> Choice:
    """The scaling of one head: logits (n,), truth (n,) in {0, 1}, groups: the texts' prompts.

    near: the prior is the head's own kin (a pooled fit), so it takes the place of no calibration.
    """
    candidates: dict[str, Callable[[np.ndarray, np.ndarray], Scale]] = {
        "pooled" if near else "none": lambda x, y: prior if near else (1.0, 0.0),
        "temperature": fit_temperature,
        "shrunk": lambda x, y: fit_platt(x, y, prior=prior, strength=STRENGTH),
        "platt": fit_platt,
    }
    if near:
        del candidates["temperature"]
    fits: dict[str, Fit] = {name: _scaling(fit) for name, fit in candidates.items()}
    fits["isotonic"] = fit_isotonic
    losses = {name: held_out_losses(logits, truth, groups, fit) for name, fit in fits.items()}
    best = min(candidates, key=lambda name: losses[name].mean())

    def indistinct(name: str) -> bool:
        gap = losses[name] - losses[best]
        return bool(gap.mean() <= gap.std() / np.sqrt(len(gap)))

    enough = min(truth.sum(), (1 - truth).sum()) >= ENOUGH
    chosen = best if enough else next(name for name in candidates if indistinct(name))
    means = {name: float(loss.mean()) for name, loss in losses.items()}
    return Choice(chosen, candidates[chosen](logits, truth), means)


def _scaling(fit: Callable[[np.ndarray, np.ndarray], Scale]) -> Fit:
    def fitted(x: np.ndarray, y: np.ndarray) -> Predictor:
        scale = fit(x, y)
        return lambda z: scaled(z, scale)

    return fitted


def held_out_losses(
    logits: np.ndarray, truth: np.ndarray, groups: Sequence[str], fit: Fit
) -> np.ndarray:
    """Log-loss (n,) of each text under fits that have not seen its prompt; mean of `ROUNDS`."""
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    probability = np.empty((ROUNDS, len(logits)))
    for round_ in range(ROUNDS):
        fold = (np.random.default_rng(round_).permutation(group.max() + 1) % FOLDS)[group]
        for k in np.unique(fold):
            out = fold == k
            probability[round_, out] = fit(logits[~out], truth[~out])(logits[out])
    p = np.clip(probability, 1e-6, 1 - 1e-6)
    losses: np.ndarray = -np.where(truth > 0, np.log(p), np.log1p(-p)).mean(axis=0)
    return losses
