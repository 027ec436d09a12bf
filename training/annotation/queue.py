"""Whose turn it is: what the annotation page asks of a store, one call per click.

A task is leased to the (annotator, session) that opened it, so that two people, or two browsers of
one person, never work on the same turn; a lease that runs out gives the task back. Nothing here
keeps state of its own: any number of processes may serve one store.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.annotation.labels import (
    AnnotationError,
    Kind,
    Label,
    Settings,
    StoredLabel,
    Suggestion,
    Task,
    read_label,
)
from training.annotation.rows import read_labels, recount
from training.annotation.rules import (
    WANTED,
    check_complete,
    condition_of,
    counts,
    disputed,
    held,
    lease,
    log_event,
    next_open,
    person,
    read_task,
    revealed,
    suggestion_of,
    write_answer,
)
from training.annotation.store import Store

# Work with pauses up to this long is one stretch: beyond it, the annotator had a break.
_PAUSE = 300.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where things stand. done, total: tasks; labels by this annotator: mine.

    left: tasks that this annotator could be given now or later, per kind.
    skipped: open tasks that somebody skipped; disputed: waiting for an adjudicator.
    rest: why a break is a good idea now, or None.
    """

    done: dict[Kind, int]
    total: dict[Kind, int]
    left: dict[Kind, int]
    mine: int
    skipped: int
    disputed: int
    minutes: float
    rest: str | None


