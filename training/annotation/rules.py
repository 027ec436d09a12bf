"""The rules of `queue` as SQL and functions over an open transaction: who may have which task."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from training.annotation.labels import (
    AnnotationError,
    Condition,
    Kind,
    Label,
    PairLabel,
    SafetyLabel,
    Settings,
    StoredLabel,
    Suggestion,
    Task,
    read_label,
)
from training.annotation.resolve import disagree, resolve
from training.annotation.rows import read_labels, recount

FIRST = 10.0
"""Priority of a suspected error, which is asked about before all that `next` brings forward."""

WANTED = "COALESCE(wanted, CASE WHEN share < :share THEN :overlap ELSE 1 END)"

_NEXT = f"""
SELECT t.id FROM tasks t
WHERE t.kind = :kind AND NOT t.settled AND t.people < {WANTED}
  AND NOT EXISTS (SELECT 1 FROM labels l
    WHERE l.task_id = t.id AND l.annotator = :me AND l.ended IS NULL)
  AND NOT EXISTS (SELECT 1 FROM claims c
    WHERE c.task_id = t.id AND c.annotator = :me AND c.expires > :now)
  AND t.people + (SELECT COUNT(*) FROM claims c WHERE c.task_id = t.id AND c.annotator <> :me
    AND NOT c.adjudicates AND c.expires > :now) < {WANTED}
  AND (t.kind = 'item' OR NOT :wait OR (
    EXISTS (SELECT 1 FROM labels l WHERE l.task_id = t.item_0 AND l.ended IS NULL
      AND l.value IS NOT NULL)
    AND EXISTS (SELECT 1 FROM labels l WHERE l.task_id = t.item_1 AND l.ended IS NULL
      AND l.value IS NOT NULL)))
