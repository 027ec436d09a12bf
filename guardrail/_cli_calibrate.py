"""`guardrail calibrate`: thresholds from the user's own labelled rows, written as a policy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from guardrail._cli import (
    DeviceOption,
    ModelOption,
    PolicyOption,
    UsageError,
    complain,
    model_folder,
)
from guardrail._files import MISSHAPEN
from guardrail._paths import beside, mix_up, no_place
from guardrail._printable import escaped, printable
from guardrail.errors import GuardrailError
from guardrail.policy import PRESETS, Policy, policy_files
from guardrail.taxonomy import Category, Direction, Severity

if TYPE_CHECKING:  # these bring numpy, or the model's libraries, along
    from guardrail._calibrate import Fitted, Goal
    from guardrail._labelled import Labelled
    from guardrail.moderator import Moderator
    from guardrail.verdict import Assessment

__all__ = ["calibrate"]

_CHUNK = 32
_SHOWN = 10  # malformed rows
_DELTA = 0.1
_LEAST = 1e-9  # of a share; to show a smaller one, more rows are needed than anybody has


def calibrate(
    labelled: Annotated[
        Path,
        typer.Argument(
            metavar="LABELLED.jsonl",
            help="Rows with prompt[, response] and severity, categories, unsafe or is_safe.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Where the policy goes, TOML; else to stdout, and a run that is stopped "
            "starts anew.",
        ),
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(help="Share of harmless texts that may be flagged.")
    ] = 0.01,
    alpha: Annotated[
        float | None,
        typer.Option(help="Promise: of the harms at most this share is delivered."),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help=f"Chance that the promise does not hold; {_DELTA} if left out."),
    ] = None,
    harm: Annotated[
        Literal["minor", "moderate", "severe"] | None,
        typer.Option(
            help="From which severity a harm is meant by the promise; severe if left out."
        ),
    ] = None,
    policy: PolicyOption = "balanced",
    model: ModelOption = "small",
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The report as JSON, with the policy's text.")
    ] = False,
) -> None:
    """Fit thresholds to your own labelled texts: at most a target share of the harmless ones is
    flagged; with --alpha, at most that share of the severe ones is delivered, with confidence
    1 - delta. Writes a policy that extends --policy, and says what it costs."""
    _check_shares(target_fpr, alpha, delta)
    if alpha is None and (delta is not None or harm is not None):
        raise UsageError("--delta and --harm are of --alpha: add --alpha SHARE")
    base = Policy.load(policy)
    _check_files(labelled, policy, output, overwrite=overwrite)
    name = _name(labelled, output)

    from guardrail._calibrate import Goal, check_labels
    from guardrail._calibrate import calibrate as fit
    from guardrail._labelled import LabelledFileError, read_labelled
    from guardrail._policy_toml import extends_of, policy_toml
    from guardrail.moderator import OnnxModerator

    _check_extends(extends_of(policy, Path(gettempdir()) if output is None else output.parent))
    try:
        rows, problems = read_labelled(labelled)
    except LabelledFileError as error:
        raise UsageError(str(error)) from None
    _list_problems(labelled, problems)
    if not rows:
        raise UsageError(f"{labelled}: no row that could be used")
    goal = Goal(target_fpr, alpha, delta or _DELTA, Severity.from_label(harm or "severe"))
    folder = model_folder(model)
    try:
        check_labels(rows, goal)
    except GuardrailError as error:
        raise UsageError(f"{labelled}: {error}") from None
    moderator = OnnxModerator(folder, device=device, locate=False)
    try:
        seen = list(_judged(moderator, rows, _partial(output)))
    except KeyboardInterrupt:
        what = "what was judged is safe; run the same command to go on"
        if output is None:
            what = "nothing is kept; with --output a run that is stopped goes on where it was"
        raise typer.Exit(complain(f"interrupted: {what}", 130)) from None
    except OSError as error:
        raise UsageError(f"{_partial(output)}: cannot be written: {error.strerror}") from None
    try:
        fitted_policy, fitted = fit(
            base, dict(moderator.thresholds), list(zip(rows, seen, strict=True)), goal
        )
    except GuardrailError as error:
        raise UsageError(f"{labelled}: {error}") from None
    comment = _comment(labelled, moderator.id, len(rows), goal)
    text = _write(
        output,
        lambda folder: policy_toml(name, extends_of(policy, folder), comment, fitted),
        fitted_policy,
    )
    if as_json:
        report = {"model": moderator.id, "rows": len(rows), "problems": problems, "policy": text}
        print(json.dumps(report | {"directions": [f.to_json() for f in fitted]}, indent=1))
        return
    _show(fitted, goal, stderr=output is None)
    if output is None:
        print(text, end="")
    else:
        print(f"wrote {output}: use it with --policy {output}")


def _check_shares(target_fpr: float, alpha: float | None, delta: float | None) -> None:
    for name, value in (("--target-fpr", target_fpr), ("--alpha", alpha), ("--delta", delta)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"{name}: a share between 0 and 1, both left out, not {value:g}")
        if value is not None and value < _LEAST:
            raise UsageError(
                f"{name}: {value:g} is a smaller share than rows can show: give {_LEAST:g} or more"
            )


def _name(labelled: Path, output: Path | None) -> str:
    """The policy's, after its file. Raises UsageError where that could not be used."""
    if output is None:
        name = labelled.name.partition(".")[0]
        return name if name and name.isprintable() else "calibrated"
    if not output.stem.isprintable():
        raise UsageError(
            f"--output {str(output)!r}: the policy is named after its file, so give that a name of "
            "printable characters, on one line"
        )
    if str(output) in PRESETS:
        raise UsageError(f"--output {output}: is the name of a preset: name it {output}.toml")
    return output.stem


