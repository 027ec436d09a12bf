"""What the moderation model learns from, as prompts that no evaluation may ask."""

from __future__ import annotations

from pathlib import Path

from training.contrast import prompts
from training.data import normalise, read_examples
from training.everyday_texts import WRITTEN, everyday_texts
from training.plain_talk import plain_talk
from training.statements import statements


def trained_prompts(data: Path) -> set[str]:
    """Normalised: the prompts of the train split in `data`, and what was written for training, of
    which an answer to small talk counts by itself."""
    trained = {normalise(e.prompt) for e in read_examples(data, "train")}
    trained |= {normalise(prompt) for prompt, _ in prompts()}
    trained |= {normalise(e.response or e.prompt) for e in (*statements(), *plain_talk())}
    trained |= {normalise(e.prompt) for e in everyday_texts([WRITTEN], held_out=False)}
    return trained
