"""Everyday prompts that nobody wrote: an instruction model plays the user, and answers itself.

    python -m training.everyday --out build/everyday
    python -m training.on_policy --policy build/dpo --more build/everyday/demonstrations.jsonl

A policy that is taught to refuse learns by heart which of its training prompts are harmless, and
refuses others like them: it needs more of them than people have written down. A chat model that is
given nothing but the header of the user's turn writes one (Magpie, Xu et al. 2024,
arXiv:2406.08464). Kept are those in which the guard sees no harm at all, with an answer that helps.
Turns are kept as they come, in `turns.jsonl`; a run that was stopped goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from guardrail import Action, Guard, Pair
from training.bases import SMOLLM2
from training.data import normalise, read_examples
from training.ending import ends_in_a_line
from training.eval_sets import like
from training.lm import BASES_FOLDER, LanguageModel, encode_prompt, load_policy
from training.on_policy import REPEATING, whole_sentences
from training.precision import fast_dtype
from training.preference_rows import Demonstration
from training.preferences import read_demonstrations, read_preferences, write_rows
from training.resuming import claim, kept_rows
from training.rollout import greedy, sample, texts
from training.suppression_report import refuses, repetition

_MARK = "Hello"  # any text that a chat template leaves as it is


@dataclass
class Args:
    policy: str = SMOLLM2
    """What plays both sides: an instruction model that refuses little."""
    guard_policy: str = "balanced"
    """What it flags is left out, even if it would deliver it."""
    data: Path = Path("build/preferences")
    """Its held-out prompts, and what is like them, are left out, should one be written again."""
    examples: Path = Path("build/data")
    """So are those of what `training.data build` wrote, which `training.suppression` asks."""
    bases: Path = BASES_FOLDER
    out: Path = Path("build/everyday")
    prompts: int = 1000
    """How many turns to draw; about half is lost to the filters."""
    temperature: float = 0.8
    prompt_tokens: int = 64
    """Longest prompt; one that goes on is left out."""
    new_tokens: int = 64
    """Longest answer; one that goes on is cut after its last whole sentence."""
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """prompt: empty where it did not end; answer: as far as it went"""

    prompt: str
    answer: str


def user_header(lm: LanguageModel) -> list[int]:
    """Token ids of a chat up to where the user's first words would stand."""
    chat = lm.tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    head, found, _ = chat.partition(_MARK)
    if not found or not head:
        raise SystemExit(f"{lm.base}: its chat template has no header of a user's turn")
    ids: list[int] = lm.tokenizer(head, add_special_tokens=False)["input_ids"]
    return ids


def draw_turns(args: Args, lm: LanguageModel, count: int) -> list[Turn]:
    """`count` prompts of the model's own, drawn, with its likeliest answers."""
    drawn = sample(
        lm.model, lm.tokenizer, [user_header(lm)] * count, args.prompt_tokens, args.temperature
    )
    ended = drawn.mask.sum(dim=1) < args.prompt_tokens
    prompts = [
        text if whole else ""
        for text, whole in zip(texts(lm.tokenizer, drawn), ended.tolist(), strict=True)
    ]
    asked = sorted(filter(None, set(prompts)), key=len)
    answers: dict[str, str] = {}
    if asked:
        ids = [encode_prompt(lm.tokenizer, prompt) for prompt in asked]
        replies = texts(lm.tokenizer, greedy(lm.model, lm.tokenizer, ids, args.new_tokens))
        answers = dict(zip(asked, replies, strict=True))
    return [Turn(prompt, answers.get(prompt, "")) for prompt in prompts]


def held_out_prompts(args: Args) -> set[str]:
    """Normalised: those of the policies' and of the guard's validation and test splits."""
    rows = [
        *read_demonstrations(args.data, "validation", "test"),
        *read_preferences(args.data, "validation"),
        *read_preferences(args.data, "test"),
        *read_examples(args.examples, "validation", "test"),
    ]
    return {normalise(row.prompt) for row in rows}


def keep(turns: Sequence[Turn], guard: Guard, held_out: Collection[str]) -> list[Demonstration]:
    """The everyday ones that are answered, each prompt once, none like a held-out one. held_out:
    normalised prompts."""
    held_out = like({key for turn in turns if (key := normalise(turn.prompt))}, held_out)
    found: dict[str, Demonstration] = {}
    for turn in turns:
        key, answer = normalise(turn.prompt), whole_sentences(turn.answer)
        if not key or key in held_out or key in found or not answer:
            continue
        if refuses(answer) or repetition(answer) > REPEATING:
            continue
        verdicts = guard.check_many([Pair(turn.prompt), Pair(turn.prompt, answer)])
        if all(verdict.action is Action.ALLOW for verdict in verdicts):
            found[key] = Demonstration(turn.prompt, answer, "benign", "everyday")
    return list(found.values())


def main(args: Args) -> None:
    guard, held_out = Guard(policy=args.guard_policy), held_out_prompts(args)
    claim(args.out, args)
    lm = load_policy(args.policy, args.bases, merged=True, dtype=fast_dtype())
    path = args.out / "turns.jsonl"
    turns = [Turn(**row) for row in kept_rows(path, args.batch, args.prompts)]
    while len(turns) < args.prompts:
        torch.manual_seed(args.seed * 1_000_003 + len(turns))
        new = draw_turns(args, lm, min(args.batch, args.prompts - len(turns)))
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(t), ensure_ascii=False) + "\n" for t in new)
        turns += new
        print(f"{len(turns)}/{args.prompts} turns", flush=True)
    kept = keep(turns, guard, held_out)
    write_rows(args.out / "demonstrations.jsonl", kept)
    print(f"{args.out}/demonstrations.jsonl: {len(kept)} of {len(turns)} turns kept")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"the turns in {args.out} are kept: the same command goes on from there"):
        main(args)
