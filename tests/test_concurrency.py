"""Many callers at once see, to the last bit, what one caller sees."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from guardrail import Guard
from guardrail.batching import Batcher
from guardrail.moderator import OnnxModerator
from guardrail.verdict import Pair, Verdict

pytest.importorskip("onnxruntime")

CHECKS, THREADS, TASKS = 1000, 8, 100


def pairs() -> list[Pair]:
    """Short for the most part, so that many fit into a test; some of several windows."""
    chance = random.Random(7)
    words = (
        "you",
        "kill",
        "a",
        "process",
        "idiot",
        "and",
        "run",
        "how",
        "do",
        "I",
        "bomb",
        "bread",
    )
    lengths = [chance.choice((1, 1, 2, 3, 5)) for _ in range(CHECKS - 4)] + [90, 180, 260, 300]
    texts = [" ".join(chance.choices(words, k=n)) for n in lengths]
    chance.shuffle(texts)
    return [Pair(t) if n % 2 else Pair("Hi", t) for n, t in enumerate(texts)]


@pytest.fixture(scope="module")
def model() -> OnnxModerator:
    return OnnxModerator(device="cpu", threads=1)


@pytest.fixture(scope="module")
def alone(model: OnnxModerator) -> list[Verdict]:
    """The serial results; equality of verdicts is that of every probability, bit for bit."""
    guard = Guard(model)
    return [guard.check(pair.prompt, pair.response) for pair in pairs()]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 8,000 inferences: seconds on an idle machine, minutes on a busy one
@pytest.mark.parametrize(
    ("batched", "checks"), [(False, CHECKS), (True, CHECKS // 4)], ids=["bare", "batcher"]
)
def test_eight_threads_of_a_thousand_checks_equal_the_serial_results(
    model: OnnxModerator, alone: list[Verdict], batched: bool, checks: int
) -> None:
    texts = pairs()
    ready = threading.Barrier(THREADS)

    def work(n: int, guard: Guard) -> bool:
        """Each thread in an order of its own, so that other texts meet."""
        order = list(range(CHECKS))
        random.Random(n).shuffle(order)
        ready.wait(60)
        return all(
            guard.check(texts[i].prompt, texts[i].response) == alone[i] for i in order[:checks]
        )

    with Batcher(model) as batcher, ThreadPoolExecutor(THREADS) as pool:
        guard = Guard(batcher if batched else model)
        assert all(pool.map(work, range(THREADS), [guard] * THREADS))


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True], ids=["bare", "batcher"])
def test_a_hundred_tasks_equal_the_serial_results(
    model: OnnxModerator, alone: list[Verdict], batched: bool
) -> None:
    """The thousand checks, dealt to a hundred tasks of one event loop."""
    texts = pairs()

    async def work(n: int, guard: Guard) -> bool:
        return all(
            [
                await guard.acheck(texts[i].prompt, texts[i].response) == alone[i]
                for i in range(n, CHECKS, TASKS)
            ]
        )

    async def main(guard: Guard) -> list[bool]:
        return await asyncio.gather(*(work(n, guard) for n in range(TASKS)))

    with Batcher(model) as batcher:
        assert all(asyncio.run(main(Guard(batcher if batched else model))))


def test_the_results_are_those_of_any_number_of_threads_per_inference(
    model: OnnxModerator, alone: list[Verdict]
) -> None:
    some = pairs()[:40] + [pair for pair in pairs() if len(pair.text) > 300]
    assert not any(verdict.degraded for verdict in alone)
    expected = model.assess(some)
    for threads in (1, 2, 3, 8):
        assert OnnxModerator(device="cpu", threads=threads).assess(some) == expected


def test_verdicts_that_differ_in_one_bit_are_not_equal(alone: list[Verdict]) -> None:
    """Else the tests above would show nothing."""
    import dataclasses
    import math

    seen = alone[0].assessment
    assert seen is not None
    category, probability = next(iter(seen.categories.items()))
    other = dict(seen.categories) | {category: math.nextafter(probability, 2)}
    assert dataclasses.replace(alone[0], assessment=dataclasses.replace(seen, categories=other)) \
        != alone[0]  # fmt: skip
