"""The annotation store: one SQLite file that several processes may write at once.

Owns the tables and what must hold between them; knows nothing of turns and settings, which is
`queue`'s. Write-ahead log, full sync and one transaction per act: what was said to be saved is
saved, and a crash leaves the last whole act. Nothing is deleted but claims: an undone or replaced
label stays, with the time it stopped counting.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.annotation.labels import (
    AnnotationError,
    Kind,
    Record,
    Role,
    Settings,
    StoredLabel,
)
from training.annotation.rows import add_record, read_labels

VERSION = 1
_UNLISTABLE = ("Cc", "Zl", "Zp", "Cs")  # controls, ends of lines, what UTF-8 cannot say

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE annotators (
  name TEXT PRIMARY KEY, role TEXT NOT NULL, adjudicates INTEGER NOT NULL DEFAULT 0,
  key_hash TEXT, created REAL NOT NULL);
-- people: labels that count towards `wanted`; share: where the task falls in [0, 1), for overlap
CREATE TABLE tasks (
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, digest BLOB NOT NULL UNIQUE,
  prompt TEXT NOT NULL, response TEXT,
  item_0 INTEGER REFERENCES tasks, item_1 INTEGER REFERENCES tasks,
  source TEXT, share REAL NOT NULL, priority REAL NOT NULL DEFAULT 0, why TEXT,
  wanted INTEGER, people INTEGER NOT NULL DEFAULT 0, settled INTEGER NOT NULL DEFAULT 0);
CREATE INDEX tasks_in_turn ON tasks (kind, priority DESC, id);
CREATE INDEX tasks_answered ON tasks (people) WHERE people > 0;
CREATE TABLE imports (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL UNIQUE, at REAL NOT NULL);
CREATE TABLE records (
  id INTEGER PRIMARY KEY, import_id INTEGER NOT NULL REFERENCES imports,
  task_id INTEGER NOT NULL REFERENCES tasks, sources TEXT NOT NULL, origin TEXT,
  extra TEXT NOT NULL, raw TEXT NOT NULL);
-- value NULL: skipped; side: which answer of an imported pair; ended: undone or replaced
CREATE TABLE labels (
  id INTEGER PRIMARY KEY, task_id INTEGER NOT NULL REFERENCES tasks,
  annotator TEXT NOT NULL REFERENCES annotators, value TEXT, note TEXT,
  adjudicated INTEGER NOT NULL DEFAULT 0, record_id INTEGER REFERENCES records, side INTEGER,
  position INTEGER, condition TEXT, revealed INTEGER NOT NULL DEFAULT 0, first TEXT,
  suggested TEXT, seconds REAL, detail TEXT, created REAL NOT NULL, ended REAL);
CREATE INDEX labels_of_task ON labels (task_id, annotator);
CREATE INDEX labels_of_annotator ON labels (annotator, id);
CREATE INDEX labels_of_record ON labels (record_id);
CREATE TABLE claims (
  task_id INTEGER NOT NULL REFERENCES tasks, annotator TEXT NOT NULL REFERENCES annotators,
  session TEXT NOT NULL, adjudicates INTEGER NOT NULL, since REAL NOT NULL, expires REAL NOT NULL,
  PRIMARY KEY (task_id, annotator, adjudicates));
CREATE TABLE events (
  id INTEGER PRIMARY KEY, at REAL NOT NULL, annotator TEXT NOT NULL, task_id INTEGER,
  kind TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX events_of_annotator ON events (annotator, task_id, kind);
"""


@dataclass(frozen=True, slots=True)
class Annotator:
    name: str
    role: Role
    adjudicates: bool


