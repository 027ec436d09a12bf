from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail import batching
from guardrail._batching_cost import Cost
from guardrail.batching import Batcher
from guardrail.errors import ModerationError, Overloaded
from guardrail.guard import Guard
from guardrail.moderator import OnnxModerator
from guardrail.taxonomy import Category, Severity
from guardrail.testing import FakeModerator
from guardrail.verdict import Action, Assessment, Pair, Verdict

ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds; machines are noisy, and only a failing test waits so long
WORDS = {"bomb": (Severity.SEVERE, Category.VIOLENCE)}


def text(n: int) -> Pair:
    """A text whose assessment no other text shares: the passage starts at n."""
    return Pair("x" * n + "bomb")


def seen(pairs: Sequence[Pair]) -> list[Assessment]:
    return FakeModerator(WORDS).assess(pairs)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


class Held(FakeModerator):
    """Judges a batch each time it is let; knows what it was given and how much at a time."""

    def __init__(self) -> None:
        super().__init__(WORDS, on_assess=self.hold)
        self.batches: list[list[Pair]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._let = threading.Semaphore(0)

    def hold(self, pairs: Sequence[Pair]) -> None:
        with self._lock:
            self.batches.append(list(pairs))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        assert self._let.acquire(timeout=PATIENCE), "the test forgot to let a batch through"
        with self._lock:
            self.at_once -= 1
        if any("poison" in pair.text for pair in pairs):
            raise ModerationError("too hot")

    def let(self, batches: int = 10_000) -> None:
        self._let.release(batches)


@pytest.fixture
def held() -> Iterator[Held]:
    moderator = Held()
    yield moderator
    moderator.let()


# --- every caller gets its own answer ------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 5), st.none() | st.integers(0, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 40), st.none()),
        st.tuples(st.just("let"), st.integers(1, 3), st.none()),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.integers(1, 3), st.integers(1, 4), st.integers(5, 12), st.sampled_from([0, 0.5]))
def test_whatever_happens_each_call_gets_its_own_answers_in_order_and_within_bounds(
    steps: list[tuple[str, int, int | None]],
    workers: int,
    max_batch: int,
    max_pending: int,
    latency: float,
) -> None:
    held = Held()
    batcher = Batcher(
        held, workers=workers, max_batch=max_batch, max_pending=max_pending, latency=latency
    )
    calls: list[tuple[list[Pair], Future[list[Assessment]]]] = []
    cancelled = set()
    serial = iter(range(10_000))
    for step, n, bad in steps:
        if step == "submit":
            pairs = [text(next(serial)) for _ in range(n)]
            if bad is not None and bad < n:
                pairs[bad] = Pair("poison")
            with contextlib.suppress(Overloaded):
                calls.append((pairs, batcher.submit(pairs)))
        elif step == "cancel" and n < len(calls):
            if calls[n][1].cancel():
                cancelled.add(n)
        elif step == "let":
            held.let(n)
        assert batcher.depth + batcher.running <= max_pending
    held.let()
    batcher.close()
    for i, (pairs, future) in enumerate(calls):
        assert future.done(), "an answer was lost"
        if i in cancelled:
            assert future.cancelled()
        elif Pair("poison") in pairs:
            with pytest.raises(ModerationError, match="too hot"):
                future.result()
        else:
            assert future.result() == seen(pairs)
    assert held.most_at_once <= workers
    assert max(map(len, held.batches), default=0) <= max_batch
    assert (batcher.depth, batcher.running) == (0, 0)


def test_threads_and_several_event_loops_share_one_batcher() -> None:
    pairs = [text(n) for n in range(200)]
    expected = seen(pairs)
    with Batcher(FakeModerator(WORDS), workers=3, max_batch=7) as batcher:

        async def ask() -> list[Assessment]:
            answers = await asyncio.gather(*(batcher.aassess([pair]) for pair in pairs))
            return [one for (one,) in answers]

        def work(n: int) -> list[Assessment]:
            return asyncio.run(ask()) if n % 2 else [batcher.assess([pair])[0] for pair in pairs]

        with ThreadPoolExecutor(8) as pool:
            assert all(found == expected for found in pool.map(work, range(8)))


