"""`guardrail policy`: look at policies, check them, compare them, replay what was decided."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardrail._cli import UsageError
from guardrail._printable import printable
from guardrail.policy import Policy
from guardrail.taxonomy import Category
from guardrail.verdict import Action

if TYPE_CHECKING:  # these bring tables, or the model's libraries, along
    from guardrail._policy_diff import Change, Value
    from guardrail.replay import Replay, Tally

__all__ = ["policy_app"]

policy_app = typer.Typer(help="Look at policies, check and compare them.")


@policy_app.command("show")
def policy_show(
    policy: Annotated[str, typer.Argument(metavar="[NAME|FILE]")] = "balanced",
    every: Annotated[bool, typer.Option("--all", help="All 19 categories, differing or not.")] = (
        False
    ),
) -> None:
    """Print a policy's grid: direction x category x severity -> action."""
    loaded = Policy.load(policy)

    from guardrail._render import console, grid

    console().print(grid(loaded, every=every))


@policy_app.command("validate")
def policy_validate(policy: Annotated[str, typer.Argument(metavar="FILE")]) -> None:
    """Check a policy file; says `ok`, or what is wrong and where."""
    print(f"ok: {Policy.load(policy).id}")


@policy_app.command("diff")
def policy_diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A preset, or a file.")],
    after: Annotated[str, typer.Argument(metavar="B", help="A preset, or a file.")],
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of the changes.")] = False,
) -> None:
    """Every action and threshold that B decides otherwise than A, what is alike in one line. Exits
    like diff: 0 when both decide alike, 1 when not, 2 when one cannot be read."""
    from guardrail._policy_diff import changes

    found = changes(Policy.load(before), Policy.load(after))
    if as_json:
        print(json.dumps([change.to_json() for change in found], ensure_ascii=False, indent=1))
    elif found:
        _print_changes(found)
    else:
        print("no difference")
    if found:
        raise typer.Exit(1)


def _print_changes(found: Sequence[Change]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from guardrail._render import console

    colours = {"stricter": "red", "looser": "green", "other": ""}
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("direction", "category", "what", "from", "to", ""):
        table.add_column(column)
    for c in found:
        where = (c.direction.value if c.direction else "both", _named(c.categories))
        values = (Text(printable(_value(v))) for v in (c.before, c.after))
        table.add_row(*where, c.what, *values, Text(c.effect, colours[c.effect]))
    console().print(table)


def _value(value: Value) -> str:
    if value is None:
        return "model's own"
    if isinstance(value, Action):
        return value.value
    return f"{value:g}" if isinstance(value, float) else value or "(none)"


def _named(categories: Sequence[Category]) -> str:
    if len(categories) == len(Category):
        return "every category"
    if len(categories) > len(Category) / 2:
        return f"all but {', '.join(c.value for c in Category if c not in categories)}"
    return ", ".join(c.value for c in categories)


@policy_app.command("replay")
def policy_replay(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="An audit log, or the output of a scan.")
    ],
    policy: Annotated[
        str, typer.Option("--policy", help="What decides anew: a preset, or a TOML file.")
    ],
    policy_from: Annotated[
        str | None,
        typer.Option("--policy-from", help="Compare with this policy, not with the record."),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "--model",
            help="The folder of a model named in it, for its thresholds; may "
            "be repeated. Bundled and installed ones are found.",
        ),
    ] = None,
    uncalibrated: Annotated[
        bool,
        typer.Option(
            "--uncalibrated",
            help="Decide rows of models not at hand too: what the "
            "policy leaves to the model counts from 0.5.",
        ),
    ] = False,
    examples: Annotated[
        int, typer.Option(min=0, help="How many row ids to show for each change.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="What was found, as JSON.")] = False,
) -> None:
    """What another policy would have decided on recorded verdicts: shadow before you enforce. Reads
    no text and opens no model. Exits 0 when it is done, whatever changes."""
    loaded = Policy.load(policy)
    base = None if policy_from is None else Policy.load(policy_from)

    from guardrail.audit import AuditError
    from guardrail.errors import ArtifactError
    from guardrail.replay import ReplayError, replay, thresholds_at_hand

    try:
        models = thresholds_at_hand(model or [])
        with _counter(source) as progress:
            found = replay(
                source, loaded, models, policy_from=base, uncalibrated=uncalibrated,
                examples=examples, progress=progress,
            )  # fmt: skip
    except (ArtifactError, AuditError, ReplayError) as error:
        raise UsageError(str(error)) from None
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=1))
    else:
        _print_replay(found)


@contextmanager
def _counter(source: Path) -> Iterator[Callable[[int], None]]:
    """The rows so far, on a terminal."""
    from guardrail._render import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda rows: None
        return
    with out.status("replaying...") as status:
        yield lambda rows: status.update(f"replaying {source.name}: {rows:,} rows")


def _print_replay(found: Replay) -> None:
    from rich import box
    from rich.table import Table

    from guardrail._render import console

    out = console()
    if found.changes:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("direction", "category", "severity", "from", "to", "rows", "such as"):
            table.add_column(column, justify="right" if column == "rows" else "left")
        for group, tally in found.ordered():
            category = group.category.value if group.category else "(none held)"
            table.add_row(
                group.direction.value, category, group.severity.label, group.before.value,
                group.after.value, f"{tally.rows:,}", printable(", ".join(tally.examples)),
            )  # fmt: skip
        out.print(table)
    print(
        f"{printable(found.policy)} against {printable(found.baseline)}: of {found.rows:,} rows "
        f"{found.changed:,} change, {found.unchanged:,} do not"
    )
    changed = [item for item in found.actions.items() if item[0][0] is not item[0][1]]
    for (before, after), rows in sorted(changed, key=lambda item: -item[1]):
        print(f"  {before.value} -> {after.value}: {rows:,}")
    for line in _notes(found):
        print(printable(line))


def _notes(found: Replay) -> Iterator[str]:
    """What a reader has to know beside the counts."""
    if found.uncertain.rows:
        yield (
            "so near a threshold that the rounding of the record decides, in neither count: "
            + _counted(found.uncertain)
        )
    for model, rows in found.unknown_model.items():
        yield (
            f"not decided, for the thresholds of model {model!r} are not at hand: {rows:,} rows "
            "(--model FOLDER, or --uncalibrated)"
        )
    if found.unlike.rows:
        yield (
            f"recorded otherwise than {found.baseline} decides, for another policy, or another "
            f"version of it or of its model's thresholds, decided then: {_counted(found.unlike)}"
        )
    if found.degraded:
        yield f"decided by on_error alone, as nothing was assessed: {found.degraded:,} rows"
    if found.errors:
        yield f"not judged by the scan, but given an error: {found.errors:,} rows"
    if found.malformed.rows:
        yield f"no verdicts: {_counted(found.malformed)}"


def _counted(tally: Tally) -> str:
    such = f" (such as {', '.join(tally.examples)})" if tally.examples else ""
    return f"{tally.rows:,} rows{such}"
