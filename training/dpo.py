"""Direct preference optimisation from dual preferences, or from a single one as the baseline.

    python -m training.dpo --policy build/sft --out build/dpo
    python -m training.dpo --policy build/sft --preference single --out build/dpo-single

TRL's DPO (Rafailov et al. 2023) on LoRA. `dual` prefers the safe answer to the unsafe one, and of
two safe ones the more helpful; `helpful`, `harmless` and `single` (one trade-off label, see
`training.preferences`) take that label alone. Help on harmless prompts, preferred to refusals
there, keeps a policy from refusing everything. The reference is the policy that it starts from, its
log-probabilities computed once. Resumes; `summary.json` is written last.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from training.ending import ends_in_a_line
from training.lm import LanguageModel, encode_answer, encode_prompt, messages
from training.losses import dpo_loss
from training.preferences import (
    Demonstration,
    Preference,
    help_pairs,
    read_demonstrations,
    read_pairs,
    read_preferences,
    refuse_flipped,
    refuses,
)
from training.resuming import claim, refuse_below_one, remember_rows
from training.rollout import answer_logprobs, given
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

Objective = Literal["dual", "helpful", "harmless", "single"]


@dataclass(kw_only=True)
class Args(TuningArgs):
    out: Path = Path("build/dpo")
    policy: str = "build/sft"
    preference: Objective = "dual"
    pairs: int = 1000
    """How many pairs, annotated ones first."""
    help_pairs: int = 300
    """Further pairs of help on harmless prompts, preferred to refusals."""
    extra: Path | None = None
    """A file of further pairs (the fields of `Preference`), such as `training.on_policy`'s. `dual`
    and `single` take one that decides a single question at its word (see `by_word`)."""
    beta: float = 0.1
    learning_rate: float = 5e-5
    batch: int = 8
    held_out: int = 100
    """Pairs of the validation split on which the result is measured."""
    held_out_steps: int = 50
    """Steps between measurements of them for the curves."""


class Trainer(Watched, DPOTrainer):
    """TRL's, watched."""


def better_of(p: Preference, objective: Objective) -> int | None:
    """Index of the answer that an objective prefers; None where it has no say: `helpful` and
    `harmless` by their own question alone, `single` where both were asked."""
    if objective == "helpful":
        return p.more_helpful
    if objective == "harmless":
        return p.less_harmful
    if objective == "single":
        # That harm was asked, and tied, shows by both answers being known as safe, or as unsafe.
        asked = p.less_harmful is not None or p.unsafe in ((False, False), (True, True))
        return p.trade_off if p.more_helpful is not None and asked else None
    if p.safer is not None:
        return p.safer if p.less_harmful in (None, p.safer) else None
    # Where one safe answer refuses, "more helpful" would mean "not refusing", which is not the aim.
    alike = refuses(p.answers[0]) == refuses(p.answers[1])
    return p.more_helpful if p.unsafe == (False, False) and alike else None


def by_word(p: Preference, objective: Objective) -> int | None:
    """`better_of`, for pairs that were made for this training: one that decides a single question
    is taken at its word, even if help is preferred to a refusal. Help is so of safe answers only,
    harmlessness where the answers' safety does not say otherwise."""
    if objective in ("helpful", "harmless"):
        return better_of(p, objective)
    if p.more_helpful is None and p.less_harmful is not None:
        return p.less_harmful if p.safer in (None, p.less_harmful) else None
    if p.less_harmful is None and p.unsafe == (False, False):
        return p.more_helpful
    return better_of(p, objective)


@dataclass(frozen=True)
class Choice:
    """A prompt, the answer to prefer, the other one, and where it comes from."""

    prompt: str
    better: str
    worse: str
    source: str


def decided(
    name: str,
    rows: Sequence[Preference],
    side_of: Callable[[Preference], int | None],
    fits: Callable[[Choice], bool],
) -> list[Choice]:
    """Of `rows` those for which `side_of` names the better answer, and that fit; how many are left
    out goes to stderr, under `name`."""
    found = [
        Choice(p.prompt, p.answers[side], p.answers[1 - side], p.source)
        for p in rows
        if (side := side_of(p)) is not None
    ]
    short = [choice for choice in found if fits(choice)]
    print(
        f"{name}: of {len(rows)} pairs {len(rows) - len(found)} are left out since they do not say "
        f"which answer is preferred, {len(found) - len(short)} as too long",
        file=sys.stderr,
        flush=True,
    )
    return short


def choose(
    preferences: Sequence[Preference],
    demonstrations: Sequence[Demonstration],
    args: Args,
    fits: Callable[[Choice], bool],
    extra: Sequence[Preference] = (),
) -> list[Choice]:
    """Pairs that the objective decides and that fit: annotated before other ones, and of them (for
    `dual`) a safe and an unsafe answer before two safe ones; then help."""
    rng = random.Random(args.seed)

    def rank(p: Preference) -> tuple[bool, bool, float]:
        second = args.preference == "dual" and p.safer is None
        return p.source != "annotated_pairs", second, rng.random()

    better = partial(better_of, objective=args.preference)
    chosen = decided(args.preference, sorted(preferences, key=rank), better, fits)[: args.pairs]
    if extra:
        word = partial(by_word, objective=args.preference)
        chosen += decided(f"{args.preference}, extra", extra, word, fits)
    # More than are asked for, since many are too long.
    helping = help_pairs(demonstrations, 8 * args.help_pairs, args.seed, other="refusal")
    chosen += decided("help", helping, lambda p: p.more_helpful, fits)[: args.help_pairs]
    rng.shuffle(chosen)
    return chosen[: args.limit]


