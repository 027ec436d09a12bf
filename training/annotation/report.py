"""The statistics of a store: how far people agree, with one another and with machines.

`statistics` is a pure function of labels to one plain value; `markdown` prints it. Every figure
says on how many tasks it rests; None where it is not defined.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from guardrail.taxonomy import Category, Severity
from training.annotation.agreement import (
    cohen_kappa,
    confusion,
    fleiss_kappa,
    interval,
    krippendorff_alpha,
)
from training.annotation.labels import PairLabel, SafetyLabel, StoredLabel
from training.annotation.resolve import resolve

Value = Callable[[StoredLabel], float]
_CATEGORIES = [c.value for c in Category]


def statistics(labels: Sequence[StoredLabel]) -> dict[str, Any]:
    """Everything below, of the labels that count."""
    items = [s for s in labels if s.kind == "item"]
    pairs = [s for s in labels if s.kind == "pair"]
    return {
        "labels": {
            "imported" if role == "import" else role: sum(s.role == role for s in labels)
            for role in ("human", "ai", "moderator", "import")
        },
        "annotators": annotators(labels),
        "people": people(items, pairs),
        "machines": {name: against(items, name) for name in _machines(items)},
        "anchoring": anchoring(items),
        "sides": sides(pairs),
    }


def annotators(labels: Sequence[StoredLabel]) -> dict[str, dict[str, Any]]:
    """Per annotator: labels, median seconds, share called unsafe, what their labels cost."""
    own: dict[str, list[StoredLabel]] = defaultdict(list)
    for label in labels:
        own[label.annotator].append(label)
    rows: dict[str, dict[str, Any]] = {}
    for name, said in sorted(own.items()):
        seconds = [s.seconds for s in said if s.seconds is not None]
        safety = [s.value.safe for s in said if isinstance(s.value, SafetyLabel)]
        rows[name] = {
            "role": said[0].role,
            "labels": len(said),
            "seconds": float(np.median(seconds)) if seconds else None,
            "unsafe": 1 - sum(safety) / len(safety) if safety else None,
            "cost": sum(float(s.detail.get("cost") or 0) for s in said) or None,
        }
    return rows


# --- people among themselves ---------------------------------------------------------------------


def people(items: Sequence[StoredLabel], pairs: Sequence[StoredLabel]) -> dict[str, Any]:
    """Krippendorff's alpha with its interval; Fleiss' kappa; Cohen's of every two people."""
    said = [s for s in items if s.role == "human" and not s.adjudicated]
    chose = [s for s in pairs if s.role == "human" and not s.adjudicated]
    alphas: dict[str, dict[str, Any]] = {
        "safe": _alpha(said, lambda s: _safety(s).safe, "nominal"),
        "severity": _alpha(said, _severity, "ordinal"),
    }
    for name in _CATEGORIES:
        row = _alpha(said, lambda s, name=name: _has(s, name), "nominal")  # type: ignore[misc]
        if row["alpha"] is not None:
            alphas[name] = row
    for question in ("more_helpful", "less_harmful", "single"):
        asked = [s for s in chose if getattr(s.value, question) is not None]
        if asked:
            alphas[question] = _alpha(asked, lambda s, q=question: _choice(s, q), "nominal")  # type: ignore[misc]
    return {
        "alpha": alphas,
        "fleiss": _fleiss(said),
        "cohen": _every_two(said),
    }


def _alpha(labels: Sequence[StoredLabel], value: Value, level: str) -> dict[str, Any]:
    """Over the tasks that two or more people labelled; `low`, `high` bound the 95 % interval."""
    by_task: dict[int, dict[str, float]] = defaultdict(dict)
    for label in labels:
        if not math.isnan(said := float(value(label))):
            by_task[label.task_id][label.annotator] = said
    shared = {task: said for task, said in by_task.items() if len(said) > 1}
    names = sorted({name for said in shared.values() for name in said})
    data = np.array([[said.get(name, np.nan) for said in shared.values()] for name in names])
    if not shared:
        return {"n": 0, "alpha": None}
    alpha = krippendorff_alpha(data, level)  # type: ignore[arg-type]
    low, high = interval(lambda i: krippendorff_alpha(data[:, i], level), data.shape[1])  # type: ignore[arg-type]
    return {"n": len(shared), "alpha": _number(alpha), "low": _number(low), "high": _number(high)}


def _fleiss(labels: Sequence[StoredLabel]) -> dict[str, Any] | None:
    """Fleiss' kappa of the severity, over the tasks with the commonest number of labels from 2."""
    by_task: dict[int, list[int]] = defaultdict(list)
    for label in labels:
        if not math.isnan(severity := _severity(label)):
            by_task[label.task_id].append(int(severity))
    sizes = Counter(len(said) for said in by_task.values() if len(said) > 1)
    if not sizes:
        return None
    size = max(sizes, key=lambda n: (sizes[n], n))
    tables = [np.bincount(s, minlength=4) for s in by_task.values() if len(s) == size]
    return {"raters": size, "n": len(tables), "kappa": _number(fleiss_kappa(tables))}


