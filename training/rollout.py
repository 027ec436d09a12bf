"""Answers of a causal language model to prompts: sampled in batches, and their log-probabilities.

Prompts are padded on the left and answers on the right, so that one column is where answers begin.
Nothing here knows of rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from training.lm import (
    LanguageModel,
    encode_answer,
    encode_prompt,
    load_policy,
    new_adapter,
    stop_tokens,
)
from training.precision import DType
from training.preference_rows import kinds_of_prompts
from training.preferences import read_demonstrations, read_preferences

REFERENCE = "reference"  # the name of a frozen adapter that the policy started from


@dataclass(frozen=True)
class Sequences:
    """A batch of prompts and their answers, as token ids.

    prompts, prompt_mask: (batch, prompt length), padded left; answers, mask: (batch, length),
    padded right, the mask 1 on an answer's tokens, its end-of-text included.
    """

    prompts: Tensor
    prompt_mask: Tensor
    answers: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device) -> Sequences:
        return Sequences(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __getitem__(self, rows: Tensor | slice) -> Sequences:
        """Some rows, without the columns of padding that their prompts do not need."""
        kept = self.prompt_mask[rows]
        first = int(kept.any(dim=0).to(torch.uint8).argmax())
        return Sequences(
            self.prompts[rows][:, first:], kept[:, first:], self.answers[rows], self.mask[rows]
        )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (batch, longest row) each."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def given(tokenizer: Any, pairs: Sequence[tuple[str, str]], length: int | None = None) -> Sequences:
    """(prompt, answer) texts as sequences, answers cut at `length` tokens, if one is given."""
    prompts, prompt_mask = pad_left(
        [encode_prompt(tokenizer, prompt) for prompt, _ in pairs], tokenizer.pad_token_id
    )
    answers = [encode_answer(tokenizer, answer)[:length] for _, answer in pairs]
    flipped, mask = pad_left([row[::-1] for row in answers], tokenizer.pad_token_id)
    return Sequences(prompts, prompt_mask, flipped.flip(1), mask.flip(1).float())


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float = 1.0,
) -> Sequences:
    """An answer of at most `tokens` tokens to each prompt (ids), drawn from the model itself,
    nothing cut off; at another temperature than 1 the draws are not the policy's own."""
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    try:
        return _generated(model, tokenizer, prompts, tokens, how)
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial's
            raise
        raise SystemExit(
            "the policy's probabilities are not finite: its training went astray: train it again "
            "with a lower --learning-rate"
        ) from error


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int) -> Sequences:
    """The likeliest answer, token by token, to each prompt (ids)."""
    return _generated(model, tokenizer, prompts, tokens, {"do_sample": False})


@torch.no_grad()
def _generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    how: dict[str, Any],
) -> Sequences:
    ids, prompt_mask = (t.to(model.device) for t in pad_left(prompts, tokenizer.pad_token_id))
    ends = stop_tokens(tokenizer, model)
    out = model.generate(
        input_ids=ids,
        attention_mask=prompt_mask,
        repetition_penalty=1.0,  # a base's own would make others of the answers
        max_new_tokens=tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **how,
    )
    answers = out[:, ids.shape[1] :]
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).long()
    mask = (ended.cumsum(dim=1) - ended == 0).float()  # an end is a token of its answer
    return Sequences(ids, prompt_mask, answers, mask)


def texts(tokenizer: Any, sequences: Sequences) -> list[str]:
    """The answers as text, special tokens left out."""
    return [
        tokenizer.decode(answer[mask.bool()], skip_special_tokens=True).strip()
        for answer, mask in zip(sequences.answers, sequences.mask, strict=True)
    ]


