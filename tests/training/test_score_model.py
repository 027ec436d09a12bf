"""Reward and cost models, trained and exported for real on tiny bases."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import tiny_policy  # noqa: E402
import tiny_preferences  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from guardrail.score import OnnxScorer  # noqa: E402
from training import score_model  # noqa: E402
from training.data import read_jsonl  # noqa: E402
from training.ending import ends_in_a_line  # noqa: E402
from training.preferences import Preference, read_preferences  # noqa: E402
from training.score_backbone import EncoderScore  # noqa: E402
from training.score_metrics import correlation, held_out, score_metrics  # noqa: E402
from training.score_metrics import main as score_metrics_main  # noqa: E402

PLAIN = {"harm": "bomb", "sugar": "good", "make": "rain", "is to": "help"}  # tiny_base knows these


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_preferences.write(tmp_path_factory.mktemp("pairs"), 240, 120)
    for path in folder.iterdir():
        text = path.read_text()
        for word, plain in PLAIN.items():
            text = text.replace(f"{word} ", f"{plain} ").replace(f'{word}"', f'{plain}"')
        path.write_text(text.replace("less_rain", "less_harm"))
    return folder


def args(data: Path, base: Path, out: Path, kind: str, **changes: Any) -> score_model.Args:
    fields: dict[str, Any] = {
        "kind": kind,
        "data": data,
        "base": str(base),
        "out": out,
        "help_pairs": 40,
        "learning_rate": 2e-3,
        "head_learning_rate": 5e-3,
        "tokens_per_batch": 600,
        "max_tokens": 96,
        "prompt_tokens": 24,
        "overlap": 16,
        "bf16": False,
    }
    return score_model.Args(**fields | changes)


@pytest.fixture(scope="module")
def cost(data: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cost")
    score_model.main(args(data, tiny_base, out, "cost", epochs=4))
    return out


def test_a_cost_above_zero_means_unsafe(data: Path, cost: Path) -> None:
    scorer = OnnxScorer(cost)
    assert scorer.kind == "cost"
    tested = [p for p in read_preferences(data, "test") if p.safer is not None]
    unsafe = scorer.score([(p.prompt, p.answers[1 - (p.safer or 0)]) for p in tested])
    safe = scorer.score([(p.prompt, p.answers[p.safer or 0]) for p in tested])
    assert (unsafe > 0).mean() > 0.9
    assert (safe < 0).mean() > 0.9


def test_the_manifest_holds_the_held_out_figures(cost: Path) -> None:
    manifest = json.loads((cost / "manifest.json").read_text())
    figures = manifest["metrics"]["test"]
    assert figures["accuracy_conflicting"] > 0.9
    assert figures["sign_accuracy"] > 0.9
    assert manifest["data"]["annotated_pairs"] == 240
    assert not (cost / "checkpoint.pt").exists()


def test_a_reward_on_a_language_model_is_normalised(data: Path, tmp_path: Path) -> None:
    base = tiny_policy.llama(tmp_path / "llama")
    tiny_preferences.write(tmp_path / "data", 240, 120)
    out = tmp_path / "reward"
    run = args(tmp_path / "data", base, out, "reward", backbone="lm", epochs=4, rank=4)
    score_model.main(run)
    scorer = OnnxScorer(out)
    rows = score_model.choose(run, "train")
    scores = scorer.score([(p.prompt, answer) for p in rows for answer in p.answers])
    assert scores.mean() == pytest.approx(0, abs=0.1)
    assert scores.std() == pytest.approx(1, abs=0.1)
    figures = json.loads((out / "manifest.json").read_text())["metrics"]["test"]
    assert figures["accuracy_annotated"] > 0.9


@pytest.mark.parametrize("backbone", ["encoder", "lm"])
def test_an_interrupted_run_resumes_to_the_same_curve(
    backbone: str, data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    monkeypatch.setattr(score_model, "export", lambda *given: curves.append(given[3]["losses"]))
    base = tiny_base if backbone == "encoder" else tiny_policy.llama(tmp_path / "llama")
    run = args(data, base, tmp_path / "whole", "cost", epochs=1, backbone=backbone)
    score_model.main(run)
    broken = replace(run, out=tmp_path / "broken", checkpoint_seconds=1e9)
    with monkeypatch.context() as patch:
        step = score_model.Run.step

        def interrupted(self: score_model.Run, rows: Any) -> None:
            if self.progress.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            step(self, rows)

        patch.setattr(score_model.Run, "step", interrupted)
        with pytest.raises(SystemExit, match="stopped at step 6: the same command goes on"):
            score_model.main(broken)
    if backbone == "lm":  # a frozen base is not written with each checkpoint
        saved = torch.load(broken.out / "checkpoint.pt", weights_only=True)["model"]
        assert all("lora" in name or name.startswith("head.") for name in saved)
    with pytest.raises(SystemExit, match="a run with other arguments or data"):
        score_model.main(replace(broken, sign=0.5))
    score_model.main(broken)
    assert len(curves[0]) > 8
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_training_stopped_in_the_final_evaluation_is_kept_and_a_strange_checkpoint_is_not(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = args(data, tiny_base, tmp_path, "cost", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(score_model, "score_metrics", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with ends_in_a_line("it is kept"), pytest.raises(SystemExit) as stop:
            score_model.main(run)
    assert stop.value.code == 128 + signal.SIGTERM
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    model = dict(state["model"])
    moved = {("head.weights" if k == "head.weight" else k): v for k, v in model.items()}
    torch.save(state | {"model": moved}, path)
    with pytest.raises(SystemExit, match=r"is not of this model: head.weight, head.weights \(2 in"):
        score_model.main(run)
    torch.save(state | {"model": model}, path)
    monkeypatch.setattr(score_model, "export", lambda *_: None)
    monkeypatch.setattr(score_model.Run, "step", lambda *_: pytest.fail("trained again"))
    score_model.main(run)


def test_pairs_that_only_answer_the_other_question_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        (0, None, (None, None)),
        (0, None, (True, False)),
        (None, 1, (None, None)),
        (0, 1, (None, None)),
    ]
    pairs = [
        Preference(f"p{n}", ("a", "b"), "s", helpful, harmless, unsafe=unsafe)
        for n, (helpful, harmless, unsafe) in enumerate(asked)
    ]
    tiny_preferences.write_rows(tmp_path / "pairs.train.jsonl", map(asdict, pairs))
    tiny_preferences.write_rows(tmp_path / "pairs.test.jsonl", map(asdict, pairs[:1]))
    for split in ("train", "test"):
        (tmp_path / f"demonstrations.{split}.jsonl").touch()
    for kind, prompts, counts in (
        ("reward", {"p0", "p1", "p3"}, "4 train pairs 3 say which answer helps more, 0 only"),
        ("cost", {"p1", "p2", "p3"}, "4 train pairs 2 say which answer harms less, 1 only whether"),
    ):
        run = score_model.Args(kind=kind, data=tmp_path)
        assert {p.prompt for p in score_model.choose(run, "train")} == prompts
        assert counts in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no test pairs for a cost: of 1 test pairs 0 say which"):
        score_model.choose(run, "test")


def test_no_held_out_pairs_and_what_is_no_encoder_are_told_before_training(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).write_text("" if "pairs.val" in path.name else path.read_text())
    with pytest.raises(SystemExit, match="no validation pairs for a cost"):
        score_model.main(args(tmp_path, tiny_base, tmp_path / "out", "cost"))
    assert not (tmp_path / "out").exists()
    llama = tiny_policy.llama(tmp_path / "llama")
    with pytest.raises(SystemExit, match="llama: not an encoder"):
        score_model.main(args(data, llama, tmp_path / "out", "cost"))


def test_two_processes_share_the_batches_out(data: Path, tmp_path: Path) -> None:
    """Each of them would train on everything, into one folder, if it took itself for the only
    one."""
    llama = tiny_policy.llama(tmp_path / "llama")
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", "training/configs/cpu2.yaml", "--main_process_port", "0",
            "-m", "training.score_model", "reward", "--backbone", "lm", "--base", str(llama),
            "--data", str(data), "--help-pairs", "0", "--epochs", "1", "--max-tokens", "48",
            "--tokens-per-batch", "600", "--no-bf16", "--out", str(tmp_path / "out"),
        ],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )  # fmt: skip
    assert len(re.findall(r"pairs, \d+ steps", done.stdout)) == 1
    assert len(re.findall(r"^test \{", done.stdout, re.MULTILINE)) == 1
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "--limit is 0: it has to be 1 or more"),
        ({"epochs": 0}, "--epochs is 0: it has to be 1 or more"),
        ({"help_pairs": -1}, "--help-pairs is -1: it has to be 0 or more"),
        ({"max_tokens": 20}, "--max-tokens, --prompt-tokens, --overlap: "),
    ],
)
def test_what_no_run_can_mean_is_refused_in_a_line(
    data: Path, tiny_base: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        score_model.main(args(data, tiny_base, tmp_path, "cost", **changes))


def test_a_damaged_checkpoint_is_told(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    for damage in (b"", b"PK", b"half a checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(damage)
        with pytest.raises(SystemExit, match=r"checkpoint\.pt is damaged"):
            score_model.main(args(data, tiny_base, tmp_path, "cost", limit=20))


def test_a_finished_run_is_not_trained_again_nor_overwritten_by_another(
    data: Path, tiny_base: Path, cost: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = {path.name: path.read_bytes() for path in cost.iterdir()}
    score_model.main(args(data, tiny_base, cost, "cost", epochs=4))
    assert "this run has finished: nothing to do" in capsys.readouterr().out
    for changes in ({"epochs": 1}, {"limit": 20}):
        with pytest.raises(SystemExit, match="has finished here: choose another --out"):
            score_model.main(args(data, tiny_base, cost, "cost", **changes))
    assert {path.name: path.read_bytes() for path in cost.iterdir()} == finished


def test_a_model_whose_run_nobody_knows_is_not_overwritten(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for manifest in ("", "[]", '{"kind": "cost"}'):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(SystemExit, match="has finished here: choose another --out"):
            score_model.main(args(data, tiny_base, tmp_path, "cost", limit=20))
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_base_that_no_onnx_file_holds_is_refused_before_it_is_trained(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.score_backbone._MOST_WEIGHTS", 1000)
    llama = tiny_policy.llama(tmp_path / "llama")
    with pytest.raises(SystemExit, match="take a --base of 1e-06 billion at most"):
        score_model.main(args(data, llama, tmp_path / "out", "cost", backbone="lm"))


def test_flipped_data_is_refused(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    for name in ("pairs", "demonstrations"):
        for split in ("train", "validation", "test"):
            rows = list(read_jsonl(data / f"{name}.{split}.jsonl"))
            for row in rows:
                if row.get("less_harmful") is not None:
                    row["less_harmful"] = 1 - row["less_harmful"]
            tiny_preferences.write_rows(tmp_path / f"{name}.{split}.jsonl", rows)
    with pytest.raises(SystemExit, match="the labels are flipped"):
        score_model.main(args(tmp_path, tiny_base, tmp_path / "out", "cost"))


def test_a_cost_that_came_out_upside_down_is_not_exported() -> None:
    with pytest.raises(SystemExit, match=r"cost 0.40 less than safe ones.*nothing was exported"):
        score_model.refuse_wrong_order({"validation": {"cost_unsafe_minus_safe": -0.4}})
    score_model.refuse_wrong_order({"validation": {"cost_unsafe_minus_safe": 0.4}})


def test_a_loss_that_is_no_number_stops_the_run_with_its_batch_saved(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run = args(data, tiny_base, tmp_path / "nan", "cost", learning_rate=1e30)
    with pytest.raises(SystemExit, match=r"the loss is nan at step \d+: stopped, its batch is"):
        score_model.main(run)
    saved = torch.load(tmp_path / "nan" / "nan_batch.pt", weights_only=True)
    assert saved[0]["windows"]
    assert not (tmp_path / "nan" / "manifest.json").exists()


def test_scores_that_tell_nothing_apart_or_are_no_numbers_are_not_normalised() -> None:
    model = EncoderScore(torch.nn.Identity(), 4)
    with pytest.raises(SystemExit, match="all answers score the same"):
        model.normalise(np.ones(3), centre=True)
    with pytest.raises(SystemExit, match="nan or infinity"):
        model.normalise(np.array([1.0, np.nan]), centre=False)


def test_a_trained_moderation_model_can_be_started_from(
    data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from training.model import ModerationModel
    from training.score_backbone import open_backbone

    trained = ModerationModel.from_base(tiny_base)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    trained.encoder.config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    (tmp_path / "summary.json").write_text(json.dumps({"args": {"base": "tiny"}}))
    out = tmp_path / "out"
    out.mkdir()
    backbone = open_backbone(args(data, tiny_base, out, "cost", init=tmp_path))
    assert backbone.base == "tiny"
    for ours, theirs in zip(
        backbone.model.body.parameters(), trained.encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(SystemExit, match=r"--init is what training.moderation wrote"):
        open_backbone(args(data, tiny_base, out, "cost", init=tmp_path / "nothing"))


def test_the_correlation_of_a_missing_model_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python -m training.score_model reward --out"):
        score_metrics_main(tmp_path / "reward", tmp_path / "cost", tmp_path)


def test_metrics_by_hand() -> None:
    pairs = [tiny_preferences.pair(n) for n in range(3)]  # two of them conflict, one is safe
    rewards = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = score_metrics(pairs, rewards, "reward")
    assert found["accuracy_annotated"] == pytest.approx(1 / 3, abs=1e-4)
    assert (found["accuracy_conflicting"], found["pairs_conflicting"]) == (0.5, 2)
    assert found["accuracy_not_conflicting"] == 0.0
    costs = np.array([[2.0, -1.0], [-1.0, -1.5], [-1.0, 1.0]])
    found = score_metrics(pairs, costs, "cost")
    # pair 0 is right; pair 1 has its harmful answer second, and costs it less
    assert found["accuracy_conflicting"] == 0.5
    assert found["sign_accuracy"] == pytest.approx(4 / 6, abs=1e-4)
    assert found["cost_unsafe_minus_safe"] == pytest.approx((2 - 1.5) / 2 - (-2) / 4)


# --- reward-cost correlation ---------------------------------------------------------------------


def test_correlation_of_a_monotone_curve() -> None:
    x, prompts = np.array([0.0, 1.0, 2.0, 3.0]), ["a", "b", "c", "d"]
    found = correlation(x, np.exp(x), prompts)
    assert found["spearman"] == 1.0
    assert found["pearson"] == pytest.approx(np.corrcoef(x, np.exp(x))[0, 1], abs=1e-4)
    found = correlation(x, -x, prompts)
    assert (found["pearson"], found["pearson_95"]) == (-1.0, (-1.0, -1.0))
    assert (found["answers"], found["prompts"]) == (4, 4)


def test_correlation_gives_ties_their_mean_rank() -> None:
    first, second = np.array([1.0, 1.0, 2.0, 3.0, 3.0]), np.array([2.0, 1.0, 1.0, 4.0, 3.0])
    expected = spearmanr(first, second).statistic
    assert correlation(first, second, list("abcde"))["spearman"] == pytest.approx(
        expected, abs=1e-4
    )


def test_the_interval_holds_the_estimate_and_is_wider_where_answers_share_a_prompt() -> None:
    rng = np.random.default_rng(0)
    centre = np.repeat(rng.normal(size=60), 5)  # five like answers to each prompt
    first = centre + rng.normal(size=300) * 0.1
    second = np.repeat(rng.normal(size=60), 5) - 0.5 * centre
    widths = []
    for prompts in ([str(i // 5) for i in range(300)], [str(i) for i in range(300)]):
        found = correlation(first, second, prompts, rounds=200)
        assert found == correlation(first, second, prompts, rounds=200)  # seeded
        low, high = found["pearson_95"]
        assert low < found["pearson"] < high
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1]


def test_a_correlation_that_cannot_be_is_none() -> None:
    flat = correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0]), ["a", "b", "c"])
    assert (flat["pearson"], flat["spearman_95"], flat["answers"]) == (None, None, 3)
    one = correlation(np.array([1.0, 2.0]), np.array([2.0, 1.0]), ["a", "a"])
    assert (one["pearson"], one["prompts"]) == (None, 1)
    assert correlation(np.array([]), np.array([]), [])["answers"] == 0


def test_held_out_answers_are_each_scored_once_and_know_their_prompts_kind(tmp_path: Path) -> None:
    rows = [*[tiny_preferences.pair(n, "test") for n in range(3)], tiny_preferences.pair(0, "test")]
    shown = [tiny_preferences.demonstration(n, "test") for n in range(4)]
    tiny_preferences.write_rows(tmp_path / "pairs.test.jsonl", map(asdict, rows))
    tiny_preferences.write_rows(tmp_path / "demonstrations.test.jsonl", map(asdict, shown))
    found = held_out(tmp_path)
    assert len({(row.prompt, row.answer) for row in found}) == len(found)
    kinds = {row.prompt: row.harmful for row in found}
    assert kinds["how to harm number 0"] is True
    assert kinds["how to make cake number 2"] is False  # a borderline demonstration's
    assert kinds["how to make cake number 3"] is False
    assert set(kinds.values()) == {True, False}
    shown[2] = replace(shown[2], kind="redirect")
    tiny_preferences.write_rows(tmp_path / "demonstrations.test.jsonl", map(asdict, shown))
    kinds = {row.prompt: row.harmful for row in held_out(tmp_path)}
    assert kinds["how to make cake number 2"] is None


def test_the_command_prints_the_correlation_of_two_models_by_the_kind_of_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tiny_policy.scorer(tmp_path / "reward", "reward")
    cost = tiny_policy.scorer(tmp_path / "cost", "cost")
    data = tiny_preferences.write(tmp_path / "data", 90, 90)
    score_metrics_main(reward, cost, data, rounds=50)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompts of kind"] for line in printed] == ["all", "harmful", "harmless"]
    everything, harmful, harmless = printed
    rows = held_out(data)
    assert everything["answers"] == len(rows)
    assert harmful["answers"] == sum(row.harmful is True for row in rows)
    assert harmless["answers"] == sum(row.harmful is False for row in rows)
    pairs = [(row.prompt, row.answer) for row in rows]
    scores = [OnnxScorer(folder).score(pairs) for folder in (reward, cost)]
    expected = np.corrcoef(*scores)[0, 1]
    assert everything["pearson"] == pytest.approx(expected, abs=1e-4)
    assert everything["pearson_95"][0] <= expected <= everything["pearson_95"][1]
    score_metrics_main(reward, cost, data, limit=12, rounds=50)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["answers"] == 12


def test_models_of_one_kind_are_compared_on_the_same_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = [tiny_policy.scorer(tmp_path / name, "cost") for name in ("one", "two")]
    data = tiny_preferences.write(tmp_path / "data", 90, 90)
    score_metrics_main(models=tuple(costs), data=data, rounds=20)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["right"] == second["right"]
    assert first["pairs_annotated"] == second["pairs_annotated"] > 0
    assert second["more_right_95"] == [0.0, 0.0]
    with pytest.raises(SystemExit, match="is a cost model, and a reward model was asked for"):
        score_metrics_main(models=(costs[0],), kind="reward", data=data)
    with pytest.raises(SystemExit, match="--limit is 0"):
        score_metrics_main(models=tuple(costs), data=data, limit=0)


def test_the_correlation_over_no_test_answers_is_refused(tmp_path: Path) -> None:
    reward = tiny_policy.scorer(tmp_path / "reward", "reward")
    cost = tiny_policy.scorer(tmp_path / "cost", "cost")
    for name in ("pairs", "demonstrations"):
        (tmp_path / f"{name}.test.jsonl").touch()
    with pytest.raises(SystemExit, match="fewer than two test prompts"):
        score_metrics_main(reward, cost, tmp_path)
    flipped = tiny_policy.scorer(tmp_path / "flipped", "cost", flip=True)
    with pytest.raises(SystemExit, match="its sign is flipped"):
        score_metrics_main(reward, flipped, tmp_path)