def _every_two(labels: Sequence[StoredLabel]) -> list[dict[str, Any]]:
    own: dict[str, dict[int, SafetyLabel]] = defaultdict(dict)
    for label in labels:
        own[label.annotator][label.task_id] = _safety(label)
    rows = []
    for first, second in combinations(sorted(own), 2):
        one, other = own[first], own[second]
        row = compare([(one[task], other[task]) for task in one.keys() & other.keys()])
        if row["n"]:
            rows.append({"first": first, "second": second, **row})
    return rows


# --- people and machines -------------------------------------------------------------------------


def _machines(items: Sequence[StoredLabel]) -> list[str]:
    return sorted({s.annotator for s in items if s.role in ("ai", "moderator")})


def against(items: Sequence[StoredLabel], machine: str) -> dict[str, Any]:
    """A machine's labels beside what people came to on the same texts: see `compare`."""
    by_task: dict[int, list[StoredLabel]] = defaultdict(list)
    theirs: dict[int, SafetyLabel] = {}
    for label in items:
        if label.annotator == machine:
            theirs[label.task_id] = _safety(label)
        elif label.origin == "human":  # imported ones included
            by_task[label.task_id].append(label)
    both = []
    for task, said in by_task.items():
        ours = resolve(said).label
        if task in theirs and isinstance(ours, SafetyLabel):
            both.append((ours, theirs[task]))
    return compare(both)


def compare(both: Sequence[tuple[SafetyLabel, SafetyLabel]]) -> dict[str, Any]:
    """Two labels of each text: kappa of safe or not, of severity (quadratic), exact severities,
    the confusion of severities (rows the first), and per category kappa, precision and recall of
    the second as judged by the first."""
    graded = [
        (a.severity, b.severity)
        for a, b in both
        if a.severity is not None and b.severity is not None
    ]
    named = [(a, b) for a, b in both if a.categories is not None and b.categories is not None]
    safe = confusion([not a.safe for a, _ in both], [not b.safe for _, b in both], 2)
    table = confusion([a for a, _ in graded], [b for _, b in graded], 4)
    categories: dict[str, dict[str, Any]] = {}
    for name in _CATEGORIES:
        cells = confusion(
            [name in (a.categories or ()) for a, _ in named],
            [name in (b.categories or ()) for _, b in named],
            2,
        )
        hits, first, second = int(cells[1, 1]), int(cells[1].sum()), int(cells[:, 1].sum())
        if first or second:
            categories[name] = {
                "first": first,
                "second": second,
                "kappa": _number(cohen_kappa(cells)),
                "precision": hits / second if second else None,
                "recall": hits / first if first else None,
            }
    return {
        "n": len(both),
        "n_severity": len(graded),
        "n_categories": len(named),
        "safe_kappa": _number(cohen_kappa(safe)),
        "severity_kappa": _number(cohen_kappa(table, "quadratic")),
        "severity_equal": float(np.trace(table) / len(graded)) if graded else None,
        "confusion": table.tolist(),
        "categories": categories,
    }


# --- what the way of asking does -----------------------------------------------------------------


def anchoring(items: Sequence[StoredLabel]) -> dict[str, Any]:
    """Does seeing a machine's opinion move people to it?

    blind, shown: how often people's safe-or-not and severity equal the machine's, where they could
    not and where they could see it; effect: the difference, with its 95 % interval. The two groups
    of tasks are drawn by a coin. toward, away: answers that moved after the suggestion was seen.
    """
    machine: dict[int, SafetyLabel] = {}
    for label in items:
        if label.role in ("ai", "moderator"):
            machine[label.task_id] = _safety(label)
    groups: dict[str, list[float]] = {"blind": [], "after_click": []}
    moved = Counter[str]()
    for label in items:
        if label.role != "human" or label.adjudicated or label.task_id not in machine:
            continue
        if label.condition is None:  # given elsewhere: the coin never fell
            continue
        # What was shown counts; where nothing was, what would have been.
        opinion = label.suggested or machine[label.task_id]
        groups[label.condition].append(_same(_safety(label), opinion))
        if label.revealed and label.suggested and label.first and "safe" in label.first:
            before, after = label.first["safe"], _safety(label).safe
            if before != after:
                moved["toward" if after == label.suggested.safe else "away"] += 1
    blind, shown = (np.array(groups[name]) for name in ("blind", "after_click"))
    low, high = _difference(shown, blind)
    return {
        "n_blind": len(blind),
        "n_shown": len(shown),
        "blind": float(blind.mean()) if len(blind) else None,
        "shown": float(shown.mean()) if len(shown) else None,
        "effect": float(shown.mean() - blind.mean()) if len(blind) and len(shown) else None,
        "low": low,
        "high": high,
        "toward": moved["toward"],
        "away": moved["away"],
    }


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[float | None, float | None]:
    """95 % interval of the difference of two shares (Agresti & Caffo 2000)."""
    if not len(a) or not len(b):
        return None, None
    p, q = (a.sum() + 1) / (len(a) + 2), (b.sum() + 1) / (len(b) + 2)
    half = 1.96 * math.sqrt(p * (1 - p) / (len(a) + 2) + q * (1 - q) / (len(b) + 2))
    return float(p - q - half), float(p - q + half)


