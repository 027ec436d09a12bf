from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fresh_kit import forks, run_fresh
from hypothesis import given
from hypothesis import strategies as st

from guardrail import Guard
from guardrail.errors import ArtifactError, ModerationError, PolicyError
from guardrail.policy import Policy
from guardrail.taxonomy import Category, Direction, Severity
from guardrail.testing import FakeModerator
from guardrail.verdict import Action, Assessment, Pair, Verdict

WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "fool": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
}
OPEN = Policy.parse('name = "open"\nextends = "balanced"\non_error = "allow"')


def fake(on_assess: Callable[[Sequence[Pair]], None] | None = None) -> FakeModerator:
    return FakeModerator(WORDS, on_assess=on_assess)


def broken(pairs: Sequence[Pair]) -> None:
    raise RuntimeError("cable\nunplugged")


def test_a_prompt_is_judged_as_input_and_a_response_as_output() -> None:
    guard = Guard(fake())
    assert guard.check("a bomb").direction is Direction.INPUT
    verdict = guard.check("a bomb", "you fool")
    assert (verdict.direction, verdict.action) == (Direction.OUTPUT, Action.FLAG)
    assert guard.check(response="a bomb").action is Action.REFUSE
    assert verdict.policy == "balanced@1"
    assert verdict.latency_ms > 0


def test_checking_nothing_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(TypeError, match="needs a prompt, a response, or both"):
        Guard(fake()).check()


@pytest.mark.parametrize("blank", ["", " \n\t", "\u2003\u3000"])
def test_a_blank_text_is_harmless_and_costs_no_inference(blank: str) -> None:
    guard = Guard(fake(broken), "strict")
    for verdict in (guard.check(blank), guard.check("a bomb", blank)):
        assert (verdict.action, verdict.degraded) == (Action.ALLOW, False)
        assert verdict.assessment is not None
        assert verdict.assessment.model == "fake"


@given(st.lists(st.sampled_from(["a bomb", "you fool", "hello", "", "  "])))
def test_many_are_judged_in_order_as_one_by_one(texts: list[str]) -> None:
    guard = Guard(fake())
    pairs = [Pair(text) for text in texts]
    assert guard.check_many(pairs) == [guard.check(text) for text in texts]


def test_a_batch_is_one_call_to_the_moderator() -> None:
    sizes: list[int] = []
    guard = Guard(fake(lambda pairs: sizes.append(len(pairs))))
    guard.check_many([Pair("a"), Pair(" "), Pair("b", "c")])
    assert sizes == [2]


# --- failing closed ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["strict", "balanced", "permissive"])
def test_a_moderator_that_raises_fails_closed(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "guardrail"):
        verdict = Guard(fake(broken), policy).check("hello")
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)
    assert verdict.error == "moderation: RuntimeError: cable unplugged"
    assert verdict.assessment is None
    assert f"policy {policy}@1 decides: RuntimeError: cable unplugged" in caplog.text


def test_a_policy_that_says_so_fails_open() -> None:
    for policy in (OPEN, "audit-only"):
        verdict = Guard(fake(broken), policy).check("hello")
        assert (verdict.action, verdict.degraded) == (Action.ALLOW, True)


class Wrong(FakeModerator):
    """A moderator that answers with what `answer` makes of the right answer."""

    def __init__(self, answer: Callable[[list[Assessment]], Any]) -> None:
        super().__init__(WORDS)
        self.answer = answer

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        answer: list[Assessment] = self.answer(super().assess(pairs))
        return answer


@pytest.mark.parametrize(
    "answer",
    [
        lambda seen: [],
        lambda seen: [*seen, *seen],
        lambda seen: None,
        lambda seen: [None for _ in seen],
        lambda seen: [{"safe": True} for _ in seen],
    ],
    ids=["none", "too many", "not a list", "nothing", "another type"],
)
def test_a_moderator_that_answers_with_nonsense_fails_closed(
    answer: Callable[[list[Assessment]], Any],
) -> None:
    for verdict in Guard(Wrong(answer)).check_many([Pair("hello"), Pair("hi")]):
        assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)


