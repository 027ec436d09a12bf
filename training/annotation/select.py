"""`next`: which texts help most to label now. Pure scores, and the effects that put them in order.

A text scores by how unsure the moderator is of it, by whether those who labelled it disagree, by
how rare its likely categories are among the labels so far, and by how often users meet it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from guardrail import audit
from guardrail.taxonomy import Category, Severity
from guardrail.verdict import Pair
from training.annotation.ai import Answer, Question, save_answers
from training.annotation.labels import AnnotationError, Record, SafetyLabel, StoredLabel
from training.annotation.rows import read_labels
from training.annotation.rules import FIRST, WANTED, ask_again
from training.annotation.store import Store


@dataclass(frozen=True)
class Weights:
    """What counts how much; each part of a score lies in [0, 1]."""

    uncertain: float = 1.0
    disagreeing: float = 1.0
    rare: float = 0.5
    traffic: float = 0.5


@dataclass(frozen=True)
class Score:
    task: int
    value: float
    why: str


def uncertainty(at_least: Sequence[float]) -> float:
    """Entropy of the four severities, of its maximum: 0 sure, 1 no idea. at_least: P(>= minor,
    moderate, severe)."""
    edges = [1.0, *at_least, 0.0]
    p = [max(0.0, a - b) for a, b in pairwise(edges)]
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(4)


def disagreement(labels: Iterable[SafetyLabel]) -> float:
    """1 where some say safe and some not; else how far severities lie apart, of 2."""
    said = list(labels)
    if len({one.safe for one in said}) > 1:
        return 1.0
    levels = [one.severity for one in said if one.severity is not None]
    return (max(levels) - min(levels)) / 2 if levels else 0.0


def rarity(likely: Mapping[str, float], counts: Counter[str]) -> float:
    """How rare the likely categories are: the greatest P(category) / sqrt(1 + labels of it)."""
    return max((p / math.sqrt(1 + counts[name]) for name, p in likely.items()), default=0.0)


def traffic(requests: int, busiest: int) -> float:
    """Of the busiest text's, on a log scale."""
    return math.log1p(requests) / math.log1p(busiest) if busiest else 0.0


def score(
    labels: Mapping[int, Sequence[StoredLabel]],
    requests: Mapping[int, int],
    tasks: Iterable[int],
    weights: Weights,
) -> list[Score]:
    """Tasks by score, best first; those without anything that speaks for them are left out."""
    counts: Counter[str] = Counter()
    for said in labels.values():
        held = {
            name
            for s in said
            if s.role in ("human", "import") and isinstance(s.value, SafetyLabel)
            for name in s.value.categories or ()
        }
        counts.update(held)
    busiest = max(requests.values(), default=0)
    scores = []
    for task in tasks:
        said = labels.get(task, ())
        opinions = (s.detail for s in reversed(said) if s.role == "moderator")
        opinion: Mapping[str, Any] = next(opinions, {})  # of the newest
        parts = {
            "uncertain": uncertainty(opinion["severity"]) if "severity" in opinion else 0.0,
            "disagreeing": disagreement(s.value for s in said if isinstance(s.value, SafetyLabel)),
            "rare": rarity(opinion.get("categories", {}), counts),
            "traffic": traffic(requests.get(task, 0), busiest),
        }
        parts = {name: getattr(weights, name) * part for name, part in parts.items()}
        if total := sum(parts.values()):
            main = max(parts, key=parts.__getitem__)
            scores.append(Score(task, total, f"{main} ({parts[main]:.2f})"))
    return sorted(scores, key=lambda s: (-s.value, s.task))


def bring_forward(
    store: Store, count: int, weights: Weights | None = None, *, again: bool = False
) -> list[Score]:
    """Put the `count` best texts first in the queue; returns them, best first.

    again: also texts that are done: each is asked of one person more.
    """
    settings, weights = store.settings(), weights or Weights()
    given = {
        "again": again,
        "share": settings.overlap_share,
        "overlap": settings.overlap_labels,
        "first": FIRST,
    }
    with store.write() as db:
        labels: dict[int, list[StoredLabel]] = defaultdict(list)
        for label in read_labels(db, "item"):
            labels[label.task_id].append(label)
        # A suspected error that nobody has looked at yet keeps its place before all others.
        moved = f"kind = 'item' AND (priority < :first OR people >= {WANTED})"
        rows = db.execute(
            f"SELECT id FROM tasks WHERE {moved} AND NOT settled AND (:again OR people < {WANTED})",
            given,
        )
        tasks = [row["id"] for row in rows]
        requests: Counter[int] = Counter()
        for row in db.execute(
            "SELECT task_id, extra FROM records WHERE extra LIKE '%\"requests\"%'"
        ):
            said = json.loads(row["extra"]).get("requests")
            requests[row["task_id"]] += said if isinstance(said, int) else 0
        best = score(labels, requests, tasks, weights)[:count]
        db.execute(f"UPDATE tasks SET priority = 0, why = NULL WHERE {moved}", given)
        most = max(sum(astuple(weights)), 1.0)
        ask_again(db, {one.task: (one.value / most, one.why) for one in best}, settings)
    return best


