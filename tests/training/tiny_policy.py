"""A tiny Llama, tiny preferences and two tiny score models, all real and on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from score_kit import word_weights

from guardrail.score import ScoreManifest
from training.scorers import SAFE, UNSAFE

HARM, HELP = "harm", "sugar"  # what costs and what pays, in an answer
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_WORD = re.compile(r"[\w']+|[^\w\s]")


def words() -> list[str]:
    texts = [text for pair in (*SAFE, *UNSAFE) for text in pair]
    asked = ["what", "is", "how", "to", "make", "cake", HARM, HELP, "number", "user", "assistant"]
    numbers = [str(n) for n in range(40)]
    return sorted({w for text in texts for w in _WORD.findall(text)} | {*asked, *numbers})


def _tokenizer(path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: n for n, word in enumerate([*special, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD.pattern), "removed", invert=True)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))


def llama(folder: Path) -> Path:
    """Two random layers, with a tokenizer of whole words and a chat template."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def preferences(folder: Path) -> Path:
    """What `training.preferences build` writes, with a held-out prompt in the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(30)), ("test", range(30, 40))):
        pairs = [
            {
                "prompt": f"how to {HARM} number {n}",
                "answers": [HARM, HELP],
                "source": "test",
                "more_helpful": 0,
                "less_harmful": 1,
                "severity": [2, 0],
                "unsafe": [True, False],
                "split": split,
            }
            for n in numbers
        ]
        demonstrations = [
            {
                "prompt": f"how to make cake number {n}",
                "answer": f"make cake {HELP} {HELP}",
                "kind": "benign",
                "source": "test",
                "split": split,
            }
            for n in numbers
        ]
        for name, rows in (("pairs", pairs), ("demonstrations", demonstrations)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def scorer(folder: Path, kind: str, *, flip: bool = False, nan_word: str | None = None) -> Path:
    """A score model that adds up a weight per word of prompt and answer, as ONNX.

    A reward pays for HELP; a cost charges for HARM and for the words of plainly unsafe answers that
    safe ones lack, and is below 0 otherwise. flip: the other sign; nan_word: has no number.
    """
    from onnx import save

    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(folder / "tokenizer.json")
    names = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *words()]
    weights = np.zeros(len(names), np.float32)
    if kind == "reward":
        weights[names.index(HELP)] = 1.0
    else:
        safe = {w for pair in SAFE for text in pair for w in _WORD.findall(text)}
        unsafe = {w for _, answer in UNSAFE for w in _WORD.findall(answer)} - safe
        weights[[names.index(word) for word in (*unsafe, HARM)]] = 0.5
        weights[names.index("<|im_start|>")] = -0.5  # two per chat
    if nan_word is not None:
        weights[names.index(nan_word)] = np.nan
    save(word_weights(-weights if flip else weights), str(folder / "model.onnx"))
    encoding = {
        "layout": "chat",
        "before": "<|im_start|> user ",
        "between": " <|im_end|> <|im_start|> assistant ",
        "after": " <|im_end|>",
        "max_tokens": 128,
        "pad_id": 0,
    }
    ScoreManifest(
        kind=kind,  # type: ignore[arg-type]
        id=f"bag-{kind}",
        base="none",
        licence="Apache-2.0",
        command="written by hand",
        seed=0,
        created="2026-01-01",
        data={},
        encoding=encoding,
    ).write(folder)
    return folder
