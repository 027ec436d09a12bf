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
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from training.data import normalise, read_examples, targets
from training.ending import ends_in_a_line
from training.metrics import moderation_metrics


@dataclass
class Args:
    data: Path = Path("build/data")
    features: int = 60_000
    c: float = 4.0


Text = tuple[str, str | None]
Floats = NDArray[np.float64]


Side = tuple[int, TfidfVectorizer]  # 0 for prompts, 1 for answers


def fit_features(texts: Sequence[Text], limit: int) -> tuple[list[Side], csr_matrix]:
    """The words of prompts and of answers, up to `limit` each, and the features of `texts`."""
    sides: list[Side] = []
    found = []
    for side in (0, 1):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=limit, sublinear_tf=True)
        try:
            found.append(words.fit_transform(text[side] or "" for text in texts))
        except ValueError:  # no word twice on this side: prompts alone, or very few texts
            continue
        sides.append((side, words))
    return sides, csr_matrix(hstack(found)) if found else csr_matrix((len(texts), 1))


def features(sides: Sequence[Side], texts: Sequence[Text]) -> csr_matrix:
    """TF-IDF of prompt beside that of answer, of the words that `fit_features` found."""
    if not sides:
        return csr_matrix((len(texts), 1))
    found = [words.transform(text[side] or "" for text in texts) for side, words in sides]
    return csr_matrix(hstack(found))


def _features(
    train: Sequence[Text], test: Sequence[Text], limit: int
) -> tuple[csr_matrix, csr_matrix]:
    sides, own = fit_features(train, limit)
    return own, features(sides, test)


def out_of_fold(
    texts: Sequence[Text],
    labels: NDArray[np.int64],
    *,
    folds: int = 5,
    seed: int = 0,
    args: Args | None = None,
) -> Floats:
    """(n, questions) P(1) of each text by models that have not seen its prompt.

    texts: (prompt, answer or None); labels: (n, questions) of 0 or 1. It knows little, but it never
    saw the label that it is asked about, which a trained moderator mostly has.
    Raises ValueError with fewer than 2 prompts.
    """
    args = args or Args()
    group = np.unique([normalise(prompt) for prompt, _ in texts], return_inverse=True)[1]
    folds = min(folds, int(group.max(initial=-1)) + 1)
    if folds < 2:
        raise ValueError("out-of-fold probabilities need texts with at least 2 prompts")
    fold = (np.random.default_rng(seed).permutation(group.max() + 1) % folds)[group]
    chances = np.zeros(labels.shape)
    for k in tqdm(range(folds), desc="folds", disable=None):
        inside, outside = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        x, x_out = _features([texts[i] for i in outside], [texts[i] for i in inside], args.features)
        for column in range(labels.shape[1]):
            own = labels[outside, column]
            if own.min() == own.max():
                chances[inside, column] = own[0]
                continue
            fit = LogisticRegression(C=args.c, max_iter=300).fit(x, own)
            chances[inside, column] = fit.predict_proba(x_out)[:, 1]
    return chances


def main(args: Args) -> None:
    train, test = (
        [
            e
            for e in read_examples(args.data, split)
            if e.source.startswith("annotated/") and e.response is not None
        ]
        for split in ("train", "test")
    )
    x, x_test = _features(
        [(e.prompt, e.response) for e in train], [(e.prompt, e.response) for e in test],
        args.features,
    )  # fmt: skip
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
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
