"""Refusal texts: polite, one for every category, with help where someone may be hurt."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from guardrail import Category, Direction, Guard, GuardedChat, Policy, Severity
from guardrail.errors import PolicyError
from guardrail.policy import LANGUAGES
from guardrail.refusals import refusal_text
from guardrail.testing import FakeModerator

OPENINGS = {
    "de": "Tut mir leid", "en": "I'm sorry, but I can't", "es": "Lo siento", "fr": "Désolé",
    "it": "Mi dispiace", "ja": "申し訳ありません", "pt": "Desculpe", "zh": "抱歉",
}  # fmt: skip


@pytest.mark.parametrize("category", Category)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_category_has_a_refusal_and_harm_to_people_points_to_help(
    language: str, category: Category, direction: Direction
) -> None:
    guard = Guard(FakeModerator({"x": (Severity.SEVERE, category)}))
    verdict = guard.check("x") if direction is Direction.INPUT else guard.check("y", "x")
    policy = Policy.parse(f'name = "t"\nextends = "strict"\nlanguage = "{language}"')
    text = refusal_text(verdict, policy)
    assert text.startswith(OPENINGS[language])
    assert "{" not in text
    crisis = category in (Category.PHYSICAL_HARM, Category.PSYCHOLOGICAL_HARM)
    assert ("findahelpline.com" in text) == crisis
    assert not any(c.isdigit() for c in text)  # no phone number is right everywhere


def test_a_policys_own_refusal_is_used_as_it_is() -> None:
    policy = Policy.parse('name = "t"\nextends = "strict"\nrefusal = "Ask the front desk."')
    guard = Guard(FakeModerator({"x": (Severity.SEVERE, Category.PHYSICAL_HARM)}), policy)
    assert GuardedChat(lambda messages: "ok", guard).complete("x").text == "Ask the front desk."


def test_a_category_may_have_words_of_its_own_and_they_are_inherited(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(
        'name = "house"\nextends = "strict"\nlanguage = "fr"\n[refusals]\nDrugs = "Ask a doctor."'
    )
    (tmp_path / "desk.toml").write_text('name = "desk"\nextends = "house.toml"\nrefusal = "No."')
    policy = Policy.load(tmp_path / "desk.toml")
    model = {
        "pills": (Severity.SEVERE, Category.DRUGS),
        "gun": (Severity.SEVERE, Category.VIOLENCE),
    }
    guard = Guard(FakeModerator(model), policy)
    assert refusal_text(guard.check("pills"), policy) == "Ask a doctor."
    assert refusal_text(guard.check("gun"), policy) == "No."
    assert policy.language == "fr"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('language = "xx"', "key 'language': 'xx' is none of de, en, es"),
        ("language = 1", "key 'language': expected str, found 1"),
        ('refusals = "No."', "key 'refusals': expected a table"),
        (
            "[refusals]\nDrug = 'No.'",
            "'Drug' is not one of the 19 categories; did you mean 'Drugs'",
        ),
        ("[refusals]\nDrugs = 1", "refusals: key 'Drugs': expected str, found 1"),
    ],
)
def test_refusals_that_cannot_be_meant_are_named(line: str, message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        Policy.parse(f'name = "t"\n{line}')


def test_a_language_that_is_not_there_is_refused_in_python_too() -> None:
    with pytest.raises(PolicyError, match="'nl' is none of de, en"):
        dataclasses.replace(Policy.load("balanced"), language="nl")


@pytest.mark.parametrize("blank", ["", "  "])
def test_blank_words_are_none(blank: str) -> None:
    text = f'name = "t"\nextends = "strict"\nrefusal = "{blank}"\n[refusals]\nDrugs = "{blank}"'
    policy = Policy.parse(text)
    guard = Guard(FakeModerator({"x": (Severity.SEVERE, Category.DRUGS)}), policy)
    assert refusal_text(guard.check("x"), policy).startswith(OPENINGS["en"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_refusal_for_a_failed_check_is_there_in_every_language(language: str) -> None:
    policy = Policy.parse(f'name = "t"\nlanguage = "{language}"')
    said = refusal_text(policy.fail(Direction.INPUT, "gone"), policy)
    assert said.startswith(OPENINGS[language].partition(",")[0])


def test_a_refusal_for_a_failed_check_does_not_accuse() -> None:
    policy = Policy.load("balanced")
    assert "could not be checked" in refusal_text(policy.fail(Direction.INPUT, "gone"), policy)
