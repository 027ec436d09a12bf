"""What `training.everyday` drew, as harmless texts for the moderation model and its thresholds.

A small model that is asked for nothing harmful seldom writes harm: the label is presumed, of kind
"derived". A third of the prompts is held out of training, to choose thresholds by.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from training.data import Example, normalise, read_jsonl

__all__ = ["everyday_texts"]


def everyday_texts(path: Path, *, held_out: bool) -> list[Example]:
    """Each prompt once, alone and with its answer. path: `turns.jsonl`; held_out: the third that
    is, or the rest."""
    found: dict[str, list[Example]] = {}
    for turn in read_jsonl(path):
        key = normalise(turn["prompt"])
        if not key or key in found or _is_held_out(key) is not held_out:
            continue
        found[key] = [_harmless(turn["prompt"], None)]
        if turn["answer"].strip():
            found[key].append(_harmless(turn["prompt"], turn["answer"]))
    return [example for texts in found.values() for example in texts]


def _is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 3 == 0


def _harmless(prompt: str, response: str | None) -> Example:
    return Example(
        prompt=prompt,
        response=response,
        source="everyday",
        unsafe=False,
        severity=0,
        categories=[],
        origin={"severity": "derived", "categories": "derived"},
    )