# --- texts from an audit log ---------------------------------------------------------------------


@dataclass
class FromAudit:
    """rows of the log; consented: of those, with texts that may be kept; texts: new ones taken."""

    rows: int = 0
    consented: int = 0
    texts: int = 0


def import_audit(store: Store, path: Path) -> FromAudit:
    """Take in the texts of an audit log whose rows say `consent` and carry them; how often each was
    met goes beside it, and so does what the moderator saw in it then.

    May be called again as the log grows. Raises AuditError, and AnnotationError for a file that is
    no audit log.
    """
    result = FromAudit()
    met: Counter[Pair] = Counter()
    seen: dict[Pair, dict[str, Any]] = {}
    lines = 0
    for _, row in audit.rows(path):
        lines += 1
        result.rows += row is not None
        if row is None or row.get("consent") is not True or not isinstance(row.get("text"), dict):
            continue
        result.consented += 1
        pair = Pair(row["text"]["prompt"], row["text"]["response"])
        met[pair] += 1
        seen[pair] = row["verdict"]
    if lines and not result.rows:
        raise AnnotationError(
            f"{path}: not an audit log, for no line of it is one's row: leave out --audit to take "
            "in rows of texts"
        )
    name = f"audit:{path.resolve()}"
    updated = _met_again(store, name, met)
    fresh = [
        Record(p.prompt, (p.response,), (None,), sources=(f"audit/{path.name}",),
               extra={"requests": n})
        for p, n in met.items()
        if p not in updated
    ]  # fmt: skip
    if fresh:
        digest = hashlib.sha256(json.dumps([name, result.rows, len(updated)]).encode())
        store.add(fresh, name=name, digest=digest.hexdigest())
    more = {pair for pair, grew in updated.items() if grew} | {p for p in met if p not in updated}
    result.texts = len(more)
    _keep_opinions(store, {pair: seen[pair] for pair in more})
    return result


def _met_again(store: Store, name: str, met: Mapping[Pair, int]) -> dict[Pair, bool]:
    """Bring the counts of a log's texts that are here already up to `met`; returns those texts,
    and whether each was met more often than before."""
    updated = {}
    with store.write() as db:
        rows = db.execute(
            "SELECT r.id, t.prompt, t.response, r.extra FROM records r"
            " JOIN tasks t ON t.id = r.task_id JOIN imports i ON i.id = r.import_id"
            " WHERE i.name = ?",
            (name,),
        ).fetchall()
        for row in rows:
            pair, extra = Pair(row["prompt"], row["response"]), json.loads(row["extra"])
            updated[pair] = met.get(pair, 0) > extra["requests"]
            if updated[pair]:
                extra["requests"] = met[pair]
                db.execute(
                    "UPDATE records SET extra = ? WHERE id = ?", (json.dumps(extra), row["id"])
                )
    return updated


def _keep_opinions(store: Store, seen: Mapping[Pair, Mapping[str, Any]]) -> None:
    ids = {text: task for task, text in store.texts().items()}
    by_model: dict[str, list[tuple[Question, Answer]]] = defaultdict(list)
    for pair, verdict in seen.items():
        task, chances = ids[pair.prompt, pair.response], verdict.get("severity_probabilities")
        if not chances or not verdict.get("model"):
            continue  # a degraded verdict: nothing was seen
        p = [chances[s.label] for s in Severity]
        severity = Severity.from_label(verdict["severity"])
        names = tuple(reason["category"] for reason in verdict["reasons"])
        label = SafetyLabel(False, int(severity), names) if severity else SafetyLabel(True)
        detail = {
            "severity": [round(sum(p[k:]), 4) for k in (1, 2, 3)],
            "categories": {c.value: verdict["categories"][c.value] for c in Category},
        }
        question = Question(task, "item", pair.prompt, (pair.response,))
        by_model[verdict["model"]].append((question, Answer(label, detail)))
    for model, given in by_model.items():
        save_answers(store, f"moderator:{model}", "moderator", given)
