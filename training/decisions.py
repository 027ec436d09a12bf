"""What the SDK decides on many texts: calibration, thresholds and windows of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guardrail.artifact import Calibration
from guardrail.encoding import canonicalise
from guardrail.moderator import OnnxModerator, calibrated
from guardrail.policy import Policy, Thresholds
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Assessment, Pair
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
        held[rows], reached[rows] = called(s, c, direction, thresholds)
        severity[rows], categories[rows] = s, c
    raw, _ = calibrated(logits_s, logits_c, Calibration())
    unreadable = np.array([canonicalise(pair.text).unreadable for pair in pairs], bool)
    return Decisions(severity, raw, categories, held, reached, unreadable)


def called(
    severity: np.ndarray, categories: np.ndarray, direction: Direction, thresholds: Thresholds
) -> tuple[np.ndarray, np.ndarray]:
    """What `Policy.decide` calls n texts, from P(>= level) (n, 3), falling, and categories (n, 19):
    the categories held (n, 19) bool, the severity (n,)."""
    held, reached = np.zeros(categories.shape, bool), np.zeros(len(severity), int)
    for row, (at_least, probabilities) in enumerate(zip(severity, categories, strict=True)):
        edges = np.concatenate([[1.0], at_least, [0.0]])
        assessment = Assessment(
            direction,
            {level: float(edges[level] - edges[level + 1]) for level in Severity},
            dict(zip(Category, map(float, probabilities), strict=True)),
        )
        verdict = _NO_THRESHOLDS.decide(assessment, thresholds)
        held[row, [_COLUMNS[reason.category] for reason in verdict.reasons]] = True
        reached[row] = verdict.severity
    return held, reached


_NO_THRESHOLDS = Policy("the model's own thresholds")
_COLUMNS = {category: column for column, category in enumerate(Category)}
