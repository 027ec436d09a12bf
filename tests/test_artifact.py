from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guardrail.artifact import (
    Calibration,
    Manifest,
    artifact_folder,
    read_manifest,
    write_manifest,
)
from guardrail.encoding import EncoderConfig
from guardrail.errors import ArtifactError
from guardrail.policy import Thresholds
from guardrail.taxonomy import Category, Direction, Severity

MANIFEST = Manifest(
    id="m-1",
    base="base",
    licence="MIT",
    data=[{"name": "d", "rows": 3}],
    command="python -m training.export",
    seed=0,
    created="2026-01-01",
    encoding=EncoderConfig(128, 40, 16).to_json(),
    calibration={"output": {"severity": [[2.0, 0.5]] * 3, "categories": [[1.0, 0.0]] * 19}},
    thresholds={"output": {"severity": {"minor": 0.4}, "categories": {"Drugs": 0.3}}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(os.urandom(4096))
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, MANIFEST)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    seen = read_manifest(folder)
    assert replace(seen, files={}) == MANIFEST
    assert set(seen.files) == {"model.onnx", "tokenizer.json"}
    assert seen.encoder_config() == EncoderConfig(128, 40, 16)
    assert list(seen.calibration_of(Direction.OUTPUT).severity) == [[2.0, 0.5]] * 3
    assert seen.calibration_of(Direction.INPUT) == Calibration()
    assert seen.thresholds_of(Direction.OUTPUT) == Thresholds(
        {Severity.MINOR: 0.4}, {Category.DRUGS: 0.3}
    )
    assert seen.thresholds_of(Direction.INPUT) == Thresholds()


def test_every_file_of_the_folder_is_hashed_but_what_is_hidden(folder: Path) -> None:
    for name in ("LICENSE", ".DS_Store", "manifest.partial"):
        (folder / name).write_text("x")
    assert set(write_manifest(folder, MANIFEST).files) == {
        "LICENSE", "model.onnx", "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_one_flipped_bit_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name}: altered or damaged .*: reinstall"):
        read_manifest(folder)
    assert read_manifest(folder, verify=False).id == "m-1"


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: cannot be read"):
        read_manifest(folder)


def test_another_taxonomy_is_refused(folder: Path) -> None:
    edit(folder, taxonomy="mlcommons-12@1")
    with pytest.raises(ArtifactError, match=r"made for taxonomy 'mlcommons-12@1', .* anew"):
        read_manifest(folder)


def test_a_folder_without_manifest_is_half_written_or_no_model(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "manifest.partial")
    with pytest.raises(ArtifactError, match="is missing: not a model folder, or one half written"):
        read_manifest(folder)
    with pytest.raises(ArtifactError, match="is missing"):
        read_manifest(folder / "nowhere")
    with pytest.raises(ArtifactError, match="not a readable manifest"):
        read_manifest(folder / "model.onnx")


def test_a_manifest_is_written_last_and_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "manifest.json").read_bytes()

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_manifest(folder, replace(MANIFEST, id="m-2"))
    monkeypatch.undo()
    assert (folder / "manifest.json").read_bytes() == before
    assert write_manifest(folder, replace(MANIFEST, id="m-2")).id == "m-2"
    assert not (folder / "manifest.partial").exists()


def cut(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "harm",
    [
        cut,
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: edit(folder, unknown=1),
        lambda folder: edit(folder, id=5),
        lambda folder: edit(folder, files={"model.onnx": "0"}),
        lambda folder: edit(folder, files=["model.onnx", "tokenizer.json"]),
        lambda folder: edit(folder, files={"model.onnx": 1, "tokenizer.json": 2}),
        lambda folder: edit(folder, encoding={"max_tokens": 10}),
        lambda folder: edit(folder, encoding={"max_tokens": "many"}),
        lambda folder: edit(folder, encoding={"tokens": 1}),
        lambda folder: edit(folder, thresholds={"input": {"severity": {"mild": 0.5}}}),
        lambda folder: edit(folder, thresholds={"input": {"severity": {"minor": 5}}}),
        lambda folder: edit(folder, thresholds={"input": {"categories": {"Arson": 0.5}}}),
        lambda folder: edit(folder, thresholds={"input": {"severity": {"minor": 10**400}}}),
        lambda folder: edit(folder, thresholds=[]),
        lambda folder: edit(folder, calibration={"input": {"severity": [[1, 0]]}}),
        lambda folder: edit(folder, calibration={"input": {"severity": [[1]] * 3}}),
        lambda folder: edit(folder, calibration={"input": {"severity": [[float("nan"), 0]] * 3}}),
        lambda folder: edit(folder, calibration={"input": {"severity": "abc"}}),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_in_one_line(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    harm(folder)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(str(folder / "manifest.json"))
    assert "\n" not in str(caught.value)


def test_the_bundled_model_is_whole() -> None:
    folder = artifact_folder()
    manifest = read_manifest(folder)
    assert folder.name == "small"
    assert manifest.id
    assert manifest.licence
    assert manifest.data
    assert set(manifest.files) >= {"model.onnx", "tokenizer.json"}


def test_a_model_is_found_by_name_or_by_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDRAIL_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert artifact_folder("model") == folder
    assert artifact_folder(folder) == folder
    assert artifact_folder(str(folder)) == folder
    assert artifact_folder("./model") == Path("model")
    assert artifact_folder(".") == Path()
    shutil.copytree(folder, tmp_path / "small")
    assert artifact_folder("small").parent.name == "models", "what is bundled goes first"


@pytest.mark.skipif(sys.platform == "win32", reason="homes are found otherwise there")
def test_a_user_without_a_home_has_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("no such user id")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("GUARDRAIL_MODELS", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)  # as in a container run under any id
    assert artifact_folder("small").parent.name == "models"


@pytest.mark.parametrize("name", ["smal", "", "x" * 10_000, "a\0b"])
def test_an_unknown_model_is_answered_with_the_known_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDRAIL_MODELS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ArtifactError, match=r"there: mine, small\); give one of these names"):
        artifact_folder(name)


def test_the_larger_model_says_how_it_is_had_until_it_is_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "installed"
    monkeypatch.setenv("GUARDRAIL_MODELS", str(home))
    with pytest.raises(
        ArtifactError, match=r"`python -m training\.base`.* installs it in .*installed"
    ):
        artifact_folder("base")
    shutil.copytree(folder, home / "base")
    assert artifact_folder("base") == home / "base"
