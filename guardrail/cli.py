"""The command line: `guardrail check`, `scan`, `policy`, `doctor`.

Exit codes: 0 done, or delivered; 3 not delivered; 2 bad usage; 1 a failure of the machine;
130 interrupted. Whatever goes wrong is one line on stderr. Models and their libraries are imported
by the commands that need them, not before.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from guardrail import __version__
from guardrail.errors import ArtifactError, GuardrailError, PolicyError
from guardrail.policy import Policy

if TYPE_CHECKING:
    from guardrail.guard import Guard
    from guardrail.scan import Tally

__all__ = ["app"]

_NOT_DELIVERED = 3


class _UsageError(GuardrailError):
    """The command was called in a way it cannot mean."""


class _OneLineErrors(TyperGroup):
    """The one place where errors end: a line on stderr, and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # no terminal is too old for a quoted text
                stream.reconfigure(errors="backslashreplace")
        # What the guard logs, a verdict or a row says too.
        logging.getLogger("guardrail").addHandler(logging.NullHandler())
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "guardrail")
            code = _complain(f"{error.format_message()} (see {command} --help)", error.exit_code)
        except typer.Abort:
            code = _complain("interrupted", 130)
        except GuardrailError as error:
            usage = _UsageError, PolicyError
            code = _complain(str(error), 2 if isinstance(error, usage) else 1)
        if standalone_mode:
            sys.exit(code)
        return code


def _complain(message: str, code: int) -> int:
    from guardrail._render import printable

    print(f"error: {printable(message)}", file=sys.stderr)
    return code


app = typer.Typer(
    cls=_OneLineErrors,
    help="Local, severity-aware safety for chat models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="Look at policies, and check them.")
app.add_typer(policy_app, name="policy")

_PolicyOption = Annotated[
    str, typer.Option("--policy", help="strict, balanced, permissive, audit-only, or a TOML file.")
]
_ModelOption = Annotated[str, typer.Option("--model", help="A model's name, or its folder.")]
_DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="auto takes CUDA where it works; cuda fails where it does not."),
]


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
    policy: _PolicyOption = "balanced",
    model: _ModelOption = "small",
    device: _DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as one JSON line.")] = False,
) -> None:
    """Judge one prompt, or a response to it. Exits 0 when it is delivered (allow, flag), 3 when
    it is not."""
    if prompt is None and response is None:
        raise _UsageError("nothing to check: give --prompt, --response, or both")
    if prompt == "-" and response == "-":
        raise _UsageError("only one of --prompt and --response can be read from stdin (-)")
    prompt, response = _text("--prompt", prompt), _text("--response", response)

    from guardrail._render import console, verdict_view

    err = console(stderr=True)
    with err.status("judging...") if err.is_terminal else nullcontext():
        verdict = _open_guard(model, policy, device).check(prompt, response)
    if as_json:
        print(json.dumps(verdict.to_json(), ensure_ascii=False))
    else:
        out = console()
        judged = response if response is not None else prompt or ""
        out.print(verdict_view(verdict, judged, panel=out.is_terminal))
    if verdict.degraded:
        _complain(f"no assessment, so the policy's on_error decided: {verdict.error}", 0)
    if not verdict.delivers:
        raise typer.Exit(_NOT_DELIVERED)


@app.command()
def scan(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".jsonl, .csv (.gz) or .parquet")],
    output: Annotated[Path, typer.Option("--output", help="Where the judged rows go.")],
    policy: _PolicyOption = "balanced",
    model: _ModelOption = "small",
    device: _DeviceOption = "auto",
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
        raise _UsageError("--engine ray is not in this version yet: leave it out to run here")

    from guardrail._render import console, scan_progress, summary
    from guardrail.scan import Fields, Scan, ScanUsageError

    try:
        fields = Fields(prompt_field, response_field)
        job = Scan(source, output, fields=fields, chunk=batch_size, overwrite=overwrite)
        guard = _open_guard(model, policy, device)
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
        raise _UsageError(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(
            _complain(
                f"interrupted: what is done is safe in {output.name}.partial; run the same command "
                "again to go on",
                130,
            )
        ) from None
    rate = (tally.rows - (first or 0)) / (time.perf_counter() - started)
    console().print(summary(tally, rate))


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


@app.command()
def doctor(
    policy: _PolicyOption = "balanced",
    model: _ModelOption = "small",
    device: _DeviceOption = "auto",
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


def _text(option: str, value: str | None) -> str | None:
    """The option's text, read from stdin for `-`; never blank, always Unicode."""
    if value is None:
        return None
    where = "stdin" if value == "-" else option
    data = sys.stdin.buffer.read() if value == "-" else value.encode("utf-8", "surrogateescape")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _UsageError(
            f"{where}: not valid UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): "
            "convert it to UTF-8"
        ) from None
    if not text.strip():
        raise _UsageError(f"{where}: the text is empty: there is nothing to judge")
    return text


def _open_guard(model: str, policy: str, device: Literal["auto", "cpu", "cuda"]) -> Guard:
    chosen = Policy.load(policy)  # before the model: a wrong word should not cost a second

    from guardrail.artifact import artifact_folder
    from guardrail.guard import Guard

    try:
        folder = artifact_folder(model)
    except ArtifactError as error:
        raise _UsageError(str(error)) from None
    if not folder.is_dir():
        raise _UsageError(f"model {model!r}: no such folder")
    return Guard(folder, chosen, device=device)


if __name__ == "__main__":
    app()