def answer_states(model: Any, sequences: Sequences) -> Tensor:
    """The trunk's last hidden state before each answer token: (batch, length, width)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk: nn.Module = getattr(base, base.base_model_prefix)
    ids = torch.cat([sequences.prompts, sequences.answers], dim=1)[:, :-1]
    mask = torch.cat([sequences.prompt_mask, sequences.mask.long()], dim=1)[:, :-1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, sequences.prompts.shape[1] - 1 :]


def answer_logprobs(
    model: Any, sequences: Sequences, states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log pi of each answer token, and (without gradient) the entropy of what it was drawn from.

    Both (batch, length), in nats, 0 on padding. The vocabulary is only looked at where an answer
    has a token. `states`: what `answer_states` gave, where it is known already.
    """
    states = answer_states(model, sequences) if states is None else states
    real = sequences.mask.bool()
    every = F.log_softmax(model.get_output_embeddings()(states[real]).float(), dim=-1)
    chosen = every.gather(1, sequences.answers[real].unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        spread = -(every.exp() * every).sum(dim=-1)
    zeros = torch.zeros(real.shape, device=real.device)
    return zeros.masked_scatter(real, chosen), zeros.masked_scatter(real, spread)


def open_policy(policy: str, bases: Path, *, rank: int, dtype: DType) -> LanguageModel:
    """A policy to train: a base under a fresh LoRA, or an adapter's folder under a frozen copy of
    itself. What it starts from is its `reference`."""
    lm = load_policy(policy, bases, trainable=True, dtype=dtype)
    if lm.adapter is None:
        return new_adapter(lm, rank=rank)
    lm.model.load_adapter(lm.adapter, REFERENCE)
    lm.model.set_adapter("default")
    return lm


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """Within, `model` is what the policy started from: its frozen adapter, or none at all.

    So a reference costs an adapter, a few MB, and no second model.
    """
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter("default")


@dataclass(frozen=True)
class Survey:
    """What is known of sequences before anything is learnt from them.

    logprobs, entropy: (batch, length), under the policy; reference: (batch, length), under the
    reference; states: (batch, length, width), the reference's, in fp32.
    """

    logprobs: Tensor
    entropy: Tensor
    reference: Tensor
    states: Tensor


@torch.no_grad()
def survey(model: Any, sequences: Sequences, chunk: int) -> Survey:
    """Look at `chunk` sequences at a time, as policy and as reference."""
    parts = []
    for first in range(0, len(sequences), chunk):
        part = sequences[first : first + chunk]
        logprobs, entropy = answer_logprobs(model, part)
        with reference(model):
            states = answer_states(model, part)
            frozen, _ = answer_logprobs(model, part, states)
        parts.append((logprobs, entropy, frozen, states.float()))
    return Survey(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class EndlessPrompts:
    """Two kinds of prompts (ids and text), shuffled anew each time they run out.

    Which ones a step gets is a function of (seed, step), so a resumed run goes on where it was.
    """

    def __init__(self, harmful: Sequence[str], benign: Sequence[str], share: float, seed: int):
        self.pools, self.share, self.seed = (list(harmful), list(benign)), share, seed

    def batch(self, index: int, size: int) -> list[tuple[str, bool]]:
        """The prompts of batch `index`, and whether each is of the harmful kind."""
        bad = round(size * self.share)
        return [
            (self._pick(kind, index * count + n), kind == 0)
            for kind, count in enumerate((bad, size - bad))
            for n in range(count)
        ]

    def _pick(self, kind: int, position: int) -> str:
        pool = self.pools[kind]
        turn, place = divmod(position, len(pool))
        return pool[np.random.default_rng((self.seed, kind, turn)).permutation(len(pool))[place]]


def rollout_prompts(folder: Path, tokenizer: Any, tokens: int) -> tuple[list[str], list[str]]:
    """Training prompts that fit into `tokens`, harmful and harmless ones, from what
    `training.preferences` built. Held-out splits are not read."""
    pairs, demonstrations = read_preferences(folder, "train"), read_demonstrations(folder, "train")
    kinds = kinds_of_prompts(pairs, demonstrations)
    harmful, benign = (
        [p for p in sorted(kind) if len(encode_prompt(tokenizer, p)) <= tokens] for kind in kinds
    )
    if not harmful or not benign:
        raise SystemExit(
            f"{folder}: of {len(kinds[0])} harmful and {len(kinds[1])} benign prompts "
            f"{len(harmful)} and {len(benign)} fit into {tokens} tokens: raise --prompt-tokens"
        )
    return harmful, benign
