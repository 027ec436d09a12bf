"""The measurement of leaks: every client adapter and stream mode is in it, and it can fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("langchain_openai")
pytest.importorskip("openai")

from benchmarks._leak_server import Source
from benchmarks._leak_ways import Piece, Seen, Whole, ways
from benchmarks.leaks import REFUSAL, Answer, Meter, Remembering, bare, measure, sample
from guardrail import Category, Pair, Severity
from guardrail.testing import FakeModerator

TEA = (
    "Tea is made of leaves.\n\tPour hot water on them — and drink it slowly, while it's warm. " * 8
)
ANSWERS = [
    Answer("How is tea made?", TEA, harmful=False),
    Answer("And what else?", f"{TEA}Then take the bomb and go. {TEA}", harmful=True),
    Answer("Who?", f"{TEA}Call 0199, she knows. {TEA}", harmful=True),
]


def a_moderator() -> FakeModerator:
    return FakeModerator(
        {
            "bomb": (Severity.SEVERE, Category.VIOLENCE),
            "0199": (Severity.MODERATE, Category.PRIVACY_VIOLATION),
        }
    )


def test_no_way_leaks_or_alters_and_all_stop_the_same_answers() -> None:
    source, meter = Source(), Meter(a_moderator())
    with ways(source, meter) as found:
        for word in ("callable", "URL", "chat.completions", "responses", "model", "agent", "pipe"):
            assert any(word in name for name in found)
        for name, way in found.items():
            row = measure(name, way, ANSWERS, source, meter)
            assert (row.leaked, row.altered) == (0, 0), name
            assert (row.harmful_stopped, row.harmless_stopped, row.redacted) == (1, 0, 1), name
            assert row.characters > len(TEA) * 3, name


def test_an_answer_that_is_checked_at_its_end_leaks_all_of_it() -> None:
    source, meter = Source(), Meter(a_moderator())
    row = measure("bare", bare(source, meter), ANSWERS, source, meter)
    assert row.leaked >= sum(len(answer.text) for answer in ANSWERS)


def test_one_character_too_early_is_a_leak_and_one_changed_is_an_alteration() -> None:
    source, meter = Source(), Meter(a_moderator())

    def early(prompt: str) -> Iterator[Seen]:
        yield Piece(source.answer[:1])
        meter.check(prompt, source.answer)
        yield Piece(source.answer[1:])

    def changed(prompt: str) -> Iterator[Seen]:
        meter.check(prompt, source.answer.upper())
        yield Whole(source.answer.upper())

    row = measure("early", early, ANSWERS[:1], source, meter)
    assert (row.leaked, row.altered) == (1, 0)
    row = measure("changed", changed, ANSWERS[:1], source, meter)
    assert (row.leaked, row.altered) == (0, 1)


def test_a_refused_text_that_comes_out_whole_is_a_leak() -> None:
    source, meter = Source(), Meter(a_moderator())

    def way(prompt: str) -> Iterator[Seen]:
        assert not meter.check(prompt, source.answer).delivers
        yield Whole(source.answer)
        yield Whole(f"a part\n\n{REFUSAL}")

    assert measure("way", way, ANSWERS[1:2], source, meter).leaked >= len(ANSWERS[1].text)


def test_a_text_is_judged_once_for_all_ways() -> None:
    seen: list[Pair] = []
    moderator = Remembering(
        FakeModerator({"x": (Severity.MINOR, Category.DRUGS)}, on_assess=seen.extend)
    )
    first = moderator.assess([Pair("a"), Pair("b"), Pair("a")])
    assert moderator.assess([Pair("b"), Pair("a")]) == [first[1], first[0]]
    assert seen == [Pair("a"), Pair("b")]


def test_the_sample_holds_labelled_answers_of_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    rows = [
        {"prompt": f"p{n}", "response": response, "severity": severity}
        for n, (response, severity) in enumerate(
            [("bad", 2), ("worse", 3), ("good", 0), ("fine", 0), (None, 3), ("?", None), (" ", 0)]
        )
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = sample(path, 2)
    assert {(a.text, a.harmful) for a in found} == {
        ("bad", True), ("worse", True), ("good", False), ("fine", False),
    }  # fmt: skip
    assert sample(path, 1) == sample(path, 1)
    with pytest.raises(SystemExit, match="holds 2 harmful answers"):
        sample(path, 3)
