"""What the tests of the audit log share: a key, verdicts, and logs filled with rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardrail import Action, Category, Direction, Pair, Severity, Verdict
from guardrail.audit import AuditLog, rows

KEY = b"0123456789abcdef"
WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "fool": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
}
VERDICT = Verdict(Action.ALLOW, Direction.INPUT, policy="p@1")


def fill(path: Path, count: int, **options: Any) -> AuditLog:
    log = AuditLog(path, key=KEY, fsync="never", **options)
    for n in range(count):
        log(Pair(f"text {n}"), VERDICT)
    return log


def data(path: Path) -> list[dict[str, Any]]:
    return [row or {"no row": where} for where, row in rows(path)]


# Appends rows `writer:n`, and says each on stdout when it is safe.
WRITER = """
import sys
from pathlib import Path
from guardrail import Action, Direction, Pair, Verdict
from guardrail.audit import AuditLog
path, writer, count, *first = sys.argv[1:]
log = AuditLog(Path(path), key=b"0123456789abcdef", consent=True, fsync="never", max_bytes=9000,
               timeout=60)
start = int(first[0]) if first else 0
for n in range(start, start + int(count)):
    log(Pair(f"{writer}:{n}", "y" * 3000), Verdict(Action.ALLOW, Direction.OUTPUT))
    print(n, flush=True)
"""
