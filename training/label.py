"""Relabel texts with a trained teacher: soft labels, kept beside the human ones with their origin.

    python -m training.label --teacher build/teacher --data build/data --out build/distil

Noisy human labels are not thrown away: the loss blends them with the teacher's opinion
(`--teacher-share` of `training.moderation`). Texts annotated by the rubric keep their labels alone.
Resumes: what is already in `--out` is not judged again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro

from guardrail.encoding import Encoder
from training.batching import encode, predict
from training.data import Example, read_examples
from training.ending import ends_in_a_line
from training.model import ModerationModel, encoder_of
from training.precision import bf16_pays


@dataclass
class Args:
    teacher: Path = Path("build/teacher")
    data: Path = Path("build/data")
    out: Path = Path("build/distil")
    trusted: tuple[str, ...] = ("annotated/", "pku/", "benign/", "over_refusal/")
    """Prefixes of sources whose own labels stand alone."""
    limit_per_source: int = 1800
    """At most so many texts of one source are judged; the rest are left out."""
    weight: float = 0.7
    """Weight in the loss of a relabelled text."""
    blend: bool = False
    """Average with the soft labels that `--data` has from another teacher: an ensemble of two."""
    chunk: int = 512
    bf16: bool = field(default_factory=bf16_pays)
    """Autocast; by default where the machine is faster in bfloat16."""


def relabel(
    model: ModerationModel, encoder: Encoder, examples: Sequence[Example], args: Args
) -> list[Example]:
    """Each example with the teacher's probabilities as its `soft` labels."""
    rows = encode(examples, encoder, 0.0)
    severity, categories = predict(model, rows, encoder.pad_id, bf16=args.bf16)
    labelled = []
    for example, s, c in zip(examples, severity, categories, strict=True):
        soft = {"severity": _probabilities(s), "categories": _probabilities(c)}
        other = example.soft if args.blend else None
        if other is not None:
            soft = {name: np.mean([soft[name], other[name]], axis=0) for name in soft}
        labelled.append(
            replace(
                example,
                soft={name: [round(float(p), 4) for p in soft[name]] for name in soft},
                origin={**example.origin, "soft": "teacher" if other is None else "two teachers"},
                weight=args.weight,
            )
        )
    return labelled


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def main(args: Args) -> None:
    encoder = encoder_of(args.teacher)
    model = ModerationModel.load(args.teacher)
    examples = read_examples(args.data, "train")
    trusted = [e for e in examples if e.source.startswith(args.trusted)]
    others = _at_most(
        [e for e in examples if not e.source.startswith(args.trusted)], args.limit_per_source
    )
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / "train.partial"
    done = _whole_lines(partial)
    print(f"{len(others)} texts to judge, {done} done, {len(trusted)} keep their labels")
    started = time.monotonic()
    with partial.open("a", encoding="utf-8") as file:
        for first in range(done, len(others), args.chunk):
            for example in relabel(model, encoder, others[first : first + args.chunk], args):
                file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
            file.flush()
            judged = min(first + args.chunk, len(others))
            rate = (judged - done) / (time.monotonic() - started)
            print(f"{judged}/{len(others)} {rate:.1f}/s", flush=True)
        for example in trusted:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
    for split in ("validation", "test"):
        shutil.copy(args.data / f"{split}.jsonl", args.out / f"{split}.jsonl")
    os.replace(partial, args.out / "train.jsonl")


def _at_most(examples: Sequence[Example], limit: int) -> list[Example]:
    """The first `limit` texts of each source, in the order of the file."""
    seen: Counter[str] = Counter()
    kept = []
    for example in examples:
        seen[example.source] += 1
        if seen[example.source] <= limit:
            kept.append(example)
    return kept


def _whole_lines(path: Path) -> int:
    """Rows already written; a line that was cut short is removed."""
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return whole.count(b"\n")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"{args.out} keeps what is judged: the same command goes on from there"):
        main(args)
