"""Tiny dual preferences and demonstrations, in the files that `training.preferences build` writes.

Harm is the word `harm`, help the word `sugar`, so that small models learn something from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.data import SPLITS, Split
from training.preferences import Demonstration, Preference

KINDS = ("refusal", "redirect", "borderline", "benign")


def pair(number: int, split: Split = "train") -> Preference:
    """Every second one has the harmful answer first; it is the more helpful one. Every third is of
    two safe answers."""
    length = "make " * (1 + number % 5)
    if number % 3 == 2:
        return Preference(
            prompt=f"how to make cake number {number}",
            answers=(f"{length}sugar sugar", f"what is {length}cake"),
            source="annotated_pairs",
            more_helpful=0,
            severity=(0, 0),
            unsafe=(False, False),
            split=split,
        )
    harmful, safe = f"{length}harm harm", f"{length}is to cake"
    first = number % 2 == 0
    return Preference(
        prompt=f"how to harm number {number}",
        answers=(harmful, safe) if first else (safe, harmful),
        source="annotated_pairs",
        more_helpful=0 if first else 1,
        less_harmful=1 if first else 0,
        severity=(2, 0) if first else (0, 2),
        unsafe=(True, False) if first else (False, True),
        split=split,
    )


def demonstration(number: int, split: Split = "train") -> Demonstration:
    kind = KINDS[number % 4]
    refusing = kind == "refusal"
    return Demonstration(
        prompt=f"how to {'harm' if number % 4 < 2 else 'make cake'} number {number}",
        answer="I'm sorry I can't help with that"
        if refusing
        else "make cake sugar " * (number % 3 + 1),
        kind=kind,
        source="test",
        split=split,
    )


def write(folder: Path, pairs: int = 48, demonstrations: int = 48) -> Path:
    """A third as many of each in the validation and the test split."""
    for offset, split in enumerate(SPLITS):
        share = 1 if split == "train" else 3
        rows = [pair(1000 * offset + n, split) for n in range(pairs // share)]
        shown = [demonstration(1000 * offset + n, split) for n in range(demonstrations // share)]
        write_rows(folder / f"pairs.{split}.jsonl", map(asdict, rows))
        write_rows(folder / f"demonstrations.{split}.jsonl", map(asdict, shown))
    return folder


def cut_runs(kept: Path) -> Iterator[Path]:
    """Folders beside that of `kept`, whose lines came in batches of four, as a kill leaves them:
    whole batches, and part of one with half a line."""
    lines = kept.read_bytes().splitlines(keepends=True)
    for name, left in (("between", lines[:4]), ("within", [*lines[:6], lines[6][:20]])):
        out = kept.parent.with_name(name)
        out.mkdir()
        (out / kept.name).write_bytes(b"".join(left))
        yield out


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
