"""A guard in front of a batcher, or of a moderator that is awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from batching_kit import ENDLESS, PATIENCE, WORDS, Counting, Held, seen, text, until
from hypothesis import given
from hypothesis import strategies as st

from guardrail.batching import Batcher
from guardrail.errors import ModerationError
from guardrail.guard import Guard
from guardrail.taxonomy import Severity
from guardrail.testing import FakeModerator
from guardrail.verdict import Action, Assessment, Pair, Verdict


def test_an_overloaded_moderator_fails_closed_and_is_not_asked_again(held: Held) -> None:
    batcher = Batcher(held, workers=1, max_batch=1, max_pending=2)
    batcher.submit([text(0)])
    batcher.submit([text(0)])
    asked = 0
    submit = batcher.submit

    def counted(pairs: Sequence[Pair]) -> Future[list[Assessment]]:
        nonlocal asked
        asked += 1
        return submit(pairs)

    batcher.submit = counted  # type: ignore[method-assign]
    guard = Guard(batcher)
    pairs = [text(1), text(2)]
    for verdicts in (guard.check_many(pairs), asyncio.run(guard.acheck_many(pairs))):
        assert [(v.action, v.degraded) for v in verdicts] == [(Action.REFUSE, True)] * 2
        assert "overloaded" in (verdicts[0].error or "")
    assert asked == 2
    held.let()
    batcher.close()


@pytest.mark.parametrize("awaited", [False, True])
def test_after_a_guards_timeout_a_long_text_is_judged_no_further(awaited: bool) -> None:
    pytest.importorskip("onnxruntime")
    model = Counting()
    guard = Guard(model, timeout=0.5)
    verdict = asyncio.run(guard.acheck(ENDLESS)) if awaited else guard.check(ENDLESS)
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)
    assert guard._pool is not None
    guard._pool.shutdown(wait=True)
    assert model.windows < 200  # of more than 1,000


@pytest.mark.parametrize("awaited", [False, True])
def test_a_guards_timeout_holds_and_frees_the_place(held: Held, awaited: bool) -> None:
    batcher = Batcher(held, workers=1, max_batch=1)
    batcher.submit([text(0)])
    until(lambda: batcher.running == 1)
    guard = Guard(batcher, timeout=0.05)
    pairs = [text(n) for n in range(8)]
    verdicts = asyncio.run(guard.acheck_many(pairs)) if awaited else guard.check_many(pairs)
    assert {v.error for v in verdicts} == {"moderation: no assessment within 0.05 s"}
    assert all((v.action, v.degraded) == (Action.REFUSE, True) for v in verdicts)
    assert batcher.depth == 0
    held.let()
    batcher.close()


def test_a_guard_with_a_timeout_keeps_more_than_its_four_threads_busy(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=64) as batcher, ThreadPoolExecutor(16) as pool:
        guard = Guard(batcher, timeout=PATIENCE)
        verdicts = [pool.submit(guard.check, "a bomb") for _ in range(16)]
        until(lambda: batcher.depth + batcher.running == 16)
        held.let()
        assert all(v.result(PATIENCE).severity is Severity.SEVERE for v in verdicts)


class Awaited(FakeModerator):
    """A moderator of a user's, asked over the network say, that is awaited."""

    def __init__(self, error: BaseException | None = None, bad: str = "") -> None:
        super().__init__(WORDS)
        self._error, self._bad = error, bad

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        raise AssertionError("called in a thread although it can be awaited")

    async def aassess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        await asyncio.sleep(0)
        if self._error is not None and any(self._bad in pair.text for pair in pairs):
            raise self._error
        return seen(pairs)


def test_a_moderator_that_can_be_awaited_is_and_says_the_same() -> None:
    pairs = [Pair("a bomb"), Pair(" "), Pair("hi", "a bomb"), Pair("hello")]
    assert asyncio.run(Guard(Awaited()).acheck_many(pairs)) == Guard(
        FakeModerator(WORDS)
    ).check_many(pairs)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TimeoutError("socket"), "moderation: TimeoutError: socket"),
        (RuntimeError("cable\nunplugged"), "moderation: RuntimeError: cable unplugged"),
        (asyncio.CancelledError(), "moderation: fake cancelled the assessment"),
    ],
    ids=["timeout", "error", "cancelled"],
)
def test_awaited_a_moderator_that_fails_fails_closed(error: BaseException, says: str) -> None:
    verdict = asyncio.run(Guard(Awaited(error), timeout=PATIENCE).acheck("hello"))
    assert (verdict.action, verdict.degraded, verdict.error) == (Action.REFUSE, True, says)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_awaited_bad_texts_do_not_cost_their_neighbours(bad: list[bool]) -> None:
    guard = Guard(Awaited(ModerationError("too hot"), "poison"))
    pairs = [Pair("poison" if is_bad else "a bomb") for is_bad in bad]
    verdicts = asyncio.run(guard.acheck_many(pairs))
    assert [v.degraded for v in verdicts] == bad


def test_an_audit_that_waits_for_a_disk_leaves_the_event_loop_free() -> None:
    released = threading.Event()

    def slow(pair: Pair, verdict: Verdict) -> None:
        assert released.wait(PATIENCE), "the loop was blocked"

    async def main() -> Verdict:
        judging = asyncio.create_task(Guard(Awaited(), audit=slow).acheck("a bomb"))
        await asyncio.sleep(0.05)
        released.set()
        return await judging

    assert not asyncio.run(main()).degraded
