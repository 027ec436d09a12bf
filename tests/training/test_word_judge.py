"""The judge of words: what it learns from, where its threshold is from, and its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tyro")

from sklearn.metrics import f1_score

from training.data import SPLITS, Example, Split, write_examples
from training.word_judge import best_f1, fit_judge

HARM, MILD = ["poison", "weapon", "fraud", "threat"], ["recipe", "garden", "poem", "holiday"]


def examples(split: Split, count: int = 60) -> list[Example]:
    """Answers whose harm is in their words; every fifth is of everyday talk."""
    rng = np.random.default_rng(SPLITS.index(split))
    rows = []
    for i in range(count):
        everyday, harmful = i % 5 == 0, i % 2 == 1 and i % 5 != 0
        rows.append(
            Example(
                f"question number {i}", " ".join(rng.choice(HARM if harmful else MILD, 4)),
                "benign/x" if everyday else "annotated/x", unsafe=harmful,
                severity=2 if harmful else 0, split=split,
            )
        )  # fmt: skip
    return rows


def write(folder: Path, **changed: list[Example]) -> Path:
    for split in SPLITS:
        write_examples(folder / f"{split}.jsonl", changed.get(split, examples(split)))
    return folder


PAIRS = [("question", "poison fraud weapon"), ("question", "garden recipe poem")]


def test_it_judges_by_words_and_says_how_well_on_the_test_splits_annotated_answers(
    tmp_path: Path,
) -> None:
    judge = fit_judge(write(tmp_path))
    assert judge.harmful(PAIRS).tolist() == [True, False]
    annotated = [e for e in examples("test") if e.source == "annotated/x"]
    assert judge.figures["n"] == len(annotated) == 48
    assert judge.figures["unsafe"] == sum(bool(e.unsafe) for e in annotated)
    assert judge.figures["auroc"] == 1.0
    called = judge.harmful([(e.prompt, str(e.response)) for e in annotated])
    assert judge.figures["f1"] == pytest.approx(f1_score([e.unsafe for e in annotated], called))


def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (fit_judge(write(tmp_path)) for _ in range(2))
    assert first.threshold == second.threshold
    assert first.chances(PAIRS).tolist() == second.chances(PAIRS).tolist()


def test_it_learns_from_annotated_and_benign_answers_alone(tmp_path: Path) -> None:
    """Others' labels, turned round, change nothing."""
    clean = fit_judge(write(tmp_path / "clean"))
    foreign = [
        replace(e, source=source, severity=0 if e.severity else 3)
        for source in ("responses/x", "unlabelled/x")
        for e in examples("train")
    ]
    alone = [replace(e, response=None, severity=3) for e in examples("train")]
    train = [*examples("train"), *foreign, *alone]
    found = fit_judge(write(tmp_path / "more", train=train))
    assert found.chances(PAIRS).tolist() == clean.chances(PAIRS).tolist()


def test_its_threshold_comes_from_the_validation_split_not_from_the_test_split(
    tmp_path: Path,
) -> None:
    judge = fit_judge(write(tmp_path / "a"))
    turned = [replace(e, severity=0 if e.severity else 2) for e in examples("test")]
    other = fit_judge(write(tmp_path / "b", test=turned))
    assert other.threshold == judge.threshold
    assert other.figures["auroc"] != judge.figures["auroc"]
    turned = [replace(e, severity=0 if e.severity else 2) for e in examples("validation")]
    assert fit_judge(write(tmp_path / "c", validation=turned)).threshold != judge.threshold


def test_the_threshold_has_the_highest_f1_and_is_the_lowest_of_several() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    chances = np.round(np.clip(truth * 0.3 + rng.random(200) * 0.7, 0, 1), 2)
    found = best_f1(truth, chances)
    every = {float(t): f1_score(truth, chances >= t) for t in np.unique(chances)}
    best = max(every.values())
    assert found == min(t for t, f1 in every.items() if f1 == pytest.approx(best, abs=1e-12))
    assert best_f1(np.array([True, False]), np.array([0.0, 0.5])) == 0.0


def test_a_split_with_answers_of_one_kind_is_refused(tmp_path: Path) -> None:
    harmless = [e for e in examples("validation") if not e.unsafe]
    with pytest.raises(SystemExit, match=r"in the validation split 0 are harmful: a judge needs"):
        fit_judge(write(tmp_path, validation=harmless))
    with pytest.raises(SystemExit, match=r"of 0 answers of annotated/ in the test split"):
        fit_judge(write(tmp_path / "none", test=[]))
