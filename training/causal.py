"""A causal language model as the base of a moderation model, as a teacher.

`guardrail.encoding` writes a pair as `<s> prompt </s> </s> response </s>`, where a tokenizer has
these tokens. A chat model's marks of a turn's start and end take their names here, so that what it
reads is near to the chats that it knows.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from training.bases import base_folder
from training.ending import in_a_line
from training.model import is_causal

_NAMES = {"<|im_start|>": "<s>", "<|im_end|>": "</s>", "<|endoftext|>": "<pad>"}


def moderation_base(name: str, cache: Path) -> Path:
    """The folder of base `name`, with a tokenizer that `guardrail.encoding` can read."""
    folder = base_folder(name, cache)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder}: not a model: {in_a_line(error)}") from error
    if not is_causal(config):
        return folder
    renamed = cache / f"{folder.resolve().name}--turns"
    if not renamed.exists():
        partial = renamed.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in folder.iterdir():
            if file.name != "tokenizer.json":
                (partial / file.name).symlink_to(file.resolve())
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        _rename(tokenizer, folder)
        (partial / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        os.replace(partial, renamed)
    return renamed


def _rename(tokenizer: dict[str, Any], folder: Path) -> None:
    special = {token["content"]: token for token in tokenizer["added_tokens"] if token["special"]}
    names = {old: new for old, new in _NAMES.items() if new not in special}
    if missing := names.keys() - special.keys():
        raise SystemExit(
            f"{folder}: its tokenizer has no {' nor '.join(sorted(missing))}: a causal base has to "
            "be a chat model with ChatML's marks, such as SmolLM2-Instruct"
        )
    vocabulary = tokenizer["model"]["vocab"]
    for old, new in names.items():
        special[old]["content"] = new
        vocabulary[new] = vocabulary.pop(old)
