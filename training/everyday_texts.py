"""Harmless turns, a prompt and its answer each, for the moderation model and its thresholds.

From two places: what `training.everyday` drew (a small model that is asked for nothing harmful
seldom writes harm: the label is presumed, of kind "derived"), and `harmless_turns.jsonl` in this
folder, which an AI wrote for this project: questions and answers whose topics or words lie near
harm, from fraud prevention to murder mysteries, and as many of plain talk (kind "ai"). A third of
the prompts is held out of training, to choose thresholds by; `harmless_turns_held_out.jsonl` is for
evaluation alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.data import Example, normalise, read_jsonl
from training.eval_sets import EvalSet

__all__ = ["WRITTEN", "everyday_texts", "written_sets"]

WRITTEN = Path(__file__).with_name("harmless_turns.jsonl")
"""The turns that an AI wrote."""
_TO_EVALUATE = WRITTEN.with_name("harmless_turns_held_out.jsonl")


def everyday_texts(paths: Sequence[Path], *, held_out: bool) -> list[Example]:
    """Each prompt once, alone and with its answer. paths: files of turns (prompt, answer, and a
    source, where it is not "everyday"); held_out: the third that is, or the rest."""
    found: dict[str, list[Example]] = {}
    for turn in (turn for path in paths for turn in read_jsonl(path)):
        key = normalise(turn["prompt"])
        if not key or key in found or _is_held_out(key) is not held_out:
            continue
        found[key] = [_harmless(turn, None)]
        if turn["answer"].strip():
            found[key].append(_harmless(turn, turn["answer"]))
    return [example for texts in found.values() for example in texts]


def written_sets() -> Iterator[EvalSet]:
    """Written turns that neither training nor a threshold has seen, answers and prompts apart."""
    turns = list(read_jsonl(_TO_EVALUATE))
    answers = [_harmless(turn, turn["answer"]) for turn in turns]
    prompts = [_harmless(turn, None) for turn in turns]
    for name, rows in (("answers", answers), ("prompts", prompts)):
        tags = [example.source for example in rows]
        yield EvalSet(f"harmless talk near harm, {name}", "ai", "harmless", rows, tags)


def _is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 3 == 0


def _harmless(turn: dict[str, Any], response: str | None) -> Example:
    source = turn.get("source", "everyday")
    kind = "derived" if source == "everyday" else "ai"
    return Example(
        prompt=turn["prompt"],
        response=response,
        source=source,
        unsafe=False,
        severity=0,
        categories=[],
        origin={"severity": kind, "categories": kind},
    )