def test_a_moderator_without_thresholds_or_id_fails_closed() -> None:
    class Bare:
        def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
            return fake().assess(pairs)

    bare: Any = Bare()
    verdict = Guard(bare).check("hello")
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)


def test_a_moderator_that_takes_an_answer_for_a_prompt_fails_closed() -> None:
    class Confused(FakeModerator):
        def assess(self, pairs: Sequence[Pair]) -> Sequence[Assessment]:
            return [Assessment.harmless(Direction.INPUT) for _ in pairs]

    guard = Guard(Confused({}))
    assert guard.check("Hello.").delivers
    verdict = guard.check("Hello.", "Hi.")
    assert verdict.degraded
    assert not verdict.delivers
    assert "assessed output as input" in str(verdict.error)


@pytest.mark.parametrize("wrong", [7, 0, False, b"", b"bomb", [], {}, object()])
def test_what_is_not_text_fails_closed(wrong: Any) -> None:
    for verdict in (Guard(fake()).check(wrong), Guard(fake()).check("hi", wrong)):
        assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)


@pytest.mark.parametrize("wrong", [["a"], "ab", [Pair("a"), "b"], [None], Pair("a"), [("a", "b")]])
def test_many_of_what_are_no_pairs_is_a_mistake_of_the_caller(wrong: Any) -> None:
    seen: list[Any] = []
    guard = Guard(fake(seen.append))
    with pytest.raises(TypeError, match=r"check_many\(\[Pair\('\.\.\.'\)\]\); it was given "):
        guard.check_many(wrong)
    with pytest.raises(TypeError, match="takes a list of Pairs"):
        asyncio.run(guard.acheck_many(wrong))
    assert seen == []


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_bad_texts_do_not_cost_their_neighbours(bad: list[bool]) -> None:
    calls: list[int] = []

    def choke(pairs: Sequence[Pair]) -> None:
        calls.append(len(pairs))
        if any("poison" in pair.text for pair in pairs):
            raise ModerationError("too hot")

    pairs = [Pair("poison" if is_bad else "a bomb") for is_bad in bad]
    verdicts = Guard(fake(choke)).check_many(pairs)
    assert [v.degraded for v in verdicts] == bad
    assert all(v.error == "moderation: too hot" for v in verdicts if v.degraded)
    assert all(v.severity is Severity.SEVERE for v in verdicts if not v.degraded)
    assert len(calls) <= 1 + 2 * sum(bad) * len(bad).bit_length()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed(interrupt: type[BaseException]) -> None:
    def stop(pairs: Sequence[Pair]) -> None:
        raise interrupt

    with pytest.raises(interrupt):
        Guard(fake(stop)).check("hello")


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_moderator_that_cancels_itself_fails_closed(timeout: float | None) -> None:
    def cancelled(pairs: Sequence[Pair]) -> None:
        raise asyncio.CancelledError

    guard = Guard(fake(cancelled), timeout=timeout)
    for verdict in (guard.check("hello"), asyncio.run(guard.acheck("hello"))):
        assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)
        assert verdict.error == "moderation: fake cancelled the assessment"


def test_cancelling_the_caller_of_acheck_is_not_taken_for_the_moderators() -> None:
    entered, release = threading.Event(), threading.Event()

    def hold(pairs: Sequence[Pair]) -> None:
        entered.set()
        release.wait(60)

    async def main() -> None:
        judging = asyncio.create_task(Guard(fake(hold)).acheck("hello"))
        await asyncio.to_thread(entered.wait, 60)
        judging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await judging
        release.set()

    asyncio.run(main())


# --- time-outs -----------------------------------------------------------------------------------


def test_a_moderator_that_hangs_fails_closed_in_time() -> None:
    release = threading.Event()
    calls: list[int] = []

    def hang(pairs: Sequence[Pair]) -> None:
        calls.append(len(pairs))
        release.wait(60)

    guard = Guard(fake(hang), timeout=0.2)
    started = time.monotonic()
    verdicts = guard.check_many([Pair("hello")] * 50)
    took = time.monotonic() - started
    release.set()
    assert all((v.action, v.degraded) == (Action.REFUSE, True) for v in verdicts)
    assert verdicts[0].error == "moderation: no assessment within 0.2 s"
    assert calls == [50], "a batch that took too long is not tried again text by text"
    assert took < 30