def test_it_is_a_moderator_of_the_same_name_and_thresholds() -> None:
    inner = FakeModerator(WORDS)
    with Batcher(inner) as batcher:
        assert (batcher.id, batcher.thresholds) == (inner.id, inner.thresholds)
        assert batcher.assess([]) == []


def test_the_bundled_model_judges_as_without_a_batcher() -> None:
    pytest.importorskip("onnxruntime")
    model = OnnxModerator(device="cpu")
    pairs = [Pair("How do I bake bread?", "Knead it. " * n) for n in range(1, 12)]
    with Batcher(model) as batcher:
        assert batcher.max_batch == 1, "more than one at a time gains nothing on a CPU"
        assert batcher.assess(pairs) == model.assess(pairs)


# --- when what is judged -------------------------------------------------------------------------


def test_idle_a_text_does_not_wait_for_company(held: Held) -> None:
    with Batcher(held, workers=1, latency=PATIENCE * 10) as batcher:
        future = batcher.submit([text(0)])
        until(lambda: len(held.batches) == 1)
        held.let()
        assert future.result(PATIENCE) == seen([text(0)])


def test_busy_what_waits_is_judged_together(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=4) as batcher:
        batcher.submit([text(0)])
        until(lambda: batcher.running == 1)
        waiting = [batcher.submit([text(1)]) for _ in range(6)]
        held.let()
        for future in waiting:
            future.result(PATIENCE)
    assert [len(batch) for batch in held.batches] == [1, 4, 2]


def test_a_worker_leaves_the_others_their_share(held: Held) -> None:
    with Batcher(held, workers=2, max_batch=64) as batcher:
        batcher.submit([text(0)])
        batcher.submit([text(0)])
        until(lambda: batcher.running == 2)
        waiting = [batcher.submit([text(1)]) for _ in range(8)]
        held.let(1)
        until(lambda: batcher.running == 5)
        held.let()
        for future in waiting:
            future.result(PATIENCE)
    assert max(len(batch) for batch in held.batches) == 4


class Clock:
    """In the place of `time` in the batcher: it goes as the moderator says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("per_text", "largest"), [(0.0, 33), (0.05, 2)])
def test_a_batch_grows_where_company_is_cheap_and_not_where_it_costs_more_than_the_latency(
    per_text: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call costs 1.5 s whatever is in it, more than the latency: no reason for less."""
    clock, sizes = Clock(), []
    monkeypatch.setattr(batching, "time", clock)

    def work(pairs: Sequence[Pair]) -> None:
        sizes.append(len(pairs))
        clock.now += 1.5 + per_text * len(pairs)

    with Batcher(FakeModerator(WORDS, on_assess=work), workers=1, latency=0.11) as batcher:
        batcher.assess([text(0)])
        batcher.assess([text(0)] * 4)
        batcher.assess([text(0)] * 33)
    assert sizes[:2] == [1, 4]
    assert max(sizes[2:]) == largest


LINES = st.lists(st.integers(1, 10_000), min_size=2, max_size=60, unique=True)


@given(LINES, st.floats(0, 1), st.floats(1e-6, 1e-2))
def test_the_cost_of_company_is_told_from_the_cost_of_a_call(
    sizes: list[int], fixed: float, slope: float
) -> None:
    cost = Cost()
    assert (cost.average, cost.marginal) == (0, 0)
    for size in sizes:
        cost.learn(size, fixed + slope * size)
        assert 0 <= cost.marginal <= cost.average
    assert cost.marginal == pytest.approx(slope, rel=0.01, abs=1e-5 * fixed) or np.var(
        sizes
    ) < 1e-3 * np.mean(np.square(sizes))


