"""A guarded chat in bad luck: streams cut at any byte, callers that leave at any await, messages
that are empty or huge. The caller gets judged text or one clear error, and never waits for ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from loopback import serving

from guardrail import (
    Assessment,
    Category,
    Guard,
    GuardedChat,
    Pair,
    Policy,
    Severity,
    UpstreamError,
)
from guardrail.stream import StreamConfig
from guardrail.testing import FakeModerator, leaked_chars
from guardrail.upstream import OpenAICompatible

WORDS = {"bomb": (Severity.SEVERE, Category.VIOLENCE)}
SAID = ("Fine so far. ", "Wé go on, ", "and a bo", "mb comes.")


async def read_into(seen: list[str], chat: GuardedChat) -> None:
    """Each text as it comes: what was seen before an error stays seen."""
    async with chat.astream("hi") as stream:
        async for text in stream:
            seen.append(text)  # noqa: PERF401


# --- a stream that is cut at any byte ------------------------------------------------------------


class Cut(ThreadingHTTPServer):
    """Sends `body` as an event stream, all of it or its beginning, and hangs up."""

    daemon_threads = True
    body = b""


class Handler(BaseHTTPRequestHandler):
    server: Cut

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def cut() -> Iterator[Cut]:
    with serving(Cut(("127.0.0.1", 0), Handler)) as server:
        yield server


def events(*texts: str) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}} for text in texts]
    lines = [f"data: {json.dumps({'choices': [c]}, ensure_ascii=False)}\n\n" for c in choices]
    return "".join(lines).encode()


@pytest.mark.parametrize("how", ["stream", "astream"])
@pytest.mark.parametrize("harmful", [False, True])
def test_half_an_event_gives_what_was_judged_and_then_an_error(
    cut: Cut, how: str, harmful: bool
) -> None:
    said = SAID if harmful else SAID[:2]
    body = events(*said)
    guard = Guard(FakeModerator(WORDS))
    ends: set[str] = set()

    def check(seen: list[str], error: UpstreamError | None) -> None:
        text = "".join(seen)
        assert leaked_chars(text, WORDS) == 0
        if error is None:  # stopped by the guard, before the cut was reached
            assert harmful
            assert "I'm sorry" in text
            ends.add("refused")
        else:
            assert "\n" not in str(error)
            assert "".join(said).startswith(text)
            ends.add("cut")

    async def read_all() -> None:
        async with OpenAICompatible(url, model="m", retries=0, timeout=30) as model:
            for at in range(0, len(body), 3):
                cut.body, seen = body[:at], []
                try:
                    await read_into(seen, GuardedChat(model, guard))
                except UpstreamError as error:
                    check(seen, error)
                else:
                    check(seen, None)

    url = f"http://127.0.0.1:{cut.server_address[1]}/v1"
    if how == "astream":
        asyncio.run(read_all())
    else:
        with OpenAICompatible(url, model="m", retries=0, timeout=30) as model:
            for at in range(0, len(body), 3):
                cut.body, seen = body[:at], []
                try:
                    seen.extend(GuardedChat(model, guard).stream("hi"))
                except UpstreamError as error:
                    check(seen, error)
                else:
                    check(seen, None)
    assert "cut" in ends


@pytest.mark.parametrize("how", ["stream", "astream"])
def test_a_model_that_dies_in_the_middle_gives_what_was_judged_and_then_an_error(how: str) -> None:
    def dies(_: Any) -> Iterator[str]:
        yield from ("All is well here. " * 9, "a bo")
        raise OSError("the connection is gone")

    chat = GuardedChat(dies, Guard(FakeModerator(WORDS)))
    seen: list[str] = []

    with pytest.raises(UpstreamError, match="OSError: the connection is gone"):
        asyncio.run(read_into(seen, chat)) if how == "astream" else seen.extend(chat.stream("hi"))
    assert "".join(seen) == "All is well here. " * 9 + "a "


# --- a caller who leaves at any await ------------------------------------------------------------


class Awaited(FakeModerator):
    """Judges after a turn of the event loop, so that a caller may leave meanwhile."""

    async def aassess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        await asyncio.sleep(0)
        return self.assess(pairs)


@pytest.mark.parametrize("how", ["acomplete", "astream"])
@pytest.mark.parametrize("action", ["refuse", "redact", "regenerate"])
def test_a_caller_may_leave_at_any_await(how: str, action: str) -> None:
    policy = Policy.parse(f'name = "t"\n[output]\nsevere = "{action}"')
    opened, closed = 0, 0

    async def model(_: Any) -> AsyncIterator[str]:
        nonlocal opened, closed
        opened += 1
        try:
            for text in SAID * 3:
                await asyncio.sleep(0)
                yield text
        finally:
            closed += 1

    chat = GuardedChat(
        model,
        Guard(Awaited(WORDS), policy),
        stream_config=StreamConfig(first=60 if action == "regenerate" else 1, longest=80),
    )

    async def read(seen: list[str]) -> None:
        if how == "acomplete":
            seen.append((await chat.acomplete("hi")).text)
        else:
            await read_into(seen, chat)

    async def leave_after(turns: int) -> bool:
        """True when there was nothing left to leave."""
        seen: list[str] = []
        task = asyncio.create_task(read(seen))
        for _ in range(turns):
            await asyncio.sleep(0)
        left = task.cancel()
        _, waiting = await asyncio.wait([task], timeout=30)
        assert not waiting
        assert task.cancelled() or task.exception() is None
        assert leaked_chars(seen, WORDS) == 0
        assert opened == closed, f"an answer was left open after {turns} turns"
        return not left

    async def main() -> int:
        turns = 0
        while not await leave_after(turns):
            turns += 1
            assert turns < 1000
        return turns

    assert asyncio.run(main()) > 15


# --- messages that are empty or huge -------------------------------------------------------------

DOORS = ("complete", "stream")


def answer(chat: GuardedChat, how: str, messages: Any) -> str:
    return chat.complete(messages).text if how == "complete" else "".join(chat.stream(messages))


@pytest.mark.parametrize("how", DOORS)
@pytest.mark.parametrize(
    "messages",
    [
        "",
        " \n",
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user"}],
        [
            {"role": "user", "content": "look it up"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "found"},
        ],
    ],
)
def test_a_message_without_text_is_answered(how: str, messages: Any) -> None:
    chat = GuardedChat(lambda _: "judged", Guard(FakeModerator(WORDS)))
    assert answer(chat, how, messages) == "judged"


@pytest.mark.parametrize("how", DOORS)
def test_an_empty_answer_is_an_empty_answer(how: str) -> None:
    for empty in ("", [], [""]):
        chat = GuardedChat(lambda _, said=empty: said, Guard(FakeModerator(WORDS)))
        assert answer(chat, how, "hi") == ""


@pytest.mark.parametrize("how", DOORS)
def test_a_huge_message_and_a_huge_answer_are_judged_to_their_end(how: str) -> None:
    huge = "All is well here. " * 60_000  # a megabyte
    guard = Guard(FakeModerator(WORDS))
    assert answer(GuardedChat(lambda _: huge, guard), how, huge) == huge
    asked: list[Any] = []
    assert answer(GuardedChat(asked.append, guard), how, f"{huge} bomb").startswith("I'm sorry")
    assert asked == []
    text = answer(GuardedChat(lambda _: f"{huge} bomb", guard), how, "hi")
    assert leaked_chars(text, WORDS) == 0
    assert "I'm sorry" in text
