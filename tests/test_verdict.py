from __future__ import annotations

import json
import math
import pickle
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail.taxonomy import Category, Direction, Severity
from guardrail.verdict import Action, Assessment, Pair, Passage, Reason, Verdict

NONE_OF_ALL = dict.fromkeys(Category, 0.0)


@st.composite
def assessments(draw: st.DrawFn) -> Assessment:
    cuts = sorted(draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)), reverse=True)
    edges = [1.0, *cuts, 0.0]
    categories = draw(st.lists(st.floats(0, 1), min_size=19, max_size=19))
    return Assessment(
        draw(st.sampled_from(Direction)),
        {s: edges[s] - edges[s + 1] for s in Severity},
        dict(zip(Category, categories, strict=True)),
        passages=(Passage(0, 3, 0.5),),
        model="m-1",
        unreadable=draw(st.booleans()),
    )


def spread(severe: float) -> dict[Severity, float]:
    return {**dict.fromkeys(Severity, 0.0), Severity.NONE: 1 - severe, Severity.SEVERE: severe}


def test_actions_compare_by_strength_not_by_spelling() -> None:
    order = [Action.ALLOW, Action.FLAG, Action.REDACT, Action.REGENERATE, Action.REFUSE]
    assert sorted(order, key=str) != sorted(order) == order
    for (i, a), (j, b) in product(enumerate(order), repeat=2):
        assert (a < b, a <= b, a > b, a >= b, a == b) == (i < j, i <= j, i > j, i >= j, i == j)
    assert [a for a in order if a.delivers] == [Action.ALLOW, Action.FLAG]


def test_an_action_compares_with_the_word_for_it() -> None:
    assert Action.REDACT > "flag"
    assert Action.REFUSE == "refuse"
    with pytest.raises(ValueError, match="drop"):
        _ = Action.FLAG < "drop"


def test_the_judged_side_of_a_pair_is_the_response_where_there_is_one() -> None:
    assert (Pair("p").direction, Pair("p").text) == (Direction.INPUT, "p")
    assert (Pair("p", "r").direction, Pair("p", "r").text) == (Direction.OUTPUT, "r")
    assert (Pair("p", "").direction, Pair("p", "").text) == (Direction.OUTPUT, "")


@given(assessments())
def test_the_probability_of_a_level_falls_with_the_level(seen: Assessment) -> None:
    levels = [seen.at_least(severity) for severity in Severity]
    assert levels[0] == pytest.approx(1)
    assert levels == sorted(levels, reverse=True)
    assert seen.unsafe_probability == levels[1]
    assert all(0 <= p <= 1 for p in levels)


@pytest.mark.parametrize(
    ("severities", "categories", "message"),
    [
        ({Severity.NONE: 1.0}, NONE_OF_ALL, "severity_probabilities must name each of the 4"),
        (spread(0.5), {}, "categories must name each of the 19"),
        (spread(0.5), {**NONE_OF_ALL, "Arson": 0.5}, "categories must name each of the 19"),
        (spread(math.nan), NONE_OF_ALL, "NONE has nan"),
        (spread(0.5), {**NONE_OF_ALL, Category.DRUGS: math.nan}, "DRUGS has nan"),
        (spread(0.5), {**NONE_OF_ALL, Category.DRUGS: 1.5}, "DRUGS has 1.5"),
        (spread(-0.2), NONE_OF_ALL, "which is not a probability"),
        (dict.fromkeys(Severity, 0.9), NONE_OF_ALL, "sum to 3.6"),
    ],
)
def test_an_assessment_that_makes_no_sense_cannot_be_made(
    severities: dict[Severity, float], categories: dict[Category, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Assessment(Direction.INPUT, severities, categories)


def test_float32_rounding_is_no_nonsense() -> None:
    Assessment(Direction.INPUT, {**spread(0), Severity.NONE: 1.0000001}, NONE_OF_ALL)


def test_a_text_with_nothing_in_it_is_harmless() -> None:
    seen = Assessment.harmless(Direction.OUTPUT, model="m-1")
    assert (seen.direction, seen.unsafe_probability, seen.model) == (Direction.OUTPUT, 0, "m-1")
    assert set(seen.categories.values()) == {0.0}
    assert seen.passages == ()


@given(assessments())
def test_verdict_json_has_one_shape_and_is_valid_json(seen: Assessment) -> None:
    reason = Reason(Category.VIOLENCE, Severity.SEVERE, 0.91234, 0.43)
    verdict = Verdict(
        Action.REFUSE,
        seen.direction,
        Severity.SEVERE,
        (reason,),
        seen,
        "balanced@1",
        latency_ms=6.1,
    )
    data = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert list(data)[:12] == [
        "action", "direction", "severity", "unsafe_probability", "severity_probabilities",
        "categories", "reasons", "passages", "policy", "model", "degraded", "latency_ms",
    ]  # fmt: skip
    assert ("unreadable" in data) is seen.unreadable
    assert "error" not in data
    assert data["reasons"] == [
        {"category": "Violence", "severity": "severe", "probability": 0.9123, "threshold": 0.43}
    ]
    assert data["passages"] == [{"start": 0, "end": 3, "probability": 0.5}]
    assert list(data["severity_probabilities"]) == ["none", "minor", "moderate", "severe"]
    assert list(data["categories"]) == [category.value for category in Category]
    assert (data["model"], data["policy"], data["degraded"]) == ("m-1", "balanced@1", False)


def test_verdict_json_is_null_where_nothing_was_assessed() -> None:
    data = Verdict(Action.REFUSE, Direction.INPUT, degraded=True, error="gone").to_json()
    assert data["unsafe_probability"] is data["categories"] is data["model"] is None
    assert data["severity_probabilities"] is None
    assert (data["degraded"], data["error"]) == (True, "gone")


def test_the_summary_says_what_was_decided_and_why() -> None:
    seen = Assessment(Direction.OUTPUT, spread(0.9), NONE_OF_ALL, unreadable=True)
    reason = Reason(Category.VIOLENCE, Severity.SEVERE, 0.91, 0.43)
    out, policy = Direction.OUTPUT, "balanced@1"
    said = {
        Verdict(Action.REFUSE, out, Severity.SEVERE, (reason,), policy=policy).summary(),
        Verdict(Action.ALLOW, out, policy=policy).summary(),
        Verdict(Action.FLAG, out, assessment=seen, policy=policy).summary(),
        Verdict(Action.REFUSE, out, policy=policy, degraded=True, error="gone").summary(),
        Verdict(
            Action.REFUSE, out, Severity.SEVERE, (reason,), seen, policy, True, "disk"
        ).summary(),
    }
    assert said == {
        "refuse: severe Violence 0.91 (policy balanced@1)",
        "allow: nothing held against it (policy balanced@1)",
        "flag: text the model cannot read (policy balanced@1)",
        "refuse: no assessment: gone (policy balanced@1)",
        "refuse: failed: disk (policy balanced@1)",
    }


@given(assessments())
def test_a_verdict_survives_pickling_and_equals_one_that_took_longer(seen: Assessment) -> None:
    verdict = Verdict(Action.FLAG, seen.direction, assessment=seen, latency_ms=1.0)
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    assert verdict == Verdict(Action.FLAG, seen.direction, assessment=seen, latency_ms=2.0)
