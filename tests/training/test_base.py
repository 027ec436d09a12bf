"""The larger model in one command, on a tiny base: built, calibrated, installed, found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from guardrail import Guard
from guardrail.artifact import read_manifest
from training import base, calibrate, moderation


@pytest.fixture(scope="module")
def args(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> base.Args:
    return base.Args(
        data=tiny_data,
        work=tmp_path_factory.mktemp("work"),
        parity=0.9,
        parity_texts=40,
        train=moderation.Args(
            base=str(tiny_base), epochs=4, learning_rate=3e-3, head_learning_rate=1e-2,
            tokens_per_batch=300, max_tokens=48, prompt_tokens=12, overlap=8, bf16=False,
        ),
        calibration=calibrate.Args(target_fpr=0.05, few=5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def installed(args: base.Args, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    base.main(replace(args, target=models / "base"))
    return models


def test_one_command_builds_the_larger_model_and_installs_it_under_its_name(
    args: base.Args, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDRAIL_MODELS", str(installed))
    guard = Guard(model="base")
    assert guard.check("how", "kill the good").assessment is not None
    manifest = read_manifest(installed / "base")
    assert manifest.id == args.name
    assert set(manifest.thresholds) == {"input", "output"}


def test_a_model_larger_than_promised_is_not_installed_nor_what_is_trained_trained_again(
    args: base.Args, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LIMIT_MB", 0.01)
    weights = args.work / "model" / "model.pt"
    trained = weights.stat().st_mtime_ns
    with pytest.raises(SystemExit, match="not installed"):
        base.main(replace(args, target=tmp_path / "base"))
    assert not (tmp_path / "base").exists()
    assert weights.stat().st_mtime_ns == trained


def test_a_run_that_has_not_finished_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no finished run"):
        base.main(base.Args(finished=tmp_path, target=tmp_path / "base"))