def lengths_of(choice: Choice, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens of both rendered chats."""
    prompt = len(encode_prompt(tokenizer, choice.prompt))
    return (
        prompt + len(encode_answer(tokenizer, choice.better)),
        prompt + len(encode_answer(tokenizer, choice.worse)),
    )


def as_rows(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """What TRL takes: conversations."""
    return [
        {
            "prompt": messages(c.prompt),
            "chosen": [{"role": "assistant", "content": c.better.strip()}],
            "rejected": [{"role": "assistant", "content": c.worse.strip()}],
        }
        for c in choices
    ]


def dataset_of(rows: Sequence[dict[str, Any]], folder: Path) -> Dataset:
    """On disk, where the reference's log-probabilities are kept for a run that is resumed."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        Dataset.from_list(list(rows)).save_to_disk(str(partial))
        partial.rename(folder)
    return load_from_disk(str(folder))


@torch.inference_mode()
def log_probabilities(lm: LanguageModel, pairs: Sequence[tuple[str, str]], size: int = 8) -> Tensor:
    """Log-probability of each answer to its prompt, summed over its tokens: (len(pairs),)."""
    device = next(lm.model.parameters()).device
    parts = [given(lm.tokenizer, pairs[i : i + size]) for i in range(0, len(pairs), size)]
    return torch.cat([answer_logprobs(lm.model, p.to(device))[0].sum(dim=1).cpu() for p in parts])


def measure(
    lm: LanguageModel, choices: Sequence[Choice], reference: tuple[Tensor, Tensor], beta: float
) -> dict[str, float]:
    """Held-out loss, and the share of pairs whose better answer gained on the other."""
    better = log_probabilities(lm, [(c.prompt, c.better) for c in choices])
    worse = log_probabilities(lm, [(c.prompt, c.worse) for c in choices])
    margin = (better - reference[0]) - (worse - reference[1])
    return {
        "loss": round(dpo_loss(better, worse, *reference, beta).item(), 4),
        "accuracy": round((margin > 0).double().mean().item(), 4),
        "better_change": round((better - reference[0]).mean().item(), 3),
        "worse_change": round((worse - reference[1]).mean().item(), 3),
        "pairs": len(choices),
    }


def main(args: Args) -> None:
    refuse_below_one(args)
    extra = read_pairs(args.extra) if args.extra else []
    if args.extra and not extra:
        raise SystemExit(f"{args.extra} holds no pairs: leave --extra out")
    preferences = read_preferences(args.data, "train")
    refuse_flipped(preferences)
    lm = open_policy(args)

    def fits(choice: Choice) -> bool:
        short = len(choice.prompt) + len(choice.better) + len(choice.worse) < 16 * args.max_tokens
        return short and max(lengths_of(choice, lm.tokenizer)) <= args.max_tokens

    chosen = choose(preferences, read_demonstrations(args.data, "train"), args, fits, extra)
    if all(choice.source.startswith("help/") for choice in chosen):
        raise SystemExit(f"{args.data}: no {args.preference} pair fits in {args.max_tokens} tokens")
    claim(args.out, args, rows_per_update=rows_per_update(args))
    lengths = [max(lengths_of(choice, lm.tokenizer)) for choice in chosen]
    order = epochs_of(lengths, args)
    print(f"{len(chosen)} pairs, {2 * sum(lengths[i] for i in order)} tokens", flush=True)
    steps = len(order) // rows_per_update(args)
    better = partial(better_of, objective=args.preference)
    held_out_pairs = decided("held out", read_preferences(args.data, "validation"), better, fits)
    tested = held_out_pairs[: min(args.held_out, args.limit or args.held_out)]
    rows, seen = as_rows([chosen[i] for i in order]), as_rows(tested)
    # A resumed run would mix two orders, or keep log-probabilities of other rows.
    remember_rows(args.out, [rows, seen])
    config = DPOConfig(
        **config_fields(args, args.out, steps),
        beta=args.beta,
        precompute_ref_log_probs=True,
        per_device_eval_batch_size=args.batch,
        eval_strategy="steps" if seen else "no",
        eval_steps=args.held_out_steps,
    )
    with config.main_process_first(local=False):  # others read what it has written
        pairs = dataset_of(rows, args.out / "pairs")
        unseen = dataset_of(seen, args.out / "held_out") if seen else None
    trainer = Trainer(
        model=lm.model,
        args=config,
        train_dataset=pairs,
        eval_dataset=unseen,
        processing_class=lm.tokenizer,
    )
    train(trainer, args.out)
    figures = held_out(trainer, lm, tested, args.beta)
    finish(trainer, lm, args, args.out, Counter(c.source for c in chosen), figures)


def held_out(
    trainer: Any, lm: LanguageModel, choices: Sequence[Choice], beta: float
) -> dict[str, float]:
    """`measure`, against the adapter that the run began with (TRL keeps it as `ref`), or the bare
    base. Nothing under several processes, whose weights may be spread."""
    if trainer.accelerator.num_processes > 1 or not choices:
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    tuned = LanguageModel(model, lm.tokenizer, lm.base)
    model.set_adapter("ref")
    reference = (
        log_probabilities(tuned, [(c.prompt, c.better) for c in choices]),
        log_probabilities(tuned, [(c.prompt, c.worse) for c in choices]),
    )
    model.set_adapter("default")
    figures = measure(tuned, choices, reference, beta)
    print(f"held out: {json.dumps(figures)}", flush=True)
    return figures


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"{args.out} keeps the last checkpoint: the same command goes on from it"):
        main(args)
    PartialState().destroy_process_group()  # else its threads may abort the exit