def sides(pairs: Sequence[StoredLabel]) -> dict[str, dict[str, Any]]:
    """Per question: how often the left answer was chosen of the choices that were no tie. The sides
    are mixed, so far from a half means that the side itself was chosen."""
    rows: dict[str, dict[str, Any]] = {}
    for question in ("more_helpful", "less_harmful", "single"):
        chosen = [
            getattr(s.value, question) == s.position
            for s in pairs
            if s.role in ("human", "ai")
            and s.position is not None
            and getattr(s.value, question) in (0, 1)
        ]
        if chosen:
            rows[question] = {"n": len(chosen), "left": sum(chosen) / len(chosen)}
    return rows


# --- values --------------------------------------------------------------------------------------


def _safety(label: StoredLabel) -> SafetyLabel:
    assert isinstance(label.value, SafetyLabel)
    return label.value


def _severity(label: StoredLabel) -> float:
    severity = _safety(label).severity
    return float("nan") if severity is None else severity


def _has(label: StoredLabel, name: str) -> float:
    names = _safety(label).categories
    return float("nan") if names is None else name in names


def _choice(label: StoredLabel, question: str) -> float:
    assert isinstance(label.value, PairLabel)
    choice = getattr(label.value, question)
    return 2.0 if choice == "tie" else float(choice)


def _same(a: SafetyLabel, b: SafetyLabel) -> bool:
    return a.safe == b.safe and a.severity == b.severity


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- Markdown ------------------------------------------------------------------------------------


def markdown(figures: dict[str, Any]) -> str:
    parts = ["# Annotation statistics", "", _line(figures["labels"]), ""]
    parts += _table(
        ["annotator", "role", "labels", "seconds, median", "unsafe", "cost"],
        [[name, *row.values()] for name, row in figures["annotators"].items()],
    )
    said = figures["people"]
    parts += ["", "## People among themselves", ""]
    parts += _table(
        ["question", "tasks", "Krippendorff's alpha", "95 %"],
        [
            [name, row["n"], row["alpha"], _range(row.get("low"), row.get("high"))]
            for name, row in said["alpha"].items()
        ],
    )
    if said["fleiss"]:
        f = said["fleiss"]
        kappa = _cell(f["kappa"])
        parts += ["", f"Fleiss' kappa of severity: {kappa} ({f['n']} tasks, {f['raters']} people)"]
    parts += ["", *_pairs_table(said["cohen"])] if said["cohen"] else []
    for name, row in figures["machines"].items():
        parts += ["", f"## People (rows) and {name} (columns)", "", *_machine(row)]
    parts += ["", "## The way of asking", "", _anchor(figures["anchoring"])]
    for question, row in figures["sides"].items():
        parts.append(
            f"{question}: the left answer was chosen {row['left']:.0%} of {row['n']} times"
        )
    return "\n".join(parts) + "\n"


def _pairs_table(rows: list[dict[str, Any]]) -> list[str]:
    return _table(
        ["two people", "texts", "kappa, safe", "kappa, severity (quadratic)"],
        [
            [f"{r['first']}, {r['second']}", r["n"], r["safe_kappa"], r["severity_kappa"]]
            for r in rows
        ],
    )


def _machine(row: dict[str, Any]) -> list[str]:
    if not row["n"]:
        return ["No text has a label of both."]
    levels = [s.label for s in Severity]
    return [
        f"{row['n']} texts: kappa of safe {_cell(row['safe_kappa'])}. {row['n_severity']} with a "
        f"severity from both: kappa (quadratic) {_cell(row['severity_kappa'])}, equal "
        f"{_cell(row['severity_equal'])}. {row['n_categories']} with categories from both.",
        "",
        *_table(
            ["severity", *levels],
            [[level, *counts] for level, counts in zip(levels, row["confusion"], strict=True)],
        ),
        "",
        *_table(
            ["category", "people", "machine", "kappa", "precision", "recall"],
            [[name, *cells.values()] for name, cells in row["categories"].items()],
        ),
    ]


def _anchor(row: dict[str, Any]) -> str:
    if row["effect"] is None:
        return "Anchoring: not measured (it needs suggestions, blind and shown)."
    return (
        f"Anchoring: people agree with the machine on {row['shown']:.0%} of {row['n_shown']} texts "
        f"where they could see its opinion, on {row['blind']:.0%} of {row['n_blind']} where not: "
        f"effect {row['effect']:+.2f} ({_range(row['low'], row['high'])}). After seeing it, "
        f"{row['toward']} answers moved toward it, {row['away']} away."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    if not rows:
        return ["Nothing yet."]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _line(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items()) + " labels"
