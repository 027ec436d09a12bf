"""A batcher: each caller gets its own answer, within bounds, whatever fails or is given up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest
from batching_kit import PATIENCE, WORDS, Held, seen, text, until
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrail.batching import Batcher
from guardrail.errors import ModerationError, Overloaded
from guardrail.guard import Guard
from guardrail.moderator import OnnxModerator
from guardrail.testing import FakeModerator
from guardrail.verdict import Action, Assessment, Pair

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


@pytest.mark.parametrize("value", ["2", 1.5, True, [1]], ids=repr)
@pytest.mark.parametrize("name", ["workers", "max_batch", "max_pending"])
def test_a_bound_that_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^{name}=.* must be a whole number$"):
        Batcher(FakeModerator(WORDS), **wrong)


@pytest.mark.parametrize("value", ["x", None, True, float("nan")], ids=repr)
def test_a_latency_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^latency=.* must be 0 seconds or more$"):
        Batcher(FakeModerator(WORDS), latency=value)


@pytest.mark.parametrize("wrong", [object(), None, Guard(FakeModerator(WORDS))], ids=type)
def test_what_is_no_moderator_is_refused_with_what_to_give(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"no moderator.*Guard\(Batcher\(moderator\)\)$"):
        Batcher(wrong)


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
