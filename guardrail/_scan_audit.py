"""What a scan writes to an audit log: each verdict once, in order, however often it is killed.

Verdicts are logged, and on disk, before their rows are. A kill between the two leaves verdicts in
the log whose rows the next run judges again: the scan's state says where in the log to look for
them, and they are not logged again.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from guardrail._audit_chain import Link, read_row
from guardrail._audit_files import UNREADABLE, AuditError, reading
from guardrail._scan_local import Judged
from guardrail.audit import AuditLog
from guardrail.verdict import Pair

__all__ = ["ScanAudit"]

_UNSTABLE = ("latency_ms", "error")  # an error is cut in a log without texts


class ScanAudit:
    """Logs what one scan decided.

    left: `state` as it was saved with the last rows that are safe; None when there are none.

    Raises AuditError, as `write` does.
    """

    def __init__(self, log: AuditLog, left: Mapping[str, Any] | None) -> None:
        self._log = log
        self._ahead: deque[tuple[int, _Said]] = deque()  # logged already: number and what it says
        self._pids: list[int] = []
        self._after = Link.parse(log.head()).seq
        if left is not None:
            self._after, self._pids = int(left["after"]), list(left["pids"])
            self._ahead.extend(self._unsaved())
        self._pids.append(os.getpid())

    @property
    def state(self) -> dict[str, Any]:
        """Beyond which row of the log those of `pids` may be of rows that are not safe yet."""
        return {"after": self._after, "pids": self._pids}

    def write(self, judged: Judged) -> None:
        """Log the verdicts of these rows, but those that an earlier run has logged."""
        for row, outcome in judged:
            if isinstance(outcome, str) or isinstance(row.pairs, str):
                continue  # not judged: there is no verdict
            for name, verdict in outcome.items():
                pair = row.pairs[name]
                if not self._is_logged(pair, verdict.to_json()):
                    self._log(pair, verdict)
        self._log.sync()
        if not self._ahead:
            self._after, self._pids = Link.parse(self._log.head()).seq, [os.getpid()]

    def _is_logged(self, pair: Pair, verdict: Mapping[str, Any]) -> bool:
        if not self._ahead:
            return False
        response = None if pair.response is None else self._log.digest(pair.response)
        number, logged = self._ahead[0]
        said = _said(self._log.digest(pair.prompt), response, verdict)
        if said.texts != logged.texts:
            self._ahead.clear()  # nobody knows which rows the others are of
            return False
        self._ahead.popleft()
        self._after = number
        return said == logged  # else it is decided otherwise this time, and logged again

    def _unsaved(self) -> list[tuple[int, _Said]]:
        """What this scan has logged after the rows that are safe. Reads the newest files only."""
        found: deque[tuple[int, _Said]] = deque()
        with reading(self._log.path) as (segments, _):
            for segment in reversed(segments):
                try:
                    rows = [row for line in segment.lines() if (row := read_row(line))]
                except UNREADABLE as error:
                    raise AuditError(f"{segment.path}: cannot be read: {error}") from error
                found.extendleft(
                    (row["seq"], _said_by(row))
                    for row in reversed(rows)
                    if row["seq"] > self._after and row.get("pid") in self._pids
                )
                if rows and rows[0]["seq"] <= self._after + 1:
                    break
        return list(found)


class _Said(NamedTuple):
    """A row of the log, but for what differs from run to run. texts: digests of prompt and
    response."""

    texts: tuple[str, str | None]
    verdict: str


def _said_by(row: Mapping[str, Any]) -> _Said:
    response = row["response"]
    return _said(row["prompt"]["hmac"], response and response["hmac"], row["verdict"])


def _said(prompt: str, response: str | None, verdict: Mapping[str, Any]) -> _Said:
    kept = {key: value for key, value in verdict.items() if key not in _UNSTABLE}
    return _Said((prompt, response), json.dumps(kept, sort_keys=True))
