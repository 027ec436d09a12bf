"""The guard: a moderator, a policy, a rule for failures, and an audit sink.

Fails closed: whatever goes wrong while judging a text gives the policy's `on_error` action with
`degraded=True`, never an exception and never a silent pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from guardrail.errors import GuardrailError, ModerationError
from guardrail.moderator import Device, Moderator, OnnxModerator
from guardrail.policy import Policy
from guardrail.verdict import Assessment, Pair, Verdict

__all__ = ["Guard"]

logger = logging.getLogger("guardrail")


class Guard:
    """Judges prompts and responses under a policy.

    model: a model name or folder, or any `Moderator`.
    policy: a preset (`strict`, `balanced`, `permissive`, `audit-only`), a TOML file, or a `Policy`.
    device: `auto`, `cpu` or `cuda`, for a model named by `model`.
    timeout: seconds one call may take, of one text or of many, before the guard fails closed;
        None waits. A moderator that hangs keeps its thread: with four such, all calls time out.
    audit: called with every pair and its verdict, before the verdict is returned; when it raises,
        the verdict fails closed, so that nothing is delivered unlogged unless the policy says so.

    Thread-safe. Raises ArtifactError, PolicyError or MissingExtra when made, nothing when used.
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
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout={timeout!r} must be above 0 seconds, or None to wait")
        self.policy = policy if isinstance(policy, Policy) else Policy.load(policy)
        self.moderator: Moderator = (
            OnnxModerator(model, device=device) if isinstance(model, str | Path) else model
        )
        self._timeout = timeout
        self._audit = audit
        self._pool = ThreadPoolExecutor(4, "guardrail") if timeout is not None else None

    def check(self, prompt: str | None = None, response: str | None = None) -> Verdict:
        """Judge a prompt alone (direction input), or a response, to its prompt where there is one
        (direction output). A text of nothing but white space is harmless. Raises TypeError when
        there is neither."""
        if prompt is None and response is None:
            raise TypeError("check() needs a prompt, a response, or both")
        return self.check_many([Pair(prompt or "", response)])[0]

    async def acheck(self, prompt: str | None = None, response: str | None = None) -> Verdict:
        """`check`, without blocking the event loop."""
        return await asyncio.to_thread(self.check, prompt, response)

    def check_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order; judged together, which is faster than one by one."""
        started = time.perf_counter()
        verdicts = self._judge(pairs)
        elapsed = (time.perf_counter() - started) * 1000 / max(1, len(pairs))
        return [
            self._log(pair, dataclasses.replace(verdict, latency_ms=elapsed))
            for pair, verdict in zip(pairs, verdicts, strict=True)
        ]

    async def acheck_many(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """`check_many`, without blocking the event loop."""
        return await asyncio.to_thread(self.check_many, pairs)

    def _judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        try:
            return self._verdicts(pairs)
        except Exception as error:
            if len(pairs) > 1 and not isinstance(error, _TimedOut):
                # One bad text must not cost its neighbours their verdicts.
                middle = len(pairs) // 2
                return self._judge(pairs[:middle]) + self._judge(pairs[middle:])
            return [self._failed("moderation", pair, error) for pair in pairs]

    def _verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        model, thresholds = self.moderator.id, self.moderator.thresholds
        blank = [not pair.text.strip() for pair in pairs]
        there = [pair for pair, nothing in zip(pairs, blank, strict=True) if not nothing]
        seen = self._assess(there) if there else []
        if len(seen) != len(there):
            raise ModerationError(f"{model} gave {len(seen)} assessments of {len(there)} texts")
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
        future = self._pool.submit(self.moderator.assess, pairs)
        if not wait([future], self._timeout).done:
            future.cancel()
            raise _TimedOut(f"no assessment within {self._timeout:g} s")
        return future.result()

    def _log(self, pair: Pair, verdict: Verdict) -> Verdict:
        if self._audit is None:
            return verdict
        try:
            self._audit(pair, verdict)
        except Exception as error:
            failed = self._failed("audit", pair, error)
            return dataclasses.replace(
                verdict,
                action=max(verdict.action, failed.action),
                degraded=True,
                error=failed.error,
            )
        return verdict

    def _failed(self, stage: str, pair: Pair, error: Exception) -> Verdict:
        what = " ".join(str(error).split())  # one line, whatever a library wrote
        if not isinstance(error, GuardrailError):
            what = f"{type(error).__name__}: {what}"
        logger.error("%s failed, policy %s decides: %s", stage, self.policy.id, what)
        return self.policy.fail(pair.direction, f"{stage}: {what}")


class _TimedOut(ModerationError):  # noqa: N818 - private, and read as a fact
    """The time is up for the whole batch: its texts are not tried again one by one."""
