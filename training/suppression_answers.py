"""Answers of policies to prompts, kept as they come, with what made them and how fast.

A policy is a base, or the folder of an adapter on it, run by torch in whole batches; or a folder
that `training.export_policy` wrote, run as users run it: by `OnnxChat`, one prompt at a time. What
judges the answers is in `training.suppression`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guardrail._files import sha256_of
from guardrail.errors import ArtifactError
from guardrail.local import OnnxChat, read_policy_manifest
from guardrail.score import BestOf
from guardrail.verdict import Pair
from training.bases import SMOLLM2
from training.lm import BASES_FOLDER, encode_prompt, load_policy, messages
from training.precision import fast_dtype
from training.resuming import kept_rows, remember, weights_of
from training.rollout import greedy, sample, texts
from training.suppression_report import Prompt

_TEMPERATURE = 0.8  # of the draws that the best is chosen from


@dataclass
class AnswerArgs:
    """What decides the answers, and where they are kept."""

    policies: tuple[str, ...] = ("base",)
    """`base`, or `name=folder` of an adapter or of what training.export_policy wrote; `base@4` or
    `name=folder@4` for the best of four answers, by reward minus cost, which needs --reward and
    --cost."""
    base: str = SMOLLM2
    bases: Path = BASES_FOLDER
    reward: Path | None = None
    """A reward model, for best-of-n, and for how helpful answers to everyday prompts are."""
    cost: Path | None = None
    """A cost model, for best-of-n."""
    out: Path = Path("build/suppression")
    tokens: int = 64
    """Longest answer."""
    batch: int = 25
    seed: int = 0


@dataclass(frozen=True)
class Policy:
    """folder: of an adapter or an exported policy, or a base; draws: the best of so many answers, 1
    for the greedy one"""

    name: str
    folder: str
    draws: int = 1

    @property
    def exported(self) -> bool:
        """Whether it runs by ONNX Runtime."""
        return (Path(self.folder) / "model.onnx").exists()


_SPEC = re.compile(r"(?:(?P<name>[^=/@]+)=(?P<folder>[^@]+)|base)(?:@(?P<draws>[1-9]\d*))?")


def policies_of(args: AnswerArgs) -> list[Policy]:
    """What --policies names. SystemExit for what is neither `base` nor `name=folder`, and for two
    of one name."""
    found: dict[str, Policy] = {}
    for spec in args.policies:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise SystemExit(
                f"--policies: {spec!r} is neither base nor name=folder; @4 at its end means the "
                "best of four"
            )
        policy = Policy(
            match["name"] or spec, match["folder"] or args.base, int(match["draws"] or 1)
        )
        if policy.name in found:
            raise SystemExit(f"--policies: two are named {policy.name!r}: rename one")
        if policy.folder == args.base and policy.exported:
            raise SystemExit(
                f"--base {args.base} is an exported policy, and the base has to run by torch, "
                "since it measures perplexity: name the exported one in --policies, name=folder"
            )
        if policy.draws > 1 and (args.reward is None or args.cost is None):
            raise SystemExit(f"{spec}: the best of {policy.draws} needs --reward and --cost")
        found[policy.name] = policy
    return list(found.values())


# --- kept answers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """tokens: that were drawn for it, the one that ends it included."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Answered:
    """The answers to all prompts, in order. tokens_per_second: None where an earlier version kept
    answers without their time."""

    texts: list[str]
    tokens_per_second: float | None


def answers_file(args: AnswerArgs, policy: Policy, prompts: Sequence[Prompt]) -> Path:
    """Where the policy's answers are kept, with what makes them beside. SystemExit where answers
    are there that something else has made."""
    path = args.out / f"{policy.name}.jsonl"
    origin = path.with_name(f"{path.name}.origin.json")
    made_by: dict[str, Any] = {
        "policy": made_of(policy, args.base),
        "tokens": args.tokens,
        "batch": args.batch,
        "prompts": hashlib.sha256("\0".join(p.text for p in prompts).encode()).hexdigest(),
        "draws": policy.draws,
    }
    if policy.draws > 1:
        made_by |= {"seed": args.seed, "temperature": _TEMPERATURE}
        for name, folder in (("reward", args.reward), ("cost", args.cost)):
            assert folder is not None  # policies_of has asked for both
            made_by[name] = sha256_of(folder / "manifest.json")
    if not path.exists():
        origin.unlink(missing_ok=True)
    elif not origin.exists():
        raise SystemExit(
            f"{path} holds answers, and nothing says what made them: remove it, or choose another "
            "--out"
        )
    remember(origin, made_by, beside=str(path))
    return path


def made_of(policy: Policy, base: str) -> str:
    """What tells its weights from others in the same place. SystemExit where nothing is there, and
    for an exported policy that is not whole: its manifest has the hashes of its files."""
    if not policy.exported:
        if policy.folder != base and not Path(policy.folder).is_dir():
            raise SystemExit(f"{policy.name}: {policy.folder}: no such folder: train it first")
        return weights_of(policy.folder)
    folder = Path(policy.folder)
    try:
        read_policy_manifest(folder)
    except ArtifactError as error:
        raise SystemExit(f"{policy.name}: {error}") from error
    return f"manifest.json@sha256:{sha256_of(folder / 'manifest.json')}"


