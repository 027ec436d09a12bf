"""What the commands of `guardrail` share: options, how a guard is opened, and where errors end.

Exit codes: 0 done, or delivered; 3 not delivered; 2 bad usage; 1 a failure of the machine;
130 interrupted. Where 1 is an answer, a failure is 2 as well. Whatever goes wrong is one line on
stderr.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from guardrail._onnx import Device
from guardrail._printable import printable
from guardrail.errors import ArtifactError, GuardrailError, PolicyError
from guardrail.policy import Policy

if TYPE_CHECKING:
    from guardrail.audit import AuditLog, Fsync
    from guardrail.guard import Guard

__all__ = [
    "KEY_ALONE",
    "AuditKeyOption",
    "AuditOption",
    "Device",
    "DeviceOption",
    "ModelOption",
    "OneLineErrors",
    "PolicyOption",
    "UsageError",
    "complain",
    "model_folder",
    "open_audit",
    "open_guard",
    "text_of",
]


PolicyOption = Annotated[
    str, typer.Option("--policy", help="strict, balanced, permissive, audit-only, or a TOML file.")
]
ModelOption = Annotated[str, typer.Option("--model", help="A model's name, or its folder.")]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", help="auto takes CUDA where it works; cuda fails where it does not."),
]
AuditOption = Annotated[
    Path | None,
    typer.Option("--audit", metavar="LOG", help="Append each verdict, without texts, to this log."),
]
AuditKeyOption = Annotated[
    Path | None,
    typer.Option("--audit-key", metavar="FILE", help="The log's key; LOG.key if left out."),
]

KEY_ALONE = "--audit-key is of --audit: add --audit LOG"
_ONE_IS_AN_ANSWER = {("audit", "verify"), ("policy", "diff")}


class UsageError(GuardrailError):
    """The command was called in a way it cannot mean."""


class OneLineErrors(TyperGroup):
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
        _open_what_is_closed()
        words = sys.argv[1:] if args is None else args
        failed = 2 if tuple(words[:2]) in _ONE_IS_AN_ANSWER else 1
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # no terminal is too old for a quoted text
                stream.reconfigure(errors="backslashreplace")
        # What the guard logs, a verdict or a row says too.
        logging.getLogger("guardrail").addHandler(logging.NullHandler())
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()  # what stdout cannot take is told here, not by Python at its end
        except typer.TyperException as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "guardrail")
            code = complain(f"{error.format_message()} (see {command} --help)", error.exit_code)
        except typer.Abort:
            code = complain("interrupted", 130)
        except GuardrailError as error:
            usage = UsageError, PolicyError
            code = complain(str(error), 2 if isinstance(error, usage) else failed)
        except BrokenPipeError:  # whoever read it has seen enough
            code = failed
        except SystemExit as stop:  # how typer and rich end for the same reason
            code = failed if stop.code == 1 else stop.code
        except OSError as error:  # a name that is too long for a file, a stdout that is full
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            what = error.strerror or str(error)
            code = complain(f"{where}{what}", 2 if error.errno == errno.ENAMETOOLONG else failed)
        _drop_what_is_left()
        if standalone_mode:
            sys.exit(code)
        return code


def _open_what_is_closed() -> None:
    """A service or a cron job may be started with stdin, stdout or stderr closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _drop_what_is_left() -> None:
    """What a full or closed stdout did not take, Python would try to write once more at its end."""
    if (stream := sys.__stdout__) is not None:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def complain(message: str, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


def text_of(option: str, value: str | None) -> str | None:
    """The option's text, read from stdin for `-`; never blank, always Unicode."""
    if value is None:
        return None
    where = "stdin" if value == "-" else option
    data = sys.stdin.buffer.read() if value == "-" else value.encode("utf-8", "surrogateescape")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not valid UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): "
            "convert it to UTF-8"
        ) from None
    if not text.strip():
        raise UsageError(f"{where}: the text is empty: there is nothing to judge")
    return text


def model_folder(model: str) -> Path:
    """Where the model is. Raises UsageError."""
    from guardrail.artifact import artifact_folder

    try:
        folder = artifact_folder(model)
    except ArtifactError as error:
        raise UsageError(str(error)) from None
    if not folder.is_dir():
        raise UsageError(f"model {model!r}: no such folder")
    return folder


def open_audit(path: Path | None, key: Path | None, *, fsync: Fsync = "always") -> AuditLog | None:
    """The log of `--audit`; None where none is asked for. Raises UsageError."""
    if path is None:
        if key is not None:
            raise UsageError(KEY_ALONE)
        return None
    from guardrail.audit import AuditError, AuditLog

    try:
        return AuditLog(path, key=key, fsync=fsync)
    except AuditError as error:
        raise UsageError(f"--audit {error}") from None


def open_guard(
    model: str,
    policy: str,
    device: Device,
    *,
    threads: int | None = None,
    audit: AuditLog | None = None,
) -> Guard:
    """threads: of one inference; all cores by default."""
    chosen = Policy.load(policy)  # before the model: a wrong word should not cost a second
    folder = model_folder(model)

    from guardrail.guard import Guard
    from guardrail.moderator import OnnxModerator

    return Guard(OnnxModerator(folder, device=device, threads=threads), chosen, audit=audit)