def _check_files(labelled: Path, policy: str, output: Path | None, *, overwrite: bool) -> None:
    """Before any of them is written. Raises UsageError."""
    if output is None:
        if overwrite:
            raise UsageError("--overwrite is of --output: add --output FILE")
        return
    read = {"the labelled rows": [labelled], "the policy": policy_files(policy)}
    written = {"--output": [output, _partial(output), _draft(output)]}
    if problem := no_place(output) or mix_up(read, written):
        raise UsageError(problem)
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: is there already: give another name, or --overwrite")


def _check_extends(extends: str) -> None:
    """Raises UsageError for a path that the policy, as TOML, could not name."""
    try:
        extends.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"--policy {extends}: not valid UTF-8, so that no policy can extend it: rename it"
        ) from None


def _list_problems(path: Path, problems: Sequence[str]) -> None:
    for problem in problems[:_SHOWN]:
        _warn(f"{path}: {problem}")
    if problems:
        more = f" ({len(problems) - _SHOWN} more not shown)" if len(problems) > _SHOWN else ""
        _warn(f"{path}: {len(problems)} malformed rows are left out{more}")


def _warn(message: str) -> None:
    from guardrail._render import console

    console(stderr=True).print(f"warning: {printable(message)}", markup=False, soft_wrap=True)


# --- judging, resumed ----------------------------------------------------------------------------


def _partial(output: Path | None) -> Path:
    return Path(os.devnull) if output is None else beside(output, ".partial")


def _judged(moderator: Moderator, rows: Sequence[Labelled], path: Path) -> Iterator[Assessment]:
    """An assessment per row. What is judged is kept at `path` until the output is written, and
    taken from there when the same rows are judged by the same model again."""
    identity = _identity(moderator, rows)
    done = _read_partial(path, identity)
    yield from done
    with path.open("ab" if done else "wb") as file, _bar(len(rows), len(done)) as advance:
        if not done:
            file.write(_line({"for": identity}))
        for first in range(len(done), len(rows), _CHUNK):
            found = moderator.assess([row.pair for row in rows[first : first + _CHUNK]])
            file.write(b"".join(_line(_plain(seen)) for seen in found))
            file.flush()
            advance(len(found))
            yield from found


def _identity(moderator: Moderator, rows: Sequence[Labelled]) -> str:
    texts = [(row.pair.prompt, row.pair.response) for row in rows]
    manifest = getattr(moderator, "manifest", None)
    what = [moderator.id, *(sorted(manifest.files.items()) if manifest else ()), texts]
    if manifest:
        what.append(manifest.calibration)
    return hashlib.sha256(json.dumps(what, default=dict).encode("utf-8", "replace")).hexdigest()


