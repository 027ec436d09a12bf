"""Refusal texts: polite, one for every category, with help where someone may be hurt."""

from __future__ import annotations

import pytest

from guardrail import Category, Direction, Guard, GuardedChat, Policy, Severity
from guardrail.refusals import refusal_text
from guardrail.testing import FakeModerator


@pytest.mark.parametrize("category", Category)
@pytest.mark.parametrize("direction", Direction)
def test_every_category_has_a_refusal_and_harm_to_people_points_to_help(
    category: Category, direction: Direction
) -> None:
    guard = Guard(FakeModerator({"x": (Severity.SEVERE, category)}))
    verdict = guard.check("x") if direction is Direction.INPUT else guard.check("y", "x")
    policy = Policy.load("strict")
    text = refusal_text(verdict, policy)
    assert text.startswith("I'm sorry, but I can't")
    crisis = category in (Category.PHYSICAL_HARM, Category.PSYCHOLOGICAL_HARM)
    assert ("findahelpline.com" in text) == crisis
    assert not any(c.isdigit() for c in text)  # no phone number is right everywhere


def test_a_policys_own_refusal_is_used_as_it_is() -> None:
    policy = Policy.parse('name = "t"\nextends = "strict"\nrefusal = "Ask the front desk."')
    guard = Guard(FakeModerator({"x": (Severity.SEVERE, Category.PHYSICAL_HARM)}), policy)
    assert GuardedChat(lambda messages: "ok", guard).complete("x").text == "Ask the front desk."


def test_a_refusal_for_a_failed_check_does_not_accuse() -> None:
    policy = Policy.load("balanced")
    assert "could not be checked" in refusal_text(policy.fail(Direction.INPUT, "gone"), policy)
