"""The recipe on a tiny Llama with tiny score models: it learns, resumes, and stops if it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("onnx")

import tiny_policy  # noqa: E402
from terminating import terminated  # noqa: E402

from training import plots  # noqa: E402
from training.ppo_lag import Args, align, main  # noqa: E402
from training.scorers import SAFE, UNSAFE, refuse_wrong_sign  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy.llama(folder / "llama")
    tiny_policy.preferences(folder / "preferences")
    tiny_policy.scorer(folder / "reward", "reward")
    tiny_policy.scorer(folder / "cost", "cost")
    tiny_policy.scorer(folder / "flipped", "cost", flip=True)
    return folder


@pytest.fixture
def args(tiny: Path, tmp_path: Path) -> Args:
    return Args(
        policy=str(tiny / "llama"),
        bases=tiny,
        data=tiny / "preferences",
        reward=tiny / "reward",
        cost=tiny / "cost",
        out=tmp_path / "run",
        steps=4,
        rollouts=8,
        minibatch=4,
        new_tokens=6,
        rank=4,
        window=16,
        save_every=2,
        dtype="float32",
    )


def curves(out: Path) -> list[dict[str, float]]:
    """Without clocks."""
    rows = plots.read(out)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def weights(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / "adapter_model.safetensors")


class Words:
    """A scorer that counts a word, and calls an answer unsafe by its words."""

    def __init__(self, word: str, *, price: float, free: float = 0.0) -> None:
        self.word, self.price, self.free = word, price, free

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return np.array(
            [
                1.0
                if pair in UNSAFE
                else -1.0
                if pair in SAFE
                else self.price * pair[1].split().count(self.word) - self.free
                for pair in pairs
            ]
        )


def test_a_run_writes_curves_samples_adapter_and_last_its_summary(args: Args) -> None:
    main(args)
    rows = plots.read(args.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"reward", "cost", "lambda", "kl", "length", "entropy"} <= rows[0].keys()
    assert "</svg>" in (args.out / "curves.svg").read_text()
    assert {"generate", "score", "evaluate", "update"} == {
        key.removeprefix("seconds/") for key in rows[0] if key.startswith("seconds/")
    }
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    summary = json.loads((args.out / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["base"] == args.policy
    assert list((args.out / "events").iterdir())
    samples = [json.loads(line) for line in (args.out / "samples.jsonl").read_text().splitlines()]
    assert samples[0].keys() == {"step", "prompt", "answer", "reward", "cost"}
    assert any(w.abs().sum() > 0 for name, w in weights(args.out).items() if "lora_B" in name)


def test_a_run_that_was_cut_goes_on_to_the_same_curve(args: Args) -> None:
    whole, cut = replace(args, ptx=0.1), replace(args, out=args.out.with_name("cut"), ptx=0.1)
    main(whole)
    main(replace(cut, steps=2))
    # What a kill after the checkpoint leaves: steps that will be done again, and half a line.
    with (cut.out / plots.FILE).open("a") as file:
        file.write(json.dumps({"step": 3, "reward": 99.0}) + '\n{"step": 4, "rew')
    main(cut)
    assert curves(cut.out) == curves(whole.out)
    for name, weight in weights(whole.out).items():
        assert torch.equal(weight, weights(cut.out)[name])


def test_a_run_starts_from_an_adapter_and_measures_kl_to_it(args: Args) -> None:
    main(args)
    onward = replace(args, policy=str(args.out), out=args.out.with_name("onward"), steps=2)
    main(onward)
    first, second = plots.read(onward.out)
    assert first["kl"] == pytest.approx(0.0, abs=1e-3)
    assert second["kl"] != 0
    summary = json.loads((onward.out / "summary.json").read_text())
    assert summary["base"] == args.policy
    assert not (onward.out / "reference").exists()


def test_the_policy_learns_what_pays_and_lambda_follows_the_cost(args: Args) -> None:
    quick = replace(args, steps=14, rollouts=32, minibatch=16, learning_rate=0.01, kl=0.001)
    free = replace(quick, lambda_init=0.0, out=args.out / "ppo")
    reward, cost = Words("sugar", price=1.0), Words("sugar", price=1.0, free=1.0)
    align(free, reward, cost)
    rows = plots.read(free.out)
    assert all(row["lambda"] == 0 for row in rows)
    assert np.mean([row["reward"] for row in rows[-5:]]) > rows[0]["reward"] + 1.5
    bound = replace(quick, lambda_rate=0.5, window=32, out=args.out / "ppo_lag")
    align(bound, reward, cost)
    held = plots.read(bound.out)
    assert held[0]["cost_average"] < 0
    assert held[0]["lambda"] < 1
    late = np.mean([row["cost"] for row in held[-5:]])
    assert late < np.mean([row["cost"] for row in rows[-5:]]) - 0.5
    for before, after in pairwise(held):
        rises = after["lambda"] > before["lambda"]
        assert rises == (after["cost_average"] > 0) or after["lambda"] == bound.lambda_max


def test_a_flipped_cost_model_is_refused_before_anything_is_trained(args: Args, tiny: Path) -> None:
    with pytest.raises(SystemExit, match="sign is flipped"):
        main(replace(args, cost=tiny / "flipped"))
    assert not args.out.exists()


def test_a_cost_model_whose_zero_parts_nothing_is_refused() -> None:
    class Shifted(Words):
        def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
            return super().score(pairs) + 5

    with pytest.raises(SystemExit, match="0 does not part"):
        refuse_wrong_sign(Shifted("x", price=0.0))


def test_a_reward_in_the_place_of_a_cost_is_refused(args: Args, tiny: Path) -> None:
    with pytest.raises(SystemExit, match="is a reward model, and a cost model was asked for"):
        main(replace(args, cost=tiny / "reward"))


def test_a_missing_score_model_says_how_to_make_it(args: Args) -> None:
    with pytest.raises(SystemExit, match=r"python -m training.score_model cost --out"):
        main(replace(args, cost=args.out / "nowhere"))


def test_a_score_that_is_no_number_stops_the_run_with_its_batch_saved(args: Args) -> None:
    class Broken(Words):
        calls = 0

        def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
            self.calls += 1
            return super().score(pairs) * (np.nan if self.calls == 3 else 1.0)

    with pytest.raises(
        SystemExit, match=r"step 3: .* not finite; its batch is in .*good state in .*checkpoint.pt"
    ):
        align(args, Broken("sugar", price=1.0), Words("harm", price=1.0, free=0.5))
    saved = torch.load(args.out / "failed_batch.pt", weights_only=True)
    assert saved["reward"].isnan().all()
    assert len(saved["answers"]) == args.rollouts
    assert saved["sequences"]["answers"].shape[0] == args.rollouts
    assert not (args.out / "summary.json").exists()
    align(args, Words("sugar", price=1.0), Words("harm", price=1.0, free=0.5))
    assert [row["step"] for row in plots.read(args.out)] == [1, 2, 3, 4]


def test_a_score_model_that_gives_no_number_leaves_its_batch(args: Args, tiny: Path) -> None:
    """The ONNX model itself raises; training has to save the batch as for any nan."""
    # No word of the check at the start, so that it is met in an answer.
    broken = tiny_policy.scorer(args.out.parent / "broken", "reward", nan_word="cake")
    with pytest.raises(
        SystemExit, match=r"step 1: .* \(bag-reward: .*no number\); its batch is in"
    ):
        main(replace(args, reward=broken))
    saved = torch.load(args.out / "failed_batch.pt", weights_only=True)
    assert len(saved["answers"]) == args.rollouts
    assert saved["reward"].isnan().any()
    assert saved["cost"].isfinite().all()
    for row, score in zip(saved["answers"], saved["reward"], strict=True):
        assert ("cake" in row["prompt"] + row["answer"]) == bool(score.isnan())


def test_a_failure_before_the_first_checkpoint_names_none(args: Args) -> None:
    class Broken(Words):
        def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
            return np.full(len(pairs), np.nan)

    with pytest.raises(SystemExit, match="no checkpoint was due yet"):
        align(args, Broken("sugar", price=1.0), Words("harm", price=1.0, free=0.5))
    assert not (args.out / "checkpoint.pt").exists()


def test_going_on_with_other_settings_is_refused(args: Args) -> None:
    main(replace(args, steps=1))
    with pytest.raises(SystemExit, match="another kl"):
        main(replace(args, kl=0.5))


def test_a_checkpoint_of_another_model_and_a_lambda_that_cannot_be_are_refused(args: Args) -> None:
    main(replace(args, steps=2))
    path = args.out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["adapter"].popitem()
    torch.save(state, path)
    with pytest.raises(SystemExit, match=r"is not of this model: .*lora_.* \(1 in all\)"):
        main(args)
    with pytest.raises(SystemExit, match="lambda must start within"):
        main(replace(args, lambda_init=9.0, out=args.out / "other"))


def command(args: Args, *launcher: str) -> tuple[list[str], dict[str, str]]:
    """The command line that gives `args`, and its environment."""
    line = [sys.executable, *launcher, "-m", "training.ppo_lag"]
    names = ("policy", "bases", "data", "reward", "cost", "out", "rollouts", "minibatch")
    for name in (*names, "new_tokens", "rank", "dtype", "steps", "save_every"):
        line += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return line, os.environ | {"OMP_NUM_THREADS": "1"}


def test_the_command_stops_at_a_signal_and_goes_on_from_there(args: Args) -> None:
    line, environment = command(replace(args, steps=300, save_every=100))
    rest, errors = terminated(line, environment, at="step 2/")
    assert "the same command goes on from there" in errors
    done = 2 + rest.count("step ")
    line, environment = command(replace(args, steps=done + 1))
    again = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {done}" in again.stdout


def test_two_processes_share_one_multiplier(args: Args) -> None:
    two = ROOT / "training" / "configs" / "cpu2.yaml"
    line, environment = command(
        replace(args, steps=2, rollouts=4),
        *("-m", "accelerate.commands.launch", "--config_file", str(two)),
    )
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = plots.read(args.out)
    assert [row["step"] for row in rows] == [1, 2]
    # `cost` is the mean over both processes, the average that lambda sees covers their answers.
    assert rows[0]["cost_average"] == pytest.approx(rows[0]["cost"], abs=1e-5)
    both = (rows[0]["cost"] + rows[1]["cost"]) / 2
    assert rows[1]["cost_average"] == pytest.approx(both, abs=1e-5)
    assert json.loads((args.out / "summary.json").read_text())["processes"] == 2


def test_plots_are_drawn_from_a_runs_curves(args: Args, tmp_path: Path) -> None:
    with plots.Curves(_made(tmp_path / "one")) as run:
        for step in range(1, 6):
            run.add(step, dict.fromkeys((*plots.PANELS, "cost_limit"), step * 0.1))
    for name in ("a.svg", "b.svg", "c.png"):
        plots.draw((tmp_path / "one",), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "lambda" in (tmp_path / "a.svg").read_text()


def test_plotting_a_folder_without_curves_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no curves in"):
        plots.draw((tmp_path,), tmp_path / "a.svg")


def test_smoothing_starts_at_the_first_value() -> None:
    assert plots.smooth([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    assert plots.smooth([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