class Store:
    """An open store. Every method is one transaction; safe in threads and between processes."""

    def __init__(
        self, path: Path | str, *, create: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = Path(path)
        self.clock = clock
        if not create and not self.path.is_file():
            raise AnnotationError(f"{path}: no such store: make one with `import`")
        if not self.path.parent.is_dir():
            raise AnnotationError(f"{self.path.parent}: no such folder: make it first")
        if self._version() == 0:
            with self.write() as db:
                if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
        if self._version() != VERSION:
            raise AnnotationError(f"{path}: is no annotation store of version {VERSION}")
        # While one connection is open, the others do not fold the log back each time they close.
        keeper = sqlite3.connect(self.path, check_same_thread=False)
        keeper.execute("SELECT 1 FROM meta").fetchone()
        weakref.finalize(self, keeper.close)

    def _version(self) -> int:
        with self.read() as db:  # does not wait for one who writes
            return int(db.execute("PRAGMA user_version").fetchone()[0])

    # --- transactions ----------------------------------------------------------------------------

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A consistent view: later writes of others are not seen in it."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that waits for its turn, and is whole or not at all."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            try:
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA foreign_keys = ON")
                db.execute(begin)
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            finally:
                db.close()
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise AnnotationError(
                    f"{self.path}: another command, such as a long import, is writing to it: try "
                    "again when that is done"
                ) from error
            raise AnnotationError(f"{self.path}: {error}: is it a store, and writable?") from error

    # --- settings and annotators -----------------------------------------------------------------

    def settings(self) -> Settings:
        with self.read() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'settings'").fetchone()
        return Settings.from_json(json.loads(row["value"])) if row else Settings()

    def set_settings(self, settings: Settings) -> None:
        with self.write() as db:
            value = json.dumps(settings.to_json())
            db.execute("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (value,))

    def add_person(self, name: str, *, adjudicates: bool = False) -> str:
        """A new annotator; returns the key, which is nowhere else: only its hash is kept."""
        if not name.strip() or ":" in name:
            raise AnnotationError(f"{name!r}: a name is not blank and has no colon")
        if any(unicodedata.category(c) in _UNLISTABLE for c in name):
            raise AnnotationError(
                f"{name!r}: a name is one line of text: leave out control characters"
            )
        key = secrets.token_urlsafe(24)
        with self.write() as db:
            if db.execute("SELECT 1 FROM annotators WHERE name = ?", (name,)).fetchone():
                raise AnnotationError(f"{name}: is an annotator already: choose another name")
            db.execute(
                "INSERT INTO annotators VALUES (?, 'human', ?, ?, ?)",
                (name, adjudicates, _hash(key), self.clock()),
            )
        return key

    def new_key(self, name: str) -> str:
        """Another key for a person who lost theirs; the old one is worth nothing from now on."""
        key = secrets.token_urlsafe(24)
        with self.write() as db:
            found = db.execute(
                "UPDATE annotators SET key_hash = ? WHERE name = ? AND role = 'human'",
                (_hash(key), name),
            )
            if not found.rowcount:
                raise AnnotationError(f"{name}: no such annotator")
        return key

    def sign_in(self, name: str, key: str) -> Annotator | None:
        """The person with this name and key; None when either is wrong."""
        with self.read() as db:
            row = db.execute(
                "SELECT * FROM annotators WHERE name = ? AND role = 'human'", (name,)
            ).fetchone()
        known = row["key_hash"] if row else _hash("")
        if not hmac.compare_digest(known, _hash(key)) or row is None:
            return None
        return Annotator(row["name"], row["role"], bool(row["adjudicates"]))

    def annotators(self) -> list[Annotator]:
        with self.read() as db:
            rows = db.execute("SELECT * FROM annotators ORDER BY created, name").fetchall()
        return [Annotator(r["name"], r["role"], bool(r["adjudicates"])) for r in rows]

    # --- records in ------------------------------------------------------------------------------

    def add(
        self, records: Iterable[Record], *, name: str, digest: str, queue_labelled: bool = False,
        person: str | None = None,
    ) -> int:  # fmt: skip
        """Take in the rows of one file, all or none; returns how many there were. One without any
        may be taken in again, read otherwise.

        Texts that are here already stay one task. A row that comes with labels is asked about only
        with `queue_labelled`, or when `next` or a suspected error brings it up.
        person: an annotator who gave these labels, elsewhere: they count as if given here.
        Raises AnnotationError when the file with this digest was taken in before.
        """
        count = 0
        with self.write() as db:
            before = db.execute("SELECT at FROM imports WHERE digest = ?", (digest,)).fetchone()
            if before:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(before["at"]))
                raise AnnotationError(f"{name}: was imported on {when}: nothing done")
            known = db.execute(
                "SELECT 1 FROM annotators WHERE name = ? AND role = 'human'", (person,)
            ).fetchone()
            if person is not None and not known:
                raise AnnotationError(f"{person}: no such annotator: add them first")
            import_id = db.execute(
                "INSERT INTO imports (name, digest, at) VALUES (?, ?, ?)",
                (name, digest, self.clock()),
            ).lastrowid
            for record in records:
                add_record(
                    db, record, int(import_id or 0), self.clock(),
                    queue_labelled=queue_labelled, person=person,
                )  # fmt: skip
                count += 1
            if not count:
                db.execute("DELETE FROM imports WHERE id = ?", (import_id,))
        return count

    # --- labels out ------------------------------------------------------------------------------

    def labels(self, kind: Kind | None = None, task_id: int | None = None) -> list[StoredLabel]:
        """Every label that counts, oldest first."""
        with self.read() as db:
            return read_labels(db, kind, task_id)

    def texts(self) -> dict[int, tuple[str, str | None]]:
        """(prompt, response) of every item."""
        with self.read() as db:
            rows = db.execute("SELECT id, prompt, response FROM tasks WHERE kind = 'item'")
            return {row["id"]: (row["prompt"], row["response"]) for row in rows}


def _hash(key: str) -> str:
    # Keys are 192 random bits: a slow, salted hash would protect nothing more.
    return hashlib.sha256(key.encode()).hexdigest()
