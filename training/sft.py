"""Supervised fine-tuning: refusals and safe directions where harm is asked for, help elsewhere.

    python -m training.sft --out build/sft
    accelerate launch --config_file training/configs/fsdp.yaml -m training.sft \\
        --policy meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16 --out build/sft-8b

LoRA on the base; the loss is on the answer's tokens alone. Demonstrations come from
`training.preferences build`. Resumes from its last checkpoint; `summary.json` is written last.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from training.ending import ends_in_a_line
from training.lm import encode_answer, encode_prompt
from training.preferences import Demonstration, Kind, read_demonstrations
from training.resuming import claim, refuse_below_one, remember_rows
from training.tuning import (
    TuningArgs,
    Watched,
    config_fields,
    epochs_of,
    finish,
    open_policy,
    rows_per_update,
    train,
)


def _shares() -> dict[Kind, int]:
    return {"refusal": 900, "redirect": 300, "borderline": 500, "benign": 600}


@dataclass(kw_only=True)
class Args(TuningArgs):
    out: Path = Path("build/sft")
    rows: dict[Kind, int] = field(default_factory=_shares)
    """How many demonstrations of each kind."""


class Trainer(Watched, SFTTrainer):
    """TRL's, watched."""


def choose(demonstrations: Sequence[Demonstration], args: Args) -> list[Demonstration]:
    """So many of each kind, short ones apart: a fixed pseudo-random choice, prompts not twice
    before each was once."""

    def place(d: Demonstration) -> bytes:
        return hashlib.sha256(f"{args.seed}\0{d.prompt}\0{d.answer}".encode()).digest()

    chosen: list[Demonstration] = []
    for kind, count in args.rows.items():
        seen: Counter[str] = Counter()
        ranked: list[tuple[int, Demonstration]] = []
        for d in sorted((d for d in demonstrations if d.kind == kind), key=place):
            ranked.append((seen[d.prompt], d))
            seen[d.prompt] += 1
        ranked.sort(key=lambda pair: pair[0])
        chosen += [d for _, d in ranked[:count]]
    chosen.sort(key=place)
    return chosen[: args.limit]


def encode(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """`input_ids`, and `labels` that leave out the prompt (-100)."""
    rows = []
    for d in demonstrations:
        prompt, answer = encode_prompt(tokenizer, d.prompt), encode_answer(tokenizer, d.answer)
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def fitting(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> list[Demonstration]:
    """Those whose rendered chat has at most `tokens` tokens: an answer cut short has no end."""
    return [
        d
        for d in demonstrations
        if len(d.prompt) + len(d.answer) < 8 * tokens  # spares tokenising what cannot fit
        and len(encode_prompt(tokenizer, d.prompt)) + len(encode_answer(tokenizer, d.answer))
        <= tokens
    ]


def main(args: Args) -> None:
    refuse_below_one(args)
    lm = open_policy(args)
    demonstrations = read_demonstrations(args.data, "train")
    chosen = choose(fitting(demonstrations, lm.tokenizer, args.max_tokens), args)
    if not chosen:
        raise SystemExit(f"{args.data}: no demonstration fits in {args.max_tokens} tokens")
    claim(args.out, args, rows_per_update=rows_per_update(args))
    rows = encode(chosen, lm.tokenizer)
    remember_rows(args.out, rows)
    order = epochs_of([len(row["input_ids"]) for row in rows], args)
    tokens = sum(len(rows[i]["input_ids"]) for i in order)
    print(f"{len(chosen)} demonstrations, {tokens} tokens in {args.epochs} epochs", flush=True)
    steps = len(order) // rows_per_update(args)
    trainer = Trainer(
        model=lm.model,
        args=SFTConfig(**config_fields(args, args.out, steps), shuffle_dataset=False),
        train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=lm.tokenizer,
    )
    train(trainer, args.out)
    finish(trainer, lm, args, args.out, Counter(d.kind for d in chosen))


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"{args.out} keeps the last checkpoint: the same command goes on from it"):
        main(args)
    PartialState().destroy_process_group()  # else its threads may abort the exit
