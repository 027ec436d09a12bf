"""What `guardrail serve` tells about each request: a log line, and spans where OpenTelemetry is.

No user text unless asked for: a line names the key, the model, the decision and its categories.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from guardrail._printable import escaped
from guardrail.verdict import Pair, Verdict

try:
    from opentelemetry import propagate, trace
except ImportError:  # an option of the user's, not a need of ours
    propagate = trace = None  # type: ignore[assignment]

__all__ = ["RECORD", "Record", "Span", "log_request", "setup_logging", "span", "trace_headers"]

logger = logging.getLogger("guardrail.server")


@dataclasses.dataclass(slots=True)
class Record:
    """What is known of a request so far; its log line at the end."""

    id: str
    method: str
    path: str
    keep_text: bool = False
    key: str | None = None
    policy: str | None = None
    model: str | None = None
    upstream: str | None = None
    error: str | None = None
    checks: int = 0
    worst: Verdict | None = None
    texts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def see(self, pair: Pair, verdict: Verdict) -> None:
        self.checks += 1
        if self.worst is None or _strength(verdict) > _strength(self.worst):
            self.worst = verdict
        if self.keep_text:
            self.texts.append(
                {"prompt": pair.prompt, "response": pair.response, "action": verdict.action.value}
            )

    def facts(self) -> dict[str, Any]:
        """Everything there is to say, without what is not known."""
        facts: dict[str, Any] = {
            "id": self.id,
            "key": self.key,
            "policy": self.policy,
            "model": self.model,
            "upstream": self.upstream,
            "checks": self.checks or None,
            "error": self.error,
        }
        if self.worst is not None:
            facts |= {
                "direction": self.worst.direction.value,
                "action": self.worst.action.value,
                "severity": self.worst.severity.label,
                "categories": [reason.category.value for reason in self.worst.reasons],
                "degraded": self.worst.degraded or None,
            }
        if self.keep_text:
            facts["texts"] = self.texts
        return {name: value for name, value in facts.items() if value is not None}


def _strength(verdict: Verdict) -> tuple[int, bool, int]:
    return verdict.action.rank, verdict.degraded, int(verdict.severity)


# The request that is being answered; mutable, so that tasks made for it add to the same one.
RECORD: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)


def log_request(record: Record, status: int, seconds: float) -> None:
    facts = {
        "method": record.method,
        "path": record.path,
        "status": status,
        "ms": round(seconds * 1000, 1),
        **record.facts(),
    }
    quiet = record.path in ("/healthz", "/readyz", "/metrics") and status < 400
    level = logging.DEBUG if quiet else logging.ERROR if status >= 500 else logging.INFO
    logger.log(level, "request", extra={"facts": facts})


class _Lines(logging.Formatter):
    """One line per record, JSON or for people; the facts stand in `extra`."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts: Mapping[str, Any] = getattr(record, "facts", {})
        now = time.gmtime(record.created)
        when = f"{time.strftime('%Y-%m-%dT%H:%M:%S', now)}.{int(record.msecs):03d}Z"
        message = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:  # its text may hold user text
            facts = {**facts, "exception": record.exc_info[0].__name__, "at": _where(record)}
        if self._as_json:
            head = {"time": when, "level": record.levelname.lower(), "event": message}
            return json.dumps({**head, **facts}, ensure_ascii=False, default=str)
        rest = "  ".join(f"{name}={value}" for name, value in facts.items() if value != [])
        line = f"{when[11:23]} {record.levelname.lower():7} {message}  {rest}".rstrip()
        # One line, whatever a caller asked for, that does not steer the terminal.
        return escaped(line)


def _where(record: logging.LogRecord) -> list[str]:
    frames = []
    trace_ = record.exc_info[2] if record.exc_info else None
    while trace_ is not None:
        code = trace_.tb_frame.f_code
        frames.append(f"{code.co_filename}:{trace_.tb_lineno} {code.co_name}")
        trace_ = trace_.tb_next
    return frames[-8:]


def setup_logging(form: Literal["auto", "json", "text"], level: str) -> None:
    """Lines on stderr, of this server and of uvicorn."""
    as_json = form == "json" or (form == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(as_json))
    for name in ("guardrail", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level.upper())
        log.propagate = False


# --- spans ---------------------------------------------------------------------------------------


class Span:
    """A span that is ended by hand; nothing where OpenTelemetry is not installed."""

    def __init__(self, name: str, headers: Mapping[str, str] | None = None, **facts: Any) -> None:
        self._span: Any = None
        if trace is not None:
            context = propagate.extract(headers) if headers is not None else None
            kind = trace.SpanKind.INTERNAL if headers is None else trace.SpanKind.SERVER
            tracer = trace.get_tracer("guardrail")
            self._span = tracer.start_span(name, context, kind=kind, attributes=_plain(facts))

    def note(self, **facts: Any) -> None:
        if self._span is not None:
            self._span.set_attributes(_plain(facts))

    def fail(self, what: str) -> None:
        if self._span is not None:
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, what))

    def end(self) -> None:
        if self._span is not None:
            self._span.end()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes it the parent of the spans that are begun within, here and in tasks made here."""
        if self._span is None:
            yield
        else:
            with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
                yield

    def headers(self) -> dict[str, str]:
        """`traceparent` and what goes with it, for a call that belongs to this span."""
        headers: dict[str, str] = {}
        if self._span is not None:
            propagate.inject(headers, trace.set_span_in_context(self._span))
        return headers


@contextmanager
def span(name: str, **facts: Any) -> Iterator[Span]:
    """A span around a block of one task."""
    one = Span(name, **facts)
    try:
        with one.current():
            yield one
    finally:
        one.end()


def trace_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """The request headers that a trace is continued from."""
    wanted = {"traceparent", "tracestate", "baggage"}
    found = {n.decode("latin-1").lower(): v.decode("latin-1") for n, v in headers}
    return {name: value for name, value in found.items() if name in wanted}


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in facts.items() if value is not None}
