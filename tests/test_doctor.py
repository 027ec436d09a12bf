"""The doctor finds what is wrong with a machine, and says what cures it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import guardrail
from guardrail.artifact import artifact_folder
from guardrail.doctor import Check, diagnose

ROOT = Path(guardrail.__file__).parents[1]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.check: check for check in checks}


def doctor(*args: str, path: Path | None = None) -> tuple[int, dict[str, dict[str, str]]]:
    paths = [str(p) for p in (path, ROOT) if p is not None]
    done = subprocess.run(
        [sys.executable, "-m", "guardrail.cli", "doctor", "--json", *args],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=300,
    )
    return done.returncode, {row["check"]: row for row in json.loads(done.stdout)}


def test_a_sound_machine_passes_every_check() -> None:
    code, rows = doctor("--device", "cpu")
    assert code == 0
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert "got cpu" in rows["device"]["detail"]
    assert " ms " in rows["one check"]["detail"]
    assert metadata.version("onnxruntime") in rows["packages"]["detail"]


def test_both_runtimes_installed_is_a_failure_with_its_cure(tmp_path: Path) -> None:
    record = tmp_path / "onnxruntime_gpu-1.20.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.20.0\n"
    )
    code, rows = doctor(path=tmp_path)
    assert code == 1
    assert rows["packages"]["status"] == "failure"
    assert "onnxruntime-gpu 1.20.0" in rows["packages"]["detail"]
    assert rows["packages"]["cure"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_a_missing_runtime_is_a_failure_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')\n"
    )
    code, rows = doctor(path=tmp_path)
    assert code == 1
    assert rows["runtime"]["status"] == "failure"
    assert "pip install" in rows["runtime"]["cure"]
    assert rows["model"]["status"] == "ok"
    assert "one check" not in rows


def test_an_altered_model_is_a_failure(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_folder(), tmp_path / "model"))
    with (folder / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    rows = by_name(list(diagnose(folder)))
    assert rows["model"].status == "failure"
    assert "altered or damaged" in rows["model"].detail
    assert "device" not in rows


def test_the_model_row_names_its_identity_licence_and_taxonomy() -> None:
    row = by_name(list(diagnose()))["model"]
    manifest = json.loads((artifact_folder() / "manifest.json").read_text())
    for key in ("id", "base", "licence", "taxonomy"):
        assert manifest[key] in row.detail


def test_a_policy_that_fails_open_is_a_warning_only_when_chosen(tmp_path: Path) -> None:
    presets = by_name(list(diagnose()))["presets"]
    assert presets.status == "ok"
    assert presets.detail.endswith("fail open: audit-only")
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nextends = "strict"\non_error = "flag"\n')
    for chosen in ("audit-only", str(mine)):
        code, rows = doctor("--policy", chosen)
        assert code == 0
        assert rows["policy"]["status"] == "warning"
        assert "fails open" in rows["policy"]["detail"]


def test_a_policy_that_is_not_valid_is_a_failure(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\non_error = "alow"\n')
    code, rows = doctor("--policy", str(mine))
    assert code == 1
    assert "did you mean 'allow'?" in rows["policy"]["detail"]
    assert rows["one check"]["status"] == "ok"


def test_a_device_that_cannot_be_had_is_a_failure() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    rows = by_name(list(diagnose(device="cuda")))
    assert rows["device"].status == "failure"
    assert "no CUDA provider" in rows["device"].detail