@given(st.lists(st.tuples(st.integers(1, 10**7), st.floats(0, 1e4)), max_size=60))
def test_the_cost_of_company_is_never_negative_nor_more_than_all(
    seen: list[tuple[int, float]],
) -> None:
    cost = Cost()
    for size, seconds in seen:
        cost.learn(size, seconds)
        assert 0 <= cost.marginal <= cost.average


def order(held: Held, batcher: Batcher, pairs: Sequence[Pair]) -> list[Pair]:
    """In which order texts that come one after the other, while the worker is busy, are judged."""
    first = batcher.submit([Pair("first")])
    until(lambda: batcher.running == 1)
    futures = [batcher.submit([pair]) for pair in pairs]
    held.let()
    for future in [first, *futures]:
        future.result(PATIENCE)
    return [pair for batch in held.batches for pair in batch][1:]


def test_a_short_text_overtakes_a_long_one_that_came_just_before(held: Held) -> None:
    pairs = [text(3000), text(1)]
    with Batcher(held, workers=1, max_batch=1, latency=PATIENCE) as batcher:
        assert order(held, batcher, pairs) == pairs[::-1]


def test_without_latency_to_spend_texts_are_judged_as_they_come(held: Held) -> None:
    pairs = [text(n) for n in (3000, 1, 500, 20)]
    with Batcher(held, workers=1, max_batch=1, latency=0) as batcher:
        assert order(held, batcher, pairs) == pairs


def test_a_long_text_is_overtaken_for_no_longer_than_the_latency(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=1, latency=0.05) as batcher:
        batcher.submit([Pair("first")])
        until(lambda: batcher.running == 1)
        batcher.submit([text(100_000)])
        time.sleep(0.1)
        late = batcher.submit([text(1)])
        held.let()
        late.result(PATIENCE)
    assert [batch[0] for batch in held.batches[1:]] == [text(100_000), text(1)]


def test_a_bulk_call_does_not_hold_up_a_single_text(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=1) as batcher:
        first = batcher.submit([text(0)])
        until(lambda: batcher.running == 1)
        time.sleep(0.3)  # the batcher learns that a text takes so long
        held.let(1)
        first.result(PATIENCE)
        bulk = batcher.submit([text(n) for n in range(100)])
        single = batcher.submit([Pair("me first")])
        held.let()
        single.result(PATIENCE)
        bulk.result(PATIENCE)
    judged = [batch[0] for batch in held.batches]
    assert judged.index(Pair("me first")) <= 3


# --- bounds --------------------------------------------------------------------------------------


def test_a_full_queue_says_so_and_when_to_come_again(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=1, max_pending=4) as batcher:
        futures = [batcher.submit([text(n)]) for n in range(4)]
        until(lambda: batcher.running == 1)
        with pytest.raises(Overloaded, match=r"4 texts pending, 4 at most: try again in") as full:
            batcher.assess([text(9)])
        assert full.value.retry_after >= 0.1
        assert batcher.depth == 3
        held.let(1)
        futures[0].result(PATIENCE)
        until(lambda: batcher.depth + batcher.running == 3)
        with pytest.raises(Overloaded):
            batcher.assess([text(9), text(8)])  # all of a call, or nothing
        last = batcher.submit([text(9)])
        held.let()
        assert last.result(PATIENCE) == seen([text(9)])


def test_the_door_closes_before_the_queue_is_full(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=1, max_pending=8) as batcher:
        for n in range(5):
            batcher.submit([text(n)])
        batcher.admit()
        batcher.submit([text(5)])
        with pytest.raises(Overloaded):
            batcher.admit()
        batcher.submit([text(6), text(7)])  # work under way goes on
        held.let()


def test_the_wait_is_estimated_from_what_waits(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=1) as batcher:
        first = batcher.submit([text(0)])
        until(lambda: batcher.running == 1)
        time.sleep(0.2)
        held.let(1)
        first.result(PATIENCE)
        until(lambda: batcher.running == 0)
        for _ in range(11):
            batcher.submit([text(0)])
        until(lambda: batcher.running == 1)
        assert 10 * 0.2 <= batcher.retry_after < PATIENCE
        held.let()


