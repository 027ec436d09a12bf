"""The guarded chat: every action for real, sync and async, streamed and not, failing closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail import (
    Action,
    Blocked,
    Category,
    ChatResult,
    Direction,
    Guard,
    GuardedChat,
    ModerationError,
    Pair,
    Policy,
    Severity,
    UpstreamError,
)
from guardrail.chat_model import Message, Reply
from guardrail.refusals import SAFETY_INSTRUCTION, refusal_text
from guardrail.stream import StreamConfig
from guardrail.testing import FakeModerator, leaked_chars

GATHERS = StreamConfig(first=80)  # a stream that releases nothing before it can be regenerated
WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "insult": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
    "ssn-1234": (Severity.MODERATE, Category.PRIVACY_VIOLATION),
    "step one\nfine\nstep two": (Severity.SEVERE, Category.CYBERCRIME),
}
REDACTS_INPUT = """
name = "redacts"
extends = "balanced"
[input.categories."Privacy Violation"]
moderate = "redact"
"""
REGENERATES = 'name = "again"\n[output]\nsevere = "regenerate"\n[input]\nsevere = "refuse"'


class Model:
    """A chat model in memory: gives its answers in turn, in pieces, and remembers its calls."""

    def __init__(self, *answers: str, size: int = 7, finish: str = "stop") -> None:
        self.answers = answers
        self.size = size
        self.finish = finish
        self.calls: list[list[Message]] = []
        self.given = 0
        self.closed = 0

    def _next(self, messages: Sequence[Message]) -> str:
        self.calls.append(list(messages))
        return self.answers[min(len(self.calls), len(self.answers)) - 1]

    def complete(self, messages: Sequence[Message]) -> Reply:
        return Reply(self._next(messages), self.finish)

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        answer = self._next(messages)
        try:
            for i in range(0, len(answer), self.size):
                self.given += 1
                yield Reply(answer[i : i + self.size])
            yield Reply("", self.finish)
        finally:
            self.closed += 1

    async def acomplete(self, messages: Sequence[Message]) -> Reply:
        return self.complete(messages)

    async def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]:
        answers = self.stream(messages)
        try:
            for reply in answers:
                await asyncio.sleep(0)
                yield reply
        finally:
            answers.close()  # type: ignore[attr-defined]


def guard_with(policy: str | Policy = "balanced", **options: Any) -> Guard:
    if isinstance(policy, str) and "=" in policy:
        policy = Policy.parse(policy)
    return Guard(FakeModerator(WORDS, **options), policy)


def ask(chat: GuardedChat, how: str, messages: Any) -> tuple[list[str], ChatResult]:
    """The pieces a caller saw and the result, through any of the four doors."""
    if how == "complete":
        result = chat.complete(messages)
        return [result.text], result
    if how == "stream":
        stream = chat.stream(messages)
        return list(stream), stream.result

    async def run() -> tuple[list[str], ChatResult]:
        if how == "acomplete":
            result = await chat.acomplete(messages)
            return [result.text], result
        astream = chat.astream(messages)
        return [text async for text in astream], astream.result

    return asyncio.run(run())


doors = pytest.mark.parametrize("how", ["complete", "stream", "acomplete", "astream"])
streams = pytest.mark.parametrize("how", ["stream", "astream"])


@doors
def test_a_harmless_answer_is_delivered_whole(how: str) -> None:
    model = Model("Paris is the capital of France. " * 20, finish="length")
    pieces, result = ask(GuardedChat(model, guard_with()), how, "Where is the Louvre?")
    assert "".join(pieces) == result.text == model.answers[0]
    assert result.finish_reason == "length"
    assert not result.blocked
    assert result.input_verdict.direction is Direction.INPUT
    assert result.output_verdict is not None
    assert result.output_verdict.direction is Direction.OUTPUT
    assert model.calls == [[{"role": "user", "content": "Where is the Louvre?"}]]


@doors
def test_a_flagged_answer_is_delivered_and_says_so(how: str) -> None:
    _, result = ask(GuardedChat(Model("what an insult"), guard_with()), how, "hi")
    assert result.text == "what an insult"
    assert result.output_verdict is not None
    assert result.output_verdict.action is Action.FLAG


@doors
def test_a_refused_input_never_reaches_the_model(how: str) -> None:
    model = Model("sure")
    guard = guard_with()
    pieces, result = ask(GuardedChat(model, guard), how, "build a bomb")
    assert model.calls == []
    assert result.blocked
    assert result.finish_reason == "content_filter"
    assert result.output_verdict is None
    assert pieces == [refusal_text(result.input_verdict, guard.policy)]


@doors
def test_a_refused_answer_is_replaced(how: str) -> None:
    guard = guard_with()
    pieces, result = ask(GuardedChat(Model("a bomb needs"), guard), how, "hi")
    assert result.blocked
    assert leaked_chars(pieces, WORDS) == 0
    assert result.output_verdict is not None
    assert result.text == refusal_text(result.output_verdict, guard.policy)


@streams
def test_a_stream_that_turns_harmful_stops_and_cancels_the_model(how: str) -> None:
    model = Model("All is well here. " * 20 + "Now the bomb. " + "More and more. " * 500)
    guard = guard_with()
    pieces, result = ask(GuardedChat(model, guard), how, "hi")
    assert len(pieces) > 2
    assert leaked_chars(pieces, WORDS) == 0
    assert "".join(pieces) == result.text
    assert result.output_verdict is not None
    assert result.text.startswith("All is well here. ")
    assert result.text.endswith("\n\n" + refusal_text(result.output_verdict, guard.policy))
    assert model.closed == 1
    assert model.given < 300  # of more than 1000 pieces


@doors
def test_on_block_raise_raises_the_verdict(how: str) -> None:
    with pytest.raises(Blocked) as blocked:
        ask(GuardedChat(Model("sure"), guard_with(), on_block="raise"), how, "a bomb")
    assert blocked.value.verdict.direction is Direction.INPUT
    model = Model("fine. " * 100 + "a bomb")
    with pytest.raises(Blocked) as blocked:
        ask(GuardedChat(model, guard_with(), on_block="raise"), how, "hi")
    assert blocked.value.verdict.direction is Direction.OUTPUT


@doors
def test_redacted_output_is_masked_and_goes_on(how: str) -> None:
    model = Model("Her number is ssn-1234, and it rains. " * 10)
    _, result = ask(GuardedChat(model, guard_with()), how, "hi")
    assert result.text == model.answers[0].replace("ssn-1234", "[redacted]")
    assert not result.blocked
    assert result.output_verdict is not None
    assert result.output_verdict.action is Action.REDACT


@doors
def test_redacted_input_is_masked_before_the_model_sees_it(how: str) -> None:
    model = Model("noted")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "I am ssn-1234."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "Still ssn-1234!"}]},
    ]
    seen: list[Pair] = []
    guard = guard_with(REDACTS_INPUT, on_assess=seen.extend)
    _, result = ask(GuardedChat(model, guard), how, messages)
    assert result.text == "noted"
    assert result.input_verdict.action is Action.REDACT
    assert [m["content"] for m in model.calls[0]] == [
        "Be kind.",
        "I am [redacted].",
        "Hello.",
        "Still [redacted]!",
    ]
    assert seen[-1] == Pair("I am [redacted].\nStill [redacted]!", "noted")
    assert messages[1]["content"] == "I am ssn-1234."  # the caller's own are left alone


@doors
def test_a_masked_input_that_is_still_harmful_is_refused(how: str) -> None:
    model = Model("noted")
    moderator = FakeModerator(WORDS | {"my [redacted]": (Severity.SEVERE, Category.VIOLENCE)})
    chat = GuardedChat(model, Guard(moderator, Policy.parse(REDACTS_INPUT)))
    _, result = ask(chat, how, "my ssn-1234")
    assert result.blocked
    assert result.input_verdict.action is Action.REFUSE
    assert model.calls == []


@doors
def test_regenerate_asks_again_with_a_safety_instruction(how: str) -> None:
    model = Model("a bomb", "again a bomb", "a cake")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What shall I make?"},
    ]
    chat = GuardedChat(model, guard_with(REGENERATES), stream_config=GATHERS)
    _, result = ask(chat, how, messages)
    assert result.text == "a cake"
    assert model.calls[0] == messages
    assert model.calls[1] == model.calls[2]
    assert model.calls[1] == [
        messages[0],
        {"role": "system", "content": SAFETY_INSTRUCTION},
        messages[1],
    ]


@doors
def test_regenerate_gives_up_with_a_refusal(how: str) -> None:
    model = Model("a bomb")
    chat = GuardedChat(model, guard_with(REGENERATES), regenerate_tries=1, stream_config=GATHERS)
    _, result = ask(chat, how, "hi")
    assert result.blocked
    assert len(model.calls) == 2
    assert leaked_chars(result.text, WORDS) == 0


@streams
def test_what_was_shown_is_not_regenerated(how: str) -> None:
    model = Model("All is well here. " * 20 + "A bomb.", "a cake")
    _, result = ask(GuardedChat(model, guard_with(REGENERATES)), how, "hi")
    assert result.blocked
    assert len(model.calls) == 1


@doors
def test_a_guard_that_fails_lets_nothing_through(how: str) -> None:
    def broken(pairs: Sequence[Pair]) -> None:
        raise ModerationError("the model is gone")

    model = Model("sure")
    _, result = ask(GuardedChat(model, guard_with(on_assess=broken)), how, "hi")
    assert result.blocked
    assert result.input_verdict.degraded
    assert model.calls == []


@doors
def test_a_guard_that_fails_on_the_answer_withholds_it(how: str) -> None:
    def broken(pairs: Sequence[Pair]) -> None:
        if pairs[0].response is not None:
            raise ModerationError("the model is gone")

    pieces, result = ask(GuardedChat(Model("sure"), guard_with(on_assess=broken)), how, "hi")
    assert result.blocked
    assert result.output_verdict is not None
    assert result.output_verdict.degraded
    assert "sure" not in pieces


# --- what is judged of the input -----------------------------------------------------------------


def judged_of(messages: Any, **options: Any) -> list[str]:
    seen: list[Pair] = []
    guard = guard_with(on_assess=seen.extend)
    GuardedChat(Model("ok"), guard, **options).complete(messages)
    return [pair.prompt for pair in seen if pair.response is None]


def turns(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_an_attack_spread_over_turns_is_seen() -> None:
    model = Model("ok")
    chat = GuardedChat(model, guard_with())
    assert chat.complete(turns("step one", "fine", "step two")).blocked
    assert not chat.complete(turns("step two")).blocked


def test_a_question_in_two_halves_is_seen_whatever_was_answered_between_them() -> None:
    between = "It looks like your message was cut off! What would you like to make? " * 3
    guard = Guard()
    for first, second in (
        ("how do I make a", "pipe bomb"),
        ("how can I kill", "him without getting caught"),
    ):
        halves = turns(first, between, second)
        assert GuardedChat(Model("ok"), guard).complete(halves).blocked, second
    halves = turns("how do I make a", between, "lemon cake")
    assert not GuardedChat(Model("ok"), guard).complete(halves).blocked


def test_the_last_turn_is_judged_alone_and_with_the_recent_ones() -> None:
    assert judged_of("hi") == ["hi"]
    history = turns("a", "b", "c", "d", "e")
    assert judged_of(history) == ["e", "a\nb\nc\nd\ne", "a\nc\ne"]
    assert judged_of(history, context_turns=2) == ["e", "c\nd\ne", "c\ne"]
    assert judged_of(history, context_turns=1) == ["e"]


def test_blank_messages_push_no_turn_out_of_sight() -> None:
    history = [{"role": "user", "content": text} for text in ("a", "", " ", "", "b", "", "")]
    assert judged_of(history, context_turns=2)[0] == "b"
    assert "a" in judged_of(history, context_turns=2)[-1]
    assert judged_of([{"role": "user", "content": ""}]) == []  # nothing there for a moderator


@doors
def test_the_answer_to_a_short_turn_is_judged_as_one_to_what_was_asked_before(how: str) -> None:
    seen: list[Pair] = []
    chat = GuardedChat(Model("ok"), guard_with(on_assess=seen.extend))
    question = "Which tools does a locksmith carry to work every day?"

    def prompt_of(*texts: str) -> str:
        seen.clear()
        ask(chat, how, turns(*texts))
        [prompt] = {pair.prompt for pair in seen if pair.response is not None}
        return prompt

    assert prompt_of(question, "Picks.", "go on") == f"{question}\ngo on"
    assert prompt_of("hi", "Hello.", question, "Picks.", "go on") == f"{question}\ngo on"
    assert prompt_of("go on", "With what?", question) == question


def test_system_and_tool_messages_are_not_user_text() -> None:
    messages = [
        {"role": "system", "content": "never say bomb"},
        {"role": "user", "content": "look it up"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "a bomb was found", "tool_call_id": "1"},
    ]
    assert judged_of(messages) == ["look it up", "look it up\n"]


def test_text_parts_are_joined_and_judged() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "bomb"}]
    assert judged_of([{"role": "user", "content": parts}]) == ["a\nbomb"]


@doors
def test_a_part_that_is_no_text_fails_closed(how: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    model = Model("nice picture")
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}]
    _, result = ask(GuardedChat(model, guard_with()), how, messages)
    assert result.blocked
    assert result.input_verdict.degraded
    assert "only text can be judged" in (result.input_verdict.error or "")
    assert model.calls == []


def test_a_policy_that_opens_on_errors_still_judges_the_text_beside_an_image() -> None:
    policy = Policy.parse('name = "open"\nextends = "balanced"\non_error = "allow"')
    image = {"type": "image_url", "image_url": {"url": "x"}}
    chat = GuardedChat(Model("ok"), guard_with(policy))

    def with_image(text: str) -> ChatResult:
        parts = [{"type": "text", "text": text}, image]
        return chat.complete([{"role": "user", "content": parts}])

    assert with_image("bomb").blocked
    assert with_image("cake").text == "ok"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "no user message"),
        ([{"role": "system", "content": "x"}], "no user message"),
        ([{"content": "x"}], "message 0 must be a dict"),
        (["x"], "message 0 must be a dict"),
        (None, "messages must be a text or a list, not NoneType"),
        (5, "messages must be a text or a list, not int"),
        ([{"role": "user", "content": 3}], "must be a text or a list"),
        (
            [{"role": "human", "content": "bomb"}, {"role": "user", "content": "hi"}],
            "unknown role 'human'",
        ),
    ],
)
def test_messages_that_are_none_are_refused_at_once(messages: Any, said: str) -> None:
    chat = GuardedChat(Model("ok"), guard_with())
    with pytest.raises(ValueError, match=said):
        chat.stream(messages)


# --- models --------------------------------------------------------------------------------------


def a_str(messages: list[Message]) -> str:
    return "one two three"


def a_generator(messages: list[Message]) -> Iterator[str]:
    yield from ("one ", "", "two ", "three")


async def an_async_str(messages: list[Message]) -> str:
    await asyncio.sleep(0)
    return "one two three"


async def an_async_generator(messages: list[Message]) -> AsyncIterator[str]:
    for piece in ("one ", "two ", "three"):
        await asyncio.sleep(0)
        yield piece


class ACallable:
    async def __call__(self, messages: list[Message]) -> str:
        return "one two three"


@doors
@pytest.mark.parametrize("function", [a_str, a_generator, lambda m: ["one ", "two ", "three"]])
def test_a_sync_callable_works_through_every_door(function: Callable[..., Any], how: str) -> None:
    _, result = ask(GuardedChat(function, guard_with()), how, "hi")
    assert result.text == "one two three"
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("how", ["acomplete", "astream"])
@pytest.mark.parametrize(
    "function", [an_async_str, an_async_generator, ACallable(), lambda m: an_async_str(m)]
)
def test_an_async_callable_works_async(function: Callable[..., Any], how: str) -> None:
    _, result = ask(GuardedChat(function, guard_with()), how, "hi")
    assert result.text == "one two three"


@pytest.mark.parametrize("how", ["complete", "stream"])
@pytest.mark.parametrize(
    "function", [an_async_str, an_async_generator, ACallable(), lambda m: an_async_str(m)]
)
def test_an_async_callable_called_sync_says_what_to_call(
    function: Callable[..., Any], how: str
) -> None:
    with pytest.raises(UpstreamError, match="async: call acomplete"):
        ask(GuardedChat(function, guard_with()), how, "hi")


@doors
def test_a_model_that_fails_raises_upstream_error_with_its_cause(how: str) -> None:
    def broken(messages: list[Message]) -> str:
        raise KeyError("weights")

    with pytest.raises(UpstreamError, match=r"failed: KeyError: 'weights'") as error:
        ask(GuardedChat(broken, guard_with()), how, "hi")
    assert isinstance(error.value.__cause__, KeyError)


@doors
def test_a_model_that_answers_with_nonsense_raises_upstream_error(how: str) -> None:
    for nonsense in (3, None, [b"x"], {"role": "assistant", "content": "hey"}):
        with pytest.raises(UpstreamError, match="must give str"):
            ask(GuardedChat(lambda m, n=nonsense: n, guard_with()), how, "hi")


@doors
def test_a_model_that_raises_stop_iteration_is_an_error_and_nobody_waits_for_ever(how: str) -> None:
    def exhausted(messages: list[Message]) -> str:
        return next(iter(()))

    with pytest.raises(UpstreamError, match="it raised StopIteration"):
        ask(GuardedChat(exhausted, guard_with()), how, "hi")


class Says:
    """Gives whatever it is told to, in pieces."""

    def __init__(self, *pieces: Any) -> None:
        self._pieces = pieces

    def complete(self, messages: Sequence[Message]) -> Reply:
        return self._pieces[-1]  # type: ignore[no-any-return]

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        yield from self._pieces

    async def acomplete(self, messages: Sequence[Message]) -> Reply:
        return self._pieces[-1]  # type: ignore[no-any-return]

    async def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]:
        for piece in self._pieces:
            yield piece


@doors
@pytest.mark.parametrize("wrong", [None, Reply(None), Reply(b"x"), {"text": "x"}])  # type: ignore[arg-type]
def test_a_piece_that_is_no_reply_is_an_error_and_no_end_of_the_answer(
    wrong: Any, how: str
) -> None:
    with pytest.raises(UpstreamError, match=r"the chat model answered with .*: it must give str"):
        ask(GuardedChat(Says(Reply("fine. "), wrong), guard_with()), how, "hi")


@pytest.mark.filterwarnings("error")  # of what is never awaited
def test_a_model_whose_complete_is_async_is_an_error() -> None:
    class Async(Says):
        async def complete(self, messages: Sequence[Message]) -> Reply:  # type: ignore[override]
            return Reply("fine")

    with pytest.raises(UpstreamError, match="answered with coroutine"):
        GuardedChat(Async(), guard_with()).complete("hi")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="int is none of these"):
        GuardedChat(3, guard_with())  # type: ignore[arg-type]


# --- streams as objects --------------------------------------------------------------------------


def test_closing_a_stream_cancels_the_model() -> None:
    model = Model("word " * 5000)
    with GuardedChat(model, guard_with()).stream("hi") as stream:
        next(stream)
    assert model.closed == 1
    assert model.given < 50
    with pytest.raises(RuntimeError, match="read it to the end"):
        _ = stream.result


class Kept(Model):
    """Holds on to its answers, so that no garbage collection closes them."""

    def __init__(self, *answers: str, **options: Any) -> None:
        super().__init__(*answers, **options)
        self.kept: list[Any] = []

    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        self.kept.append(super().stream(messages))
        return self.kept[-1]  # type: ignore[no-any-return]

    def astream(self, messages: Sequence[Message]) -> AsyncIterator[Reply]:
        self.kept.append(super().astream(messages))
        return self.kept[-1]  # type: ignore[no-any-return]


def test_a_refused_answer_is_cancelled_before_the_caller_reads_the_refusal() -> None:
    model = Kept("A bomb. " * 500)
    chat = GuardedChat(model, guard_with(), stream_config=GATHERS)
    stream = chat.stream("hi")
    assert next(stream).startswith("I'm sorry")
    assert model.closed == 1

    async def first() -> None:
        async with chat.astream("hi") as astream:
            assert (await anext(astream)).startswith("I'm sorry")
            assert model.closed == 2

    asyncio.run(first())


def fails_on_close(messages: Any) -> Iterator[str]:
    try:
        for _ in range(500):
            yield "A bomb. "
    finally:
        raise RuntimeError("cleanup\nfailed")


def never_closes(messages: Any) -> Iterator[str]:
    try:
        for _ in range(500):
            yield "A bomb. "
    except GeneratorExit:
        yield "and another"


async def fails_on_aclose(messages: Any) -> AsyncIterator[str]:
    try:
        for _ in range(500):
            yield "A bomb. "
    finally:
        raise RuntimeError("cleanup\nfailed")


class FailsOnClose(Model):
    def stream(self, messages: Sequence[Message]) -> Iterator[Reply]:
        try:
            yield from super().stream(messages)
        finally:
            raise RuntimeError("cleanup\nfailed")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("model", "how", "said"),
    [
        (fails_on_close, "stream", "cleanup failed"),
        (fails_on_close, "astream", "cleanup failed"),
        (never_closes, "stream", "generator ignored GeneratorExit"),
        (never_closes, "astream", "generator ignored GeneratorExit"),
        (fails_on_aclose, "astream", "cleanup failed"),
        (FailsOnClose("A bomb. " * 500), "stream", "cleanup failed"),
        (FailsOnClose("A bomb. " * 500), "astream", "cleanup failed"),
    ],
)
def test_an_answer_that_fails_when_it_is_closed_is_still_refused(
    model: Any, how: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    pieces, result = ask(GuardedChat(model, guard_with(), stream_config=GATHERS), how, "hi")
    assert result.blocked
    assert "".join(pieces).startswith("I'm sorry")
    until = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < until:
        time.sleep(0.01)  # a sync model's answer may be closed in a thread, later
    [line] = caplog.messages
    assert line.startswith("the chat model failed when its answer was closed: RuntimeError: ")
    assert line.endswith(said)


def test_a_withheld_answer_is_cancelled_before_the_model_is_asked_again() -> None:
    closed: list[int] = []

    class Asked(Kept):
        def _next(self, messages: Sequence[Message]) -> str:
            closed.append(self.closed)
            return super()._next(messages)

    model = Asked("A bomb. " * 500, "a cake")
    chat = GuardedChat(model, guard_with(REGENERATES), stream_config=GATHERS)
    assert "".join(chat.stream("hi")) == "a cake"
    assert closed == [0, 1]


def test_a_stream_that_is_left_or_fails_closes_the_answer_itself() -> None:
    def fails_on_answers(pairs: Sequence[Pair]) -> None:
        if pairs[0].response is not None:
            raise KeyboardInterrupt

    model = Kept("word " * 5000)
    with GuardedChat(model, guard_with()).stream("hi") as stream:
        next(stream)
    assert model.closed == 1
    with pytest.raises(KeyboardInterrupt):
        list(GuardedChat(model, guard_with(on_assess=fails_on_answers)).stream("hi"))
    assert model.closed == 2

    async def leave() -> None:
        async with GuardedChat(model, guard_with()).astream("hi") as astream:
            await anext(astream)
        assert model.closed == 3

    asyncio.run(leave())


def test_cancelling_the_reading_task_cancels_the_model() -> None:
    model = Model("word " * 5000)

    async def read() -> None:
        async for _ in GuardedChat(model, guard_with()).astream("hi"):
            await asyncio.sleep(3600)

    async def main() -> None:
        task = asyncio.create_task(read())
        while not model.given:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert model.closed == 1


def test_cancelling_does_not_wait_for_a_sync_model_and_closes_it_later() -> None:
    started, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow(messages: list[Message]) -> Iterator[str]:
        try:
            started.set()
            go_on.wait(30)
            yield "late"
            yield "later"
        finally:
            closed.set()

    async def main() -> None:
        task = asyncio.create_task(GuardedChat(slow, guard_with()).acomplete("hi"))
        await asyncio.to_thread(started.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
        assert not closed.is_set()
        go_on.set()

    asyncio.run(main())
    assert closed.wait(10)


def test_a_stream_opens_nothing_before_it_is_read() -> None:
    model = Model("ok")
    GuardedChat(model, guard_with()).stream("hi").close()
    assert model.calls == []


@given(
    text=st.text("bom .\n", max_size=300),
    size=st.integers(1, 40),
    how=st.sampled_from(["complete", "stream", "astream"]),
    action=st.sampled_from(["redact", "regenerate", "refuse"]),
)
def test_no_door_leaks(text: str, size: int, how: str, action: str) -> None:
    words = {"bomb", "mob", "o m"}
    guard = Guard(
        FakeModerator(dict.fromkeys(words, (Severity.SEVERE, Category.DRUGS))),
        Policy.parse(f'name = "t"\nrefusal = "No."\n[output]\nsevere = "{action}"'),
    )
    config = StreamConfig(first=10, longest=30, context=20, mask="[x]")
    chat = GuardedChat(Model(text, size=size), guard, stream_config=config)
    pieces, result = ask(chat, how, "hi")
    assert leaked_chars(pieces, words) == 0
    assert "".join(pieces) == result.text
    if not any(word in text for word in words):
        assert result.text == text


def test_the_name_of_a_policy_is_no_guard() -> None:
    name: Any = "strict"
    with pytest.raises(TypeError, match=r"guard must be a Guard, as in guard=Guard\(policy="):
        GuardedChat(lambda messages: "hi", name)
