"""Confident learning: which labels are probably wrong (Northcutt, Jiang & Chuang 2021, JAIR 70).

Pure functions of labels and out-of-fold probabilities, i.e. of a model that did not see the label
it is asked about. A model that was trained on it agrees with it, and finds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Suspects:
    """Labels that are probably wrong, most suspect first.

    index: (k,) which rows; suggested: (k,) the class each seems to be; margin: (k,) how much more
    probable that is than the label given, in (-1, 1].
    """

    index: Ints
    suggested: Ints
    margin: Floats


def thresholds(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """(classes,) the mean probability of a class among the rows labelled as it; infinite for a
    class that no row has, which thus is never suggested."""
    given, p = _checked(labels, probabilities)
    return np.array(
        [p[given == j, j].mean() if (given == j).any() else np.inf for j in range(p.shape[1])]
    )


def confident_joint(labels: ArrayLike, probabilities: ArrayLike) -> Ints:
    """(classes, classes) counts: rows labelled i that confidently look like j.

    labels: (n,) 0..classes-1; probabilities: (n, classes). A row counts for the most probable class
    of those that reach their threshold, and not at all where none does.
    """
    given, p = _checked(labels, probabilities)
    looks = _confident_class(given, p)
    joint = np.zeros((p.shape[1], p.shape[1]), np.int64)
    np.add.at(joint, (given[looks >= 0], looks[looks >= 0]), 1)
    return joint


def noise(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """(classes, classes) estimated joint distribution of given and true labels; sums to 1.

    The confident joint, its rows scaled to how often each label was given.
    """
    given, p = _checked(labels, probabilities)
    joint = confident_joint(given, p).astype(float)
    frequency = np.bincount(given, minlength=p.shape[1]).astype(float)
    empty = (joint.sum(axis=1) == 0) & (frequency > 0)
    joint[empty, empty] = 1.0
    sums = joint.sum(axis=1, keepdims=True)
    scaled = np.divide(joint, sums, out=np.zeros_like(joint), where=sums > 0) * frequency[:, None]
    return np.asarray(scaled / scaled.sum(), np.float64)


def label_errors(labels: ArrayLike, probabilities: ArrayLike) -> Suspects:
    """Rows off the diagonal of the confident joint, ordered by margin."""
    given, p = _checked(labels, probabilities)
    looks = _confident_class(given, p)
    rows = np.flatnonzero((looks >= 0) & (looks != given))
    margin = p[rows, looks[rows]] - p[rows, given[rows]]
    order = np.argsort(-margin, kind="stable")
    return Suspects(rows[order], looks[rows][order], margin[order])


def category_errors(labels: ArrayLike, probabilities: ArrayLike) -> dict[int, Suspects]:
    """Multi-label: each column is a question of its own with two answers; {column: suspects}.

    labels: (n, columns) 0 or 1; probabilities: (n, columns) of 1. Columns where all rows have one
    label are left out: there is nothing to learn a threshold from.
    """
    given, p = np.asarray(labels, int), np.asarray(probabilities, float)
    if given.shape != p.shape or given.ndim != 2:
        raise ValueError(f"labels {given.shape} and probabilities {p.shape} are not of one shape")
    return {
        column: label_errors(given[:, column], np.stack([1 - p[:, column], p[:, column]], axis=1))
        for column in range(p.shape[1])
        if given[:, column].min(initial=1) < given[:, column].max(initial=0)
    }


def _confident_class(given: Ints, p: Floats) -> Ints:
    """(n,) the class each row confidently looks like; -1 for none."""
    reached = p >= thresholds(given, p)
    looks = np.where(reached, p, -np.inf).argmax(axis=1)
    return np.where(reached.any(axis=1), looks, -1)


def _checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Ints, Floats]:
    given, p = np.asarray(labels), np.asarray(probabilities, float)
    if p.ndim != 2 or given.shape != (len(p),):
        raise ValueError(f"labels {given.shape} do not go with probabilities {p.shape}")
    given = given.astype(np.int64)
    if len(given) and not (given.min() >= 0 and given.max() < p.shape[1]):
        raise ValueError(f"a label is not in 0..{p.shape[1] - 1}")
    if not np.isfinite(p).all():
        raise ValueError("a probability is not a number")
    return given, p
