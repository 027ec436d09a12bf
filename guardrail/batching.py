"""Many callers, one moderator: a bounded queue, and workers that take from it what they can.

    batcher = Batcher(OnnxModerator())
    guard = Guard(batcher)  # from any number of threads and event loops

Idle, a text is judged at once. Busy, each worker takes the texts that are due, together up to what
the moderator gains from; short ones may overtake long ones, within a bound. Full, callers hear so.

Owns no inference: the moderator behind it does that, and must be thread-safe.
"""

from __future__ import annotations

import asyncio
import atexit
import heapq
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent import futures
from itertools import accumulate, count
from numbers import Integral
from types import TracebackType

from guardrail._batching_calls import Call, Job, Settled, settle, size_of
from guardrail._batching_cost import Cost
from guardrail._forks import renewed_in_children
from guardrail._onnx import GPUS
from guardrail._unwanted import Unwanted, while_wanted
from guardrail.errors import ModerationError, Overloaded
from guardrail.moderator import Moderator
from guardrail.policy import Thresholds
from guardrail.taxonomy import Direction
from guardrail.verdict import Assessment, Pair

__all__ = ["Batcher"]

_IDLE_SECONDS = 10.0  # a worker without work ends, so that a forgotten batcher leaves no thread
_EXIT_SECONDS = 5.0  # a hanging moderator must not keep the interpreter from ending
_STOP_SECONDS = 30.0  # in which one that was told to stop does so, on a machine however busy
_LONG = 2000  # characters from which on a text may be overtaken for the whole latency bound
_ADMITTED = 0.75  # of the queue; the rest is for conversations under way