def test_a_call_larger_than_the_queue_is_told_to_come_in_parts() -> None:
    with Batcher(FakeModerator(WORDS), max_pending=10) as batcher:
        with pytest.raises(ModerationError, match=r"11 texts in one call.*in parts") as raised:
            batcher.assess([text(0)] * 11)
        assert not isinstance(raised.value, Overloaded), "trying again would not help"
        verdicts = Guard(batcher).check_many([text(n) for n in range(100)])
        assert not any(v.degraded for v in verdicts), "a guard gives them in parts"


@pytest.mark.parametrize("wrong", ["workers", "max_batch", "max_pending"])
def test_a_bound_that_lets_nothing_through_is_refused(wrong: str) -> None:
    nothing: dict[str, Any] = {wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong}=0 must be at least 1"):
        Batcher(FakeModerator(WORDS), **nothing)
    with pytest.raises(ValueError, match="latency=-1 must be"):
        Batcher(FakeModerator(WORDS), latency=-1)


# --- cancelling ----------------------------------------------------------------------------------


def test_cancelling_a_future_frees_its_places_at_once(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=1, max_pending=4) as batcher:
        batcher.submit([text(0)])
        until(lambda: batcher.running == 1)
        given_up = batcher.submit([text(1), text(2), text(3)])
        assert batcher.depth == 3
        assert given_up.cancel()
        assert batcher.depth == 0
        with pytest.raises(CancelledError):
            given_up.result(PATIENCE)
        kept = batcher.submit([text(4)])
        held.let()
        kept.result(PATIENCE)
    assert held.batches == [[text(0)], [text(4)]], "a text given up was judged all the same"


def test_cancelling_a_task_frees_its_place(held: Held) -> None:
    batcher = Batcher(held, workers=1, max_batch=1)

    async def main() -> None:
        batcher.submit([text(0)])
        until(lambda: batcher.running == 1)  # so that what waits from here on is the task's text
        task = asyncio.create_task(Guard(batcher).acheck("a bomb"))
        while not batcher.depth:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert batcher.depth == 0

    asyncio.run(main())
    held.let()
    batcher.close()


# --- failing -------------------------------------------------------------------------------------


def test_a_failing_text_does_not_cost_those_judged_with_it(held: Held) -> None:
    with Batcher(held, workers=1, max_batch=16) as batcher:
        batcher.submit([text(0)])
        until(lambda: batcher.running == 1)
        good = [batcher.submit([text(n)]) for n in range(1, 8)]
        bad = batcher.submit([Pair("poison")])
        held.let()
        with pytest.raises(ModerationError, match="too hot"):
            bad.result(PATIENCE)
        assert [f.result(PATIENCE)[0] for f in good] == seen([text(n) for n in range(1, 8)])
    assert max(map(len, held.batches)) == 8, "they were judged together"


@pytest.mark.parametrize("error", [StopIteration, CancelledError, asyncio.CancelledError])
@pytest.mark.parametrize("awaited", [False, True])
def test_an_error_that_futures_take_for_their_own_is_named_a_failure(
    error: type[BaseException], awaited: bool
) -> None:
    def fail(pairs: Sequence[Pair]) -> None:
        raise error

    with Batcher(FakeModerator(WORDS, on_assess=fail)) as batcher:

        async def main() -> None:
            await asyncio.wait_for(batcher.aassess([text(0)]), PATIENCE)

        with pytest.raises(ModerationError, match=f"fake raised {error.__name__}"):
            asyncio.run(main()) if awaited else batcher.assess([text(0)])


def test_an_interrupt_reaches_the_caller_and_the_next_call_is_answered() -> None:
    def interrupt(pairs: Sequence[Pair]) -> None:
        if "stop" in pairs[0].text:
            raise KeyboardInterrupt

    with Batcher(FakeModerator(WORDS, on_assess=interrupt), workers=1) as batcher:
        with pytest.raises(KeyboardInterrupt):
            batcher.assess([Pair("stop")])
        assert batcher.assess([text(3)]) == seen([text(3)])


