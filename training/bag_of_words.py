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

from training.data import Example, read_examples, targets
from training.metrics import moderation_metrics


@dataclass
class Args:
    data: Path = Path("build/data")
    features: int = 60_000
    c: float = 4.0


def main(args: Args) -> None:
    train, test = (
        [
            e
            for e in read_examples(args.data, split)
            if e.source.startswith("annotated/") and e.response is not None
        ]
        for split in ("train", "test")
    )
    prompts, answers = (
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=args.features, sublinear_tf=True)
        for _ in range(2)
    )
    prompts.fit(e.prompt for e in train)
    answers.fit(e.response or "" for e in train)

    def features(examples: Sequence[Example]) -> csr_matrix:
        sides = (
            prompts.transform(e.prompt for e in examples),
            answers.transform(e.response or "" for e in examples),
        )
        return csr_matrix(hstack(sides))

    x, x_test = features(train), features(test)
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