class Batcher:
    """A `Moderator` for many callers at once, in front of one that does the work.

    workers: batches judged at the same time; by default one per core, or 2 on a GPU, so that one
        prepares its texts while the other is judged.
    max_batch: texts judged together at most; by default 1 for a model on the CPU, where more gain
        nothing and wait for one another, else 64.
    max_pending: texts waiting or being judged; a call that would exceed it raises `Overloaded`.
    latency: seconds that company may cost a text: shorter texts that came up to so much later go
        first, and a batch is filled until its texts together are expected to add so much.

    A call of many texts counts as if they came one after the other: it does not hold up the rest.

    Thread-safe; for any number of event loops; usable after a fork, in the child with an empty
    queue. A failing text fails its own call only. Raises ValueError when made with nonsense.
    """

    def __init__(
        self,
        moderator: Moderator,
        *,
        workers: int | None = None,
        max_batch: int | None = None,
        max_pending: int = 1024,
        latency: float = 0.1,
    ) -> None:
        if missing := [n for n in ("assess", "id", "thresholds") if not hasattr(moderator, n)]:
            raise ValueError(
                f"{type(moderator).__name__} is no moderator, it has no {missing[0]!r}: give one "
                "as OnnxModerator(), and the batcher to the guard, as in Guard(Batcher(moderator))"
            )
        device = getattr(moderator, "device", None)
        self.moderator = moderator
        self._name = moderator.id
        self.workers = (2 if device in GPUS else _cores()) if workers is None else workers
        self.max_batch = (1 if device == "cpu" else 64) if max_batch is None else max_batch
        self.max_pending = max_pending
        self._latency = latency
        for name in ("workers", "max_batch", "max_pending"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name}={value!r} must be a whole number")
            if value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if isinstance(latency, bool) or not isinstance(latency, int | float) or not latency >= 0:
            raise ValueError(f"latency={latency!r} must be 0 seconds or more")
        self._cost = Cost()
        self._closed = False
        self._asks = False  # whether the moderator asks, at times, if it should go on
        self._after_fork()
        renewed_in_children(self)
        _ALL.add(self)

    def _after_fork(self) -> None:
        """Start empty: the parent's threads, and whoever held its lock, are not in its child."""
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._drained = threading.Condition(self._lock)
        self._queue: list[tuple[float, int, Job]] = []  # a heap: what is due first, first
        self._arrivals = count()
        self._running: set[Job] = set()
        self._idle = 0  # workers that wait for work
        self._fresh = 0  # workers started that have not looked for work yet
        self._threads: set[threading.Thread] = set()

    @property
    def id(self) -> str:
        return self.moderator.id

    @property
    def thresholds(self) -> Mapping[Direction, Thresholds]:
        return self.moderator.thresholds

    @property
    def depth(self) -> int:
        """Texts that wait for a worker."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Texts that are being judged."""
        return len(self._running)

    @property
    def retry_after(self) -> float:
        """Seconds until what is pending now should be done; an estimate, 0.1 at least."""
        with self._lock:
            return self._estimate()

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        """One assessment per pair, in order. Raises Overloaded, ModerationError, or whatever the
        moderator raised on one of them."""
        future = self.submit(pairs)
        try:
            return future.result()
        finally:
            future.cancel()  # interrupted: what still waits is taken out of the queue

    async def aassess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        """`assess`, without blocking the event loop; cancelling it frees its place."""
        future = self.submit(pairs)
        try:
            return await asyncio.wrap_future(future)
        finally:
            future.cancel()

    def submit(self, pairs: Sequence[Pair]) -> futures.Future[list[Assessment]]:
        """`assess` as a future; `cancel()` takes what still waits out of the queue, and stops what
        is being judged where the moderator can. Raises Overloaded where there is no room,
        ModerationError once closed."""
        call = Call([None] * len(pairs), len(pairs))
        if not pairs:
            call.future.set_result([])
            return call.future
        if len(pairs) > self.max_pending:
            raise ModerationError(
                f"{len(pairs):,} texts in one call, more than max_pending={self.max_pending:,}: "
                "give them in parts, or raise max_pending"
            )
        jobs = [Job(call, i, pair, size_of(pair)) for i, pair in enumerate(pairs)]
        with self._lock:
            if self._closed:
                raise ModerationError(f"{self._name}: the batcher is closed")
            self._make_sure_of_room(len(jobs), self.max_pending)
            for due, job in zip(self._due(jobs), jobs, strict=True):
                heapq.heappush(self._queue, (due, next(self._arrivals), job))
            self._call_workers(call)
        call.future.add_done_callback(lambda future: self._forget(call))
        return call.future

    def admit(self) -> None:
        """Raise `Overloaded` when new work is better turned away at the door: three quarters of
        the places are taken. The rest is for work under way, as a stream's later passages."""
        with self._lock:
            self._make_sure_of_room(1, max(1, int(self.max_pending * _ADMITTED)))

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, and wait until all that was taken is judged; what is not after
        `timeout` seconds fails with ModerationError, and is judged no further where the moderator
        can stop, as `OnnxModerator` does. May be called again. From a callback of a future that a
        worker settles it does not wait: what is left is that worker's to judge."""
        with self._lock:
            self._closed = True
            self._wake.notify_all()
            if threading.current_thread() in self._threads:
                return
            self._drained.wait_for(lambda: not (self._queue or self._running), timeout)
            jobs = [*self._running, *(job for _, _, job in self._queue)]
            left = {job.call for job in jobs if not job.call.done}
            self._queue.clear()
            for call in left:
                call.done = True
            stuck = bool(self._running)
            threads = self._threads - {threading.current_thread()}
        closed = ModerationError(f"{self._name}: closed before the text was judged")
        settle([(call, closed) for call in left])
        # A thread that is in native code when the interpreter ends takes the process with it. One
        # whose moderator never asks may hang for ever, and is left.
        end = time.monotonic() + (_STOP_SECONDS if self._asks or not stuck else 0.0)
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> Batcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- under the lock --------------------------------------------------------------------------

    def _make_sure_of_room(self, texts: int, places: int) -> None:
        pending = len(self._queue) + len(self._running)
        if pending + texts > places:
            wait = self._estimate()
            raise Overloaded(
                f"{self._name}: overloaded: {pending:,} texts pending, {places:,} at most: "
                f"try again in {wait:.1f} s",
                retry_after=wait,
            )

    def _estimate(self) -> float:
        waiting = sum(job.size for _, _, job in self._queue)
        return max(0.1, waiting * self._cost.average / self.workers)

    def _due(self, jobs: Sequence[Job]) -> list[float]:
        """When each text of a call that came now is due, on the clock of time.monotonic()."""
        now = time.monotonic()
        before = accumulate((job.size * self._cost.average for job in jobs), initial=0.0)
        return [
            now + wait + self._latency * min(1.0, job.size / _LONG)
            for job, wait in zip(jobs, before, strict=False)
        ]

    def _call_workers(self, call: Call) -> None:
        """Wake or start as many as there is work for."""
        self._wake.notify(call.left)
        while len(self._queue) > self._idle + self._fresh and len(self._threads) < self.workers:
            thread = threading.Thread(target=self._work, name="guardrail-batch", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                if self._threads:
                    return
                self._drop(call)
                raise ModerationError(f"{self._name}: no worker could start: {error}") from error
            self._threads.add(thread)
            self._fresh += 1

    def _take(self) -> list[Job]:
        """What is due first; as much as is worth judging together, and leaves the other workers
        their share."""
        share = -(-len(self._queue) // self.workers)
        batch: list[Job] = []
        marginal, seconds = self._cost.marginal, 0.0
        while self._queue and len(batch) < min(self.max_batch, share):
            seconds += self._queue[0][2].size * marginal
            if batch and seconds > self._latency:
                break
            batch.append(heapq.heappop(self._queue)[2])
        self._running.update(batch)
        return batch

    # --- workers ---------------------------------------------------------------------------------

    def _work(self) -> None:
        with self._lock:
            self._fresh -= 1
        try:
            while batch := self._next():
                started = time.monotonic()
                self._judge(batch)
                self._finish(batch, time.monotonic() - started)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _next(self) -> list[Job]:
        """The next batch; none when this worker should end."""
        with self._lock:
            self._idle += 1
            self._wake.wait_for(lambda: self._queue or self._closed, _IDLE_SECONDS)
            self._idle -= 1
            batch = self._take()
            if not batch:  # in one step with having looked, lest a caller count on this worker
                self._threads.discard(threading.current_thread())
            return batch

    def _judge(self, batch: Sequence[Job]) -> None:
        batch = [job for job in batch if not job.call.done]
        if not batch:
            return
        try:
            with while_wanted(lambda: self._is_wanted(batch)):
                found = list(self.moderator.assess([job.pair for job in batch]))
            if len(found) != len(batch):
                raise ModerationError(f"{self._name} gave {len(found)} assessments of {len(batch)}")
        except Unwanted:
            return
        except BaseException as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            middle = len(batch) // 2
            self._judge(batch[:middle])
            self._judge(batch[middle:])
        else:
            self._deliver(batch, found)

    def _is_wanted(self, batch: Sequence[Job]) -> bool:
        self._asks = True
        return any(not job.call.done for job in batch)

    def _deliver(self, batch: Sequence[Job], found: Sequence[Assessment]) -> None:
        settled: list[Settled] = []
        with self._lock:
            for job, assessment in zip(batch, found, strict=True):
                call = job.call
                call.found[job.index] = assessment
                call.left -= 1
                if not call.left and not call.done:
                    call.done = True
                    settled.append((call, None))
        settle(settled)

    def _fail(self, job: Job, error: BaseException) -> None:
        if isinstance(error, StopIteration | asyncio.CancelledError | futures.CancelledError):
            # A future would take these for its own, its caller hang or think itself cancelled.
            error = ModerationError(f"{self._name} raised {type(error).__name__}: {error}")
        with self._lock:
            if job.call.done:
                return
            self._drop(job.call)
        settle([(job.call, error)])

    def _finish(self, batch: Sequence[Job], seconds: float) -> None:
        with self._lock:
            if not any(job.call.given_up for job in batch):  # a part tells nothing of the whole
                self._cost.learn(sum(job.size for job in batch), seconds)
            self._running.difference_update(batch)
            if not (self._queue or self._running):
                self._drained.notify_all()

    def _forget(self, call: Call) -> None:
        """Called when a call is over; by its caller's `cancel()` with texts still waiting."""
        with self._lock:
            if call.done:
                return
            self._drop(call)
        call.future.set_running_or_notify_cancel()

    def _drop(self, call: Call) -> None:
        call.done = True
        self._queue = [entry for entry in self._queue if entry[2].call is not call]
        heapq.heapify(self._queue)
        if not (self._queue or self._running):
            self._drained.notify_all()


def _cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_ALL: weakref.WeakSet[Batcher] = weakref.WeakSet()


def _at_exit() -> None:
    for batcher in list(_ALL):
        batcher.close(_EXIT_SECONDS)


atexit.register(_at_exit)
