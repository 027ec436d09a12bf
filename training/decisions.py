"""What the SDK decides on many texts: calibration, thresholds and windows of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guardrail.artifact import Calibration
from guardrail.encoding import canonicalise
from guardrail.moderator import OnnxModerator, calibrated
from guardrail.policy import LEVELS
from guardrail.taxonomy import Category, Direction
from guardrail.verdict import Pair
from training.data import Example
from training.scoring import cached_logits


@dataclass(frozen=True)
class Decisions:
    """n texts: P(>= level) (n, 3), the same uncalibrated, categories (n, 19), the categories held
    against them (n, 19) bool, the severity called (n,) 0-3, what could not be read (n,) bool."""

    probabilities: np.ndarray
    uncalibrated: np.ndarray
    categories: np.ndarray
    held: np.ndarray
    severity: np.ndarray
    unreadable: np.ndarray

    @property
    def flagged(self) -> np.ndarray:
        return self.severity > 0


def decide(
    moderator: OnnxModerator,
    examples: Sequence[Example],
    label: str = "",
    cache: Path | None = None,
) -> Decisions:
    """The decisions of a policy without thresholds of its own, i.e. the model's calibrated ones."""
    pairs = [Pair(e.prompt, e.response) for e in examples]
    logits_s, logits_c = cached_logits(moderator, pairs, cache, label=label)
    severity, categories = np.empty_like(logits_s), np.empty_like(logits_c)
    reached, held = np.zeros(len(pairs), int), np.zeros(logits_c.shape, bool)
    for direction in Direction:
        rows = np.array([pair.direction is direction for pair in pairs])
        if not rows.any():
            continue
        s, c = calibrated(
            logits_s[rows], logits_c[rows], moderator.manifest.calibration_of(direction)
        )
        thresholds = moderator.thresholds[direction]
        levels = np.array([thresholds.severity.get(level, 0.5) for level in LEVELS])
        limits = np.array([thresholds.categories.get(category, 0.5) for category in Category])
        reached[rows] = (s >= levels).cumprod(axis=1).sum(axis=1)
        over = c >= limits
        none = ~over.any(axis=1)
        over[none, c[none].argmax(axis=1)] = True
        held[rows] = over & (reached[rows] > 0)[:, None]
        severity[rows], categories[rows] = s, c
    raw, _ = calibrated(logits_s, logits_c, Calibration())
    unreadable = np.array([canonicalise(pair.text).unreadable for pair in pairs], bool)
    return Decisions(severity, raw, categories, held, reached, unreadable)