def test_a_guard_with_all_threads_hanging_still_fails_closed() -> None:
    release = threading.Event()
    guard = Guard(fake(lambda pairs: release.wait(60) and None), timeout=0.05)
    verdicts = [guard.check("hello") for _ in range(8)]
    release.set()
    assert all(v.degraded and v.action is Action.REFUSE for v in verdicts)


def test_a_moderators_own_timeout_is_not_taken_for_the_guards() -> None:
    def late(pairs: Sequence[Pair]) -> None:
        raise TimeoutError("socket")

    verdict = Guard(fake(late), timeout=30).check("hello")
    assert verdict.error == "moderation: TimeoutError: socket"


def test_within_its_time_a_verdict_is_as_without_a_timeout() -> None:
    assert Guard(fake(), timeout=60).check("a bomb") == Guard(fake()).check("a bomb")


@pytest.mark.parametrize("timeout", [0, -1, float("-inf"), float("nan")])
def test_a_timeout_that_leaves_no_time_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Guard(fake(), timeout=timeout)


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_a_timeout_longer_than_a_thread_can_wait_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="or None to wait"):
        Guard(fake(), timeout=timeout)
    assert not Guard(fake(), timeout=threading.TIMEOUT_MAX).check("hello").degraded


@pytest.mark.parametrize("timeout", ["5", True, [5]])
def test_a_timeout_that_is_no_number_is_a_mistake_of_the_caller(timeout: Any) -> None:
    with pytest.raises(TypeError, match="timeout must be a number of seconds, or None to wait"):
        Guard(fake(), timeout=timeout)


# --- audit ---------------------------------------------------------------------------------------


@forks
def test_a_guard_with_a_timeout_judges_in_a_forked_child() -> None:
    script = """
import os
from guardrail import Guard
from guardrail.testing import FakeModerator
guard = Guard(FakeModerator({}), timeout=20)
print(guard.check("hello").degraded, flush=True)  # its threads are there now
if os.fork() == 0:
    print(guard.check("hello").degraded, flush=True)
    os._exit(0)
os.wait()
"""
    assert run_fresh(script).split() == ["False", "False"]


def test_every_verdict_is_audited_before_it_is_returned() -> None:
    seen: list[tuple[Pair, Verdict]] = []
    guard = Guard(fake(), audit=lambda pair, verdict: seen.append((pair, verdict)))
    pairs = [Pair("a bomb"), Pair(" "), Pair("hi", "you fool")]
    verdicts = guard.check_many(pairs)
    assert seen == list(zip(pairs, verdicts, strict=True))
    assert all(verdict.latency_ms == logged.latency_ms
               for verdict, (_, logged) in zip(verdicts, seen, strict=True))  # fmt: skip


def full(pair: Pair, verdict: Verdict) -> None:
    raise OSError("disk full")


def test_a_verdict_that_cannot_be_audited_fails_closed() -> None:
    verdict = Guard(fake(), audit=full).check("hello")
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)
    assert verdict.error == "audit: OSError: disk full"
    assert verdict.summary() == "refuse: failed: audit: OSError: disk full (policy balanced@1)"


def test_a_failing_audit_never_weakens_a_verdict() -> None:
    """Not even under a policy that fails open: else a full disk would let harm pass."""
    guard = Guard(fake(), OPEN, audit=full)
    assert guard.check("hello").action is Action.ALLOW
    verdict = guard.check("a bomb")
    assert (verdict.action, verdict.severity) == (Action.REFUSE, Severity.SEVERE)


async def unawaited(pair: Pair, verdict: Verdict) -> None:
    raise AssertionError("nobody awaits a sink")


class AsyncSink:
    async def __call__(self, pair: Pair, verdict: Verdict) -> None:
        raise AssertionError("nobody awaits a sink")


