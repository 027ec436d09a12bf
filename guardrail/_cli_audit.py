"""`guardrail audit`: verify a log's chain, and look into it."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from guardrail._cli import UsageError, complain, text_of
from guardrail._printable import escaped, printable
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action

if TYPE_CHECKING:
    from guardrail._audit_chain import Key

__all__ = ["audit_app"]

audit_app = typer.Typer(help="Check an audit log, and look into it.")

LogArgument = Annotated[Path, typer.Argument(metavar="LOG", help="The log, e.g. audit.jsonl.")]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="The file with its key; LOG.key if left out.")
]
SeverityWord = Literal["none", "minor", "moderate", "severe"]
_AGO = re.compile(r"(\d+)([smhdw])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@audit_app.command("verify")
def audit_verify(
    log: LogArgument,
    key: KeyOption = None,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="HEAD", help="A head printed earlier and kept elsewhere: SEQ:HASH, or a file."
        ),
    ] = None,
    pruned: Annotated[
        bool, typer.Option("--pruned", help="Accept that the oldest files were removed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Check that nothing in a log was edited, removed, added, moved or cut off. That log and head
    were both put back to an older copy is found with --expect only. Exits 0 when all is as it was
    written, 1 when not, 2 when it cannot be told."""
    from guardrail.audit import AuditError, verify

    anchor = _anchor(expect)
    try:
        with _progress(log) as advance:
            report = verify(log, key, expect=anchor, pruned=pruned, progress=advance)
    except (AuditError, ValueError) as error:
        raise UsageError(str(error)) from None
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        for problem in report.problems:
            print(printable(str(problem)))
        if report.more:
            print(f"... and {report.more:,} more")
        if report.torn:
            print(f"{report.torn:,} bytes of an unfinished row at the end")
        found = f"{report.rows:,} rows in {report.files} files"
        print(f"whole: {found}, head {report.head}" if report.ok else f"BROKEN: {found}")
    if not report.ok:
        raise typer.Exit(1)


def _anchor(expect: str | None) -> str | None:
    """The head itself, or the last word of a file, as `verify` printed it."""
    if expect is not None and not expect.strip():
        raise UsageError("--expect is empty: give a head, SEQ:HASH, or a file that holds one")
    if expect is None or (":" in expect and not Path(expect).is_file()):
        return expect
    try:
        words = Path(expect).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--expect {expect}: neither SEQ:HASH nor a readable file: {why}"
        ) from None
    if not words:
        raise UsageError(f"--expect {expect}: the file is empty")
    return words[-1]


