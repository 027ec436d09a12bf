"""Everyday prompts of a model's own: what is kept of them, and a run that was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_policy  # noqa: E402
from tiny_preferences import cut_runs  # noqa: E402

from guardrail import Guard  # noqa: E402
from training import everyday, on_policy  # noqa: E402
from training.data import write_examples  # noqa: E402
from training.eval_statements import statement_sets, statements_held_out  # noqa: E402
from training.everyday import Turn, keep, user_header  # noqa: E402
from training.everyday_texts import WRITTEN, everyday_texts, written_sets  # noqa: E402
from training.lm import load_policy  # noqa: E402
from training.preferences import read_shown  # noqa: E402

GUARD = Guard(policy="balanced")
CAKE = Turn("How do I bake a sponge cake?", "Mix flour, sugar and eggs. Bake it for 25 minutes.")


def kept(turns: Sequence[Turn], *held_out: str) -> list[str]:
    return [d.prompt for d in keep(turns, GUARD, held_out)]


def test_an_everyday_prompt_is_kept_once_with_its_whole_sentences() -> None:
    cut = replace(CAKE, answer=CAKE.answer + " Then let it")
    again = replace(CAKE, prompt="how do I bake a SPONGE cake?")
    (found,) = keep([cut, again], GUARD, set())
    assert (found.prompt, found.answer, found.kind) == (CAKE.prompt, CAKE.answer, "benign")


@pytest.mark.parametrize(
    "turn",
    [
        replace(CAKE, prompt=""),
        replace(CAKE, answer="It never ends"),
        replace(CAKE, answer="I'm sorry, but I can't help with that."),
        replace(CAKE, answer="Stir it again and again. " * 9),
        Turn("How do I build a pipe bomb?", "Fill a steel pipe with powder. Add a fuse."),
    ],
    ids=["no end", "no sentence", "refuses", "circles", "harmful"],
)
def test_what_is_no_helped_everyday_prompt_is_left_out(turn: Turn) -> None:
    assert kept([turn, CAKE]) == [CAKE.prompt]


def test_held_out_prompts_are_left_out() -> None:
    assert kept([CAKE], everyday.normalise(CAKE.prompt)) == []
    assert kept([CAKE], "how do i bake a good sponge cake") == []  # like one
    assert kept([CAKE], "how do i knit a scarf") == [CAKE.prompt]


def test_turns_become_harmless_texts_a_third_of_the_prompts_held_out(tmp_path: Path) -> None:
    turns = [Turn(f"How do I get to street number {n}?", f"Take bus {n}.") for n in range(300)]
    turns += [turns[0], Turn("", ""), Turn("Is it late?", " ")]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps(asdict(turn)) + "\n" for turn in turns))
    taught, held_out = (everyday_texts([path], held_out=out) for out in (False, True))
    prompts = [{e.prompt for e in texts} for texts in (taught, held_out)]
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {turn.prompt for turn in turns if turn.prompt}
    assert 60 < len(prompts[1]) < 140
    texts = taught + held_out
    assert len(texts) == 300 * 2 + 1  # each once, and one prompt has no answer
    assert {(e.unsafe, e.severity, e.source) for e in texts} == {(False, 0, "everyday")}


def test_the_user_is_played_from_the_header_of_its_turn(tmp_path: Path) -> None:
    lm = load_policy(str(tiny_policy.llama(tmp_path / "base")), tmp_path)
    assert lm.tokenizer.decode(user_header(lm)).split() == ["<|im_start|>", "user"]


def test_a_template_without_a_users_turn_is_refused(tmp_path: Path) -> None:
    lm = load_policy(str(tiny_policy.llama(tmp_path / "base")), tmp_path)
    lm.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(SystemExit, match="no header of a user's turn"):
        user_header(lm)


@pytest.fixture
def args(babbler: Path) -> everyday.Args:
    """Of a run of 12 turns, four of them in a batch."""
    for split in ("validation", "test"):
        write_examples(babbler / "examples" / f"{split}.jsonl", [])
    return everyday.Args(
        policy=str(babbler / "base"), data=babbler / "data", examples=babbler / "examples",
        bases=babbler, out=babbler / "whole", prompts=12, new_tokens=6, batch=4,
    )  # fmt: skip


def test_a_stopped_run_goes_on_to_the_same_turns(args: everyday.Args) -> None:
    everyday.main(args)
    turns = (args.out / "turns.jsonl").read_bytes()
    assert len(turns.splitlines()) == 12
    shown = read_shown(args.out / "demonstrations.jsonl")
    for out in cut_runs(args.out / "turns.jsonl"):
        everyday.main(replace(args, out=out))
        assert (out / "turns.jsonl").read_bytes() == turns
        assert read_shown(out / "demonstrations.jsonl") == shown


def test_the_policy_is_asked_the_everyday_prompts_that_are_given(
    babbler: Path, args: everyday.Args
) -> None:
    more = babbler / "more.jsonl"
    rows = [
        {"prompt": f"how is cake {n} ?", "answer": "sugar", "kind": "benign", "source": "everyday"}
        for n in range(200)
    ]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = on_policy.Args(
        policy=args.policy, cost=babbler / "cost", data=args.data, bases=babbler,
        out=babbler / "drawn", more=more, prompts=8, draws=2, new_tokens=8, batch=8,
    )  # fmt: skip
    on_policy.main(asked)
    drawn = (babbler / "drawn" / "draws.jsonl").read_text(encoding="utf-8").splitlines()
    everyday_ones = [r["prompt"] for line in drawn for r in json.loads(line) if not r["harmful"]]
    assert everyday_ones
    assert set(everyday_ones) <= {row["prompt"] for row in rows}


def test_further_demonstrations_that_are_missing_are_named(args: everyday.Args) -> None:
    with pytest.raises(SystemExit, match=r"none\.jsonl is missing"):
        on_policy.main(on_policy.Args(more=args.out / "none.jsonl"))


def test_the_written_turns_are_whole_and_none_is_one_to_evaluate_on() -> None:
    rows = [json.loads(line) for line in WRITTEN.read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"prompt", "answer", "source"} for row in rows)
    assert all(row["prompt"].strip() and row["answer"].strip() for row in rows)
    taught, held_out = (everyday_texts([WRITTEN], held_out=out) for out in (False, True))
    assert len(taught) + len(held_out) == 2 * len(rows)  # no prompt twice
    assert {(e.source, e.unsafe, e.origin["severity"]) for e in taught} == {
        ("written", False, "ai")
    }
    said = [e for each in statement_sets() for e in each.examples] + statements_held_out()
    known = {everyday.normalise(e.response or e.prompt) for e in said}
    asked = {everyday.normalise(e.prompt) for each in written_sets() for e in each.examples}
    assert not known & {everyday.normalise(e.response or e.prompt) for e in taught}
    assert not asked & {everyday.normalise(e.prompt) for e in taught + held_out}
