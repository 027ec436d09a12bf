"""Annotation from the command line; the page is `serve`.

    python -m training.annotate import chats.jsonl
    python -m training.annotate annotators add ann --adjudicates
    python -m training.annotate label --moderator small
    python -m training.annotate serve
    python -m training.annotate stats
    python -m training.annotate export labelled.jsonl

Every command takes `--store` (default `annotations.db`, or $GUARDRAIL_ANNOTATIONS).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from guardrail._cli import OneLineErrors, UsageError
from training.annotation.forms import FormName
from training.annotation.labels import (
    AnnotationError,
    Kind,
    Label,
    PairLabel,
    SafetyLabel,
    Settings,
    StoredLabel,
    Suggestions,
    Task,
)
from training.annotation.labels import Preference as Preferences
from training.annotation.queue import Queue
from training.annotation.store import Store

app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, help=__doc__, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
people = typer.Typer(no_args_is_help=True, help="Who annotates: names and keys.")
app.add_typer(people, name="annotators")

StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="GUARDRAIL_ANNOTATIONS", help="The annotation store."),
]
DEFAULT = Path("annotations.db")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


# --- rows in and out -----------------------------------------------------------------------------


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help=".jsonl[.gz], .parquet, or a datasets folder.")],
    store: StoreOption = DEFAULT,
    form: Annotated[FormName | None, typer.Option(help="Told from the rows unless given.")] = None,
    audit: Annotated[bool, typer.Option(help="It is an audit log: take consented texts.")] = False,
    queue_labelled: Annotated[
        bool, typer.Option(help="Ask people about rows that come with labels, too.")
    ] = False,
    annotator: Annotated[
        str | None, typer.Option(help="A person of the store who gave these labels elsewhere.")
    ] = None,
) -> None:
    """Take rows in; makes the store where there is none. Malformed rows are listed, exit code 3."""
    from training.annotation.exchange import data_files, import_path

    data_files(source)  # a wrong name makes no store
    target = Store(store, create=True)
    if audit:
        from training.annotation.select import import_audit

        found = import_audit(target, source)
        typer.echo(
            f"{found.rows} rows, {found.consented} with consent and text: "
            f"{found.texts} new or more often met texts taken in"
        )
        return
    result = import_path(
        target, source, form=form, queue_labelled=queue_labelled, person=annotator,
        progress=_progress,
    )  # fmt: skip
    for problem in result.problems:
        typer.echo(problem, err=True)
    typer.echo(f"{result.rows} rows taken in, {len(result.problems)} malformed")
    if result.problems:
        raise typer.Exit(3)


@app.command("export")
def export_(
    target: Annotated[Path, typer.Argument(help=".jsonl[.gz], .parquet, or a folder's name.")],
    store: StoreOption = DEFAULT,
    form: Annotated[FormName | None, typer.Option(help="plain and pairs unless given.")] = None,
    people_only: Annotated[bool, typer.Option(help="No labels of AI annotators.")] = False,
    labelled_only: Annotated[bool, typer.Option(help="Leave out rows without a label.")] = False,
    settled_only: Annotated[bool, typer.Option(help="Leave out rows under dispute.")] = False,
) -> None:
    """Write every row with the labels that stand for it now."""
    from training.annotation.exchange import export_path

    result = export_path(
        Store(store), target, form=form, machines=not people_only, labelled_only=labelled_only,
        settled_only=settled_only,
    )  # fmt: skip
    typer.echo(
        f"{target}: {result.rows} rows; of all, {result.unlabelled} have no label, "
        f"{result.disputed} are disputed"
    )


def _progress(rows: Iterable[Any]) -> Iterable[Any]:
    shown: Iterable[Any] = tqdm(rows, unit=" rows", desc="import", leave=False, disable=None)
    return shown


# --- people --------------------------------------------------------------------------------------


@people.command("add")
def add_person(
    name: str,
    store: StoreOption = DEFAULT,
    adjudicates: Annotated[bool, typer.Option(help="May settle disagreements.")] = False,
) -> None:
    """A new annotator; prints their key, once."""
    typer.echo(Store(store, create=True).add_person(name, adjudicates=adjudicates))


@people.command("key")
def new_key(name: str, store: StoreOption = DEFAULT) -> None:
    """Another key for someone who lost theirs; prints it, once."""
    typer.echo(Store(store).new_key(name))


@people.command("list")
def list_people(store: StoreOption = DEFAULT) -> None:
    """Everyone who labelled or may label, machines and imports too."""
    for one in Store(store).annotators():
        typer.echo(f"{one.name}\t{one.role}{', adjudicates' if one.adjudicates else ''}")


@app.command()
def settings(
    store: StoreOption = DEFAULT,
    overlap_share: Annotated[float | None, typer.Option(help="Share labelled by several.")] = None,
    overlap_labels: Annotated[int | None, typer.Option(help="By how many.")] = None,
    suggestions: Annotated[Suggestions | None, typer.Option(help="When they are shown.")] = None,
    preference: Annotated[Preferences | None, typer.Option(help="What pairs ask.")] = None,
    pairs_wait: Annotated[bool | None, typer.Option(help="Pairs after their texts.")] = None,
    lease_seconds: float | None = None,
    break_minutes: float | None = None,
    break_harmful: int | None = None,
    blur: bool | None = None,
    seed: int | None = None,
) -> None:
    """Show the settings of the store, after changing those that are given."""
    given = {k: v for k, v in locals().items() if k != "store" and v is not None}
    target = Store(store, create=True)
    chosen: Settings = replace(target.settings(), **given)
    if given:
        target.set_settings(chosen)
    for one in fields(chosen):
        typer.echo(f"{one.name} = {getattr(chosen, one.name)}")


# --- machines ------------------------------------------------------------------------------------


@app.command("label")
def label_(
    store: StoreOption = DEFAULT,
    moderator: Annotated[str | None, typer.Option(help="A local model's name or folder.")] = None,
    model: Annotated[str | None, typer.Option(help="A model behind an endpoint.")] = None,
    url: Annotated[str | None, typer.Option(help="Its base URL; OpenAI's by default.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only texts, or only pairs.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Rows that are not queued too.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 4,
    price_in: Annotated[float, typer.Option(help="Per million prompt tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option(help="Per million completion tokens.")] = 0.0,
    max_cost: Annotated[float | None, typer.Option(help="Stop when so much is spent.")] = None,
    rubric: Annotated[Path | None, typer.Option(help="Your own rubric in place of ours.")] = None,
) -> None:
    """Label the queue with a machine; stop and repeat at will. The API key: $OPENAI_API_KEY."""
    from training.annotation.ai import Machine, ModeratorMachine, Tally, annotate

    if (moderator is None) == (model is None):
        raise UsageError("give --moderator, or --model, and not both")
    if max_cost is not None and not (price_in or price_out):
        raise UsageError("--max-cost needs a price: add --price-in and --price-out, per million")
    target = Store(store)
    machine: Machine
    if moderator is not None:
        from guardrail.moderator import OnnxModerator

        machine = ModeratorMachine(OnnxModerator(moderator, locate=False))
    else:
        from training.annotation.endpoint import Endpoint, Price

        machine = Endpoint(
            str(model), url=url, api_key=_api_key(url), preference=target.settings().preference,
            price=Price(price_in, price_out), rubric=_rubric(rubric),
        )  # fmt: skip
    with tqdm(unit=" tasks", desc=machine.name, disable=None) as bar:

        def show(tally: Tally) -> None:
            bar.total, bar.n = tally.total, tally.labelled + tally.failed
            bar.set_postfix_str(f"{tally.tokens} tokens, cost {tally.cost:.4f}")

        tally = annotate(
            target, machine, kind=kind, everything=everything, limit=limit, workers=workers,
            max_cost=max_cost, progress=show,
        )  # fmt: skip
    for problem in tally.problems:
        typer.echo(problem, err=True)
    left = tally.total - tally.labelled - tally.failed
    typer.echo(
        f"{machine.name}: {tally.labelled} labelled, {tally.failed} without a usable answer, "
        f"{left} left; {tally.tokens} tokens, cost {tally.cost:.4f}"
    )
    if tally.failed:
        raise typer.Exit(3)


def _api_key(url: str | None) -> str | None:
    key = os.environ.get("OPENAI_API_KEY")
    # Local servers want no key, and the client wants one.
    return key if key or url is None else "none"


def _rubric(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None


# --- what to look at -----------------------------------------------------------------------------


@app.command()
def stats(store: StoreOption = DEFAULT, as_json: JsonOption = False) -> None:
    """Agreement of people and machines, anchoring, confusion (Markdown)."""
    from training.annotation.report import markdown, statistics

    found = statistics(Store(store).labels())
    typer.echo(json.dumps(found, indent=1) if as_json else markdown(found))


@app.command("next")
def next_(
    count: Annotated[int, typer.Argument(min=1, help="How many texts to bring forward.")] = 50,
    store: StoreOption = DEFAULT,
    again: Annotated[bool, typer.Option(help="Texts that are done, too.")] = False,
    uncertain: Annotated[float, typer.Option(help="Weight of the moderator's doubt.")] = 1.0,
    disagreeing: Annotated[float, typer.Option(help="Weight of labels that differ.")] = 1.0,
    rare: Annotated[float, typer.Option(help="Weight of rare categories.")] = 0.5,
    traffic: Annotated[float, typer.Option(help="Weight of texts that users often meet.")] = 0.5,
) -> None:
    """Put first what helps most to label; needs a moderator's opinion (`label --moderator`)."""
    from training.annotation.select import Weights, bring_forward

    target = Store(store)
    weights = Weights(uncertain, disagreeing, rare, traffic)
    best = bring_forward(target, count, weights, again=again)
    texts = target.texts()
    for one in best:
        prompt, response = texts[one.task]
        typer.echo(f"{one.task}\t{one.value:.2f}\t{one.why}\t{_short(response or prompt)}")
    if not best:
        raise AnnotationError(
            "nothing speaks for any open text: `label --moderator small` first, or --again"
        )


