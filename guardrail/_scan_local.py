"""The local engine of `guardrail scan`: this machine's cores, one single-threaded inference each.

Texts are judged one by one on a CPU: int8 activations are scaled by the largest of a batch, so
that texts judged together would shift one another's verdicts, and it would save nothing there.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeAlias

from guardrail._onnx import GPUS
from guardrail._rows import Format, Outcome, Row
from guardrail.guard import Guard
from guardrail.moderator import OnnxModerator
from guardrail.policy import Policy
from guardrail.verdict import Pair, Verdict

__all__ = ["Engine", "Judged", "LocalEngine", "cores", "identity"]

Judged: TypeAlias = list[tuple[Row, Outcome]]
_Key: TypeAlias = tuple[int, str]  # which row of a chunk, which field of the row
_GPU_BATCH = 64


class Engine(Protocol):
    """What judges the rows of a scan."""

    @property
    def identity(self) -> dict[str, Any]:
        """Policy and model: a scan goes on only under the same; engines do not count."""
        ...

    def judge(self, source: Format, skip: int, chunk: int) -> Generator[Judged, None, None]:
        """The rows but the first `skip`, in order, about `chunk` together, with their outcome."""
        ...


class LocalEngine:
    """Judges with one guard, in threads; the model's runtime lets go of Python's lock meanwhile.

    workers: texts judged at once; by default one per core that this process may use (on a GPU
        two, so that one prepares texts while the other is judged). Open the model with `threads=1`
        for that.
    """

    def __init__(self, guard: Guard, workers: int | None = None) -> None:
        self._guard = guard
        on_gpu = getattr(guard.moderator, "device", None) in GPUS
        self._group = _GPU_BATCH if on_gpu else 1
        self.workers = workers or (2 if on_gpu else cores())

    @property
    def identity(self) -> dict[str, Any]:
        model = self._guard.moderator
        seen = model.manifest if isinstance(model, OnnxModerator) else model.thresholds
        return identity(self._guard.policy, model.id, seen)

    def judge(self, source: Format, skip: int, chunk: int) -> Generator[Judged, None, None]:
        """Reads ahead by a few chunks, so that no core waits for the slowest text of one."""
        rows = (source.row(raw) for raw in source.raw(skip))
        ahead = 1 + -(-2 * self.workers * self._group // chunk)
        waiting: deque[tuple[list[Row], dict[_Key, Future[Verdict]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, "guardrail-scan")
        try:
            while part := list(islice(rows, chunk)):
                waiting.append((part, self._submit(pool, part)))
                if len(waiting) > ahead:
                    yield _outcomes(*waiting.popleft())
            while waiting:
                yield _outcomes(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, rows: Sequence[Row]) -> dict[_Key, Future[Verdict]]:
        texts = [
            ((index, name), pair)
            for index, row in enumerate(rows)
            if not isinstance(row.pairs, str)
            for name, pair in row.pairs.items()
        ]
        # The longest first: the short ones then fill the gaps at the end.
        texts.sort(key=lambda text: -len(text[1].text))
        futures = {}
        for first in range(0, len(texts), self._group):
            group = texts[first : first + self._group]
            done = [Future[Verdict]() for _ in group]
            pool.submit(self._settle, [pair for _, pair in group], done)
            futures.update({key: future for (key, _), future in zip(group, done, strict=True)})
        return futures

    def _settle(self, pairs: Sequence[Pair], futures: Sequence[Future[Verdict]]) -> None:
        try:
            for future, verdict in zip(futures, self._guard.check_many(pairs), strict=True):
                future.set_result(verdict)
        except BaseException as error:  # the scan's own thread must hear of it, not this one
            for future in futures:
                if not future.done():
                    future.set_exception(error)


def _outcomes(rows: Sequence[Row], futures: dict[_Key, Future[Verdict]]) -> Judged:
    return [
        (
            row,
            row.pairs
            if isinstance(row.pairs, str)
            else {name: futures[index, name].result() for name in row.pairs},
        )
        for index, row in enumerate(rows)
    ]


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def identity(policy: Policy, model: str, seen: object) -> dict[str, Any]:
    """seen: all that the model's verdicts rest on, its manifest for a start."""
    return {"policy": [policy.id, _digest(policy)], "model": [model, _digest(seen)]}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:16]
