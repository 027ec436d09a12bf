"""SFT and DPO, run for real on a tiny Llama: they learn, resume to the same curve, stop on nan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import tiny_policy  # noqa: E402
import tiny_preferences  # noqa: E402

from training import dpo, plots, resuming, sft, tuning  # noqa: E402
from training.lm import load_policy  # noqa: E402
from training.preferences import Preference  # noqa: E402

SFT_ROWS = {"refusal": 8, "redirect": 8, "borderline": 8, "benign": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alignment")
    tiny_policy.llama(folder / "base")
    tiny_preferences.write(folder / "data")
    return folder


def common(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": root / "data",
        "bases": root,
        "bf16": False,
        "max_tokens": 96,
        "rank": 4,
        "batch": 4,
        "log_steps": 1,
        "save_steps": 100,
        "learning_rate": 3e-3,
    } | changes


def sft_args(root: Path, out: Path, **changes: Any) -> sft.Args:
    return sft.Args(policy=str(root / "base"), out=out, rows=SFT_ROWS, **common(root, **changes))


def claim(out: Path, args: sft.Args) -> None:
    resuming.claim(out, args, rows_per_update=tuning.rows_per_update(args))


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    """A finished SFT run."""
    sft.main(sft_args(root, root / "sft", epochs=2))
    return root / "sft"


def losses(out: Path) -> list[float]:
    history = json.loads((out / "summary.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def rows_of(out: Path) -> list[dict[str, float]]:
    return [row for row in plots.read(out) if "loss" in row]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGTERM, within a step."""
    original = tuning.StopAtSignal.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(tuning.StopAtSignal, "on_step_end", on_step_end)


def test_sft_learns_and_says_what_it_did(root: Path, tuned: Path) -> None:
    curve = losses(tuned)
    assert len(curve) == 16
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["rows"] == SFT_ROWS
    assert summary["base"] == str(root / "base")
    assert load_policy(str(tuned)).adapter == tuned


