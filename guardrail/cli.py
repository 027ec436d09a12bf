"""The command line: `guardrail check`, `scan`, `policy`, `audit`, `doctor`.

Models and their libraries are imported by the commands that need them, not before.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from guardrail import __version__
from guardrail._cli import (
    KEY_ALONE,
    AuditKeyOption,
    AuditOption,
    DeviceOption,
    ModelOption,
    OneLineErrors,
    PolicyOption,
    UsageError,
    complain,
    open_audit,
    open_guard,
    text_of,
)
from guardrail._cli_audit import audit_app
from guardrail._cli_calibrate import calibrate
from guardrail._cli_policy import policy_app
from guardrail._cli_scan import scan
from guardrail._cli_server import keys_app, serve

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
app.command()(scan)
app.command()(serve)
app.command()(calibrate)


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
    audit: AuditOption = None,
    audit_key: AuditKeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as one JSON line.")] = False,
) -> None:
    """Judge one prompt, or a response to it. Exits 0 when it is delivered (allow, flag), 3 when
    it is not."""
    if prompt is None and response is None:
        raise UsageError("nothing to check: give --prompt, --response, or both")
    if prompt == "-" and response == "-":
        raise UsageError("only one of --prompt and --response can be read from stdin (-)")
    prompt, response = text_of("--prompt", prompt), text_of("--response", response)

    log = open_audit(audit, audit_key)

    from guardrail._render import console, verdict_view

    err = console(stderr=True)
    with err.status("judging...") if err.is_terminal else nullcontext():
        verdict = open_guard(model, policy, device, audit=log).check(prompt, response)
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
def doctor(
    policy: PolicyOption = "balanced",
    model: ModelOption = "small",
    device: DeviceOption = "auto",
    audit: Annotated[
        Path | None, typer.Option("--audit", metavar="LOG", help="An audit log to look at too.")
    ] = None,
    audit_key: AuditKeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of the checks.")] = False,
) -> None:
    """Look at what the guard runs on: packages, providers, device, model, policy, audit log, speed.
    Exits 1 when something has failed."""
    if audit is None and audit_key is not None:
        raise UsageError(KEY_ALONE)

    from guardrail._render import console, health
    from guardrail.doctor import diagnose

    checks = list(diagnose(model, policy, device=device, audit=audit, audit_key=audit_key))
    if as_json:
        print(json.dumps([check.to_json() for check in checks], ensure_ascii=False, indent=1))
    else:
        console().print(health(checks))
    if any(check.status == "failure" for check in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
