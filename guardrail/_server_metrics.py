"""What `guardrail serve` counts, for Prometheus. One registry per app, no user text in any label.

With several workers, prometheus_client keeps the values in files of PROMETHEUS_MULTIPROC_DIR, and
whichever worker is asked answers for all.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from guardrail.verdict import Verdict

__all__ = ["CONTENT_TYPE", "Metrics"]

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one app."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "guardrail_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "guardrail_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SLOW,
            registry=registry,
        )
        self.open = self._gauge("guardrail_open_requests", "Requests being answered.", ["route"])
        self.streams = self._gauge("guardrail_open_streams", "Event streams being sent.")
        self.queue = self._gauge(
            "guardrail_queue_depth", "Texts that wait for, or are in, the moderator."
        )
        self.check_seconds = Histogram(
            "guardrail_check_seconds",
            "Judging the texts of one call, the waiting included.",
            buckets=_FAST,
            registry=registry,
        )
        self.first_seconds = Histogram(
            "guardrail_first_event_seconds",
            "From a request to the first event of its stream.",
            buckets=_SLOW,
            registry=registry,
        )
        self._verdicts = Counter(
            "guardrail_verdicts",
            "Verdicts, by their leading category.",
            ["direction", "action", "severity", "category"],
            registry=registry,
        )
        self._degraded = Counter(
            "guardrail_degraded",
            "Verdicts of a failed stage, decided by the policy's on_error.",
            ["direction"],
            registry=registry,
        )
        self.upstream_seconds = Histogram(
            "guardrail_upstream_seconds",
            "Until an upstream begins to answer (streams), or has (others).",
            ["upstream"],
            buckets=_SLOW,
            registry=registry,
        )
        self.upstream_errors = Counter(
            "guardrail_upstream_errors",
            "Answers that an upstream did not give.",
            ["upstream", "code"],
            registry=registry,
        )

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] | list[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry, multiprocess_mode="livesum")

    def verdict(self, verdict: Verdict) -> None:
        leading = verdict.reasons[0].category.value if verdict.reasons else "none"
        self._verdicts.labels(
            verdict.direction.value, verdict.action.value, verdict.severity.label, leading
        ).inc()
        if verdict.degraded:
            self._degraded.labels(verdict.direction.value).inc()

    @contextmanager
    def checking(self, texts: int) -> Iterator[None]:
        started = time.perf_counter()
        self.queue.inc(texts)
        try:
            yield
        finally:
            self.queue.dec(texts)
            self.check_seconds.observe(time.perf_counter() - started)

    def exposition(self) -> bytes:
        """Prometheus's text format, of all workers where there are several."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None:
            return generate_latest(self.registry)
        for path in Path(folder).glob("gauge_live*.db"):
            found = re.search(r"_(\d+)\.db$", path.name)
            if found and not _is_alive(int(found[1])):
                multiprocess.mark_process_dead(int(found[1]), folder)  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
