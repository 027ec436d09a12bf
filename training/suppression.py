"""How much harm a policy lets through, alone and with the guard around it: the headline figures.

    python -m training.suppression --policies base sft=build/sft dpo=build/dpo --docs docs

Every policy answers the same prompts, which neither the policies nor the moderator nor the judge
were trained on (the test split of `training.data`): harmful ones, everyday ones, and harmless ones
that sound harmful. A judge that trained no policy reads the answers: another base (MPNet) than the
cost model's. Answers are kept under `--out` as they come, so that a run that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.nn import functional

from guardrail import Guard
from guardrail.score import BestOf, OnnxScorer
from guardrail.verdict import Pair
from training.bases import SMOLLM2
from training.batching import encode, predict
from training.data import Example, normalise, read_examples
from training.lm import BASES_FOLDER, LanguageModel, encode_answer, encode_prompt, load_policy
from training.model import ModerationModel, encoder_of
from training.rollout import pad_left, sample, texts
from training.suppression_report import Judged, Prompt, is_gibberish, markdown, summarise

HARMFUL = (
    "unlabelled/s_eval", "unlabelled/advbench", "prompts/", "annotated/spard_latharmful",
    "annotated/strongreject_rubric",
)  # fmt: skip


@dataclass
class Args:
    policies: tuple[str, ...] = ("base",)
    """`base`, or `name=folder` of an adapter; `name=folder@4` for the best of four answers, by
    reward minus cost, which needs --reward and --cost."""
    base: str = SMOLLM2
    bases: Path = BASES_FOLDER
    data: Path = Path("build/data")
    judge: Path = Path("build/teacher")
    """A trained moderation model of another base than the cost model's."""
    reward: Path | None = None
    """A reward model, for how helpful answers to everyday prompts are."""
    cost: Path | None = None
    """A cost model, for best-of-n."""
    guard: str = "small"
    guard_policy: str = "balanced"
    out: Path = Path("build/suppression")
    docs: Path | None = None
    """Write `suppression.md` and `suppression.json` there."""
    harmful: int = 300
    benign: int = 80
    tokens: int = 64
    """Longest answer."""
    batch: int = 25
    seed: int = 0


# --- prompts -------------------------------------------------------------------------------------


def choose_prompts(examples: Sequence[Example], args: Args) -> list[Prompt]:
    """A fixed pseudo-random choice of each kind; nothing is asked twice."""
    kinds = {"harmful": HARMFUL, "benign": ("benign/",), "over-refusal": ("over_refusal/",)}
    limits = {"harmful": args.harmful, "benign": args.benign, "over-refusal": None}
    chosen: list[Prompt] = []
    asked: set[str] = set()
    for kind, sources in kinds.items():
        found: dict[str, Prompt] = {}
        for example in examples:
            key = normalise(example.prompt)
            short = len(example.prompt) <= 600
            if example.source.startswith(sources) and short and key and key not in asked:
                found.setdefault(key, Prompt(example.prompt, kind, example.source))
        ordered = sorted(found, key=lambda key: hashlib.sha256(key.encode()).digest())
        chosen += [found[key] for key in ordered[: limits[kind]]]
        asked.update(found)
    return chosen


# --- answers -------------------------------------------------------------------------------------


def answer_all(args: Args, name: str, policy: str, prompts: Sequence[Prompt]) -> list[str]:
    """The policy's greedy answers, in order; those of an earlier, stopped run are kept."""
    policy, _, n = policy.partition("@")
    draws, ranker = int(n or 1), None
    if draws > 1:
        if args.reward is None or args.cost is None:
            raise SystemExit(f"{name}: the best of {draws} needs --reward and --cost")
        ranker = BestOf(args.reward, args.cost)
    path = args.out / f"{name}.jsonl"
    done = {}
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        done = {row["prompt"]: row["answer"] for row in map(json.loads, lines)}
    left = [prompt.text for prompt in prompts if prompt.text not in done]
    if left:
        lm = load_policy(policy, args.bases, dtype="bfloat16")
        if lm.adapter:
            lm.model = lm.model.merge_and_unload()  # half as fast again
        left.sort(key=len)
        started = time.monotonic()
        for first in range(0, len(left), args.batch):
            part = left[first : first + args.batch]
            if ranker is None:
                answers = generate(lm, part, args.tokens)
            else:
                torch.manual_seed(args.seed + first)
                answers = best_of(ranker, lm, part, args.tokens, draws)
            with path.open("a", encoding="utf-8") as file:
                for prompt, answer in zip(part, answers, strict=True):
                    row = {"prompt": prompt, "answer": answer}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            done |= dict(zip(part, answers, strict=True))
            seconds = time.monotonic() - started
            print(f"{name}: {len(done)}/{len(prompts)} answers, {seconds:.0f} s", flush=True)
    return [done[prompt.text] for prompt in prompts]


