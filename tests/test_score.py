"""Scoring answers with an exported model; the model here adds up a weight per token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from score_kit import CHAT, scorer_folder

from guardrail.errors import ArtifactError, ModerationError
from guardrail.score import OnnxScorer, ScoreKind, read_score_manifest
from guardrail.verdict import Pair

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_one_float_per_answer_in_order(tmp_path: Path) -> None:
    scorer = OnnxScorer(scorer_folder(tmp_path / "m"))
    pairs = [("filler", "good good"), ("filler", "bad"), ("good", "filler"), ("filler", "")]
    assert scorer.score(pairs).tolist() == [2, -1, 1, 0]
    assert scorer.score([]).shape == (0,)


def test_a_pair_of_the_sdk_scores_like_a_tuple(tmp_path: Path) -> None:
    scorer = OnnxScorer(scorer_folder(tmp_path / "m"))
    assert scorer.score([Pair("filler", "good")]).tolist() == [1]


@pytest.mark.parametrize(("kind", "expected"), [("cost", 2.0), ("reward", 1.0)])
def test_of_a_long_answer_the_worst_window_costs_and_the_mean_one_rewards(
    tmp_path: Path, kind: ScoreKind, expected: float
) -> None:
    scorer = OnnxScorer(scorer_folder(tmp_path / "m", kind))
    long = "good good " + "filler " * 30  # two windows, 2 and 0
    assert scorer.score([("filler", long)]).tolist() == [expected]


def test_a_chat_keeps_the_end_of_a_long_prompt_and_the_start_of_a_long_answer(
    tmp_path: Path,
) -> None:
    scorer = OnnxScorer(scorer_folder(tmp_path / "m", encoding=CHAT))
    asked = "bad " + "filler " * 30
    answer = "good " * 3 + "filler " * 30 + "bad"
    assert scorer.score([("filler", "good"), (asked, answer)]).tolist() == [2, 4]


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    scorer = OnnxScorer(scorer_folder(tmp_path / "m"))
    with pytest.raises(ModerationError, match="bag: the model gave a value that is no number"):
        scorer.score([("filler", "broken")])


def test_an_altered_model_is_refused(tmp_path: Path) -> None:
    folder = scorer_folder(tmp_path / "m")
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="altered or damaged"):
        OnnxScorer(folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing: not a score model"):
        read_score_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "toxicity"}, "neither reward nor cost"),
        ({"unheard_of": 1}, "not a score model's manifest"),
        ({"files": {}}, "not a score model's manifest"),
        ({"encoding": {"layout": "smoke"}}, "unknown layout 'smoke'"),
        ({"encoding": {"layout": "pair", "max_tokens": 1}}, "max_tokens=1 must exceed"),
        ({"encoding": {"layout": "chat"}}, "missing .* required"),
        ({"encoding": None}, "encoding must be an object, not None"),
        ({"files": {"model.onnx": 1, "tokenizer.json": 2}}, "hashes must be texts"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_in_a_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = scorer_folder(tmp_path / "m")
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message) as raised:
        OnnxScorer(folder)
    assert "\n" not in str(raised.value)