def answer_all(args: AnswerArgs, policy: Policy, prompts: Sequence[Prompt]) -> Answered:
    """The policy's answers; whole batches of an earlier, stopped run are kept, each row with its
    share of its batch's seconds. What a batch draws depends on seed and place alone, so that
    answers are those of a run in one go."""
    path = answers_file(args, policy, prompts)
    asked = sorted((prompt.text for prompt in prompts), key=len)
    rows = kept_rows(path, args.batch, len(asked))
    if len(rows) < len(asked):
        answer = opened(args, policy)
        for first in range(len(rows), len(asked), args.batch):
            part = asked[first : first + args.batch]
            started = time.perf_counter()
            answers = answer(part, first)
            seconds = round((time.perf_counter() - started) / len(part), 6)
            made = [
                {"prompt": prompt, "answer": a.text, "tokens": a.tokens, "seconds": seconds}
                for prompt, a in zip(part, answers, strict=True)
            ]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            rows += made
            speed = tokens_per_second(made) or 0
            print(f"{policy.name}: {len(rows)}/{len(asked)}, {speed:.1f} tokens/s", flush=True)
    said = {row["prompt"]: row["answer"] for row in rows}
    return Answered([said[prompt.text] for prompt in prompts], tokens_per_second(rows))


def tokens_per_second(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of kept answers: tokens of the answers that were given (of a best-of-n's draws, the chosen
    one) in the time that making them took, the choice included."""
    if not rows or any("seconds" not in row for row in rows):
        return None
    seconds = sum(row["seconds"] for row in rows)
    return float(sum(row["tokens"] for row in rows) / seconds) if seconds else None


# --- drawing -------------------------------------------------------------------------------------

Draw = Callable[[Sequence[str], int], list[Answer]]
"""Answers to the prompts of a batch, given the place of its first among all; `draws` to each, in a
row, before the best is chosen."""


def opened(args: AnswerArgs, policy: Policy) -> Draw:
    """What answers as the policy does, its model in memory."""
    draw = onnx_draw(args, policy) if policy.exported else torch_draw(args, policy)
    if policy.draws == 1:
        return draw
    assert args.reward is not None  # policies_of has asked for both
    assert args.cost is not None
    ranker = BestOf(args.reward, args.cost)
    return lambda prompts, first: best_of(ranker, prompts, draw(prompts, first))


def torch_draw(args: AnswerArgs, policy: Policy) -> Draw:
    lm = load_policy(policy.folder, args.bases, merged=True, dtype=fast_dtype())

    def draw(prompts: Sequence[str], first: int) -> list[Answer]:
        torch.manual_seed(args.seed * 1_000_003 + first)
        rows = [prompt for prompt in prompts for _ in range(policy.draws)]
        ids = [encode_prompt(lm.tokenizer, prompt) for prompt in rows]
        if policy.draws == 1:
            made = greedy(lm.model, lm.tokenizer, ids, args.tokens)
        else:
            made = sample(lm.model, lm.tokenizer, ids, args.tokens, _TEMPERATURE)
        said, lengths = texts(lm.tokenizer, made), made.mask.sum(dim=1).int().tolist()
        return [Answer(text, length) for text, length in zip(said, lengths, strict=True)]

    return draw


def onnx_draw(args: AnswerArgs, policy: Policy) -> Draw:
    chat = OnnxChat(
        policy.folder,
        temperature=0.0 if policy.draws == 1 else _TEMPERATURE,
        seed=args.seed,
        max_new_tokens=args.tokens,
        threads=torch.get_num_threads(),  # as many as the policies that it is compared with
    )

    def one(prompt: str, number: int) -> Answer:
        reply = chat.redrawn(number).complete(messages(prompt))
        if reply.finish_reason == "length":
            tokens = args.tokens
        else:  # it gives text, not tokens, so they are counted anew
            tokens = len(chat.encoder.tokenizer.encode(reply.text, add_special_tokens=False)) + 1
        return Answer(reply.text.strip(), tokens)

    def draw(prompts: Sequence[str], first: int) -> list[Answer]:
        rows = [prompt for prompt in prompts for _ in range(policy.draws)]
        # Numbered through the run, so that no two answers are drawn from one seed.
        return [one(prompt, first * policy.draws + i) for i, prompt in enumerate(rows)]

    return draw


def best_of(ranker: BestOf, prompts: Sequence[str], answers: Sequence[Answer]) -> list[Answer]:
    """Of each prompt's answers, which stand in a row, the one with most reward minus cost."""
    draws = len(answers) // len(prompts)
    pairs = [Pair(prompts[i // draws], answer.text) for i, answer in enumerate(answers)]
    best = np.reshape(ranker.scores(pairs), (len(prompts), draws)).argmax(axis=1)
    return [answers[i * draws + int(b)] for i, b in enumerate(best)]
