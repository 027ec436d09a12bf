"""What judges in `guardrail serve`: the moderator behind its queue, guards that are counted and
traced, and the audit log.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guardrail._audit_check import UnusableLogError, check_log
from guardrail._onnx import DeviceError
from guardrail._server_config import Settings
from guardrail._server_metrics import Metrics
from guardrail._server_telemetry import RECORD, span
from guardrail.batching import Batcher
from guardrail.conversation import MOST_VIEWS
from guardrail.errors import ArtifactError
from guardrail.guard import Guard
from guardrail.moderator import Moderator, OnnxModerator
from guardrail.verdict import Pair, Verdict, stage_of

__all__ = [
    "ServedGuard",
    "check_audit",
    "check_moderator",
    "device_of",
    "open_audit",
    "open_moderator",
]


class ServedGuard(Guard):
    """A guard whose calls are counted, traced, and added to the record of their request."""

    def __init__(self, metrics: Metrics, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._metrics = metrics

    async def acheck_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        with self._metrics.checking(len(pairs)), span("guardrail.check", texts=len(pairs)) as one:
            verdicts = [_for_callers(v) for v in await super().acheck_many(pairs)]
            worst = max(verdicts, key=lambda v: v.action.rank, default=None)
            if worst is not None:
                one.note(
                    guardrail__action=worst.action.value,
                    guardrail__severity=worst.severity.label,
                    guardrail__categories=[r.category.value for r in worst.reasons],
                    guardrail__policy=worst.policy,
                )
        record = RECORD.get()
        for pair, verdict in zip(pairs, verdicts, strict=True):
            self._metrics.verdict(verdict)
            if record is not None:
                record.see(pair, verdict)
        return verdicts


def _for_callers(verdict: Verdict) -> Verdict:
    """What failed; the log says why, which may name this machine's files."""
    if verdict.error is None:
        return verdict
    return dataclasses.replace(verdict, error=stage_of(verdict.error))


def open_moderator(settings: Settings, given: Moderator | None) -> Moderator:
    """The moderator, behind a queue that never overflows: what comes in is bounded before it."""
    model, limits = settings.model, settings.limits
    moderator = given or _onnx_moderator(settings)
    if not model.batching or hasattr(moderator, "aassess"):
        return moderator
    # A chat has one question pending at a time: of its input, or a passage of each choice.
    most = limits.texts + limits.chats * max(MOST_VIEWS, limits.choices)
    return Batcher(moderator, max_pending=most)


def _onnx_moderator(settings: Settings) -> OnnxModerator:
    model = settings.model
    # The queue keeps every core busy with a text of its own; a text on all of them costs more.
    threads = model.threads or (1 if model.batching else None)
    try:
        return OnnxModerator(model.name, device=model.device, threads=threads)
    except ArtifactError as error:
        key = "device" if isinstance(error, DeviceError) else "name"
        raise settings.error(("model", key), str(error)) from error


def check_moderator(settings: Settings) -> None:
    """Raises what `open_moderator` would."""
    _onnx_moderator(settings)


def check_audit(settings: Settings) -> None:
    """Raises what `open_audit` would. Starts no log."""
    wanted = settings.audit
    if wanted is None:
        return
    key = Path(wanted.key_file) if wanted.key_file else None
    try:
        check_log(Path(wanted.path), key)
    except UnusableLogError as error:
        name = "key_file" if key is not None and error.about == "key" else "path"
        raise settings.error(("audit", name), str(error)) from error


def open_audit(settings: Settings) -> Callable[[Pair, Verdict], None] | None:
    """The log that all workers append to. Raises ConfigError."""
    wanted = settings.audit
    if wanted is None:
        return None
    from guardrail.audit import AuditError, AuditLog

    try:
        return AuditLog(
            wanted.path,
            key=Path(wanted.key_file) if wanted.key_file else None,
            consent=wanted.text,
            max_bytes=wanted.max_bytes,
            fsync=wanted.fsync,
        )
    except AuditError as error:
        check_audit(settings)  # names the key that is to blame
        raise settings.error(("audit", "path"), str(error)) from error


def device_of(moderator: Moderator) -> str | None:
    """What the model runs on, where it says so."""
    behind = moderator.moderator if isinstance(moderator, Batcher) else moderator
    return getattr(behind, "device", None)