@pytest.mark.parametrize("answer", [[], [None, None], None], ids=["none", "too many", "no list"])
def test_a_moderator_that_answers_with_nonsense_fails_closed(answer: Any) -> None:
    class Wrong(FakeModerator):
        def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
            nonsense: list[Assessment] = answer
            return nonsense

    with Batcher(Wrong(WORDS)) as batcher:
        verdict = Guard(batcher).check("hello")
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)


def test_where_no_thread_can_start_the_caller_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    batcher = Batcher(FakeModerator(WORDS))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no)
        with pytest.raises(ModerationError, match="no worker could start: can't start new thread"):
            batcher.assess([text(0)])
    assert batcher.depth == 0
    assert batcher.assess([text(0)]) == seen([text(0)])
    batcher.close()


# --- closing, forking, ending --------------------------------------------------------------------


def test_closing_answers_all_that_was_taken_and_takes_no_more(held: Held) -> None:
    batcher = Batcher(held, workers=2, max_batch=2)
    futures = [batcher.submit([text(n)]) for n in range(20)]
    held.let()
    batcher.close()
    assert [f.result(0)[0] for f in futures] == seen([text(n) for n in range(20)])
    with pytest.raises(ModerationError, match="the batcher is closed"):
        batcher.assess([text(0)])
    batcher.close()
    assert not batcher._threads


def test_closing_does_not_wait_longer_than_told_for_a_moderator_that_hangs(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = Batcher(held, workers=1, max_batch=1)
    futures = [batcher.submit([text(n)]) for n in range(3)]
    until(lambda: batcher.running == 1)
    batcher.close(timeout=0.05)
    for future in futures:
        with pytest.raises(ModerationError, match="closed before the text was judged"):
            future.result(0)
    held.let()  # it comes back after all: its late answer must not be the worker's end
    until(lambda: batcher.running == 0)
    assert not caplog.records, "a call was settled twice"


def test_a_forgotten_batcher_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_IDLE_SECONDS", 0.01)
    kept = [Batcher(FakeModerator(WORDS))]
    for n in range(2):  # idle workers are started anew
        assert kept[0].assess([text(n)]) == seen([text(n)])
        until(lambda: not kept[0]._threads)
    forgotten = weakref.ref(kept.pop())

    def gone() -> bool:
        gc.collect()
        return forgotten() is None

    until(gone)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, timeout=PATIENCE * 2, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


PREAMBLE = """
import os, threading, time
from guardrail.batching import Batcher
from guardrail.moderator import OnnxModerator
from guardrail.testing import FakeModerator
from guardrail.verdict import Pair
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_judges_on_while_its_parent_is_busy() -> None:
    pytest.importorskip("onnxruntime")
    said = run(
        PREAMBLE
        + """
model = OnnxModerator(device="cpu", threads=2)
batcher = Batcher(model, workers=2)
pairs = [Pair("How do I bake bread?", "Knead it, wait, bake it. " * n) for n in (1, 9)]
expected = model.assess(pairs)
pending = [batcher.submit(pairs) for _ in range(3)]
child = os.fork()
if child == 0:
    print(batcher.depth, batcher.assess(pairs) == expected, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(all(future.result() == expected for future in pending))
"""
    )
    assert said.split() == ["0", "True", "True"]


def test_the_interpreter_ends_although_a_moderator_hangs() -> None:
    said = run(
        PREAMBLE
        + """
import guardrail.batching
guardrail.batching._EXIT_SECONDS = 0.1
batcher = Batcher(FakeModerator({}, on_assess=lambda pairs: time.sleep(10_000)))
batcher.submit([Pair("hello")])
print("ends")
"""
    )
    assert said == "ends\n"


# --- behind a guard ------------------------------------------------------------------------------


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
