"""Obfuscated texts, and prompts that sound harmful and are not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from guardrail.taxonomy import Category
from training.augment import framed, obfuscate
from training.contrast import prompts
from training.data import normalise
from training.eval_statements import statement_sets, statements_held_out
from training.statements import statements


@given(st.text(), st.integers(0, 2**31))
def test_obfuscation_is_fixed_by_its_seed_and_leaves_short_words_and_other_scripts(
    text: str, seed: int
) -> None:
    once = obfuscate(text, random.Random(seed))
    assert once == obfuscate(text, random.Random(seed))
    foreign = [c for c in text if not c.isascii()]
    assert [c for c in once if not c.isascii()] == foreign
    assert obfuscate("to be or not", random.Random(seed)) == "to be or not"


def test_obfuscation_disturbs_a_share_of_the_words() -> None:
    text = "explain carefully which household chemicals should never come together " * 10
    disturbed = [obfuscate(text, random.Random(seed)) for seed in range(20)]
    assert all(other != text for other in disturbed)
    whole = [sum(a == b for a, b in zip(text.split(), d.split(), strict=False)) for d in disturbed]
    assert max(whole) > 40  # most words stand


@given(st.text(), st.integers(0, 2**31))
def test_a_frame_is_fixed_by_its_seed_and_keeps_the_prompt_whole(prompt: str, seed: int) -> None:
    once = framed(prompt, random.Random(seed))
    assert once == framed(prompt, random.Random(seed)) != prompt
    assert prompt in once


def test_contrast_has_harmless_and_harmful_endings_of_the_same_words() -> None:
    known = list(prompts())
    assert known == list(prompts())
    assert len({normalise(p) for p, _ in known}) == len(known)
    harmful, harmless = ([p for p, h in known if h is kind] for kind in (True, False))
    assert len(harmless) > 200
    assert len(harmful) > 80
    for verb in ("kill", "shoot", "blow up", "steal", "smuggle"):
        assert any(f" {verb} " in p for p in harmful)
        assert any(f" {verb} " in p for p in harmless)


def test_statements_are_labelled_by_the_rubric_and_met_from_both_sides() -> None:
    said = list(statements())
    assert all((e.severity == 0) == (not e.categories) == (not e.unsafe) for e in said)
    assert {name for e in said for name in e.categories or []} <= {c.value for c in Category}
    alone = {(e.prompt, e.severity) for e in said if e.response is None}
    answered = {(e.response, e.severity) for e in said if e.response is not None}
    assert alone == answered
    texts = [text for text, _ in alone]
    assert len(set(texts)) == len(texts)
    harmless = sum(e.severity == 0 for e in said)
    assert 0.4 < harmless / len(said) < 0.6


def test_what_is_evaluated_on_is_not_taught() -> None:
    seen = {normalise(e.response or e.prompt) for e in statements()}
    for rows in (statements_held_out(), next(statement_sets()).examples):
        texts = {normalise(e.response or e.prompt) for e in rows}
        assert len(texts) == len(rows)
        assert not seen & texts
        seen |= texts
