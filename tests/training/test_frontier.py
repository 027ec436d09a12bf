"""Two runs are compared where both flag the same share of benign answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("tyro")

from training import frontier, moderation
from training.data import Example
from training.eval_sets import benign_answers
from training.frontier import at_equal_shares

TRUTH = np.array([1.0, 1.0, 1.0, 0.0])


def test_a_run_that_ranks_better_finds_more_at_the_same_price() -> None:
    benign = np.linspace(0.01, 0.5, 50)
    good = {"set": (np.array([0.9, 0.8, 0.6, 0.2]), TRUTH)}
    poor = {"set": (np.array([0.9, 0.4, 0.3, 0.6]), TRUTH)}
    assert at_equal_shares(good, benign, [0.02])["set"] == {"AUROC": 1.0, "F1 at 2.0%": 1.0}
    row = at_equal_shares(poor, benign, [0.02])["set"]
    assert row["F1 at 2.0%"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))  # one found, one wrongly


@given(st.integers(1, 30), st.floats(0.2, 5.0))
def test_scores_that_are_stretched_change_nothing(flagged: int, power: float) -> None:
    rng = np.random.default_rng(flagged)
    benign, scores = rng.uniform(0.01, 0.99, 100), rng.uniform(0.01, 0.99, 40)
    truth = (rng.uniform(size=40) < 0.5).astype(float)
    truth[:2] = 0.0, 1.0
    shares = [flagged / 100]
    plain = at_equal_shares({"set": (scores, truth)}, benign, shares)
    stretched = at_equal_shares({"set": (scores**power, truth)}, benign**power, shares)
    assert plain["set"] == pytest.approx(stretched["set"])


def test_a_share_of_the_prompts_logit_is_added_to_the_answers() -> None:
    logits = np.array([[0.0, 1.0, -1.0], [2.0, -2.0, 0.0]])
    expected = 1 / (1 + np.exp(-np.array([1.0, 0.0, -1.0])))
    assert frontier.combined(logits, 0.5) == pytest.approx(expected)


def _write_benign(folder: Path, prompts: list[str]) -> None:
    folder.mkdir()
    with gzip.open(folder / "benign.jsonl.gz", "wt", encoding="utf-8") as file:
        for prompt in prompts:
            for answer in ("good cake", "kind help", "good cake"):
                file.write(json.dumps({"prompt": prompt, "response": answer, "source": "a"}) + "\n")


def test_benign_answers_are_those_of_the_prompts_each_once(tmp_path: Path) -> None:
    _write_benign(tmp_path / "source", ["how 1", "How  2?", "how 3"])
    split = [Example(prompt, None, "benign/a") for prompt in ("how 1", "how 2?")]
    found = benign_answers(tmp_path / "source", [*split, Example("how 3", None, "annotated/a")])
    assert len(found) == 4
    assert {e.prompt for e in found} == {"how 1", "How  2?"}
    assert benign_answers(tmp_path, split) == []


def test_the_command_puts_two_runs_side_by_side(
    tmp_path: Path, tiny_base: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = (tmp_path / "one", tmp_path / "other")
    for seed, out in enumerate(runs):
        moderation.main(
            moderation.Args(
                data=tiny_data, out=out, base=str(tiny_base), epochs=0.1, seed=seed,
                include=("annotated/",), max_tokens=32, prompt_tokens=8, overlap=8, bf16=False,
            )
        )  # fmt: skip
    _write_benign(tmp_path / "source", [f"how {1000 + n}" for n in range(80)])
    capsys.readouterr()
    frontier.main(frontier.Args(runs, data=tiny_data, source=tmp_path / "source"))
    said = capsys.readouterr().out
    assert said.count("annotated answers") == 2
    assert said.count("F1 at 2.0%") == 2
    prompts = frontier.Args(runs[:1], tiny_data, tmp_path / "source", prompt_shares=(0.0, 5.0))
    frontier.main(prompts)
    alone, with_prompt = capsys.readouterr().out.split("5 of the prompt's logit")
    assert alone.splitlines()[1] in said
    assert with_prompt.count("annotated answers") == 1
    with pytest.raises(SystemExit, match=r"no benign answer to a validation prompt"):
        frontier.main(frontier.Args(runs, data=tiny_data, source=tmp_path))