def test_sft_stopped_by_a_signal_resumes_to_the_same_curve(
    root: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sft"
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(SystemExit, match="step 5 of 16: the same command goes on") as stop:
            sft.main(sft_args(root, out, epochs=2))
    assert stop.value.code == 128 + signal.SIGTERM
    assert not (out / "summary.json").exists()
    with monkeypatch.context() as patch:
        choose = sft.choose
        patch.setattr(sft, "choose", lambda *given: choose(*given)[1:])
        with pytest.raises(SystemExit, match="is of a run with another data"):
            sft.main(sft_args(root, out, epochs=2))
    # A checkpoint that a kill left half written is passed over.
    (out / "checkpoints" / "checkpoint-9").mkdir()
    sft.main(sft_args(root, out, epochs=2))
    assert losses(out) == pytest.approx(losses(tuned), abs=1e-5)
    assert [row["step"] for row in rows_of(out)] == list(range(1, 17))
    assert [row["loss"] for row in rows_of(out)] == losses(out)


def test_a_run_of_fewer_steps_than_are_logged_at_once_finishes_with_a_curve(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = sft_args(root, tmp_path / "sft", limit=4, log_steps=5)
    with monkeypatch.context() as patch:  # as earlier versions left it: no row of a curve
        patch.setattr(tuning.Logged, "on_log", lambda *_, **__: None)
        sft.main(args)
    assert (args.out / "summary.json").exists()
    sft.main(sft_args(root, tmp_path / "short", limit=4, log_steps=5))
    assert [row["step"] for row in rows_of(tmp_path / "short")] == [1]


def test_the_curves_of_a_run_are_written_and_drawn(tuned: Path, preferred: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for out, held_out in ((tuned, []), (preferred, list(range(2, 27, 2)))):
        events = EventAccumulator(str(out / "events"))
        events.Reload()
        for name in ("loss", "learning_rate"):
            shown = [event.value for event in events.Scalars(name)]
            assert shown == pytest.approx([row[name] for row in rows_of(out)])
        seen = [row for row in plots.read(out) if "eval_rewards/accuracies" in row]
        assert [row["step"] for row in seen] == held_out
        assert "</svg>" in (out / "curves.svg").read_text()
    assert seen[-1]["eval_rewards/accuracies"] > 0.8
    assert seen[-1]["eval_rewards/margins"] > seen[0]["eval_rewards/margins"]


def test_another_run_in_the_same_folder_is_refused(root: Path, tuned: Path) -> None:
    with pytest.raises(SystemExit, match=r"is of a run with another learning_rate \(0.003, now 1"):
        sft.main(sft_args(root, tuned, epochs=2, learning_rate=1.0))


def test_going_on_with_other_rows_per_update_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sft"
    claim(out, sft_args(root, out, batch=4))
    # As many rows, spread otherwise over steps and processes.
    claim(out, sft_args(root, out, batch=2, accumulate=2))
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        claim(out, sft_args(root, out, batch=1))
    for changes in ({"batch": 16}, {"accumulate": 2}):
        with pytest.raises(SystemExit, match=r"another batch x accumulate x processes \(4, now"):
            sft.main(sft_args(root, out, **changes))


def test_going_on_from_a_policy_that_was_trained_again_is_refused(
    root: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"first")
    args = sft_args(root, tmp_path / "sft")
    args.policy = str(adapter)
    claim(args.out, args)
    (adapter / "adapter_model.safetensors").write_bytes(b"second")
    with pytest.raises(SystemExit, match="another policy_weights"):
        claim(args.out, args)


@pytest.mark.parametrize("left", ["", '{"policy": "x', "[]"])
def test_arguments_that_are_half_written_are_an_error(
    root: Path, tmp_path: Path, left: str
) -> None:
    (tmp_path / "args.json").write_text(left)
    with pytest.raises(SystemExit, match=r"args.json is damaged or half written"):
        claim(tmp_path, sft_args(root, tmp_path))


def test_arguments_are_written_whole_by_the_main_process(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path, sft_args(root, tmp_path))
    assert not (tmp_path / "args.json").exists()
    monkeypatch.setenv("RANK", "0")
    replaced = []
    monkeypatch.setattr(resuming, "write_json", lambda path, data: replaced.append((path, data)))
    claim(tmp_path, sft_args(root, tmp_path))
    ((path, data),) = replaced  # write_json writes, then renames
    assert path == tmp_path / "args.json"
    assert data["rows_per_update"] == 4


@pytest.mark.parametrize("name", ["batch", "accumulate", "epochs"])
def test_a_count_of_zero_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit, match=f"--{name} is 0: it has to be 1 or more"):
        sft.main(sft_args(root, tmp_path / "sft", **{name: 0}))
    assert not (tmp_path / "sft").exists()


def test_a_loss_that_is_no_number_stops_the_run_with_its_batch_saved(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        SystemExit,
        match=r"the loss is nan at step \d+: stopped, its batch is in .*No checkpoint yet",
    ):
        sft.main(sft_args(root, tmp_path / "nan", learning_rate=1e30))
    batch = torch.load(tmp_path / "nan" / "nan_batch.pt", weights_only=False)
    assert batch["input_ids"].shape[0] == 4
    assert not (tmp_path / "nan" / "summary.json").exists()


def test_an_adapter_that_the_last_update_spoilt_is_not_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"sft: .*lora_\w.* is not finite: training went astray"):
        sft.main(sft_args(root, tmp_path / "sft", limit=8, learning_rate=1e39))
    assert not (tmp_path / "sft" / "adapter_model.safetensors").exists()


def test_a_mistaken_argument_leaves_the_folder_free(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "sft"
    mistaken = sft_args(root, out)
    mistaken.policy = str(tmp_path)
    with pytest.raises(SystemExit, match="no model, no adapter"):
        sft.main(mistaken)
    with pytest.raises(SystemExit, match=r"--plot is curve.doc: its name has to end in .svg"):
        sft.main(sft_args(root, out, plot=Path("curve.doc")))
    with pytest.raises(SystemExit, match="file: no folder can be made here"):
        sft.main(sft_args(root, tmp_path / "file"))
    claim(out, sft_args(root, out))


def test_nothing_that_fits_is_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no demonstration fits in 3 tokens"):
        sft.main(sft_args(root, tmp_path / "none", max_tokens=3))


def test_a_kind_is_not_asked_twice_before_every_prompt_was(root: Path) -> None:
    shown = [tiny_preferences.demonstration(4 * n) for n in range(5)]
    twice = [*shown, *(type(d)(d.prompt, "what is harm", d.kind, d.source) for d in shown)]
    args = sft_args(root, root, seed=3)
    args.rows = {"refusal": 5}
    assert len({d.prompt for d in sft.choose(twice, args)}) == 5


# --- dpo -----------------------------------------------------------------------------------------


def dpo_args(root: Path, tuned: Path, out: Path, **changes: Any) -> dpo.Args:
    fields = {"pairs": 48, "help_pairs": 4, "beta": 0.5, "held_out": 10, "epochs": 2}
    fields |= {"held_out_steps": 2} | changes
    return dpo.Args(policy=str(tuned), out=out, **common(root, **fields))


@pytest.fixture(scope="module")
def preferred(root: Path, tuned: Path) -> Path:
    """A finished DPO run, from the adapter of SFT."""
    dpo.main(dpo_args(root, tuned, root / "dpo"))
    return root / "dpo"


def test_dpo_starts_at_log_two_and_learns_what_is_preferred(preferred: Path) -> None:
    assert losses(preferred)[0] == pytest.approx(0.6931, abs=1e-3)
    held_out = json.loads((preferred / "summary.json").read_text())["held_out"]
    assert held_out["pairs"] == 10
    assert held_out["accuracy"] > 0.8
    assert held_out["loss"] < 0.6


def test_dpo_stopped_by_a_signal_resumes_to_the_same_curve(
    root: Path, tuned: Path, preferred: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dpo"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(SystemExit, match="stopped at step 3"):
            dpo.main(dpo_args(root, tuned, out))
    dpo.main(dpo_args(root, tuned, out))
    assert losses(out) == pytest.approx(losses(preferred), abs=1e-5)
    for ours, theirs in zip(plots.read(out), plots.read(preferred), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (out, preferred))
    assert ours["held_out"] == pytest.approx(theirs["held_out"], abs=1e-3)


def test_our_log_probabilities_are_those_of_trl(root: Path, tuned: Path, preferred: Path) -> None:
    from datasets import Dataset, load_from_disk

    lm = load_policy(str(tuned))
    rows = load_from_disk(str(preferred / "pairs"))
    cache = next(
        found
        for path in (preferred / "pairs").glob("cache-*.arrow")
        if "ref_chosen_logps" in (found := Dataset.from_file(str(path))).column_names
    )
    pairs = [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in rows]
    ours = dpo.log_probabilities(lm, pairs)
    assert ours.tolist() == pytest.approx(list(cache["ref_chosen_logps"]), abs=1e-3)


def test_each_objective_prefers_by_its_own_label() -> None:
    harmful_first = tiny_preferences.pair(0)
    answers = {o: dpo.better_of(harmful_first, o) for o in ("dual", "helpful", "harmless")}
    assert answers == {"dual": 1, "helpful": 0, "harmless": 1}
    assert dpo.better_of(harmful_first, "single") == harmful_first.trade_off
    two_safe = tiny_preferences.pair(2)
    assert [dpo.better_of(two_safe, o) for o in ("dual", "harmless")] == [0, None]


ASKED = [  # what may be known of two answers
    Preference("p", ("Do it.", "Leave it."), "s", helpful, harmless, unsafe=unsafe)
    for helpful, harmless, unsafe in (
        (0, None, (None, None)),  # help alone
        (0, None, (True, False)),  # of a pair of which one is unsafe
        (0, None, (False, False)),  # of two safe ones
        (None, 1, (None, None)),  # harm alone
        (None, 1, (True, False)),
        (None, 0, (True, False)),  # contradicted
        (0, 1, (True, False)),  # both
        (None, None, (None, None)),
    )
]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("helpful", [0, 0, 0, None, None, None, 0, None]),
        ("harmless", [None, None, None, 1, 1, 0, 1, None]),
        ("single", [None, None, 0, None, None, None, 1, None]),
        ("dual", [None, 1, 0, None, 1, None, 1, None]),
    ],
)
def test_an_objective_does_not_use_a_pair_that_only_answers_the_other_question(
    objective: Any, expected: list[int | None]
) -> None:
    assert [dpo.better_of(p, objective) for p in ASKED] == expected


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("helpful", [0, 0, 0, None, None, None, 0, None]),
        ("harmless", [None, None, None, 1, 1, 0, 1, None]),
        ("single", [None, None, 0, 1, 1, None, 1, None]),
        ("dual", [None, 1, 0, 1, 1, None, 1, None]),
    ],
)
def test_an_own_pair_is_taken_at_its_word_unless_it_would_prefer_harm(
    objective: Any, expected: list[int | None]
) -> None:
    assert [dpo.by_word(p, objective) for p in ASKED] == expected


