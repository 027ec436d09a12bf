"""A first look in the terminal: a few conversations, judged by the bundled model.

python -m demo.first_look
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import resources

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from guardrail import Action, Guard, GuardrailError, Pair, Severity, Verdict

__all__ = ["conversations", "main", "table"]

ACTION_STYLE = {
    Action.ALLOW: "green",
    Action.FLAG: "yellow",
    Action.REDACT: "magenta",
    Action.REGENERATE: "cyan",
    Action.REFUSE: "bold red",
}
SEVERITY_STYLE = {
    Severity.NONE: "dim",
    Severity.MINOR: "yellow",
    Severity.MODERATE: "dark_orange",
    Severity.SEVERE: "bold red",
}


def conversations() -> list[tuple[str, Pair]]:
    """What each conversation is about, and the conversation."""
    text = resources.files("demo").joinpath("conversations.json").read_text(encoding="utf-8")
    return [(c["about"], Pair(c["prompt"], c.get("response"))) for c in json.loads(text)]


def table(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> Table:
    """One row per judged text; `ms` is the time of its check."""
    grid = Table("side", "text", "severity", "category", "action", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("ms", justify="right")
    for pair, verdict in zip(pairs, verdicts, strict=True):
        top = verdict.reasons[0] if verdict.reasons else None
        grid.add_row(
            Text(verdict.direction.value, "dim"),
            Text(textwrap.shorten(pair.text, 56, placeholder="...")),
            Text(verdict.severity.label, SEVERITY_STYLE[verdict.severity]),
            top.category.value if top else Text("-", "dim"),
            Text(verdict.action.value, ACTION_STYLE[verdict.action]),
            f"{verdict.latency_ms:.1f}",
        )
    return grid


def main() -> None:
    try:
        started = time.perf_counter()
        guard = Guard()
        opened = time.perf_counter() - started
    except GuardrailError as error:
        sys.exit(f"first look: {error}")
    pairs = [pair for _, pair in conversations()]
    guard.check("warm up")  # the first inference allocates; its time says nothing of the next
    verdicts = [guard.check(pair.prompt, pair.response) for pair in pairs]
    terminal = Console()
    wide = terminal if terminal.is_terminal else Console(width=120)
    wide.print(table(pairs, verdicts))
    wide.print(
        f"model {guard.moderator.id}, opened in {opened * 1000:.0f} ms, "
        f"policy {guard.policy.id}, all of it on this machine",
        style="dim",
        highlight=False,
    )
    if failed := [v.error for v in verdicts if v.degraded]:
        sys.exit(f"first look: {len(failed)} texts could not be judged: {failed[0]}")


if __name__ == "__main__":
    main()