class Queue:
    """The turns of a store, under its settings."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def settings(self) -> Settings:
        return self.store.settings()

    # --- taking a turn ---------------------------------------------------------------------------

    def claim(self, annotator: str, *, session: str = "", kind: Kind | None = None) -> Task | None:
        """The next task for this annotator, theirs for `lease_seconds`; None when none is left.

        The task that the session holds already comes again (a reloaded page, a crash). With no
        `kind`, items come before pairs.
        """
        settings, now = self.settings, self.store.clock()
        with self.store.write() as db:
            person(db, annotator)
            task_id = held(db, annotator, session, settings, now, adjudicates=False, kind=kind)
            for one in (kind,) if kind else ("item", "pair"):
                if task_id is None:
                    task_id = next_open(db, one, annotator, settings, now)
            if task_id is None:
                return None
            lease(db, task_id, annotator, session, settings, now, adjudicates=False)
            return read_task(db, task_id, annotator, settings)

    def renew(self, annotator: str, task_id: int, *, session: str = "") -> None:
        """Go on with a task that takes longer than its lease; call it now and then."""
        settings, now = self.settings, self.store.clock()
        with self.store.write() as db:
            db.execute(
                "UPDATE claims SET expires = ? WHERE task_id = ? AND annotator = ? AND session = ?",
                (now + settings.lease_seconds, task_id, annotator, session),
            )

    def release(self, annotator: str, *, session: str = "") -> None:
        """Give back what the session holds (the annotator leaves)."""
        with self.store.write() as db:
            db.execute(
                "DELETE FROM claims WHERE annotator = ? AND session = ?", (annotator, session)
            )

    def reveal(self, annotator: str, task_id: int, first: Mapping[str, Any]) -> Suggestion | None:
        """What a machine says of the item; None where none has said anything.

        first: what the annotator has clicked so far, of safe, severity, categories; it is kept, so
        that anchoring can be measured.
        Raises AnnotationError where the task is blind for this annotator, or nothing was clicked.
        """
        settings = self.settings
        with self.store.write() as db:
            if condition_of(annotator, task_id, settings) == "blind":
                raise AnnotationError("this text is labelled blind: no suggestion is shown for it")
            if not first:
                raise AnnotationError("answer first: the suggestion is shown after a first click")
            suggestion = suggestion_of(read_labels(db, "item", task_id))
            if suggestion is not None and not revealed(db, annotator, task_id):
                data = {"first": dict(first), "suggested": suggestion.label.to_json()}
                log_event(db, self.store.clock(), annotator, task_id, "reveal", data)
            return suggestion

    # --- answering -------------------------------------------------------------------------------

    def save(
        self,
        annotator: str,
        task_id: int,
        label: Label,
        *,
        session: str = "",
        note: str | None = None,
    ) -> None:
        """Keep an answer; an earlier one of this annotator on the task stops counting.

        Saved even when the lease has run out: work that was done is never thrown away.
        Raises AnnotationError on an incomplete answer.
        """
        settings = self.settings
        with self.store.write() as db:
            person(db, annotator)
            task = read_task(db, task_id, annotator, settings)
            check_complete(task, label, settings)
            write_answer(db, self.store.clock(), annotator, session, task, label, note)

    def skip(
        self, annotator: str, task_id: int, *, session: str = "", reason: str | None = None
    ) -> None:
        """Leave a task to others; it does not come back to this annotator."""
        settings = self.settings
        with self.store.write() as db:
            person(db, annotator)
            task = read_task(db, task_id, annotator, settings)
            write_answer(db, self.store.clock(), annotator, session, task, None, reason)

    def undo(self, annotator: str, *, session: str = "") -> Task | None:
        """Take back the annotator's last answer or skip, adjudications included, and open its task
        again with the answer in it; None when there is nothing left to take back."""
        settings, now = self.settings, self.store.clock()
        with self.store.write() as db:
            last = db.execute(
                "SELECT l.*, t.kind FROM labels l JOIN tasks t ON t.id = l.task_id"
                " WHERE l.annotator = ? AND l.ended IS NULL AND l.condition IS NOT NULL"
                " ORDER BY l.id DESC LIMIT 1",  # one from a file has no condition
                (annotator,),
            ).fetchone()
            if last is None:
                return None
            db.execute("UPDATE labels SET ended = ? WHERE id = ?", (now, last["id"]))
            recount(db, last["task_id"])
            log_event(db, now, annotator, last["task_id"], "undo", {"label": last["id"]})
            db.execute(
                "DELETE FROM claims WHERE annotator = ? AND session = ?", (annotator, session)
            )
            adjudicates = bool(last["adjudicated"])
            lease(db, last["task_id"], annotator, session, settings, now, adjudicates=adjudicates)
            task = read_task(db, last["task_id"], annotator, settings)
            value = last["value"]
            answer = read_label(task.kind, value) if value else None
            return replace(task, answer=answer, adjudicating=adjudicates)

    # --- adjudication ----------------------------------------------------------------------------

    def claim_disputed(
        self,
        adjudicator: str,
        *,
        session: str = "",
        kind: Kind | None = None,
        machines: bool = False,
    ) -> tuple[Task, list[StoredLabel]] | None:
        """The next task on which people disagree, with their labels; None when there is none.

        machines: a person and an AI annotator who disagree make a dispute too.
        """
        settings, now = self.settings, self.store.clock()
        with self.store.write() as db:
            if not person(db, adjudicator):
                raise AnnotationError(f"{adjudicator}: is no adjudicator")
            task_id = held(db, adjudicator, session, settings, now, adjudicates=True, kind=kind)
            if task_id is None:
                leased = {
                    row["task_id"]
                    for row in db.execute(
                        "SELECT task_id FROM claims WHERE adjudicates AND expires > ?", (now,)
                    )
                }
                open_ = (t for t in disputed(db, kind, machines) if t not in leased)
                task_id = next(open_, None)
            if task_id is None:
                return None
            lease(db, task_id, adjudicator, session, settings, now, adjudicates=True)
            task = read_task(db, task_id, adjudicator, settings)
            said = [s for s in read_labels(db, None, task_id) if counts(s, machines)]
            return replace(task, adjudicating=True), said

    def adjudicate(
        self,
        adjudicator: str,
        task_id: int,
        label: Label,
        *,
        session: str = "",
        note: str | None = None,
    ) -> None:
        """Settle a task: from now on this label stands for it, whatever others said."""
        settings = self.settings
        with self.store.write() as db:
            if not person(db, adjudicator):
                raise AnnotationError(f"{adjudicator}: is no adjudicator")
            task = read_task(db, task_id, adjudicator, settings)
            check_complete(task, label, settings)
            now = self.store.clock()
            write_answer(db, now, adjudicator, session, task, label, note, adjudicates=True)

    # --- overview --------------------------------------------------------------------------------

    def progress(self, annotator: str) -> Progress:
        settings = self.settings
        with self.store.read() as db:
            share, overlap = settings.overlap_share, settings.overlap_labels
            done: dict[Kind, int] = {"item": 0, "pair": 0}
            total: dict[Kind, int] = {"item": 0, "pair": 0}
            left: dict[Kind, int] = {"item": 0, "pair": 0}
            rows = db.execute(
                f"SELECT kind, SUM({WANTED} > 0) AS total,"
                f" SUM({WANTED} > 0 AND (people >= {WANTED} OR settled)) AS done,"
                f" SUM(people < {WANTED} AND NOT settled AND NOT EXISTS (SELECT 1 FROM labels l"
                "   WHERE l.task_id = t.id AND l.annotator = :me AND l.ended IS NULL)) AS remain"
                " FROM tasks t GROUP BY kind",
                {"share": share, "overlap": overlap, "me": annotator},
            )
            for row in rows:
                kind: Kind = row["kind"]
                total[kind], done[kind], left[kind] = row["total"], row["done"], row["remain"]
            mine = db.execute(
                "SELECT COUNT(*) FROM labels WHERE annotator = ? AND ended IS NULL"
                " AND value IS NOT NULL AND NOT adjudicated",
                (annotator,),
            ).fetchone()[0]
            skipped = db.execute(
                f"SELECT COUNT(*) FROM tasks t WHERE people < {WANTED} AND NOT settled AND EXISTS"
                " (SELECT 1 FROM labels l WHERE l.task_id = t.id AND l.ended IS NULL"
                "  AND l.value IS NULL)",
                {"share": share, "overlap": overlap},
            ).fetchone()[0]
            minutes, harmful = _stretch(db, annotator, self.store.clock())
            rest = _rest(minutes, harmful, settings)
            count = len(disputed(db, None, machines=False))
        return Progress(done, total, left, mine, skipped, count, minutes, rest)

    def had_break(self, annotator: str) -> None:
        """The annotator had a break: the clock of work starts anew."""
        with self.store.write() as db:
            log_event(db, self.store.clock(), annotator, None, "break", {})


def _stretch(db: sqlite3.Connection, annotator: str, now: float) -> tuple[float, int]:
    """Minutes worked since the last break, and how many unsafe texts came last in a row."""
    rows = db.execute(
        "SELECT e.at, e.kind, l.value FROM events e LEFT JOIN labels l ON l.task_id = e.task_id"
        " AND l.annotator = e.annotator AND l.ended IS NULL AND l.created = e.at"
        " WHERE e.annotator = ? ORDER BY e.id DESC LIMIT 500",
        (annotator,),
    )
    start, harmful, counting = now, 0, True
    for row in rows:
        if row["kind"] == "break" or start - row["at"] > _PAUSE:
            break
        start = row["at"]
        if row["kind"] == "label" and counting:
            value = json.loads(row["value"]) if row["value"] else {}
            counting = value.get("safe") is False
            harmful += counting
    return (now - start) / 60, harmful


def _rest(minutes: float, harmful: int, settings: Settings) -> str | None:
    if harmful >= settings.break_harmful:
        return f"{harmful} unsafe texts in a row: look at something else for a while"
    if minutes >= settings.break_minutes:
        return f"{minutes:.0f} minutes without a break: take one"
    return None
