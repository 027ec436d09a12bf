"""Rows of the store's tables, read and written within an open transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable

from training.annotation.labels import (
    Kind,
    Label,
    Record,
    Role,
    SafetyLabel,
    StoredLabel,
    read_label,
)


def add_record(
    db: sqlite3.Connection, record: Record, import_id: int, now: float, *, queue_labelled: bool,
    person: str | None,
) -> None:  # fmt: skip
    """A row and its labels; see `Store.add`."""
    asked = queue_labelled or person is not None
    sources = record.sources or (None,) * len(record.responses)
    items = [
        _task(
            db, "item", record.prompt, response, (None, None), source,
            None if asked or label is None else 0,
        )
        for response, source, label in zip(
            record.responses, sources, record.safety, strict=True
        )
    ]  # fmt: skip
    task = items[0]
    if record.kind == "pair":
        wanted = None if asked or record.preference is None else 0
        task = _task(db, "pair", record.prompt, None, (items[0], items[1]), sources[0], wanted)
    if queue_labelled:  # what an earlier file brought with its labels, too
        db.executemany(
            "UPDATE tasks SET wanted = NULL WHERE id = ? AND wanted = 0",
            [(one,) for one in {*items, task}],
        )
    record_id = db.execute(
        "INSERT INTO records (import_id, task_id, sources, origin, extra, raw)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            import_id,
            task,
            _dump(sources),
            record.origin,
            _dump(dict(record.extra)),
            _dump(dict(record.raw)),
        ),
    ).lastrowid
    given: list[tuple[int, Label | None, int | None]] = [
        (item, label, side)
        for side, (item, label) in enumerate(zip(items, record.safety, strict=True))
    ]
    if record.preference is not None:
        given.append((task, record.preference, None))
    if person is not None:
        _as_given_here(db, person, [(item, label) for item, label, _ in given], now)
    elif any(label is not None for _, label, _ in given):
        annotator = ensure(db, f"import:{record.origin or 'unknown'}", "import", now)
        db.executemany(
            "INSERT INTO labels (task_id, annotator, value, record_id, side, created)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [
                (item, annotator, _dump(label.to_json()), record_id, side, now)
                for item, label, side in given
                if label is not None
            ],
        )


def read_labels(
    db: sqlite3.Connection, kind: Kind | None = None, task_id: int | None = None
) -> list[StoredLabel]:
    rows = db.execute(
        "SELECT l.*, t.kind, a.role, r.origin AS said FROM labels l"
        " JOIN tasks t ON t.id = l.task_id JOIN annotators a ON a.name = l.annotator"
        " LEFT JOIN records r ON r.id = l.record_id"
        " WHERE l.ended IS NULL AND l.value IS NOT NULL"
        " AND (:kind IS NULL OR t.kind = :kind) AND (:task IS NULL OR l.task_id = :task)"
        " ORDER BY l.id",
        {"kind": kind, "task": task_id},
    )
    return [_stored(row) for row in rows]


def _stored(row: sqlite3.Row) -> StoredLabel:
    suggested = row["suggested"]
    role: Role = row["role"]
    return StoredLabel(
        id=row["id"],
        task_id=row["task_id"],
        kind=row["kind"],
        annotator=row["annotator"],
        role=role,
        origin=(row["said"] or "unknown") if role == "import" else role,
        value=read_label(row["kind"], row["value"]),
        adjudicated=bool(row["adjudicated"]),
        record_id=row["record_id"],
        side=row["side"],
        position=row["position"],
        condition=row["condition"],
        revealed=bool(row["revealed"]),
        first=json.loads(row["first"]) if row["first"] else None,
        suggested=SafetyLabel.from_json(json.loads(suggested)) if suggested else None,
        seconds=row["seconds"],
        detail=json.loads(row["detail"]) if row["detail"] else {},
        created=row["created"],
        note=row["note"],
    )


def _as_given_here(
    db: sqlite3.Connection, person: str, given: Iterable[tuple[int, Label | None]], now: float
) -> None:
    """A person's labels from elsewhere; an earlier one of theirs stops counting."""
    for task, label in given:
        if label is None:
            continue
        db.execute(
            "UPDATE labels SET ended = ? WHERE task_id = ? AND annotator = ? AND NOT adjudicated"
            " AND ended IS NULL",
            (now, task, person),
        )
        db.execute(
            "INSERT INTO labels (task_id, annotator, value, created) VALUES (?, ?, ?, ?)",
            (task, person, _dump(label.to_json()), now),
        )
        recount(db, task)


def ensure(db: sqlite3.Connection, name: str, role: Role, now: float) -> str:
    """The annotator that is no person, made where it is new."""
    db.execute(
        "INSERT OR IGNORE INTO annotators (name, role, created) VALUES (?, ?, ?)",
        (name, role, now),
    )
    return name


def recount(db: sqlite3.Connection, task_id: int) -> None:
    """Bring a task's counters up to its labels; part of every act that changes them."""
    db.execute(
        "UPDATE tasks SET"
        " people = (SELECT COUNT(DISTINCT l.annotator) FROM labels l"
        "   JOIN annotators a ON a.name = l.annotator WHERE l.task_id = tasks.id"
        "   AND a.role = 'human' AND l.ended IS NULL AND l.value IS NOT NULL"
        "   AND NOT l.adjudicated),"
        " settled = EXISTS (SELECT 1 FROM labels l WHERE l.task_id = tasks.id"
        "   AND l.adjudicated AND l.ended IS NULL AND l.value IS NOT NULL)"
        " WHERE id = ?",
        (task_id,),
    )


def _task(
    db: sqlite3.Connection,
    kind: Kind,
    prompt: str,
    response: str | None,
    items: tuple[int | None, int | None],
    source: str | None,
    wanted: int | None,
) -> int:
    """The task of these texts, made where it is new; one that is to be asked about stays so."""
    identity = json.dumps([kind, prompt, response, *items])
    digest = hashlib.sha256(identity.encode()).digest()
    found = db.execute("SELECT id FROM tasks WHERE digest = ?", (digest,)).fetchone()
    if found:
        return int(found["id"])
    share = int.from_bytes(digest[:6], "big") / 2**48
    values = (kind, digest, prompt, response, *items, source, share, wanted)
    made = db.execute(
        "INSERT INTO tasks (kind, digest, prompt, response, item_0, item_1, source, share, wanted)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    )
    return int(made.lastrowid or 0)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
