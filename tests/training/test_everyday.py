"""Everyday prompts of a model's own: what is kept of them, and a run that was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_policy  # noqa: E402
import tiny_preferences  # noqa: E402

from guardrail import Guard  # noqa: E402
from training import everyday, on_policy  # noqa: E402
from training.everyday import Turn, keep, user_header  # noqa: E402
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


def test_the_user_is_played_from_the_header_of_its_turn(tmp_path: Path) -> None:
    lm = load_policy(str(tiny_policy.llama(tmp_path / "base")), tmp_path)
    assert lm.tokenizer.decode(user_header(lm)).split() == ["<|im_start|>", "user"]


def test_a_template_without_a_users_turn_is_refused(tmp_path: Path) -> None:
    lm = load_policy(str(tiny_policy.llama(tmp_path / "base")), tmp_path)
    lm.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(SystemExit, match="no header of a user's turn"):
        user_header(lm)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> everyday.Args:
    """Of a run of 12 turns, four of them in a batch."""
    base = tiny_policy.llama(tmp_path / "base")
    tiny_preferences.write(tmp_path / "data")
    # A tiny model ends no sentence, and says anything again and again.
    monkeypatch.setattr(everyday, "whole_sentences", str.strip)
    monkeypatch.setattr(everyday, "REPEATING", 1.0)
    return everyday.Args(
        policy=str(base), data=tmp_path / "data", bases=tmp_path, out=tmp_path / "whole",
        prompts=12, new_tokens=6, batch=4,
    )  # fmt: skip


def test_a_stopped_run_goes_on_to_the_same_turns(args: everyday.Args) -> None:
    everyday.main(args)
    turns = (args.out / "turns.jsonl").read_bytes()
    lines = turns.splitlines(keepends=True)
    assert len(lines) == 12
    shown = read_shown(args.out / "demonstrations.jsonl")
    for name, left in (("between", lines[:4]), ("within", [*lines[:6], lines[6][:20]])):
        out = args.out.with_name(name)
        out.mkdir()
        (out / "turns.jsonl").write_bytes(b"".join(left))
        everyday.main(replace(args, out=out))
        assert (out / "turns.jsonl").read_bytes() == turns
        assert read_shown(out / "demonstrations.jsonl") == shown


def test_the_policy_is_asked_the_everyday_prompts_that_are_given(
    tmp_path: Path, args: everyday.Args
) -> None:
    more = tmp_path / "more.jsonl"
    rows = [
        {"prompt": f"how is cake {n} ?", "answer": "sugar", "kind": "benign", "source": "everyday"}
        for n in range(200)
    ]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cost = tiny_policy.scorer(tmp_path / "cost", "cost")
    asked = on_policy.Args(
        policy=args.policy, cost=cost, data=args.data, bases=tmp_path, out=tmp_path / "drawn",
        more=more, prompts=8, draws=2, new_tokens=8, batch=8,
    )  # fmt: skip
    on_policy.main(asked)
    drawn = (tmp_path / "drawn" / "draws.jsonl").read_text(encoding="utf-8").splitlines()
    everyday_ones = [r["prompt"] for line in drawn for r in json.loads(line) if not r["harmful"]]
    assert everyday_ones
    assert set(everyday_ones) <= {row["prompt"] for row in rows}


def test_further_demonstrations_that_are_missing_are_named(args: everyday.Args) -> None:
    with pytest.raises(SystemExit, match=r"none\.jsonl is missing"):
        on_policy.main(on_policy.Args(more=args.out / "none.jsonl"))
