"""Verifying an audit log: walk the chain over all its files, hold it to its head and to an anchor.

What is found is a list of problems, not an error: a verifier that stops at the first would help
whoever hides the second.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardrail._audit_chain import Key, Link, Row, read_head, read_row, unseal
from guardrail._audit_files import UNREADABLE, Names, Segment, open_key, reading

__all__ = ["Problem", "Report", "verify"]

_LISTED = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written: where (`file:line`, or a file), and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(slots=True)
class Report:
    """What a verification found.

    rows: how many rows were read, and files of them; first: number of the first row.
    head: where the chain ends, as `SEQ:HASH`, to be kept elsewhere and given as `expect` later.
    torn: bytes of a row that a crash left unfinished at the very end; the next writer puts them
        aside. They are no problem: no row is missing for them.
    problems: the first 100; `more` counts the rest.
    """

    rows: int = 0
    files: int = 0
    first: int = 1
    head: str = ""
    torn: int = 0
    problems: list[Problem] = field(default_factory=list)
    more: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, where: str, what: str) -> None:
        if len(self.problems) < _LISTED:
            self.problems.append(Problem(where, what))
        else:
            self.more += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "rows": self.rows,
            "files": self.files,
            "first": self.first,
            "head": self.head,
            "torn_bytes": self.torn,
            "problems": [{"where": p.where, "what": p.what} for p in self.problems],
            "more_problems": self.more,
        }


def verify(
    path: str | Path,
    key: Key | bytes | str | Path | None = None,
    *,
    expect: str | None = None,
    pruned: bool = False,
    progress: Callable[[int], None] = lambda size: None,
    lock: bool = True,
) -> Report:
    """Check every row of a log, its order, its head.

    key: as for `AuditLog`. expect: a `SEQ:HASH` from an earlier report, kept out of the log's
    reach: that row must still be there, and all before it as it was. pruned: the oldest files may
    have been removed. progress: called with the bytes of each line. lock: False for who holds it.

    Raises AuditError where there is no log or no key, ValueError for an `expect` that is none.
    """
    log = Path(path)
    anchor = None if expect is None else Link.parse(expect)
    with reading(log, lock=lock) as (segments, head):
        secret = key if isinstance(key, Key) else open_key(key, Names(log))
        walk = _Walk(secret, log, pruned=pruned)
        if walk.read_head(head):
            walk.read_rows(segments, anchor, progress)
            walk.compare_head()
            if anchor is not None:
                walk.compare_anchor(anchor)
    return walk.report


class _Walk:
    """One pass over a log. `last` is where the chain stands; after a problem it goes on from what
    the row says of itself, so that one change is one problem and not a thousand."""

    def __init__(self, key: Key, log: Path, *, pruned: bool) -> None:
        self.key, self.log, self.pruned = key, log, pruned
        self.report = Report()
        self.last = self.before = key.start()  # before: the link that the first row follows
        self.sealed: Link | None = None
        self.found: dict[int, str] = {0: self.last.hash}  # hashes of rows that are asked for

    def read_head(self, head: bytes | None) -> bool:
        """False where the key is another, so that every row would be a problem."""
        where = Names(self.log).head.name
        if head is None:
            self.report.add(where, "the head is missing: rows cut off at the end cannot be told")
            return True
        try:
            self.sealed = read_head(self.key, head)
        except ValueError as error:
            self.report.add(where, str(error))
            return "another key" not in str(error)
        return True

    def read_rows(
        self, segments: Sequence[Segment], anchor: Link | None, progress: Callable[[int], None]
    ) -> None:
        wanted = {link.seq for link in (self.sealed, anchor) if link is not None}
        self.report.files = len(segments)
        for segment in segments:
            name = segment.path.name
            try:
                for number, line in enumerate(segment.lines(), 1):
                    if not line.endswith(b"\n") and segment.path == self.log:
                        self.report.torn = len(line)
                    else:
                        self._read_row(f"{name}:{number}", line, wanted)
                    progress(len(line))
            except UNREADABLE as error:
                self.report.add(name, f"cannot be read to its end: {error}")
        self.report.head = str(self.last)

    def _read_row(self, where: str, line: bytes, wanted: Container[int]) -> None:
        try:
            row = unseal(self.key, line)
        except ValueError as error:
            self.report.add(where, str(error))
            data = read_row(line)
            if data is not None:
                self.last = Link(data["seq"], data["hash"])
            return
        if (row.link.seq - 1, row.prev) != (self.last.seq, self.last.hash):
            if self.report.rows or self.last.seq or row.link.seq <= 1:
                self.report.add(where, self._out_of_order(row.link.seq))
            else:
                self._begins_late(where, row)
        self.report.rows += 1
        self.last = row.link
        if row.link.seq in wanted:
            self.found[row.link.seq] = row.link.hash

    def _out_of_order(self, seq: int) -> str:
        last = self.last.seq
        if seq == last + 1:
            return f"row {seq} does not follow on the row {last} before it: that one was replaced"
        return f"row {seq} comes after row {last}: rows were removed, added or moved"

    def _begins_late(self, where: str, row: Row) -> None:
        self.report.first = row.link.seq
        self.before = Link(row.link.seq - 1, row.prev)
        self.found[self.before.seq] = self.before.hash
        if not self.pruned:
            self.report.add(
                where,
                f"the log begins with row {row.link.seq}: those before it were removed "
                "(--pruned, if that was you)",
            )

    def compare_head(self) -> None:
        if self.sealed is not None:
            self._compare(self.sealed, "the head was sealed over row")

    def compare_anchor(self, anchor: Link) -> None:
        if anchor.seq < self.before.seq:
            self.report.add(
                self.log.name, f"row {anchor.seq} of the expected head was removed: not comparable"
            )
        else:
            self._compare(anchor, "the expected head is row")

    def _compare(self, link: Link, whose: str) -> None:
        if link.seq > self.last.seq:
            what = f"{whose} {link.seq}, but the log ends with row {self.last.seq}: it was cut off"
            self.report.add(self.log.name, what)
        elif self.found.get(link.seq) != link.hash:
            what = f"{whose} {link.seq}, and that is another row now: the log was rewritten"
            self.report.add(self.log.name, what)
