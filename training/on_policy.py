"""Preferences between a policy's own answers: sample it, judge, choose.

    python -m training.on_policy --policy build/sft --out build/on_policy
    python -m training.dpo --policy build/sft --extra build/on_policy/pairs.jsonl

Pairs that others wrote teach a policy about answers that it never gives; its own show it where it
goes wrong: a harmful prompt answered, an everyday one refused. The cost model says what is harmful,
not the judge of `training.suppression`, whose labels it has learnt from. Draws are kept as they
come, in `draws.jsonl`; a run that was stopped goes on there.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from guardrail.verdict import Pair
from training.ending import ends_in_a_line
from training.lm import BASES_FOLDER, LanguageModel, encode_prompt, load_policy
from training.precision import fast_dtype
from training.preference_rows import Demonstration, Preference
from training.preferences import read_demonstrations, read_shown, write_rows
from training.resuming import claim, kept_rows, manifest_of, refuse_below_one
from training.rollout import EndlessPrompts, rollout_prompts, sample, texts
from training.scorers import Scorer, open_scorer, refuse_wrong_sign
from training.suppression_report import refuses, repetition

REPEATING = 0.3  # share of an answer's four-word runs that were there before


@dataclass
class Args:
    policy: str = "build/sft"
    cost: Path = Path("build/cost")
    """The score model that says which answers are unsafe (cost > 0)."""
    data: Path = Path("build/preferences")
    more: Path | None = None
    """Further demonstrations, such as `training.everyday`'s: their prompts are the everyday ones,
    instead of those of `data`, which a policy may have learnt by heart."""
    bases: Path = BASES_FOLDER
    out: Path = Path("build/on_policy")
    prompts: int = 600
    harmful_share: float = 0.5
    draws: int = 3
    """Answers per prompt."""
    temperature: float = 0.8
    new_tokens: int = 64
    prompt_tokens: int = 96
    margin: float = 0.5
    """A safe answer costs at most minus this, an unsafe one at least this."""
    batch: int = 48
    seed: int = 0


@dataclass(frozen=True)
class Draw:
    """One answer of the policy, and its cost."""

    prompt: str
    harmful: bool
    answer: str
    cost: float


def whole_sentences(answer: str) -> str:
    """Without what follows the last end of a sentence: an answer cut short would teach to stop
    there. Empty where no sentence ends."""
    found = re.match(r".*[.!?][\"')\]]*(?=\s|$)", answer.strip(), re.DOTALL)
    return found.group() if found else ""


def choose(
    draws: Sequence[Draw],
    demonstrations: Sequence[Demonstration],
    margin: float,
    rng: random.Random,
) -> Preference | None:
    """What the draws of one prompt teach. A harmful prompt: its safest answer before its most
    harmful one. An everyday prompt: an answer before a refusal; one that is only borderline
    teaches nothing, for a refusal may be right there. The better side is taken from
    `demonstrations` (of this prompt; refusals, of any) where no draw will do."""
    prompt, harmful = draws[0].prompt, draws[0].harmful
    if not harmful and any(d.prompt == prompt and d.kind != "benign" for d in demonstrations):
        return None
    coherent = [d for d in draws if d.answer and repetition(d.answer) <= REPEATING]
    safe = sorted((d for d in coherent if d.cost <= -margin), key=lambda d: d.cost)
    own = [d.answer for d in demonstrations if d.prompt == prompt]
    if harmful:
        wrong = [d for d in draws if d.answer and d.cost >= margin]
        right = [d.answer for d in safe] or own
        refusals = [d.answer for d in demonstrations if d.kind == "refusal"]
        if not right and refusals:
            right = [rng.choice(refusals)]
    else:
        wrong = [d for d in draws if refuses(d.answer)]
        right = [d.answer for d in safe if not refuses(d.answer)] or own
    if not wrong or not right:
        return None
    worst = max(wrong, key=lambda d: d.cost)
    return Preference(
        prompt=prompt,
        answers=(right[0], worst.answer),
        source=f"on-policy/{'harmful' if harmful else 'everyday'}",
        more_helpful=None if harmful else 0,
        less_harmful=0 if harmful else None,
        unsafe=(False, harmful),
    )


def prompts_of(
    args: Args, lm: LanguageModel, more: Sequence[Demonstration]
) -> list[tuple[str, bool]]:
    """What to ask, and whether it is harmful; the everyday ones are those of `more` if there are.
    Prompts of like lengths stand together."""
    harmful, benign = rollout_prompts(args.data, lm.tokenizer, args.prompt_tokens)
    new = sorted({d.prompt for d in more} - {*harmful, *benign})
    new = [p for p in new if len(encode_prompt(lm.tokenizer, p)) <= args.prompt_tokens]
    benign = new or benign
    pool = EndlessPrompts(harmful, benign, args.harmful_share, args.seed)
    asked = pool.batch(0, min(args.prompts, 2 * len(harmful), 2 * len(benign)))
    return sorted(asked, key=lambda row: len(row[0]))


def draw_batch(
    args: Args, lm: LanguageModel, cost: Scorer, prompts: Sequence[tuple[str, bool]]
) -> list[list[Draw]]:
    """`args.draws` answers to each of the prompts, and their costs."""
    rows = [row for row in prompts for _ in range(args.draws)]
    ids = [encode_prompt(lm.tokenizer, prompt) for prompt, _ in rows]
    drawn = sample(lm.model, lm.tokenizer, ids, args.new_tokens, args.temperature)
    answers = [whole_sentences(text) for text in texts(lm.tokenizer, drawn)]
    costs = cost.score([Pair(p, a) for (p, _), a in zip(rows, answers, strict=True)])
    draws = [
        Draw(prompt, harmful, answer, round(float(value), 3))
        for (prompt, harmful), answer, value in zip(rows, answers, costs, strict=True)
    ]
    return [draws[i : i + args.draws] for i in range(0, len(draws), args.draws)]


def draw_all(
    args: Args, lm: LanguageModel, cost: Scorer, more: Sequence[Demonstration]
) -> list[list[Draw]]:
    """The draws of each prompt; whole batches of an earlier, stopped run are kept. The randomness
    of a batch depends on seed and place alone, so that the draws are those of a run in one go."""
    asked = prompts_of(args, lm, more)
    claim(args.out, args, {"cost_model": manifest_of(args.cost)})
    path = args.out / "draws.jsonl"
    size, started = max(1, args.batch // args.draws), time.monotonic()
    found = [[Draw(**row) for row in group] for group in kept_rows(path, size, len(asked))]
    if [group[0].prompt for group in found] != [prompt for prompt, _ in asked[: len(found)]]:
        raise SystemExit(
            f"{path} holds draws for other prompts: {args.data} has changed since the run began. "
            f"Put it back, remove {args.out}, or choose another --out"
        )
    for first in range(len(found), len(asked), size):
        torch.manual_seed(args.seed * 1_000_003 + first)
        groups = draw_batch(args, lm, cost, asked[first : first + size])
        with path.open("a", encoding="utf-8") as file:
            for group in groups:
                file.write(json.dumps([asdict(d) for d in group], ensure_ascii=False) + "\n")
        found += groups
        spent = time.monotonic() - started
        print(f"{len(found)}/{len(asked)} prompts, {spent:.0f} s", flush=True)
    return found


def main(args: Args) -> None:
    refuse_below_one(args)
    more = read_shown(args.more) if args.more else []
    if args.more and not more:
        raise SystemExit(f"{args.more} holds no demonstrations: leave --more out")
    cost = open_scorer(args.cost, "cost")
    refuse_wrong_sign(cost, args.cost)  # a flipped one would choose the harmful answers
    lm = load_policy(args.policy, args.bases, merged=True, dtype=fast_dtype())
    rng = random.Random(args.seed)
    groups = draw_all(args, lm, cost, more)
    demonstrations = [*read_demonstrations(args.data, "train"), *more]
    chosen = [p for g in groups if (p := choose(g, demonstrations, args.margin, rng))]
    write_rows(args.out / "pairs.jsonl", chosen)
    drawn = [d for group in groups for d in group]
    bad = [d for d in drawn if d.harmful]
    everyday = [d for d in drawn if not d.harmful]
    print(
        f"{args.out}/pairs.jsonl: {dict(Counter(p.source for p in chosen))}; of the draws "
        f"{sum(d.cost > 0 for d in bad)}/{len(bad)} on harmful prompts cost more than 0, "
        f"{sum(refuses(d.answer) for d in everyday)}/{len(everyday)} on everyday ones refuse"
    )


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"the draws in {args.out} are kept: the same command goes on from there"):
        main(args)