@app.command()
def errors(
    store: StoreOption = DEFAULT,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    queue: Annotated[bool, typer.Option("--queue", help="Ask one more person about each.")] = False,
) -> None:
    """Labels that are probably wrong, by confident learning; most suspect first."""
    from training.annotation.suspects import find, requeue

    target = Store(store)
    found = find(target)[:limit]
    texts = target.texts()
    for one in found:
        prompt, response = texts[one.task]
        typer.echo(f"{one.task}\t{one.margin:.2f}\t{one.why}\t{_short(response or prompt)}")
    if queue:
        typer.echo(f"{requeue(target, found)} queued for another look")


@app.command()
def adjudicate(
    name: Annotated[str, typer.Argument(help="An annotator who may adjudicate.")],
    store: StoreOption = DEFAULT,
    task: Annotated[int | None, typer.Option(help="Settle this one.")] = None,
    severity: Annotated[int | None, typer.Option(min=0, max=3)] = None,
    category: Annotated[list[str] | None, typer.Option(help="Once per category.")] = None,
    more_helpful: Annotated[str | None, typer.Option(help="0, 1 or tie.")] = None,
    less_harmful: Annotated[str | None, typer.Option(help="0, 1 or tie.")] = None,
    single: Annotated[str | None, typer.Option(help="0, 1 or tie.")] = None,
    note: Annotated[str | None, typer.Option(help="Why; kept beside the label.")] = None,
    machines: Annotated[bool, typer.Option(help="A person against an AI, too.")] = False,
) -> None:
    """Show the next dispute and who said what; or settle one with --task and a label."""
    queue = Queue(Store(store))
    if task is None:
        found = queue.claim_disputed(name, session="cli", machines=machines)
        typer.echo("no disputes are open" if found is None else _dispute(*found))
        return
    label: Label
    if severity is not None:
        label = SafetyLabel(severity == 0, severity, tuple(category or ()))
    else:
        label = PairLabel(_side(more_helpful), _side(less_harmful), _side(single))
    queue.adjudicate(name, task, label, session="cli", note=note)
    typer.echo(f"task {task}: settled; {queue.progress(name).disputed} disputes are left")


def _dispute(task: Task, said: list[StoredLabel]) -> str:
    lines = [f"task {task.id} ({task.kind})", f"prompt: {task.prompt}"]
    names = ["response"] if task.kind == "item" else ["response 0", "response 1"]
    for name, response in zip(names, task.responses, strict=True):
        lines += [f"{name}: {response}"] if response is not None else []
    lines += [f"{s.annotator}: {json.dumps(s.value.to_json())}" for s in said]
    return "\n".join(lines)


def _side(word: str | None) -> Any:
    if word not in (None, "0", "1", "tie"):
        raise UsageError(f"{word!r} is not 0, 1 or tie")
    return int(word) if word in ("0", "1") else word


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"


# --- the page ------------------------------------------------------------------------------------


@app.command()
def serve(
    store: StoreOption = DEFAULT,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 7870,
) -> None:
    """The annotation page."""
    target = Store(store)
    if not any(one.role == "human" for one in target.annotators()):
        raise UsageError("nobody may sign in yet: `annotators add NAME` makes a key")
    from training.annotation import page

    page.serve(store, host, port, target.settings())


if __name__ == "__main__":
    app()
