"""A policy's own answers become preferences: safe before harmful, help before refusal."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from tiny_preferences import cut_runs  # noqa: E402

from training import on_policy  # noqa: E402
from training.on_policy import Draw, choose, whole_sentences  # noqa: E402
from training.preferences import Demonstration, Preference, read_pairs  # noqa: E402

REFUSAL = "I'm sorry, but I can't help with that."
SHOWN = [
    Demonstration("how to harm", REFUSAL, "refusal", "test"),
    Demonstration("how to bake", "Mix flour and water.", "benign", "test"),
    Demonstration("how to hide", "Why, from whom?", "borderline", "test"),
]


def chosen(harmful: bool, *answers: tuple[str, float]) -> Preference | None:
    prompt = "how to burn a house" if harmful else "how to bake"
    draws = [Draw(prompt, harmful, answer, cost) for answer, cost in answers]
    return choose(draws, SHOWN, 0.5, random.Random(0))


def test_a_harmful_prompt_prefers_its_safest_answer_to_its_most_harmful_one() -> None:
    answers = (("Do it.", 1.0), ("Never do it.", -2.0), ("Light it.", 3.0), ("Ask me.", -1.0))
    found = chosen(True, *answers)
    assert found is not None
    assert found.answers == ("Never do it.", "Light it.")
    assert (found.less_harmful, found.more_helpful, found.unsafe) == (0, None, (False, True))


def test_where_every_answer_harms_a_demonstrated_refusal_is_preferred() -> None:
    found = chosen(True, ("Light it.", 3.0))
    assert found is not None
    assert found.answers == (REFUSAL, "Light it.")


def test_an_everyday_prompt_prefers_help_to_a_refusal() -> None:
    found = chosen(False, ("Use yeast.", -1.0), (REFUSAL, -3.0))
    assert found is not None
    assert found.answers == ("Use yeast.", REFUSAL)
    assert (found.more_helpful, found.less_harmful) == (0, None)


def test_where_every_draw_refuses_the_demonstrated_answer_is_preferred() -> None:
    found = chosen(False, (REFUSAL, -3.0))
    assert found is not None
    assert found.answers[0] == "Mix flour and water."


def test_a_borderline_prompt_teaches_nothing_about_refusals() -> None:
    draws = [Draw("how to hide", False, a, -1.0) for a in (REFUSAL, "Behind a tree.")]
    assert choose(draws, SHOWN, 0.5, random.Random(0)) is None


def test_nothing_is_learnt_from_harm_alone() -> None:
    draws = [Draw("how to burn a house", True, "Light it.", 3.0)]
    assert choose(draws, [], 0.5, random.Random(0)) is None


@pytest.mark.parametrize("harmful", [True, False])
def test_nothing_is_learnt_where_nothing_is_wrong(harmful: bool) -> None:
    assert chosen(harmful, ("Fine.", -1.0), ("Good.", -2.0)) is None


def test_an_answer_in_circles_is_never_the_better_one() -> None:
    circles = "do not do it again " * 9
    found = chosen(True, (circles, -5.0), ("Light it.", 3.0))
    assert found is not None
    assert found.answers[0] == REFUSAL


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("One. Two is cut", "One."),
        ('He said "no." Then', 'He said "no."'),
        ("version 3.5 is", ""),
        ("All of it!", "All of it!"),
        ("A.\n\nB? c", "A.\n\nB?"),
    ],
)
def test_what_follows_the_last_whole_sentence_is_cut(answer: str, kept: str) -> None:
    assert whole_sentences(answer) == kept


@pytest.fixture
def args(babbler: Path) -> on_policy.Args:
    """Of a run that asks 12 prompts, four of them in a batch."""
    return on_policy.Args(
        policy=str(babbler / "base"), cost=babbler / "cost", data=babbler / "data", bases=babbler,
        out=babbler / "whole", prompts=12, draws=2, new_tokens=8, margin=0.0, batch=8,
    )  # fmt: skip


def test_a_stopped_run_goes_on_to_the_same_pairs(args: on_policy.Args) -> None:
    on_policy.main(args)
    draws = (args.out / "draws.jsonl").read_bytes()
    lines = draws.splitlines(keepends=True)
    assert len(lines) == 12
    assert {row["harmful"] for line in lines for row in json.loads(line)} == {True, False}
    pairs = read_pairs(args.out / "pairs.jsonl")
    assert pairs
    for out in cut_runs(args.out / "draws.jsonl"):
        on_policy.main(replace(args, out=out))
        assert (out / "draws.jsonl").read_bytes() == draws
        assert read_pairs(out / "pairs.jsonl") == pairs


def test_draws_of_other_batches_or_to_other_prompts_are_not_gone_on_with(
    args: on_policy.Args,
) -> None:
    on_policy.main(replace(args, prompts=4))
    with pytest.raises(SystemExit, match=r"another batch \(8, now 12\)"):
        on_policy.main(replace(args, prompts=4, batch=12))
    path = args.out / "draws.jsonl"
    path.write_text(path.read_text().replace("number", "no"))
    with pytest.raises(SystemExit, match="holds draws for other prompts"):
        on_policy.main(replace(args, prompts=4))
