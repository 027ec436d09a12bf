"""One word tells nobody anything; a text does, whatever parts its words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail._names import is_base64, is_identifier, is_token, plain_name


@pytest.mark.parametrize("said", ["", "call_1|fc_2", "org/model:7b@rev", "gAAAA-_+/w==", "a" * 128])
def test_an_identifier_is_one_word(said: str) -> None:
    assert is_identifier(said)


def test_an_identifier_has_a_length_unless_it_is_sealed() -> None:
    assert not is_identifier("a" * 129)
    assert is_identifier("a" * 129, limit=512)
    assert is_identifier("a" * 100_000, limit=None)


@given(st.text(min_size=1), st.characters(exclude_categories=["L", "N"]), st.text(min_size=1))
def test_words_that_anything_parts_but_the_signs_of_identifiers_are_a_text(
    one: str, sign: str, other: str
) -> None:
    if sign not in "_.:/@+=|~\\-":
        assert not is_identifier(one + sign + other, limit=None)
        assert plain_name(one + sign + other) is None


@pytest.mark.parametrize("said", ["", "two words", "-x", "org/model", "a" * 65, "naïve", None, 3])
def test_what_is_not_one_short_word_is_no_name(said: object) -> None:
    assert plain_name(said) is None


def test_a_name_is_given_as_it_is() -> None:
    assert plain_name("tool_calls") == "tool_calls"


@pytest.mark.parametrize("said", ["", "call_1", "org/model:7b@rev", "a" * 128, None, 3, 0.5])
def test_a_token_is_one_word_or_a_number(said: object) -> None:
    assert is_token(said)


@pytest.mark.parametrize("said", ["two words", "a" * 129, "-kill", "kill|you", "a~b", "\\a", ["a"]])
def test_a_token_has_few_signs_and_an_end(said: object) -> None:
    assert not is_token(said)


@pytest.mark.parametrize("said", ["kill.you", "kill:you", "kill@you", "kill|you", "kill you", None])
def test_what_is_sealed_has_the_signs_of_base64_alone(said: object) -> None:
    assert is_base64("gAAAA-_+/w==" * 1000)
    assert not is_base64(said)
