"""The guard: a moderator, a policy, a rule for failures, and an audit sink.

Fails closed: whatever goes wrong while judging a text gives the policy's `on_error` action with
`degraded=True`, never an exception and never a silent pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeAlias

from guardrail._forks import renewed_in_children
from guardrail._unwanted import Interest, in_thread
from guardrail.batching import Batcher
from guardrail.errors import GuardrailError, ModerationError, Overloaded
from guardrail.moderator import Device, Moderator, OnnxModerator
from guardrail.policy import Policy
from guardrail.verdict import Assessment, Pair, Verdict

__all__ = ["Guard", "as_guard"]

logger = logging.getLogger("guardrail")

_Judging: TypeAlias = Generator[Sequence[Pair], Sequence[Assessment], list[Verdict]]


class Guard:
    """Judges prompts and responses under a policy.

    model: a model name or folder, or any `Moderator`; for many callers at once, a `Batcher`.
    policy: a preset (`strict`, `balanced`, `permissive`, `audit-only`), a TOML file, or a `Policy`.
    device: `auto`, `cpu` or `cuda`, for a model named by `model`.
    timeout: seconds one call may take, of one text or of many, before the guard fails closed;
        None waits. `OnnxModerator` then stops; a moderator that hangs keeps its thread: with four
        such, all calls time out. Behind a `Batcher`, or awaited (see `acheck`), it takes no thread
        of the guard's.
    audit: called with every pair and its verdict, before the verdict is returned; when it raises,
        the verdict fails closed, so that nothing is delivered unlogged unless the policy says so.

    Thread-safe, and usable in forked children. Raises ArtifactError, PolicyError, MissingExtra,
    TypeError or ValueError when made, nothing when used.
    """

    def __init__(
        self,
        model: str | Path | Moderator = "small",
        policy: str | Path | Policy = "balanced",
        *,
        device: Device = "auto",
        timeout: float | None = None,
        audit: Callable[[Pair, Verdict], None] | None = None,
    ) -> None:
        if timeout is not None:
            _check_timeout(timeout)
        if not isinstance(policy, str | Path | Policy):
            raise TypeError(
                f"policy must be a preset's name, a path or a Policy, not {type(policy).__name__}"
            )
        if not isinstance(model, str | Path) and not hasattr(model, "assess"):
            raise TypeError(
                f"model must be a name, a folder or a Moderator, not {type(model).__name__}"
            )
        if not isinstance(model, str | Path) and _is_async(model.assess):
            raise TypeError(
                "the model's assess is async and would never be awaited: name it aassess, for "
                "acheck, and give it a sync assess as well"
            )
        if _is_async(audit):
            raise TypeError(
                "audit is async and would never be awaited: give a sync callable, as "
                "AuditLog('audit.jsonl') is; acheck calls it in a thread"
            )
        if audit is not None and not callable(audit):
            raise TypeError(
                f"audit must be callable, as AuditLog('audit.jsonl') is, not {type(audit).__name__}"
            )
        self.policy = policy if isinstance(policy, Policy) else Policy.load(policy)
        self.moderator: Moderator = (
            OnnxModerator(model, device=device) if isinstance(model, str | Path) else model
        )
        self._timeout = timeout
        self._audit = audit
        self._after_fork()
        renewed_in_children(self)

    def _after_fork(self) -> None:
        """Have threads of its own: a forked child has none of its parent's."""
        self._pool = ThreadPoolExecutor(4, "guardrail") if self._timeout is not None else None

    def check(self, prompt: str | None = None, response: str | None = None) -> Verdict:
        """Judge a prompt alone (direction input), or a response, to its prompt where there is one
        (direction output). A text of nothing but white space is harmless. Raises TypeError when
        there is neither."""
        return self.check_many([_pair(prompt, response)])[0]

    async def acheck(self, prompt: str | None = None, response: str | None = None) -> Verdict:
        """`check`, without blocking the event loop. A moderator with `async def aassess(pairs)` is
        awaited, and cancelled with its caller; any other is called in a thread."""
        return (await self.acheck_many([_pair(prompt, response)]))[0]

    def check_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order; judged together, which is faster than one by one. Raises
        TypeError, before anything is judged, where there is something else than pairs."""
        pairs = _pairs(pairs)
        started = time.perf_counter()
        return self._log(pairs, self._judge(pairs), time.perf_counter() - started)

    async def acheck_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """`check_many`, without blocking the event loop."""
        pairs = _pairs(pairs)
        if not hasattr(self.moderator, "aassess"):
            return await in_thread(self.check_many, pairs)
        started = time.perf_counter()
        verdicts = await self._ajudge(pairs)
        elapsed = time.perf_counter() - started
        if self._audit is None:
            return self._log(pairs, verdicts, elapsed)
        # In a thread: a sink may wait for a disk.
        return await asyncio.to_thread(self._log, pairs, verdicts, elapsed)

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        judging = self._judging(pairs)
        try:
            wanted = next(judging)
            while True:
                try:
                    seen = self._assess(wanted)
                except asyncio.CancelledError:  # its own: a caller's is raised by an await alone
                    cancelled = f"{self.moderator.id} cancelled the assessment"
                    wanted = judging.throw(ModerationError(cancelled))
                except Exception as error:
                    wanted = judging.throw(error)
                else:
                    wanted = judging.send(seen)
        except StopIteration as end:
            verdicts: list[Verdict] = end.value
            return verdicts

    async def _ajudge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        judging = self._judging(pairs)
        try:
            wanted = next(judging)
            while True:
                try:
                    seen = await self._aassess(wanted)
                except Exception as error:
                    wanted = judging.throw(error)
                else:
                    wanted = judging.send(seen)
        except StopIteration as end:
            verdicts: list[Verdict] = end.value
            return verdicts

    def _judging(self, pairs: Sequence[Pair]) -> _Judging:
        """Yields texts to be assessed, is sent their assessments (or thrown why there are none),
        and returns the verdicts."""
        try:
            return (yield from self._verdicts(pairs))
        except Exception as error:
            if len(pairs) > 1 and not isinstance(error, _TimedOut | Overloaded):
                # One bad text must not cost its neighbours their verdicts.
                middle = len(pairs) // 2
                first = yield from self._judging(pairs[:middle])
                return first + (yield from self._judging(pairs[middle:]))
            return [self._failed("moderation", pair, error) for pair in pairs]

    def _verdicts(self, pairs: Sequence[Pair]) -> _Judging:
        model, thresholds = self.moderator.id, self.moderator.thresholds
        for text in (text for pair in pairs for text in (pair.prompt, pair.response)):
            if not isinstance(text, str | None):
                raise ModerationError(f"a text must be a str, not {type(text).__name__}")
        blank = [not pair.text.strip() for pair in pairs]
        there = [pair for pair, nothing in zip(pairs, blank, strict=True) if not nothing]
        seen = (yield there) if there else []
        if len(seen) != len(there):
            raise ModerationError(f"{model} gave {len(seen)} assessments of {len(there)} texts")
        for pair, one in zip(there, seen, strict=True):
            if one.direction is not pair.direction:  # it would be decided by the other grid
                raise ModerationError(
                    f"{model} assessed {pair.direction.value} as {one.direction.value}"
                )
        rest = iter(seen)
        return [
            self.policy.decide(
                Assessment.harmless(pair.direction, model=model) if nothing else next(rest),
                thresholds.get(pair.direction),
            )
            for pair, nothing in zip(pairs, blank, strict=True)
        ]

    def _assess(self, pairs: Sequence[Pair]) -> Sequence[Assessment]:
        if self._pool is None:
            return self.moderator.assess(pairs)
        interest = Interest()
        if isinstance(self.moderator, Batcher):
            future = self.moderator.submit(pairs)
        else:
            future = self._pool.submit(interest.run, self.moderator.assess, pairs)
        try:
            if not wait([future], self._timeout).done:
                raise _TimedOut(f"no assessment within {self._timeout:g} s")
            return future.result()
        finally:
            interest.given_up = True
            future.cancel()

    async def _aassess(self, pairs: Sequence[Pair]) -> Sequence[Assessment]:
        moderator: Any = self.moderator
        task = asyncio.ensure_future(moderator.aassess(pairs))
        try:
            await asyncio.wait([task], timeout=self._timeout)
            if not task.done():
                raise _TimedOut(f"no assessment within {self._timeout:g} s")
            if task.cancelled():  # by the moderator: its caller was not
                raise ModerationError(f"{moderator.id} cancelled the assessment")
            seen: Sequence[Assessment] = task.result()
            return seen
        finally:
            task.cancel()

    def _log(
        self, pairs: Sequence[Pair], verdicts: Sequence[Verdict], seconds: float
    ) -> list[Verdict]:
        """The verdicts, timed and audited."""
        each = seconds * 1000 / max(1, len(pairs))
        return [
            self._audited(pair, dataclasses.replace(verdict, latency_ms=each))
            for pair, verdict in zip(pairs, verdicts, strict=True)
        ]

    def _audited(self, pair: Pair, verdict: Verdict) -> Verdict:
        if self._audit is None:
            return verdict
        audit: Any = self._audit
        try:
            done = audit(pair, verdict)
            if inspect.isawaitable(done):
                if inspect.iscoroutine(done):
                    done.close()
                raise TypeError("the sink is async and nobody awaits it: give a sync one")
        except (Exception, asyncio.CancelledError) as error:
            failed = self._failed("audit", pair, error)
            return dataclasses.replace(
                verdict,
                action=max(verdict.action, failed.action),
                degraded=True,
                error=failed.error,
            )
        return verdict

    def _failed(self, stage: str, pair: Pair, error: BaseException) -> Verdict:
        what = " ".join(str(error).split())  # one line, whatever a library wrote
        if not isinstance(error, GuardrailError):
            what = f"{type(error).__name__}: {what}"
        logger.error("%s failed, policy %s decides: %s", stage, self.policy.id, what)
        return self.policy.fail(pair.direction, f"{stage}: {what}")


def as_guard(guard: Guard | None) -> Guard:
    """`Guard()` by default. Raises TypeError for what is none, such as the name of a policy."""
    if guard is None:
        return Guard()
    if not isinstance(guard, Guard):
        raise TypeError(
            f"guard must be a Guard, as in guard=Guard(policy='balanced'), not "
            f"{type(guard).__name__}"
        )
    return guard


def _check_timeout(timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(
            f"timeout must be a number of seconds, or None to wait, not {type(timeout).__name__}"
        )
    most = threading.TIMEOUT_MAX  # what a thread can wait
    if not 0 < timeout <= most:
        raise ValueError(
            f"timeout={timeout!r} must be above 0 seconds and at most {most:g}, or None to wait"
        )


def _is_async(function: object) -> bool:
    """Whether a call of it would have to be awaited; an object's `__call__` counts too."""
    call = getattr(type(function), "__call__", None)  # noqa: B004 - which one, not whether
    return any(map(inspect.iscoroutinefunction, (function, call)))


def _pair(prompt: str | None, response: str | None) -> Pair:
    if prompt is None and response is None:
        raise TypeError("check() needs a prompt, a response, or both")
    return Pair("" if prompt is None else prompt, response)


def _pairs(pairs: Sequence[Pair]) -> list[Pair]:
    # A text alone would be taken for a sequence of its characters.
    found: list[object] = [pairs] if isinstance(pairs, str | Pair) else list(pairs)
    if isinstance(pairs, Pair) or not all(isinstance(pair, Pair) for pair in found):
        wrong = next((i for i in found if not isinstance(i, Pair)), pairs)
        raise TypeError(
            f"check_many takes a list of Pairs, as in check_many([Pair('...')]); "
            f"it was given {type(wrong).__name__}"
        )
    return found  # type: ignore[return-value]


class _TimedOut(ModerationError):  # noqa: N818 - private, and read as a fact
    """The time is up for the whole batch: its texts are not tried again one by one."""
