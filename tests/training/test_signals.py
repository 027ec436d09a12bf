"""SIGINT and SIGTERM end every command in a line that says how to go on, with a shell's status."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")
pytest.importorskip("onnx")

import tiny_policy  # noqa: E402
import tiny_preferences  # noqa: E402
from terminating import terminated  # noqa: E402

from guardrail.errors import ModerationError  # noqa: E402

# All of them now, so that none is first imported, and kept, with what a test has put in its place.
from training import (  # noqa: E402, F401
    dpo,
    everyday,
    export_policy,
    on_policy,
    ppo_lag,
    score_metrics,
    score_model,
    sft,
    suppression,
)
from training.ending import ends_in_a_line  # noqa: E402

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_is_within_in_a_line_and_is_given_back(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, ends_in_a_line("nothing is kept"):
        os.kill(os.getpid(), number)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "stopped: nothing is kept\n"
    assert signal.getsignal(number) == before


def test_an_error_of_the_sdk_is_a_line() -> None:
    with (
        pytest.raises(SystemExit, match=r"^bag: gave no number$"),
        ends_in_a_line("nothing is kept"),
    ):
        raise ModerationError("bag: gave\nno number")


def test_an_error_of_a_file_is_a_line(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"No such file or directory: .*missing'$"),
        ends_in_a_line("nothing is kept"),
    ):
        (tmp_path / "missing").read_text()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("everyday", "the turns in {out} are kept: the same command goes on from there"),
        ("on_policy", "the draws in {out} are kept: the same command goes on from there"),
        ("suppression", "the answers in {out} are kept: the same command goes on from there"),
        ("export_policy", "{out} is whole once it has a manifest.json: the same command makes it"),
        ("score_metrics", "nothing is kept: the same command starts anew"),
        ("score_model", "{out} keeps the last checkpoint: the same command goes on from it"),
        ("sft", "{out} keeps the last checkpoint: the same command goes on from it"),
        ("dpo", "{out} keeps the last checkpoint: the same command goes on from it"),
        ("ppo_lag", "{out} keeps the last checkpoint: the same command goes on from it"),
    ],
)
def test_a_command_that_is_stopped_outside_of_its_steps_says_what_is_kept(
    recipe: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    # Whatever a command opens first.
    for name in (
        "lm.load_policy", "tuning.load_policy", "rollout.load_policy", "scorers.open_scorer",
        "score_backbone.open_backbone", "data.read_examples",
    ):  # fmt: skip
        monkeypatch.setattr(f"training.{name}", interrupted)
    tiny_preferences.write(tmp_path / "data")
    options = [] if recipe == "score_metrics" else ["--out", str(tmp_path / "out")]
    if recipe == "export_policy":
        options += ["--policy", str(tmp_path)]
    elif recipe != "suppression":
        options += ["--data", str(tmp_path / "data")]
    if recipe == "score_model":
        options += ["cost", "--no-bf16"]  # as other tests: accelerate takes one for all
    monkeypatch.setattr(sys, "argv", [recipe, *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"training.{recipe}", run_name="__main__", alter_sys=True)
    assert stop.value.code == 130
    assert f"stopped: {says.format(out=tmp_path / 'out')}" in capsys.readouterr().err


def test_a_stopped_command_goes_on_where_it_was(tmp_path: Path) -> None:
    tiny_policy.llama(tmp_path / "base")
    tiny_preferences.write(tmp_path / "data")
    out = tmp_path / "out"
    line = [sys.executable, "-m", "training.everyday", "--policy", str(tmp_path / "base")]
    line += ["--data", str(tmp_path / "data"), "--out", str(out), "--new-tokens", "4"]
    line += ["--examples", str(tmp_path / "data"), "--batch", "4", "--prompts", "4000"]
    for split in ("validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").touch()
    _, errors = terminated(line, os.environ | {"OMP_NUM_THREADS": "1"}, at="8/4000")
    assert errors.splitlines()[-1].endswith("are kept: the same command goes on from there")
    assert len((out / "turns.jsonl").read_bytes().splitlines()) >= 8


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("recipe", "options", "spoilt"),
    [
        ("data", ["report", "--out"], "train.jsonl"),
        ("preferences", ["report", "--out"], "pairs.train.jsonl"),
        ("bag_of_words", ["--data"], "train.jsonl"),
        ("word_judge", ["--data"], "train.jsonl"),
        ("compare", ["--data"], "test.jsonl"),
        ("restore", ["--artifact"], "manifest.json"),
        ("speed", ["--model"], "manifest.json"),
        ("base", ["--finished"], "summary.json"),
        ("seeds", ["--models", "unreadable"], "summary.json"),
        ("publish", ["--policy"], "summary.json"),
        ("retrain", ["--store"], "."),
    ],
)
def test_a_file_that_cannot_be_read_is_a_line(
    recipe: str, options: list[str], spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "unreadable"
    (folder / spoilt).mkdir(parents=True)  # a folder, where a file should be
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [recipe, *options, str(folder)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"training.{recipe}", run_name="__main__", alter_sys=True)
    assert isinstance(stop.value.code, str)
    assert len(stop.value.code.splitlines()) == 1
    assert "unreadable" in stop.value.code
