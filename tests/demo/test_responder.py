from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.responder import EXAMPLES, NAME, ScriptedResponder, answer_to


def ask(prompt: str) -> str:
    return "".join(ScriptedResponder(delay=0)([{"role": "user", "content": prompt}]))


def test_it_says_that_it_is_no_language_model() -> None:
    assert "not a language model" in NAME


def test_it_streams_word_by_word() -> None:
    words = list(ScriptedResponder(delay=0)([{"role": "user", "content": "hello"}]))
    assert len(words) > 10
    assert all(len(word.split()) == 1 for word in words)


@given(st.text())
def test_what_is_streamed_is_the_whole_answer_to_any_message(prompt: str) -> None:
    assert ask(prompt) == answer_to(prompt)
    assert ask(prompt).strip()


def test_the_last_user_message_is_the_one_answered() -> None:
    messages = [
        {"role": "user", "content": "Tell me a bedtime story."},
        {"role": "assistant", "content": "Once upon a time"},
        {"role": "user", "content": "What can I cook?"},
    ]
    assert "onion" in "".join(ScriptedResponder(delay=0)(messages))


@pytest.mark.parametrize("prompt", [p for label, p in EXAMPLES if label != "Harmful ask"])
def test_every_example_has_an_answer_of_its_own(prompt: str) -> None:
    others = [answer_to(p) for _, p in EXAMPLES if p != prompt]
    assert answer_to(prompt) not in [*others, answer_to("zzz")]
