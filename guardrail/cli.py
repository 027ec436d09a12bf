"""The command line: `guardrail check`, `scan`, `policy`, `audit`, `doctor`.

Models and their libraries are imported by the commands that need them, not before.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guardrail import __version__
from guardrail._cli import (
    DeviceOption,
    ModelOption,
    OneLineErrors,
    PolicyOption,
    UsageError,
    complain,
    open_guard,
    text_of,
)
from guardrail._cli_audit import audit_app
from guardrail._cli_policy import policy_app
from guardrail._cli_server import keys_app, serve

if TYPE_CHECKING:
    from guardrail.scan import Tally

__all__ = ["app"]

_NOT_DELIVERED = 3


app = typer.Typer(
    cls=OneLineErrors,
    help="Local, severity-aware safety for chat models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")
app.add_typer(keys_app, name="keys")
app.command()(serve)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"guardrail {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What the user said; - reads stdin.")
    ] = None,
    response: Annotated[
        str | None, typer.Option("--response", help="What the model answered; - reads stdin.")
    ] = None,
    policy: PolicyOption = "balanced",
    model: ModelOption = "small",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as one JSON line.")] = False,
) -> None:
    """Judge one prompt, or a response to it. Exits 0 when it is delivered (allow, flag), 3 when
    it is not."""
    if prompt is None and response is None:
        raise UsageError("nothing to check: give --prompt, --response, or both")
    if prompt == "-" and response == "-":
        raise UsageError("only one of --prompt and --response can be read from stdin (-)")
    prompt, response = text_of("--prompt", prompt), text_of("--response", response)

    from guardrail._render import console, verdict_view

    err = console(stderr=True)
    with err.status("judging...") if err.is_terminal else nullcontext():
        verdict = open_guard(model, policy, device).check(prompt, response)
    if as_json:
        print(json.dumps(verdict.to_json(), ensure_ascii=False))
    else:
        out = console()
        judged = response if response is not None else prompt or ""
        out.print(verdict_view(verdict, judged, panel=out.is_terminal))
    if verdict.degraded:
        complain(f"no assessment, so the policy's on_error decided: {verdict.error}", 0)
    if not verdict.delivers:
        raise typer.Exit(_NOT_DELIVERED)


@app.command()
def scan(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".jsonl, .csv (.gz) or .parquet")],
    output: Annotated[Path, typer.Option("--output", help="Where the judged rows go.")],
    policy: PolicyOption = "balanced",
    model: ModelOption = "small",
    device: DeviceOption = "auto",
    engine: Annotated[Literal["local", "ray"], typer.Option(help="What runs it.")] = "local",
    prompt_field: Annotated[str, typer.Option(help="Where a row has its prompt.")] = "prompt",
    response_field: Annotated[
        str, typer.Option(help="Where a row may have a response; if blank, the prompt is judged.")
    ] = "response",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows judged together, and lost at most when killed.")
    ] = 256,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and what another scan left.")
    ] = False,
) -> None:
    """Judge every row of a file: each is written with `guardrail`, its verdict, or an `error`.
    Rows keep their order. The same command, run again after it was stopped, goes on."""
    if engine == "ray":
        raise UsageError("--engine ray is not in this version yet: leave it out to run here")

    from guardrail._render import console, scan_progress, summary
    from guardrail.scan import Fields, Scan, ScanUsageError

    try:
        fields = Fields(prompt_field, response_field)
        job = Scan(source, output, fields=fields, chunk=batch_size, overwrite=overwrite)
        guard = open_guard(model, policy, device)
        started = time.perf_counter()
        first: int | None = None
        with scan_progress() as bar:
            task = bar.add_task(source.name, total=None if bar.disable else job.total)

            def show(tally: Tally) -> None:
                nonlocal first
                if first is None:
                    first = tally.rows
                    bar.reset(task, completed=first)
                bar.update(task, completed=tally.rows)

            tally = job.run(guard, show)
    except ScanUsageError as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(
            complain(
                f"interrupted: what is done is safe in {output.name}.partial; run the same command "
                "again to go on",
                130,
            )
        ) from None
    rate = (tally.rows - (first or 0)) / (time.perf_counter() - started)
    console().print(summary(tally, rate))


@app.command()
def doctor(
    policy: PolicyOption = "balanced",
    model: ModelOption = "small",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of the checks.")] = False,
) -> None:
    """Look at what the guard runs on: packages, providers, device, model, policy, speed. Exits 1
    when something has failed."""
    from guardrail._render import console, health
    from guardrail.doctor import diagnose

    checks = list(diagnose(model, policy, device=device))
    if as_json:
        print(json.dumps([check.to_json() for check in checks], ensure_ascii=False, indent=1))
    else:
        console().print(health(checks))
    if any(check.status == "failure" for check in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
