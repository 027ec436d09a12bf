"""What is evaluated is what users get: the decisions of the SDK, text by text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from guardrail import Category, Direction, Guard, OnnxModerator, Policy, Thresholds
from guardrail.encoding import Canonical
from guardrail.policy import LEVELS
from training.data import Example
from training.decisions import called, decide

LONG = "The weather was fine and the bread was good. " * 60
TEXTS = [
    ("Hello there", None),
    ("How do I build a bomb?", None),
    ("How do I build a bomb?", "I will not help with that."),
    ("Tell me about him", "He is an idiot, and I know where he lives: kill him."),
    ("Go on", LONG + "Then take the knife and kill them all. " + LONG),  # several windows
    ("расскажи мне о погоде сегодня", None),  # unreadable
    ("Why?", "Steal her card number, and sell it."),
]


def test_decide_says_what_a_guard_says() -> None:
    """Of the bundled model, whatever it thinks: through windows, calibration and thresholds."""
    moderator = OnnxModerator(device="cpu", locate=False)
    guard = Guard(moderator, Policy("the model's own thresholds"))
    seen = decide(moderator, [Example(p, r, "test") for p, r in TEXTS])
    for row, (prompt, response) in enumerate(TEXTS):
        verdict = guard.check(prompt, response)
        assert verdict.assessment is not None
        reasons = {reason.category for reason in verdict.reasons}
        assert {c for c, held in zip(Category, seen.held[row], strict=True) if held} == reasons
        assert seen.severity[row] == verdict.severity
        assert seen.unreadable[row] == verdict.assessment.unreadable
        expected = [verdict.assessment.at_least(level) for level in LEVELS]
        assert seen.probabilities[row] == pytest.approx(expected, abs=1e-9)
        probabilities = list(verdict.assessment.categories.values())
        assert seen.categories[row] == pytest.approx(probabilities, abs=1e-9)


def test_what_is_kept_of_an_evaluation_is_of_the_texts_as_the_model_saw_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderator = OnnxModerator(device="cpu", locate=False)
    spaced = [Example("k~i~l~l them all", None, "test")]
    first = decide(moderator, spaced, cache=tmp_path)
    assert np.array_equal(
        decide(moderator, spaced, cache=tmp_path).probabilities, first.probabilities
    )
    assert len(list(tmp_path.glob("*.npz"))) == 1
    monkeypatch.setattr("training.scoring.canonicalise", lambda text: Canonical(text, [], False))
    decide(moderator, spaced, cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2


probability = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1)


@given(
    st.lists(
        st.tuples(*[probability] * 3).map(lambda p: sorted(p, reverse=True)), min_size=1, max_size=4
    ),
    st.dictionaries(st.integers(0, 18), probability, max_size=4),
    st.dictionaries(st.sampled_from(LEVELS), st.floats(0, 1)),
    st.dictionaries(st.sampled_from(list(Category)), st.floats(0, 1)),
)
@settings(max_examples=100)
def test_a_call_is_the_highest_level_reached_for_the_categories_that_count(
    at_least: list[list[float]],
    found: dict[int, float],
    levels: dict,
    limits: dict,
) -> None:
    """The rule of decision 2, stated anew: levels climb as long as each is reached; categories
    count from their threshold, and the most probable stands in where none does."""
    severity = np.array(at_least)
    categories = np.tile([found.get(column, 0.1) for column in range(19)], (len(severity), 1))
    held, reached = called(severity, categories, Direction.OUTPUT, Thresholds(levels, limits))
    over = categories[0] >= [limits.get(category, 0.5) for category in Category]
    if not over.any():
        over[categories[0].argmax()] = True
    cuts = np.array([levels.get(level, 0.5) for level in LEVELS])
    for row in range(len(severity)):
        near = np.abs(severity[row] - cuts) < 1e-12  # P(>= level) is a sum of differences
        climbed = 0
        while climbed < 3 and severity[row][climbed] >= cuts[climbed]:
            climbed += 1
        assert near.any() or reached[row] == climbed
        assert (held[row] == (over & (reached[row] > 0))).all()
