"""`guardrail scan`: its options, its progress, and what it says at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guardrail._cli import (
    AuditKeyOption,
    AuditOption,
    Device,
    DeviceOption,
    ModelOption,
    PolicyOption,
    UsageError,
    complain,
    model_folder,
    open_audit,
    open_guard,
)
from guardrail._onnx import GPUS
from guardrail._paths import mix_up, no_place
from guardrail.policy import Policy, policy_files

if TYPE_CHECKING:
    from guardrail.scan import Engine, Scan, Tally

__all__ = ["scan"]

_LINE_EVERY = 30.0  # seconds, where stderr is no terminal
_IN = ".jsonl, .csv (.gz) or .parquet, a data-set folder, hf:OWNER/NAME[:SPLIT]"


def scan(
    source: Annotated[str, typer.Argument(metavar="IN", help=_IN)],
    output: Annotated[
        Path, typer.Option("--output", help="Where the judged rows go, in the format of IN.")
    ],
    policy: PolicyOption = "balanced",
    model: ModelOption = "small",
    device: DeviceOption = "auto",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="local: this machine's cores; ray: a cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="ray: a cluster (auto, HOST:PORT, ray://HOST:PORT); else one here."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Texts judged at once, or Ray actors: one per core.")
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0.0, help="ray: of each actor; 0.25 puts four on one GPU.")
    ] = 0.0,
    prompt_field: Annotated[str, typer.Option(help="Where a row has its prompt.")] = "prompt",
    response_field: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a row may have a response; if blank, the prompt is judged. Give it again "
            "to judge several. By default response, else response_0, response_1, ...",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows written together, and lost at most when killed.")
    ] = 256,
    report: Annotated[
        Path | None, typer.Option(help="An HTML page of what was found, without texts.")
    ] = None,
    report_texts: Annotated[
        bool, typer.Option("--report-texts", help="The worst texts' beginnings in the report.")
    ] = False,
    audit: AuditOption = None,
    audit_key: AuditKeyOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and what another scan left.")
    ] = False,
) -> None:
    """Judge every row of a file or a data set: each is written with `guardrail`, its verdict, or
    an `error`. Rows keep their order. The same command, run again after it was stopped, goes on.
    The exit code is 1 where not one row could be judged."""
    _check_options(engine, address, gpus_per_worker, device)
    for option, path in (("--output", output), ("--report", report), ("--audit", audit)):
        replaced = path is not report
        if path is not None and (problem := no_place(path, replaced=replaced)):
            raise UsageError(f"{option} {problem}")

    from guardrail._scan_source import open_source
    from guardrail.scan import Fields, Scan, ScanUsageError

    try:
        found = open_source(source)
        _keep_apart(found.files, policy, output, report, audit, audit_key)
        job = Scan(
            found,
            output,
            fields=Fields(prompt_field, tuple(response_field or ())),
            chunk=batch_size,
            overwrite=overwrite,
            excerpts=report_texts,
            audit=open_audit(audit, audit_key, fsync="interval"),  # and once per chunk
        )
        if engine == "ray":
            judge = _ray(model, policy, device, workers, gpus_per_worker, address)
        else:
            judge = _local(model, policy, device, workers)
        tally = _run(job, judge, partial(_tell, report, source, judge))
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
    if tally.rows and tally.errors == tally.rows:
        most = tally.problems.most_common(1)[0][0]
        raise typer.Exit(complain(f"no row could be judged; of most: {most}", 1))


def _check_options(engine: str, address: str | None, gpus: float, device: Device) -> None:
    if engine == "local" and (address is not None or gpus):
        raise UsageError("--address and --gpus-per-worker are of --engine ray: add that")
    if engine == "ray" and device in GPUS and not gpus:
        raise UsageError(f"--device {device} needs GPUs from Ray: add --gpus-per-worker, 0.25 say")


def _keep_apart(
    source: Sequence[Path],
    policy: str,
    output: Path,
    report: Path | None,
    audit: Path | None,
    audit_key: Path | None,
) -> None:
    """Before any of them is written. Raises UsageError."""
    from guardrail._audit_files import Names
    from guardrail.scan import files_of

    read = {
        "the input": source,
        "the policy": policy_files(policy),
        "--audit-key": [audit_key] if audit_key else [],
    }
    written = {
        "--output": files_of(output),
        "--audit": Names(audit).all(key=audit_key is None) if audit else [],
        "--report": [report] if report else [],
    }
    if problem := mix_up(read, written):
        raise UsageError(problem)


def _local(model: str, policy: str, device: Device, workers: int | None) -> Engine:
    from guardrail.scan import LocalEngine

    return LocalEngine(open_guard(model, policy, device, threads=1), workers)


def _ray(
    model: str, policy: str, device: Device, workers: int | None, gpus: float, address: str | None
) -> Engine:
    chosen = Policy.load(policy)
    model_folder(model)

    from guardrail._scan_ray import RayEngine

    return RayEngine(model, chosen, device, workers, gpus, address)


def _run(job: Scan, engine: Engine, tell: Callable[[Tally, float], None]) -> Tally:
    """tell: has what was found, and the rows per second of this run, before the scan has ended."""
    from guardrail._render import progress_line, scan_progress

    started = said = time.perf_counter()
    before: int | None = None
    with scan_progress() as bar:
        task = bar.add_task(job.source.name, total=None if bar.disable else job.total)

        def show(tally: Tally) -> None:
            nonlocal before, said
            if before is None:
                before = tally.rows
                bar.reset(task, completed=before)
            bar.update(task, completed=tally.rows)
            if bar.disable and time.perf_counter() - said >= _LINE_EVERY:
                bar.update(task, total=job.total)  # only now: a short scan need not count its rows
                print(progress_line(bar.tasks[0]), file=sys.stderr, flush=True)
                said = time.perf_counter()

        def done(tally: Tally) -> None:
            bar.stop()
            judged = tally.rows - (tally.rows if before is None else before)
            tell(tally, judged / (time.perf_counter() - started))

        return job.run(engine, show, done)


def _tell(report: Path | None, source: str, engine: Engine, tally: Tally, rate: float) -> None:
    from guardrail._render import console, summary

    if report is not None:
        _write_report(report, tally, source, engine)
    console().print(summary(tally, rate))
    if report is not None:
        print(f"report: {report}", flush=True)


def _write_report(path: Path, tally: Tally, source: str, engine: Engine) -> None:
    from guardrail._scan_report import page
    from guardrail.scan import ScanError

    found = engine.identity
    text = page(tally, source=source, policy=found["policy"][0], model=found["model"][0])
    try:
        # A name or a text may hold what UTF-8 does not: a byte, half of a surrogate pair.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ScanError(
            f"{path}: the report cannot be written: {error.strerror or error}: mend that and run "
            "the same command again; every row is judged and safe"
        ) from error