@pytest.mark.parametrize(
    "sink", [unawaited, AsyncSink(), AsyncSink().__call__, functools.partial(unawaited)]
)
def test_an_async_sink_is_refused_for_nobody_would_await_it(sink: Any) -> None:
    with pytest.raises(TypeError, match="audit is async and would never be awaited"):
        Guard(fake(), audit=sink)


@pytest.mark.filterwarnings("error")  # of what is never awaited
def test_a_sink_that_turns_out_to_be_async_fails_closed() -> None:
    guard = Guard(fake(), audit=lambda pair, verdict: unawaited(pair, verdict))  # type: ignore[arg-type,return-value]
    verdict = guard.check("hello")
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)
    assert verdict.error is not None
    assert "the sink is async" in verdict.error


def test_a_sink_that_cancels_itself_fails_closed() -> None:
    def cancelled(pair: Pair, verdict: Verdict) -> None:
        raise asyncio.CancelledError

    verdict = Guard(fake(), audit=cancelled).check("hello")
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, True)


def test_a_moderator_whose_assess_is_async_is_refused() -> None:
    class Async(FakeModerator):
        async def assess(self, pairs: Sequence[Pair]) -> Any:
            return []

    with pytest.raises(TypeError, match="assess is async and would never be awaited: name it aass"):
        Guard(Async(WORDS))


# --- async, threads, making one ------------------------------------------------------------------


def test_acheck_leaves_the_event_loop_free() -> None:
    entered, release = threading.Event(), threading.Event()

    def hold(pairs: Sequence[Pair]) -> None:
        entered.set()
        assert release.wait(60), "the loop was blocked: nobody released the moderator"

    async def main() -> Verdict:
        judging = asyncio.create_task(Guard(fake(hold)).acheck("a bomb"))
        while not entered.is_set():
            await asyncio.sleep(0.005)
        release.set()  # only a free loop gets here
        return await judging

    verdict = asyncio.run(main())
    assert (verdict.action, verdict.degraded) == (Action.REFUSE, False)


def test_acheck_and_acheck_many_say_what_check_says() -> None:
    guard = Guard(fake())
    pairs = [Pair("a bomb"), Pair("hi", "you fool")]

    async def main() -> list[Verdict]:
        return [await guard.acheck("a bomb"), *await guard.acheck_many(pairs)]

    assert asyncio.run(main()) == [guard.check("a bomb"), *guard.check_many(pairs)]
    with pytest.raises(TypeError, match="needs a prompt"):
        asyncio.run(guard.acheck())


def test_a_wrong_policy_or_model_is_an_error_when_the_guard_is_made(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="did you mean 'balanced'"):
        Guard(fake(), "balancd")
    with pytest.raises(ArtifactError, match="not bundled"):
        Guard("no-such-model")
    with pytest.raises(ArtifactError, match="is missing"):
        Guard(tmp_path)


@pytest.mark.parametrize("wrong", [None, 5, {"name": "balanced"}])
def test_what_is_no_policy_is_a_mistake_of_the_caller(wrong: Any) -> None:
    with pytest.raises(TypeError, match="policy must be a preset's name, a path or a Policy, not"):
        Guard(fake(), wrong)


@pytest.mark.parametrize("wrong", [None, 5, object()])
def test_what_is_no_moderator_is_a_mistake_of_the_caller(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model must be a name, a folder or a Moderator, not"):
        Guard(wrong)


def test_the_path_of_an_audit_log_is_not_taken_for_one() -> None:
    with pytest.raises(TypeError, match=r"audit must be callable, as AuditLog.* is, not str"):
        Guard(fake(), audit="audit.jsonl")  # type: ignore[arg-type]


def test_a_megabyte_goes_through_the_bundled_guard() -> None:
    """Blank but for a word: the text is windowed, not cut, and comes back with a verdict."""
    pytest.importorskip("onnxruntime")
    verdict = Guard().check("Hi", "word" + " " * 999_990 + "end.")
    assert not verdict.degraded
