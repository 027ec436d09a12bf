"""A batcher: when what is judged, and with what."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from batching_kit import PATIENCE, WORDS, Held, seen, text, until
from hypothesis import given
from hypothesis import strategies as st

from guardrail import batching
from guardrail._batching_cost import Cost
from guardrail.batching import Batcher
from guardrail.testing import FakeModerator
from guardrail.verdict import Pair


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