ORDER BY t.priority DESC, t.id LIMIT 1
"""


def next_open(
    db: sqlite3.Connection, kind: str, annotator: str, settings: Settings, now: float
) -> int | None:
    row = db.execute(
        _NEXT,
        {
            "kind": kind,
            "me": annotator,
            "now": now,
            "share": settings.overlap_share,
            "overlap": settings.overlap_labels,
            "wait": settings.pairs_wait,
        },
    ).fetchone()
    return row["id"] if row else None


def condition_of(annotator: str, task_id: int, settings: Settings) -> Condition:
    """Blind or not: by the setting, or by a coin that falls the same way each time."""
    if settings.suggestions != "experiment":
        return settings.suggestions
    return "blind" if _coin("condition", annotator, task_id, settings.seed) else "after_click"


def order_of(annotator: str, task_id: int, settings: Settings) -> tuple[int, int]:
    """Which answer of a pair stands left and right for this annotator; the same on every visit."""
    return (1, 0) if _coin("order", annotator, task_id, settings.seed) else (0, 1)


def _coin(what: str, annotator: str, task_id: int, seed: int) -> bool:
    digest = hashlib.sha256(json.dumps([what, annotator, task_id, seed]).encode()).digest()
    return bool(digest[0] & 1)


def suggestion_of(labels: Sequence[StoredLabel]) -> Suggestion | None:
    """The newest opinion of a machine among the labels of one item."""
    machines = [s for s in labels if s.role in ("moderator", "ai")]
    if not machines:
        return None
    newest = machines[-1]
    assert isinstance(newest.value, SafetyLabel)
    return Suggestion(newest.value, newest.annotator, newest.detail.get("categories", {}))


def disputed(db: sqlite3.Connection, kind: Kind | None, machines: bool) -> list[int]:
    """Tasks on which those who count disagree, and which nobody has settled; oldest first."""
    # Equal labels are equal text: `to_json` writes them in one way. Others may still agree.
    rows = db.execute(
        "SELECT t.id, t.kind, json_group_array(DISTINCT l.value) AS said FROM tasks t"
        " JOIN labels l ON l.task_id = t.id JOIN annotators a ON a.name = l.annotator"
        " WHERE t.people >= :floor AND t.people > 0 AND NOT t.settled"
        " AND (:kind IS NULL OR t.kind = :kind) AND l.ended IS NULL AND l.value IS NOT NULL"
        " AND (a.role = 'human' OR (:machines AND a.role = 'ai'))"
        " GROUP BY t.id HAVING COUNT(DISTINCT l.value) > 1 ORDER BY t.id",
        {"floor": 1 if machines else 2, "kind": kind, "machines": machines},
    )
    return [
        row["id"]
        for row in rows
        if disagree([read_label(row["kind"], one) for one in json.loads(row["said"])])
    ]


def ask_again(
    db: sqlite3.Connection, tasks: Mapping[int, tuple[float, str]], settings: Settings
) -> int:
    """Bring tasks forward, {task: (priority, why)}: those that are done get one person more, those
    that an adjudicator settled are left; returns how many."""
    changed = db.executemany(
        "UPDATE tasks SET priority = :priority, why = :why,"
        f" wanted = CASE WHEN people >= {WANTED} THEN people + 1 ELSE wanted END"
        " WHERE id = :task AND NOT settled",
        [
            {
                "task": task,
                "priority": priority,
                "why": why,
                "share": settings.overlap_share,
                "overlap": settings.overlap_labels,
            }
            for task, (priority, why) in tasks.items()
        ],
    )
    return changed.rowcount


def counts(label: StoredLabel, machines: bool) -> bool:
    return label.role == "human" or (machines and label.role == "ai")


# --- pieces of a transaction ---------------------------------------------------------------------


def person(db: sqlite3.Connection, name: str) -> bool:
    """Whether this person adjudicates."""
    row = db.execute(
        "SELECT * FROM annotators WHERE name = ? AND role = 'human'", (name,)
    ).fetchone()
    if row is None:
        raise AnnotationError(f"{name}: no such annotator: add them with `annotators add`")
    return bool(row["adjudicates"])


def held(
    db: sqlite3.Connection,
    annotator: str,
    session: str,
    settings: Settings,
    now: float,
    *,
    adjudicates: bool,
    kind: Kind | None,
) -> int | None:
    """What the session holds: within its lease, or past it while nobody else has done it."""
    row = db.execute(
        "SELECT c.task_id FROM claims c JOIN tasks t ON t.id = c.task_id"
        " WHERE c.annotator = :me AND c.session = :session AND c.adjudicates = :adjudicates"
        " AND (:kind IS NULL OR t.kind = :kind) AND (c.expires > :now"
        f"   OR (NOT t.settled AND (c.adjudicates OR t.people < {WANTED})))",
        {
            "me": annotator,
            "session": session,
            "adjudicates": adjudicates,
            "kind": kind,
            "now": now,
            "share": settings.overlap_share,
            "overlap": settings.overlap_labels,
        },
    ).fetchone()
    return row["task_id"] if row else None


def lease(
    db: sqlite3.Connection,
    task_id: int,
    annotator: str,
    session: str,
    settings: Settings,
    now: float,
    *,
    adjudicates: bool,
) -> None:
    db.execute(
        # A label's seconds begin when its task is shown: anew in another session, or after a break.
        "INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
        " since = CASE WHEN session <> excluded.session OR expires <= excluded.since"
        "  THEN excluded.since ELSE since END,"
        " session = excluded.session, expires = excluded.expires",
        (task_id, annotator, session, adjudicates, now, now + settings.lease_seconds),
    )


def read_task(db: sqlite3.Connection, task_id: int, annotator: str, settings: Settings) -> Task:
    row = db.execute("SELECT * FROM tasks WHERE id = ?", (task_id,)).fetchone()
    if row is None:
        raise AnnotationError(f"task {task_id}: is not in this store")
    if row["kind"] == "item":
        condition = condition_of(annotator, task_id, settings)
        return Task(
            task_id, "item", row["prompt"], (row["response"],), (0,), condition, row["source"]
        )
    sides = [row["item_0"], row["item_1"]]
    answers = [
        db.execute("SELECT response FROM tasks WHERE id = ?", (side,)).fetchone()["response"]
        for side in sides
    ]
    safety = tuple(resolve(read_labels(db, "item", side)).label for side in sides)
    return Task(
        id=task_id,
        kind="pair",
        prompt=row["prompt"],
        responses=tuple(answers),
        order=order_of(annotator, task_id, settings),
        condition="blind",
        source=row["source"],
        safety=tuple(s if isinstance(s, SafetyLabel) else None for s in safety),
    )


def check_complete(task: Task, label: Label, settings: Settings) -> None:
    if isinstance(label, SafetyLabel) != (task.kind == "item"):
        raise AnnotationError(f"task {task.id} is a {task.kind}: the answer is of the other kind")
    if isinstance(label, SafetyLabel) and not label.complete:
        raise AnnotationError("an unsafe text needs a severity and at least one category")
    if isinstance(label, PairLabel) and not label.answers(settings.preference):
        raise AnnotationError("answer every question, or skip the pair: a tie is an answer")


def write_answer(
    db: sqlite3.Connection,
    now: float,
    annotator: str,
    session: str,
    task: Task,
    label: Label | None,
    note: str | None,
    *,
    adjudicates: bool = False,
) -> None:
    mine = (task.id, annotator, adjudicates)
    claim = db.execute(
        "SELECT since FROM claims WHERE task_id = ? AND annotator = ? AND adjudicates = ?", mine
    ).fetchone()
    seen = revealed(db, annotator, task.id)
    db.execute(
        "UPDATE labels SET ended = ? WHERE task_id = ? AND annotator = ? AND adjudicated = ?"
        " AND ended IS NULL",
        (now, *mine),
    )
    db.execute(
        "INSERT INTO labels (task_id, annotator, adjudicated, value, note, position, condition,"
        " revealed, first, suggested, seconds, created)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *mine,
            json.dumps(label.to_json()) if label else None,
            note,
            task.order[0] if task.kind == "pair" else None,
            task.condition,
            seen is not None,
            json.dumps(seen["first"]) if seen else None,
            json.dumps(seen["suggested"]) if seen else None,
            now - claim["since"] if claim else None,
            now,
        ),
    )
    db.execute("DELETE FROM claims WHERE task_id = ? AND annotator = ? AND adjudicates = ?", mine)
    recount(db, task.id)
    log_event(db, now, annotator, task.id, "label" if label else "skip", {"session": session})


def revealed(db: sqlite3.Connection, annotator: str, task_id: int) -> dict[str, Any] | None:
    row = db.execute(
        "SELECT data FROM events WHERE annotator = ? AND task_id = ? AND kind = 'reveal'"
        " ORDER BY id LIMIT 1",
        (annotator, task_id),
    ).fetchone()
    return json.loads(row["data"]) if row else None


def log_event(
    db: sqlite3.Connection,
    now: float,
    annotator: str,
    task_id: int | None,
    kind: str,
    data: Mapping[str, Any],
) -> None:
    db.execute(
        "INSERT INTO events (at, annotator, task_id, kind, data) VALUES (?, ?, ?, ?, ?)",
        (now, annotator, task_id, kind, json.dumps(data)),
    )