@contextmanager
def _progress(log: Path) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of a log, on a terminal; no bar where files are compressed."""
    from guardrail._audit_files import Names
    from guardrail._render import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda size: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    files = [*(path for _, path in Names(log).full()), log]
    total = sum(path.stat().st_size for path in files if path.exists())
    packed = any(path.suffix == ".gz" for path in files)
    with Progress(BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=out) as bar:
        task = bar.add_task(log.name, total=None if packed else total)
        waiting = 0

        def advance(size: int) -> None:
            nonlocal waiting
            waiting += size
            if waiting > 1 << 20:
                bar.advance(task, waiting)
                waiting = 0

        yield advance


@audit_app.command("show")
def audit_show(
    log: LogArgument,
    action: Annotated[
        list[Action] | None, typer.Option(help="Only these actions; may be repeated.")
    ] = None,
    category: Annotated[
        list[Category] | None,
        typer.Option(case_sensitive=False, help="Only rows that hold these; may be repeated."),
    ] = None,
    severity: Annotated[
        SeverityWord | None, typer.Option(help="Only rows of this severity, or graver.")
    ] = None,
    direction: Annotated[Direction | None, typer.Option(help="Only prompts, or answers.")] = None,
    since: Annotated[
        str | None, typer.Option(help="A time (2026-01-31, 2026-01-31T12:00), or 90m, 2h, 7d ago.")
    ] = None,
    degraded: Annotated[
        bool, typer.Option("--degraded", help="Only rows in which a stage had failed.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(help="Only rows on exactly this text, found by its digest; - reads stdin."),
    ] = None,
    key: KeyOption = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last so many of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rows as they are, a line each.")] = (
        False
    ),
) -> None:
    """Show the rows of a log, oldest first. Shows what is written; `verify` says whether it is
    what was written."""
    tests: list[_Test] = []
    if action:
        tests.append(lambda row: row["verdict"]["action"] in action)
    if category:
        tests.append(lambda row: any(r["category"] in category for r in row["verdict"]["reasons"]))
    if severity:
        least = Severity.from_label(severity)
        tests.append(lambda row: Severity.from_label(row["verdict"]["severity"]) >= least)
    if direction:
        tests.append(lambda row: row["verdict"]["direction"] == direction)
    if since:
        start = _moment(since)
        tests.append(lambda row: datetime.fromisoformat(row["time"]) >= start)
    if degraded:
        tests.append(lambda row: row["verdict"]["degraded"] is True)
    if text is not None:
        tests.append(_about(text_of("--text", text) or "", log, key))

    from guardrail.audit import AuditError

    write = _as_json if as_json else _as_line
    odd: list[str] = []
    try:
        found = _chosen(log, tests, odd)
        for n, row in enumerate(found if tail is None else deque(found, tail)):
            if n == 0 and not as_json:
                print(_COLUMNS)
            print(write(row))
    except AuditError as error:
        raise UsageError(str(error)) from None
    if odd:
        complain(f"{len(odd)} lines are no rows, the first at {odd[0]}: see audit verify", 0)


_Row = Mapping[str, Any]
_Test = Callable[[_Row], bool]
_COLUMNS = f"{'row':>8}  {'time (UTC)':<19}  {'side':<6}  {'action':<10}  {'severity':<8}  held"


def _chosen(log: Path, tests: Sequence[_Test], odd: list[str]) -> Iterator[_Row]:
    """The rows that pass every test; where what is no row stands goes to `odd`."""
    from guardrail.audit import rows

    for where, row in rows(log):
        try:
            if row is None:
                odd.append(where)
            elif all(test(row) for test in tests) and _as_line(row):
                yield row
        except (KeyError, TypeError, ValueError, OverflowError):  # sealed, by no version we know
            odd.append(where)


def _as_json(row: _Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def _as_line(row: _Row) -> str:
    said = row["verdict"]
    held = ", ".join(f"{r['category']} {r['probability']:.2f}" for r in said["reasons"])
    if said["degraded"]:
        held = f"degraded: {said.get('error')}"
    elif said.get("unreadable") and not held:
        held = "unreadable"
    time = datetime.fromisoformat(row["time"]).astimezone(UTC).isoformat(" ", "seconds")[:19]
    cells = (f"{said['direction']:<6}", f"{said['action']:<10}", f"{said['severity']:<8}", held)
    return f"{row['seq']:>8}  {time}  {'  '.join(map(escaped, cells))}".rstrip()


def _about(text: str, log: Path, key: Path | None) -> _Test:
    """Rows whose prompt or response is this text, told by its digest under the log's key."""
    from guardrail._audit_files import AuditError, Names, open_key

    try:
        names = Names(log)
        secret = open_key(key, names)
        fits = _seals(secret, log)
    except AuditError as error:
        raise UsageError(str(error)) from None
    if not fits:
        raise UsageError(
            f"{key or names.key}: another key than that of {log}, so that no text can be found: "
            "give the log's own with --key"
        )
    digest = secret.digest(text)
    return lambda row: any(
        side is not None and side["hmac"] == digest for side in (row["prompt"], row["response"])
    )


def _seals(key: Key, log: Path) -> bool:
    """Whether a row bears the key's seal; True of a log without rows. Raises AuditError."""
    from guardrail._audit_chain import unseal
    from guardrail._audit_files import UNREADABLE, AuditError, reading

    empty = True
    with reading(log) as (segments, _):
        try:
            for line in (line for segment in segments for line in segment.lines()):
                empty = False
                with suppress(ValueError):
                    unseal(key, line)
                    return True
        except UNREADABLE as error:
            raise AuditError(f"{log}: cannot be read to its end: {error}") from error
    return empty


def _moment(since: str) -> datetime:
    """A time as written, local where it names no zone; or so long ago."""
    ago = _AGO.match(since)
    try:
        if ago:
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        at = datetime.fromisoformat(since)
    except (ValueError, OverflowError):
        raise UsageError(
            f"--since {since!r}: neither a time (2026-01-31, 2026-01-31T12:00) nor how long ago "
            "(90m, 2h, 7d)"
        ) from None
    try:
        return at.astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # at an end of time, no zone moves it
        return at.replace(tzinfo=UTC)
