"""Labels that are probably wrong, queued for another look (`confident` says how they are found)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guardrail.taxonomy import Category, Severity
from training.annotation.confident import category_errors, label_errors
from training.annotation.labels import AnnotationError, SafetyLabel, StoredLabel
from training.annotation.resolve import resolve
from training.annotation.rules import FIRST, ask_again
from training.annotation.store import Store
from training.bag_of_words import out_of_fold

Floats = NDArray[np.float64]
FEW = 10


@dataclass(frozen=True)
class Suspect:
    task: int
    margin: float
    why: str


def suspects(tasks: Sequence[int], labels: Sequence[SafetyLabel], chances: Floats) -> list[Suspect]:
    """Most suspect first; one entry per task. labels: complete ones.

    chances: (n, 3 + 19) out-of-fold P(>= minor, moderate, severe) and P(category). Severities and
    categories that fewer than `FEW` texts have are not judged: a model that saw so few of them
    would find every one of them wrong.
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
        if (levels == levels[i]).sum() >= FEW
    ]
    table = category_table(labels)
    for column, one in category_errors(table, chances[:, 3:]).items():
        if table[:, column].sum() < FEW:
            continue
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
    try:
        chances = out_of_fold([texts[task] for task in tasks], asked.astype(np.int64), folds=folds)
    except ValueError as error:
        raise AnnotationError(f"suspected errors: {error}") from None
    return suspects(tasks, labels, chances)


def requeue(store: Store, found: Sequence[Suspect]) -> int:
    """Ask one more person about each, before anything else."""
    with store.write() as db:
        return ask_again(
            db, {one.task: (FIRST + one.margin, one.why) for one in found}, store.settings()
        )
