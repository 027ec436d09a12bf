"""The baseline to beat: TF-IDF of prompt and of answer, logistic regression, on the same labels.

    python -m training.bag_of_words --data build/data

It has no idea of word order: a model that does not beat it has learnt words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from training.data import Example, read_examples, targets
from training.metrics import moderation_metrics


@dataclass
class Args:
    data: Path = Path("build/data")
    features: int = 60_000
    c: float = 4.0


def _features(
    train: Sequence[Example], test: Sequence[Example], limit: int
) -> tuple[csr_matrix, csr_matrix]:
    """TF-IDF of prompt beside that of answer, its words those of `train`."""
    sides = []
    for text in (lambda e: e.prompt, lambda e: e.response or ""):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=limit, sublinear_tf=True)
        sides.append((words.fit_transform(map(text, train)), words.transform(map(text, test))))
    first, second = (csr_matrix(hstack(part)) for part in zip(*sides, strict=True))
    return first, second


def out_of_fold(
    examples: Sequence[Example],
    given: np.ndarray,
    groups: Sequence[str],
    folds: int,
    seed: int = 0,
    args: Args | None = None,
) -> np.ndarray:
    """P(label 1) (n,) of each text by models that have not seen its group; given (n,): 0 or 1."""
    args = args or Args()
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    fold = (np.random.default_rng(seed).permutation(group.max() + 1) % folds)[group]
    probability = np.empty(len(examples))
    for k in tqdm(np.unique(fold), desc="folds"):
        inside, outside = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        x, x_out = _features(
            [examples[i] for i in outside], [examples[i] for i in inside], args.features
        )
        model = LogisticRegression(C=args.c, max_iter=300).fit(x, given[outside])
        probability[inside] = model.predict_proba(x_out)[:, 1]
    return probability


def main(args: Args) -> None:
    train, test = (
        [
            e
            for e in read_examples(args.data, split)
            if e.source.startswith("annotated/") and e.response is not None
        ]
        for split in ("train", "test")
    )
    x, x_test = _features(train, test, args.features)
    grades = np.array([e.severity for e in train])
    severity = np.stack(
        [
            LogisticRegression(C=args.c, max_iter=300)
            .fit(x, grades > k)
            .predict_proba(x_test)[:, 1]
            for k in range(3)
        ],
        axis=1,
    )
    names = np.stack([targets(e)[2] for e in test])
    truth = np.array([e.severity for e in test])
    figures = moderation_metrics(severity, np.zeros_like(names), truth, names)
    del figures["category_micro_f1"]  # it calls no categories
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


if __name__ == "__main__":
    main(tyro.cli(Args))