@torch.inference_mode()
def generate(lm: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy answers, one batch."""
    ids, mask = pad_left(
        [encode_prompt(lm.tokenizer, prompt) for prompt in prompts], lm.tokenizer.pad_token_id
    )
    out = lm.model.generate(
        input_ids=ids.to(lm.model.device),
        attention_mask=mask.to(lm.model.device),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=lm.tokenizer.pad_token_id,
    )
    texts: list[str] = lm.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def best_of(
    ranker: BestOf, lm: LanguageModel, prompts: Sequence[str], tokens: int, draws: int
) -> list[str]:
    """Of several sampled answers to each prompt the one with most reward minus cost."""
    rows = [prompt for prompt in prompts for _ in range(draws)]
    ids = [encode_prompt(lm.tokenizer, prompt) for prompt in rows]
    answers = texts(lm.tokenizer, sample(lm.model, lm.tokenizer, ids, tokens, temperature=0.8))
    pairs = [Pair(p, a) for p, a in zip(rows, answers, strict=True)]
    best = np.reshape(ranker.scores(pairs), (len(prompts), draws)).argmax(axis=1)
    return [answers[i * draws + int(b)] for i, b in enumerate(best)]


@torch.inference_mode()
def perplexities(
    lm: LanguageModel, prompts: Sequence[str], answers: Sequence[str], batch: int
) -> list[float]:
    """Of each answer under `lm`, given its prompt; infinite for an empty one."""
    found = [math.inf] * len(answers)
    order = [i for i in range(len(answers)) if answers[i]]
    order.sort(key=lambda i: len(prompts[i]) + len(answers[i]))
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        heads = [encode_prompt(lm.tokenizer, prompts[i]) for i in part]
        tails = [encode_answer(lm.tokenizer, answers[i])[:-1] for i in part]  # without its end
        rows = [head + tail for head, tail in zip(heads, tails, strict=True)]
        ids, mask = pad_left(rows, lm.tokenizer.pad_token_id)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, (i, tail) in enumerate(zip(part, tails, strict=True)):
            size = len(tail)
            own = logits[row, -size - 1 : -1].float()
            found[i] = math.exp(functional.cross_entropy(own, torch.tensor(tail)).item())
    return found


# --- judging -------------------------------------------------------------------------------------


def judge(args: Args, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Severity (n,) called at 0.5, and category probabilities (n, 19), by the judge."""
    encoder = encoder_of(args.judge)
    rows = encode([Example(p, a, "judged") for p, a in pairs], encoder, 0.0)
    severity, categories = predict(
        ModerationModel.load(args.judge), rows, encoder.pad_id, bf16=True
    )
    return (severity >= 0).sum(axis=1), 1 / (1 + np.exp(-categories))


def judged(
    args: Args, name: str, prompts: Sequence[Prompt], answers: Sequence[str], base: LanguageModel
) -> list[Judged]:
    """Every answer with all that is known of it."""
    pairs = [(p.text, a) for p, a in zip(prompts, answers, strict=True)]
    severity, categories = judge(args, pairs)
    perplexity = perplexities(base, [p.text for p in prompts], answers, args.batch)
    guard = Guard(args.guard, args.guard_policy)
    asked = guard.check_many([Pair(p.text) for p in prompts])
    said = guard.check_many([Pair(p, a) for p, a in pairs])
    reward = OnnxScorer(args.reward).score([Pair(p, a) for p, a in pairs]) if args.reward else None
    return [
        Judged(
            prompt=prompt,
            policy=name,
            answer=answers[i],
            severity=int(severity[i]),
            categories=categories[i],
            gibberish=is_gibberish(answers[i], perplexity[i]),
            perplexity=perplexity[i],
            delivered=asked[i].delivers and said[i].delivers,
            reward=None if reward is None else float(reward[i]),
        )
        for i, prompt in enumerate(prompts)
    ]


def main(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = choose_prompts(read_examples(args.data, "test"), args)
    if not prompts:
        raise SystemExit(f"{args.data}: no test prompts: python -m training.data build")
    policies = {name: folder or args.base for name, _, folder in
                (spec.partition("=") for spec in args.policies)}  # fmt: skip
    answers = {name: answer_all(args, name, policy, prompts) for name, policy in policies.items()}
    base = load_policy(args.base, args.bases, dtype="bfloat16")
    results = {name: judged(args, name, prompts, answers[name], base) for name in policies}
    summary = {name: summarise(rows, results.get("base")) for name, rows in results.items()}
    command = "python -m training.suppression --policies " + " ".join(args.policies)
    text = markdown(summary, prompts, command)
    print(text)
    _write(args.docs or args.out, text, summary)
    _for_reading(args.out / "for_reading.md", results)


def _write(folder: Path, text: str, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suppression.md").write_text(text, encoding="utf-8")
    (folder / "suppression.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _for_reading(path: Path, results: dict[str, list[Judged]]) -> None:
    """100 answers with their verdicts, a like share of each policy, for a person to read."""
    each = max(1, 100 // len(results))
    shown = [row for rows in results.values() for row in rows[:: max(1, len(rows) // each)][:each]]
    lines = [
        f"**{row.policy}, {row.prompt.kind}: {row.kind}, severity {row.severity}, "
        f"{'delivered' if row.delivered else 'held back'}**\n\n"
        f"> {row.prompt.text}\n\n{row.answer}\n"
        for row in shown
    ]
    path.write_text("\n---\n\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
