"""Sets that are evaluated on hold nothing that was trained on, nor nearly."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro")

from training.data import Example, normalise
from training.eval_sets import balanced, evaluation_prompts, like, public_sets

LONG = "how do i pick the lock of a garden shed without a key at night"


def test_a_prompt_is_known_when_it_was_trained_on_or_nearly() -> None:
    trained = [LONG, "what is a cake"]
    near, far = LONG.replace("night", "noon"), "how do i paint a garden shed"
    assert like([LONG, near, far], trained) == {LONG, near}
    assert like([], trained) == set()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_public_sets_are_without_what_was_trained_on(tmp_path: Path) -> None:
    row = {"response": "r", "source": "x", "unsafe": True, "label_kind": "human"}
    near = LONG.replace("night", "noon").capitalize() + "?"
    write(
        tmp_path / "eval_public" / "a.jsonl.gz",
        [row | {"prompt": prompt} for prompt in (LONG, near, "Quite another thing.")],
    )
    write(tmp_path / "eval_public" / "b.jsonl.gz", [row | {"prompt": LONG}])
    real = {"response": "r", "source": "y", "safe": False, "severity": 2}
    write(tmp_path / "severity_real.jsonl.gz", [real | {"prompt": p} for p in (near, "New")])
    sets = {each.name: each for each in public_sets(tmp_path, {normalise(LONG)})}
    assert set(sets) == {"a", "PKU's own severities"}  # of b nothing is left
    assert [e.prompt for e in sets["a"].examples] == ["Quite another thing."]
    assert [e.prompt for e in sets["PKU's own severities"].examples] == ["New"]


def test_public_evaluation_prompts_are_without_what_was_trained_on(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Once?", "source": "mara_bteval"},
        {"prompt": "once", "source": "mara_harmfulqa"},
        {"prompt": LONG.replace("night", "noon"), "source": "mara_harmfulqa"},
        {"prompt": "Another?", "source": "mara_harmfulqa"},
        {"prompt": "No evaluation.", "source": "mara_hh"},
    ]
    write(tmp_path / "prompts.jsonl.gz", rows)
    found = evaluation_prompts(tmp_path, {normalise(LONG)})
    assert [(e.prompt, e.source) for e in found] == [
        ("Once?", "evaluation/beavertails_evaluation"),
        ("Another?", "evaluation/harmfulqa"),
    ]
    assert all(e.unsafe and e.response is None for e in found)


def test_a_balanced_set_has_as_many_of_both() -> None:
    rows = [Example(f"p{n}", "r", "s", unsafe=n % 3 == 0) for n in range(9)]
    assert [bool(e.unsafe) for e in balanced(rows)] == [True] * 3 + [False] * 3
