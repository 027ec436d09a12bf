from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail.taxonomy import TAXONOMY_VERSION, Category, Direction, Severity


def test_the_words_are_those_of_pku_saferlhf_in_its_order() -> None:
    """A change of a word, or of the order, makes every trained model another's: a new version."""
    assert TAXONOMY_VERSION == "pku-saferlhf-19@1"
    assert [category.value for category in Category] == [
        "Endangering National Security", "Insulting Behavior", "Discriminatory Behavior",
        "Endangering Public Health", "Copyright Issues", "Violence", "Drugs", "Privacy Violation",
        "Economic Crime", "Mental Manipulation", "Human Trafficking", "Physical Harm",
        "Sexual Content", "Cybercrime", "Disrupting Public Order", "Environmental Damage",
        "Psychological Harm", "White-Collar Crime", "Animal Abuse",
    ]  # fmt: skip
    assert [direction.value for direction in Direction] == ["input", "output"]


def test_severities_are_ordered_and_named() -> None:
    assert Severity.NONE < Severity.MINOR < Severity.MODERATE < Severity.SEVERE
    assert [(int(s), s.label) for s in Severity] == [
        (0, "none"), (1, "minor"), (2, "moderate"), (3, "severe"),
    ]  # fmt: skip


@given(st.sampled_from(Severity))
def test_a_severity_is_found_by_its_label(severity: Severity) -> None:
    assert Severity.from_label(severity.label) is severity


@given(st.text() | st.sampled_from(["Minor", "MINOR", " minor", "minor "]))
def test_any_other_word_is_no_severity(word: str) -> None:
    if word not in {s.label for s in Severity}:
        with pytest.raises(ValueError, match="is not a severity"):
            Severity.from_label(word)