def _read_partial(path: Path, identity: str) -> list[Assessment]:
    """Assessments of an earlier run for the same texts and model; a line cut short is removed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    try:
        head, *lines = map(json.loads, whole.splitlines())
        seen = [_assessment(line) for line in lines]
    except MISSHAPEN:
        return []  # not ours, or damaged
    if head != {"for": identity}:
        return []
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return seen


def _plain(seen: Assessment) -> dict[str, Any]:
    return {
        "direction": seen.direction.value,
        "severity": [seen.severity_probabilities[s] for s in Severity],
        "categories": [seen.categories[c] for c in Category],
        "unreadable": seen.unreadable,
    }


def _assessment(data: dict[str, Any]) -> Assessment:
    from guardrail.verdict import Assessment

    return Assessment(
        direction=Direction(data["direction"]),
        severity_probabilities=dict(zip(Severity, data["severity"], strict=True)),
        categories=dict(zip(Category, data["categories"], strict=True)),
        unreadable=data["unreadable"],
    )


def _line(data: object) -> bytes:
    return json.dumps(data).encode() + b"\n"


@contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    from guardrail._render import scan_progress

    with scan_progress() as bar:
        task = bar.add_task("judging", total=total, completed=done)
        yield lambda n: bar.advance(task, n)


# --- writing and showing -------------------------------------------------------------------------


def _comment(labelled: Path, model: str, rows: int, goal: Goal) -> list[str]:
    promise = ""
    if goal.alpha is not None:
        promise = f", {goal.harm.label} harms alpha {goal.alpha:g}, delta {goal.delta:g}"
    return [
        f"guardrail calibrate: {rows} rows of {escaped(labelled.name)}, "
        f"target false-positive rate {goal.target_fpr:g}{promise}.",
        f"Made for the model {model}: with another one, calibrate anew.",
    ]


def _draft(output: Path) -> Path:
    return output.parent / f".{output.name}.draft"


def _write(output: Path | None, text_in: Callable[[Path], str], expected: Policy) -> str:
    """The policy's text for its folder (of a policy that goes to stdout the current one), once it
    was read back as what was meant; it becomes the output in one step. Raises UsageError."""
    from guardrail._policy_toml import read_back

    with TemporaryDirectory() if output is None else nullcontext(output.parent) as folder:
        draft = _draft(output or Path(folder, "policy"))
        try:
            draft.write_text(text_in(Path(folder)), encoding="utf-8")
            read_back(draft, expected)
            if output is not None:
                os.replace(draft, output)
                _partial(output).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"{output or folder}: cannot be written: {error}") from None
        finally:
            draft.unlink(missing_ok=True)
    return text_in(Path() if output is None else output.parent)


def _show(fitted: Sequence[Fitted], goal: Goal, *, stderr: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from guardrail._render import console

    out = console(stderr=stderr)
    for found in fitted:
        table = Table(title=found.direction.value, title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("of the texts labelled", "n", "before", "after", "95 % interval"):
            table.add_column(column, justify="left" if column.startswith("of") else "right")
        for name, rate in found.rates.items():
            span = f"{rate.low:.2%} - {rate.high:.2%}"
            table.add_row(name, str(rate.n), f"{rate.before:.2%}", f"{rate.after:.2%}", span)
        out.print(table)
        for line in _said(found, goal):
            out.print(Text(line), soft_wrap=True)
    out.print(
        Text(
            "These are the rows it was fitted on. What is promised holds for texts drawn like them."
        )
    )


def _said(found: Fitted, goal: Goal) -> Iterator[str]:
    if found.minor is not None:
        t = found.minor
        # "after" in the table is with what the promise lowers, which may miss the target.
        lowered = found.promise is not None and found.promise.lowered > 0
        yield (
            f"the target {'alone would be' if lowered else 'is'} met by flagging from P(harmful) "
            f"{t.value:.4f} (95 % interval {t.low:.4f} - {t.high:.4f})"
        )
    if (promise := found.promise) is not None and goal.alpha is not None:
        yield (
            f"promise: at most {goal.alpha:.2%} of {goal.harm.label} harms pass, with confidence "
            f"{1 - goal.delta:.0%}; {promise.passed:.2%} of {promise.n} did. "
            f"Thresholds lowered by {promise.lowered:g} logits for it"
        )
    if found.categories:
        yield f"thresholds of {len(found.categories)} categories: see the file"
    yield from (f"note: {note}" for note in found.notes)
