"""A batcher: closed, forgotten, forked, and when the interpreter ends."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from batching_kit import ENDLESS, PATIENCE, WORDS, Counting, Held, seen, text, until
from fresh_kit import forks, run_fresh

from guardrail import batching
from guardrail.batching import Batcher
from guardrail.errors import ModerationError
from guardrail.testing import FakeModerator
from guardrail.verdict import Pair


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


@pytest.mark.parametrize("workers", [1, 2])
def test_closed_by_a_futures_callback_it_answers_the_rest_and_ends(
    held: Held, workers: int
) -> None:
    batcher = Batcher(held, workers=workers, max_batch=2)
    futures = [batcher.submit([text(n)]) for n in range(6)]
    for future in futures:
        future.add_done_callback(lambda _: batcher.close())
    held.let()
    closer = threading.Thread(target=batcher.close, daemon=True)
    closer.start()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert [f.result(0)[0] for f in futures] == seen([text(n) for n in range(6)])
    until(lambda: not batcher._threads)


def test_a_text_that_nobody_waits_for_any_more_is_judged_no_further() -> None:
    pytest.importorskip("onnxruntime")
    model = Counting()
    with Batcher(model, workers=1) as batcher:
        hello = batcher.assess([Pair("Hello")])
        average = batcher._cost.average
        future = batcher.submit([Pair(ENDLESS)])
        until(lambda: model.windows > 3)
        future.cancel()
        until(lambda: batcher.running == 0)
        assert model.windows < 200  # of more than 1,000
        assert batcher._cost.average == average, "it took what a whole text would"
        assert batcher.assess([Pair("Hello")]) == hello


def test_closed_in_the_middle_of_a_long_text_no_worker_is_left() -> None:
    pytest.importorskip("onnxruntime")
    model = Counting()
    batcher = Batcher(model, workers=1)
    future = batcher.submit([Pair(ENDLESS)])
    until(lambda: model.windows > 3)
    batcher.close(timeout=0.05)
    with pytest.raises(ModerationError, match="closed before the text was judged"):
        future.result(0)
    assert not batcher._threads
    assert model.windows < 200


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


PREAMBLE = """
import os, sys, threading, time
from guardrail.batching import Batcher
from guardrail.moderator import OnnxModerator
from guardrail.testing import FakeModerator
from guardrail.verdict import Pair
"""


@forks
def test_children_forked_from_a_busy_parent_judge_and_end() -> None:
    pytest.importorskip("onnxruntime")
    said = run_fresh(
        PREAMBLE
        + """
model = OnnxModerator(device="cpu", threads=2)
batcher = Batcher(model, workers=2)
pairs = [Pair("How do I bake bread?", "Knead it, wait, bake it. " * n) for n in (1, 9)]
expected = model.assess(pairs)
for moment in range(10):
    pending = [batcher.submit(pairs) for _ in range(3)]
    time.sleep(moment * 0.004)
    child = os.fork()
    if child == 0:
        assert batcher.depth == 0
        assert batcher.assess(pairs) == expected
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(future.result() == expected for future in pending)
print("all")
"""
    )
    assert said == "all\n"


def test_the_interpreter_ends_although_a_moderator_hangs() -> None:
    said = run_fresh(
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


@pytest.mark.parametrize("windows", [0, 4])
def test_the_interpreter_ends_well_in_the_middle_of_a_long_text(windows: int) -> None:
    """A worker that came back from native code after that would end the process by SIGABRT."""
    pytest.importorskip("onnxruntime")
    said = run_fresh(
        PREAMBLE
        + """
import guardrail.batching
sys.path.insert(0, "tests")
from batching_kit import ENDLESS, Counting
class Slow:  # as an interpreter with much to clean up is: workers come back meanwhile
    def __del__(self, sleep=time.sleep):
        sleep(1)

slow = Slow()
guardrail.batching._EXIT_SECONDS = 0.1
model = Counting()
batcher = Batcher(model, workers=1)
batcher.submit([Pair(ENDLESS)])
while model.windows < int(sys.argv[1]):
    time.sleep(0.01)
print("ends")
""",
        str(windows),
    )
    assert said == "ends\n"
