"""Labels that are probably wrong, queued for another look (`confident` says how they are found)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from guardrail.taxonomy import Category, Severity
from training.annotation.confident import category_errors, label_errors
from training.annotation.labels import AnnotationError, SafetyLabel, StoredLabel
from training.annotation.resolve import resolve
from training.annotation.rules import ask_again
from training.annotation.store import Store
from training.data import normalise

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Suspect:
    task: int
    margin: float
    why: str


def out_of_fold(
    texts: Sequence[tuple[str, str | None]], labels: NDArray[np.int64], *, folds: int = 5
) -> Floats:
    """(n, questions) P(1) of each text from models that saw neither it nor its prompt.

    labels: (n, questions) 0 or 1. A bag of words of prompt and of answer: it knows little, but it
    never saw the label that it is asked about, which a trained moderator mostly has.
    """
    groups = [normalise(prompt) for prompt, _ in texts]
    folds = min(folds, len(set(groups)))
    if folds < 2:
        raise AnnotationError("suspected errors need labelled texts with at least 2 prompts")
    chances = np.zeros(labels.shape)
    for train, test in GroupKFold(folds).split(np.zeros(len(texts)), groups=groups):
        sides = []
        for side in (0, 1):
            words = [text[side] or "" for text in texts]
            bag = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
            try:
                bag.fit([words[i] for i in train])
            except ValueError:  # no words at all on this side: prompts alone
                continue
            sides.append(bag.transform(words))
        features = hstack(sides).tocsr()
        for column in range(labels.shape[1]):
            own = labels[train, column]
            if own.min() == own.max():
                chances[test, column] = own[0]
                continue
            fit = LogisticRegression(C=4.0, max_iter=300).fit(features[train], own)
            chances[test, column] = fit.predict_proba(features[test])[:, 1]
    return chances


def suspects(tasks: Sequence[int], labels: Sequence[SafetyLabel], chances: Floats) -> list[Suspect]:
    """Most suspect first; one entry per task. labels: complete ones.

    chances: (n, 3 + 19) out-of-fold P(>= minor, moderate, severe) and P(category).
    """
    levels = np.array([label.severity for label in labels])
    at_least = np.minimum.accumulate(chances[:, :3], axis=1)
    edges = np.hstack([np.ones((len(tasks), 1)), at_least, np.zeros((len(tasks), 1))])
    found = label_errors(levels, edges[:, :-1] - edges[:, 1:])
    rows = [
        Suspect(
            tasks[i],
            float(margin),
            f"labelled {Severity(levels[i]).label}, looks {Severity(looks).label}",
        )
        for i, looks, margin in zip(found.index, found.suggested, found.margin, strict=True)
    ]
    for column, one in category_errors(category_table(labels), chances[:, 3:]).items():
        name = list(Category)[column].value
        rows += [
            Suspect(tasks[i], float(m), f"{name}: {'seems missing' if looks else 'seems wrong'}")
            for i, looks, m in zip(one.index, one.suggested, one.margin, strict=True)
        ]
    first: dict[int, Suspect] = {}
    for row in sorted(rows, key=lambda r: -r.margin):
        first.setdefault(row.task, row)
    return list(first.values())


def category_table(labels: Sequence[SafetyLabel]) -> NDArray[np.int64]:
    """(n, 19) 0 or 1."""
    return np.array([[c.value in (one.categories or ()) for c in Category] for one in labels], int)


def find(store: Store, *, folds: int = 5) -> list[Suspect]:
    """Suspects among a store's complete labels of people and imports, most suspect first."""
    by_task: dict[int, list[StoredLabel]] = {}
    for label in store.labels("item"):
        by_task.setdefault(label.task_id, []).append(label)
    texts, said = store.texts(), {}
    for task, given in by_task.items():
        # What an adjudicator settled has had its other look.
        resolved = resolve(given, ("human", "import")).label
        settled = any(label.adjudicated for label in given)
        if isinstance(resolved, SafetyLabel) and resolved.complete and not settled:
            said[task] = resolved
    if not said:
        raise AnnotationError("there are no complete labels yet in which errors could be found")
    tasks, labels = list(said), list(said.values())
    levels = np.array([label.severity for label in labels])
    asked = np.hstack([np.stack([levels > k for k in range(3)], axis=1), category_table(labels)])
    chances = out_of_fold([texts[task] for task in tasks], asked.astype(np.int64), folds=folds)
    return suspects(tasks, labels, chances)


def requeue(store: Store, found: Sequence[Suspect]) -> int:
    """Ask one more person about each, before anything else."""
    with store.write() as db:
        return ask_again(
            db, {one.task: (10 + one.margin, one.why) for one in found}, store.settings()
        )