def test_dual_preferences_never_reject_a_refusal_for_a_safe_answer() -> None:
    p = Preference(
        "p",
        ("I'm sorry, I can't help with that.", "Sure: talk it over."),
        "s",
        more_helpful=1,
        severity=(0, 0),
        unsafe=(False, False),
    )
    assert dpo.better_of(p, "dual") is None
    assert dpo.better_of(p, "helpful") == 1


def test_on_policy_pairs_are_trained_on_beside_the_others(
    root: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import asdict, replace

    harmful = replace(tiny_preferences.pair(1), source="on_policy")
    everyday = Preference(
        "how to make cake",
        ("make cake sugar", "I'm sorry, but I can't help with that."),
        "on_policy",
        more_helpful=0,  # not refusing is the aim here, and the only question that was asked
        unsafe=(False, False),
    )
    useless = replace(everyday, unsafe=(None, None))  # more helpful, and nobody knows if safe
    rows = [asdict(p) for p in (harmful, everyday, useless)]
    tiny_preferences.write_rows(tmp_path / "own.jsonl", rows)
    args = dpo_args(
        root, tuned, tmp_path / "dpo", pairs=7, help_pairs=0, extra=tmp_path / "own.jsonl"
    )
    dpo.main(args)
    rows = json.loads((tmp_path / "dpo" / "summary.json").read_text())["rows"]
    assert rows == {"annotated_pairs": 7, "on_policy": 2}
    assert "dual, extra: of 3 pairs 1 are left out since they do not say" in capsys.readouterr().err


def test_dpo_does_not_go_on_with_the_pairs_of_other_data(
    root: Path, tuned: Path, preferred: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = dpo.choose
    monkeypatch.setattr(dpo, "choose", lambda *given: choose(*given)[::-1])
    with pytest.raises(SystemExit, match="is of a run with another data"):
        dpo.main(dpo_args(root, tuned, preferred))


def test_a_run_that_does_not_say_which_rows_it_is_on_is_not_gone_on_with(
    root: Path, tuned: Path, preferred: Path, tmp_path: Path
) -> None:
    """Earlier versions wrote no data.json."""
    (preferred / "data.json").rename(tmp_path / "data.json")
    with pytest.raises(SystemExit, match=r"dpo has no data.json.*nobody knows which rows"):
        dpo.main(dpo_args(root, tuned, preferred))
    assert not (preferred / "data.json").exists()
    (tmp_path / "data.json").rename(preferred / "data.json")


def test_pairs_that_a_kill_left_half_written_are_written_anew(tmp_path: Path) -> None:
    rows = dpo.as_rows([dpo.Choice(f"p{n}", "better", "worse", "s") for n in range(4)])
    (tmp_path / "pairs.partial").mkdir()
    assert len(dpo.dataset_of(rows, tmp_path / "pairs")) == 4
    assert len(dpo.dataset_of(rows, tmp_path / "pairs")) == 4
    assert not (tmp_path / "pairs.partial").exists()


def test_dpo_without_its_extra_pairs_says_so_before_anything_else(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"own.jsonl is missing"):
        dpo.main(dpo_args(root, tuned, tmp_path / "dpo", extra=tmp_path / "own.jsonl"))
    (tmp_path / "own.jsonl").touch()
    with pytest.raises(SystemExit, match=r"own.jsonl holds no pairs"):
        dpo.main(dpo_args(root, tuned, tmp_path / "dpo", extra=tmp_path / "own.jsonl"))
    assert not (tmp_path / "dpo").exists()


def test_dpo_does_not_train_on_help_alone(root: Path, tuned: Path, tmp_path: Path) -> None:
    for path in (root / "data").iterdir():
        (tmp_path / path.name).write_text("" if "pairs.train" in path.name else path.read_text())
    with pytest.raises(SystemExit, match="no dual pair fits in 96 tokens"):
        dpo.main(dpo_args(root, tuned, tmp_path / "dpo", data=tmp_path))


# --- processes -----------------------------------------------------------------------------------


def launch_two(root: Path, recipe: str, policy: Path, out: Path, *options: str) -> None:
    """The arguments of `common`, with half the batch for each of two processes."""
    config = Path(__file__).parents[2] / "training" / "configs" / "cpu2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", f"training.{recipe}", "--policy", str(policy), "--data", str(root / "data")]
    command += ["--bases", str(root), "--out", str(out), "--no-bf16"]
    command += ["--max-tokens", "96", "--rank", "4", "--batch", "2", "--log-steps", "1"]
    command += ["--save-steps", "100", "--learning-rate", "3e-3", *options]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_take_the_steps_of_one_with_a_double_batch(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    rows = [part for k, n in SFT_ROWS.items() for part in (f"--rows.{k}", str(n))]
    launch_two(root, "sft", root / "base", tmp_path / "two", "--epochs", "2", *rows)
    assert losses(tmp_path / "two") == pytest.approx(losses(tuned), abs=2e-4)


def test_two_processes_of_dpo_share_the_pairs_that_one_wrote(
    root: Path, tuned: Path, tmp_path: Path
) -> None:
    options = ("--pairs", "8", "--help-pairs", "0", "--held-out", "0")
    launch_two(root, "dpo", tuned, tmp_path / "two", *options)
    assert (tmp_path / "two" / "data.json").exists()
    assert losses(tmp_path / "two")[0] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed_zero3", "cpu2"])
def test_accelerate_reads_the_configs(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).parents[2] / "training" / "configs" / f"{name}.yaml"
    assert load_config_from_file(str(path)).num_processes >= 2


@pytest.mark.parametrize("recipe", ["sft", "dpo", "score_model"])
def test_every_argument_has_an_option_of_its_own(recipe: str) -> None:
    """A field named like one of the parser's own options could not be set from the command line."""
    import importlib
    from dataclasses import fields

    names = {field.name for field in fields(importlib.import_module(f"training.{recipe}").Args)}
    assert not names & {"help", "tyro_print_completion", "tyro_write_completion"}
