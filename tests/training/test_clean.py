"""Label cleaning finds labels that were turned round, and keeps what was given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from training.bag_of_words import out_of_fold
from training.clean import Args, agreement_table, cleaned_human, ensemble, find, listing, main
from training.data import SPLITS, Example, read_examples, write_examples

HARM = ["poison", "weapon", "fraud", "threat"]
MILD = ["recipe", "garden", "poem", "holiday"]


def answers(n: int, source: str, flipped: set[int], seed: int = 0) -> list[Example]:
    """Answers whose harm is in their words; the labels of `flipped` are turned round."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        harmful = i % 2 == 0
        words = rng.choice(HARM if harmful else MILD, 4)
        said = harmful is not (i in flipped)
        rows.append(
            Example(
                f"{source} question number {i}", f"{' '.join(words)} text {i}", source,
                unsafe=said, origin={"unsafe": "human"}, weight=0.3,
            )
        )  # fmt: skip
    return rows


def soft(p: float) -> dict[str, list[float]]:
    return {"severity": [p, p / 2, p / 4], "categories": [0.1] * 19}


def test_labels_that_were_turned_round_are_found_out_of_fold() -> None:
    flipped = {3, 10, 44, 61, 90}
    rows = answers(200, "annotated/x", flipped)
    given = np.array([int(bool(e.unsafe)) for e in rows])
    texts = [(e.prompt, e.response) for e in rows]
    probability = out_of_fold(texts, given[:, None], folds=4)[:, 0]
    found = find("x", rows, given, probability)
    # not all: one counts as found when it looks more like the other class than most of that class
    assert set(found.suspects.index) <= flipped
    assert len(found.suspects.index) >= 3
    margins = [row["margin"] for row in listing(found)]
    assert margins == sorted(margins, reverse=True)


def test_no_text_is_judged_by_a_model_that_saw_its_prompt() -> None:
    """Words that stand in one prompt's answers alone, and tell its label: out of fold they are
    unknown, so that the model stays unsure; a leak would make it certain."""
    rows = [
        Example(
            f"q{i // 2}", f"zz{i // 2} zz{i // 2} common words", "annotated/x", unsafe=i % 4 < 2
        )
        for i in range(80)
    ]
    given = np.array([int(bool(e.unsafe)) for e in rows])
    texts = [(e.prompt, e.response) for e in rows]
    probability = out_of_fold(texts, given[:, None], folds=4)[:, 0]
    assert np.abs(probability - 0.5).max() < 0.2


def test_an_ensemble_is_the_mean_of_its_teachers() -> None:
    row = Example("p", "r", "responses/x")
    both = ensemble([[replace(row, soft=soft(0.2))], [replace(row, soft=soft(0.6))]])
    assert both[row.key]["severity"] == pytest.approx([0.4, 0.2, 0.1])


def test_a_withdrawn_label_leaves_the_soft_one_and_its_origin_behind() -> None:
    rows = answers(60, "responses/x", {7})
    opinions = {e.key: soft(0.9 if i % 2 == 0 else 0.1) for i, e in enumerate(rows)}
    given = np.array([int(bool(e.unsafe)) for e in rows])
    found = find("x", rows, given, np.array([opinions[e.key]["severity"][0] for e in rows]))
    cleaned = cleaned_human(rows, found, opinions, Args(soft=(Path("a"), Path("b"))))
    assert len(cleaned) == 60
    changed = [i for i, e in enumerate(cleaned) if e.unsafe is None]
    assert changed == [7]
    assert cleaned[7].origin == {"withdrawn": "human: harmful", "soft": "2 teachers"}
    assert cleaned[7].soft == opinions[rows[7].key]
    assert cleaned[8].origin == {"unsafe": "human", "soft": "2 teachers"}


def test_a_label_that_is_withdrawn_with_nothing_in_its_place_takes_the_text_with_it() -> None:
    unlabelled = Example("p", "r", "unlabelled/x")
    assert cleaned_human([unlabelled], None, {}, Args()) == []
    assert len(cleaned_human([unlabelled], None, {unlabelled.key: soft(0.5)}, Args())) == 1


def test_agreement_is_told_per_source_and_in_all() -> None:
    rows = [("a", True, True), ("a", True, False), ("a", False, False), ("b", True, True)]
    table = "\n".join(agreement_table(rows))
    assert "| a | 3 | 0.667 | 0.400 | 0.500 | 0.000 |" in table
    assert "| b | 1 | 1.000 | - | 0.000 | 0.000 |" in table
    assert "| all | 4 |" in table


def test_the_command_writes_what_training_reads_and_lists_suspects(tmp_path: Path) -> None:
    data, distil, out = (tmp_path / name for name in ("data", "distil", "clean"))
    annotated = [
        replace(
            e, severity=int(bool(e.unsafe)), categories=[], origin={"severity": "ai"}, weight=1.0
        )
        for e in answers(120, "annotated/x", {5, 50})
    ]
    human = answers(80, "responses/x", {8, 31}, seed=1)
    benign = [Example("p", "r", "benign/x", unsafe=False, severity=0, categories=[])]
    for split in SPLITS:
        rows = [*annotated, *human, *benign] if split == "train" else benign
        write_examples(data / f"{split}.jsonl", rows)
    labelled = [replace(e, soft=soft(0.9 if i % 2 == 0 else 0.1)) for i, e in enumerate(human)]
    write_examples(distil / "train.jsonl", labelled)
    main(Args(data=data, source=tmp_path, soft=(distil,), out=out))
    cleaned = read_examples(out, "train")
    assert len(cleaned) == 201
    assert sum("withdrawn" in e.origin for e in cleaned) == 2
    suspect = [e for e in cleaned if "suspect" in e.origin]
    assert {e.key for e in suspect} == {annotated[5].key, annotated[50].key}
    assert all(e.weight == 0.5 and e.severity is not None for e in suspect)
    listed = [json.loads(line) for line in (out / "suspects.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in listed} == {"annotated answers", "answers labelled by people"}
    assert (out / "validation.jsonl").read_bytes() == (data / "validation.jsonl").read_bytes()
    report = (out / "report.md").read_text()
    assert "2 labels of people withdrawn" in report
    # One harmful text was called harmless (8 is even), one harmless text harmful (31).
    assert "| responses/x | 40 | 1 | 40 | 1 |" in report
