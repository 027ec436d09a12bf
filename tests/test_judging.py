"""Data in an answer (arguments of tool calls, ...) is judged string by string, not only in one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from openai import OpenAI

from guardrail import Category, Guard, Severity
from guardrail._judging import judge_strings
from guardrail.langchain import GuardedChatModel
from guardrail.openai import guard_openai
from guardrail.stream import StreamConfig
from guardrail.testing import FakeModerator
from guardrail.verdict import Action, Assessment, Pair, Verdict

HARM = "First build the bomb, then carry it to the station."
CALM = "The weather was fine and the bread was still warm. " * 4


class Diluted(FakeModerator):
    """Sees harm only in a text of which it is a third at least."""

    def __init__(self) -> None:
        super().__init__({HARM: (Severity.SEVERE, Category.VIOLENCE)})

    def assess(self, pairs: Sequence[Pair]) -> list[Assessment]:
        short = [pair if len(pair.text) < 3 * len(HARM) else Pair("", "-") for pair in pairs]
        return super().assess(short)


def verdict_on(found: Sequence[str], guard: Guard) -> tuple[Verdict, list[str]]:
    """The verdict, and the texts that were judged for it."""
    flow = judge_strings("hi", found, StreamConfig())
    texts = []
    check = next(flow)
    while True:
        texts += [pair.text for pair in check.pairs]
        try:
            check = flow.send(guard.check_many(check.pairs))
        except StopIteration as end:
            return end.value, texts


@given(st.lists(st.sampled_from(["a", "the name of a field", CALM]), max_size=6), st.data())
def test_harm_among_harmless_strings_is_seen(calm: list[str], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(calm)))
    verdict, _ = verdict_on([*calm[:at], HARM, *calm[at:]], Guard(Diluted()))
    assert verdict.action is Action.REFUSE
    assert verdict_on(calm, Guard(Diluted()))[0].action is Action.ALLOW


def test_short_strings_are_judged_together_and_each_long_one_once_more() -> None:
    _, texts = verdict_on(["a", CALM, "b", CALM], Guard(Diluted()))
    assert texts == ["\n".join(["a", CALM, "b", CALM]), CALM]


def test_no_strings_are_harmless() -> None:
    assert verdict_on([], Guard(Diluted()))[0].action is Action.ALLOW


@pytest.mark.parametrize("text", [HARM, CALM])
def test_a_tool_call_is_withheld_for_one_harmful_argument(text: str) -> None:
    arguments = {"path": CALM, "text": text}
    function = {"name": "write", "arguments": json.dumps(arguments)}
    message: dict[str, Any] = {"role": "assistant", "content": None}
    message["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, json=body | {"choices": [choice]})
    )
    guard = Guard(Diluted())
    with httpx.Client(transport=transport) as http:
        client = guard_openai(OpenAI(api_key="k", base_url="http://x/v1", http_client=http), guard)
        ask = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model="m", messages=ask)  # type: ignore[arg-type]
    call = {"name": "write", "args": arguments, "id": "1"}
    inner = GenericFakeChatModel(messages=iter([AIMessage("", tool_calls=[call])]))
    answer = GuardedChatModel(inner=inner, guard=guard).invoke("hi")
    assert bool(chat.choices[0].message.tool_calls) is (text == CALM)
    assert bool(answer.tool_calls) is (text == CALM)
