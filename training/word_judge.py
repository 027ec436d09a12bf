"""A judge of answers of another family than the guard, the teacher and the score models.

    python -m training.word_judge --data build/data

A bag of words, fitted on the annotated and the benign answers of the train split. With the
transformers it shares those annotations, mistakes included, but no base, no teacher's labels and no
word order: what a model of theirs cannot see, it may. Deterministic, and fitted in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve

from training import bag_of_words
from training.bag_of_words import Side, features, fit_features
from training.data import Split, read_examples
from training.ending import ends_in_a_line
from training.metrics import binary_metrics

_SHOWN = ("n", "unsafe", "auroc", "f1", "recall", "fpr")


@dataclass(frozen=True)
class WordJudge:
    """threshold: of P(harmful), with the highest F1 on the validation split's annotated answers;
    figures: on the test split's, at this threshold."""

    sides: Sequence[Side]
    model: LogisticRegression
    threshold: float = 0.5
    figures: Mapping[str, Any] = field(default_factory=dict)

    def chances(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        """P(harmful) of answers to their prompts, (len(pairs),)."""
        found: NDArray[np.float64] = self.model.predict_proba(features(self.sides, pairs))[:, 1]
        return found

    def harmful(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.bool_]:
        """(len(pairs),)"""
        return self.chances(pairs) >= self.threshold


def fit_judge(data: Path, settings: bag_of_words.Args | None = None) -> WordJudge:
    """The judge that `training.data build`'s files make. SystemExit where a split lacks harmful or
    harmless answers."""
    settings = settings or bag_of_words.Args()
    train, labels = _answers(data, "train", ("annotated/", "benign/"))
    sides, x = fit_features(train, settings.features)
    model = LogisticRegression(C=settings.c, max_iter=300).fit(x, labels)
    known, truth = _answers(data, "validation", ("annotated/",))
    threshold = best_f1(truth, WordJudge(sides, model).chances(known))
    tested, truth = _answers(data, "test", ("annotated/",))
    chances = WordJudge(sides, model).chances(tested)
    figures = binary_metrics(truth, chances >= threshold, chances)
    return WordJudge(sides, model, threshold, {name: figures[name] for name in _SHOWN})


def _answers(
    data: Path, split: Split, sources: tuple[str, ...]
) -> tuple[list[tuple[str, str]], NDArray[np.bool_]]:
    """(prompt, answer) of a split, and whether each harms."""
    rows = [
        (e.prompt, e.response, e.severity)
        for e in read_examples(data, split)
        if e.source.startswith(sources) and e.response is not None and e.severity is not None
    ]
    harmful = np.array([severity > 0 for _, _, severity in rows], dtype=bool)
    if harmful.all() or not harmful.any():  # of no answers all() is true
        raise SystemExit(
            f"{data}: of {len(rows)} answers of {', '.join(sources)} in the {split} split "
            f"{harmful.sum()} are harmful: a judge needs both kinds: python -m training.data build"
        )
    return [(prompt, answer) for prompt, answer, _ in rows], harmful


def best_f1(truth: NDArray[np.bool_], chances: NDArray[np.float64]) -> float:
    """The threshold with the highest F1, the lowest of several. truth, chances: (n,)"""
    precision, recall, thresholds = precision_recall_curve(truth, chances)
    # The curve's last point flags nothing, and has no threshold.
    sums = np.maximum(precision + recall, np.finfo(float).tiny)[:-1]
    return float(thresholds[(2 * (precision * recall)[:-1] / sums).argmax()])


def main(data: Path = Path("build/data")) -> None:
    """Print how good the judge is on the test split."""
    judge = fit_judge(data)
    print(json.dumps({"threshold": judge.threshold, **judge.figures}))


if __name__ == "__main__":
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        tyro.cli(main)
