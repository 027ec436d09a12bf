"""Causal language models: opening them, their chat template, prompts and answers as tokens.

What `sft`, `dpo`, `ppo_lag`, `score_model` and `export_policy` share. A base is a hub name or a
local folder (`training.bases`); a policy is a base, or the folder of a LoRA adapter trained here,
whose `adapter_config.json` names its base.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from training.bases import SMOLLM2, base_folder
from training.ending import in_a_line
from training.precision import DType
from training.runs import digest_of

__all__ = [
    "BASES_FOLDER",
    "LanguageModel",
    "encode_answer",
    "encode_prompt",
    "grouped",
    "load_policy",
    "load_tokenizer",
    "messages",
    "new_adapter",
    "refuse_not_finite",
    "stop_tokens",
    "tokenizer_fingerprint",
]

BASES_FOLDER = Path("build/bases")


@dataclass
class LanguageModel:
    """A model with its tokenizer. base: the name it was asked for by; adapter: the LoRA folder."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    base: str
    adapter: Path | None = None


def load_policy(
    policy: str = SMOLLM2,
    cache: Path = BASES_FOLDER,
    *,
    trainable: bool = False,
    merged: bool = False,
    dtype: DType = "float32",
) -> LanguageModel:
    """Open a base (hub name or folder) or an adapter folder on top of its base.

    trainable: an adapter's weights get gradients; else nothing does. merged: an adapter's weights
    are added to the base's, and its answers half as fast again. Raises SystemExit with what
    to do when the base is not to be had, or model, tokenizer and adapter do not belong together.
    """
    adapter = Path(policy) if (Path(policy) / "adapter_config.json").is_file() else None
    base = _base_of(adapter) if adapter else policy
    folder = base_folder(base, cache)
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder}: no config.json nor adapter_config.json: no model, no adapter")
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(f"{folder}: not a causal language model: {in_a_line(error)}") from error
    check_fit(tokenizer, model.config, base)
    model.requires_grad_(False)
    if adapter:
        model = _with_adapter(model, tokenizer, adapter, trainable)
        if merged:
            model = model.merge_and_unload()
    return LanguageModel(model, tokenizer, base, adapter)


def _base_of(adapter: Path) -> str:
    config = _read_object(adapter / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise SystemExit(f"{adapter}/adapter_config.json names no base_model_name_or_path")
    return str(base)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON: {error}: damaged, or half written") from error
    if not isinstance(found, dict):
        raise SystemExit(f"{path}: a {type(found).__name__}, not an object with fields")
    return found


def _with_adapter(
    model: Any, tokenizer: PreTrainedTokenizerBase, adapter: Path, trainable: bool
) -> Any:
    from peft import PeftModel

    if not (adapter / "adapter_model.safetensors").is_file():
        raise SystemExit(f"{adapter}: no adapter_model.safetensors: copied by half, or not trained")
    summary = adapter / "summary.json"
    if summary.exists():
        expected = _read_object(summary).get("tokenizer")
        found = tokenizer_fingerprint(tokenizer)
        if expected and expected != found:
            raise SystemExit(
                f"{adapter}: trained with tokenizer {expected}, its base now has {found}: "
                "the tokenizer does not match, use the base that the adapter was trained on"
            )
    try:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise SystemExit(f"{adapter}: does not fit its base: {in_a_line(error)}") from error
    refuse_not_finite({n: p for n, p in model.named_parameters() if "lora_" in n}, adapter)
    return model


def refuse_not_finite(weights: Mapping[str, torch.Tensor], where: object) -> None:
    """SystemExit that names the first of the weights that has nan or infinity in it."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise SystemExit(
                f"{where}: {name} is not finite: training went astray: remove it, and train again "
                "with a lower --learning-rate"
            )


def new_adapter(
    lm: LanguageModel, *, rank: int = 16, alpha: int = 32, dropout: float = 0.0
) -> LanguageModel:
    """A fresh trainable LoRA (Hu et al. 2022) on every linear layer, the head excepted."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(lm.model, config)
    # Adapters are given to others: they name the base, not a folder of this machine.
    model.peft_config["default"].base_model_name_or_path = lm.base
    return LanguageModel(model, lm.tokenizer, lm.base)


# --- tokenizers ----------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; it must know a chat template and an end of turn."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(f"{folder}: no readable tokenizer: {in_a_line(error)}") from error
    if not tokenizer.chat_template:
        raise SystemExit(f"{folder}: its tokenizer has no chat template: use an instruction model")
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"{folder}: its tokenizer has no eos_token, so answers would not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is told by masks here, never by id
    return tokenizer


def check_fit(tokenizer: PreTrainedTokenizerBase, config: Any, name: str) -> None:
    """SystemExit when tokens of `tokenizer` would mean something else, or nothing, to the model."""
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: "
            "the tokenizer does not match the model"
        )
    ends = config.eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    if ends is not None and tokenizer.eos_token_id not in known:
        raise SystemExit(
            f"{name}: the tokenizer ends a turn with {tokenizer.eos_token_id}, the model with "
            f"{ends}: the tokenizer does not match the model"
        )


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """What ends an answer: the tokenizer's end of turn, and the model's own ends."""
    ends = model.generation_config.eos_token_id
    own = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *(end for end in own if end is not None)})


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary and chat template: equal means that tokens have the same meaning."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return digest_of(content)[:16]


# --- chats as tokens -----------------------------------------------------------------------------

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def messages(prompt: str) -> list[dict[str, str]]:
    """The chat messages of a prompt: one user turn, or the turns of an HH-RLHF transcript
    (`Human: ...` and `Assistant: ...`, blank lines between)."""
    if not prompt.startswith("Human:"):
        return [{"role": "user", "content": prompt}]
    parts = _TURN.split(prompt)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    while turns and (turns[-1]["role"] == "assistant" and not turns[-1]["content"]):
        turns.pop()
    return turns


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of the rendered chat, up to and with the header of the answer."""
    text = tokenizer.apply_chat_template(
        messages(prompt), tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, its end of turn included."""
    ids: list[int] = tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def grouped(lengths: Sequence[int], size: int, seed: int) -> list[int]:
    """An order of items such that runs of `size` have like lengths: batches with little padding.

    Runs come in random order. A run is one step's batch, over all processes, so the batches do not
    depend on how many processes share them. What is more than whole runs, a random choice of other
    ones for each seed, stands at the end.
    """
    if size < 1:
        raise ValueError(f"a batch of {size}")
    rng = random.Random(seed)
    rest = rng.sample(range(len(lengths)), len(lengths) % size)
    whole = set(range(len(lengths))).difference(rest)
    order = sorted(whole, key=lambda i: (lengths[i], rng.random()))
    runs = [order[first : first + size] for first in range(0, len(order), size)]
    rng.shuffle(runs)
    return [i for run in [*runs, rest] for i in run]
