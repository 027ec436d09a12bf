"""The whole loop on a few texts: labels in a store, a new artifact, installed only if better."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from guardrail import Guard  # noqa: E402
from guardrail.artifact import read_manifest  # noqa: E402
from training import calibrate, export, moderation, retrain  # noqa: E402
from training.annotation.labels import Record, SafetyLabel  # noqa: E402
from training.annotation.store import Store  # noqa: E402
from training.data import Example, read_examples  # noqa: E402
from training.retrain import Args, labelled, main, merge  # noqa: E402

TRAIN = moderation.Args(
    epochs=8, learning_rate=3e-3, head_learning_rate=1e-2, tokens_per_batch=300, max_tokens=48,
    prompt_tokens=12, overlap=8, bf16=False,
)  # fmt: skip


def example(prompt: str, severity: int = 0, source: str = "annotated/x") -> Example:
    names = ["Violence"] if severity else []
    return Example(prompt, "r", source, severity > 0, severity, names)


# --- merging -------------------------------------------------------------------------------------


def test_a_text_whose_prompt_is_nearly_one_of_the_frozen_test_is_never_trained_on() -> None:
    base = {
        "train": [example("old one two three four five")],
        "validation": [],
        "test": [example("how do i bake a very good cake at home today")],
    }
    new = [
        example("How do I bake a very good cake at home, today!", 1),
        example("how do i bake a very good cake at home", 2),  # 9 of 10 words
        example("something else entirely", 1),
    ]
    merged = merge(base, new, 0.0)  # type: ignore[arg-type]
    assert (merged.new, merged.held_out) == (1, 2)
    assert [e.prompt for e in merged.train][1:] == ["something else entirely"]


def test_a_new_label_takes_the_place_of_the_old_one_in_its_split() -> None:
    base = {
        "train": [example("a b c d e", 0)],
        "validation": [example("v w x y z", 0)],
        "test": [example("t", 0)],
    }
    merged = merge(base, [example("A b c d e", 3), example("v w x y z", 2)], 0.5)  # type: ignore[arg-type]
    assert [e.severity for e in merged.train] == [3]
    assert [e.severity for e in merged.validation] == [2]
    assert merged.validation[0].split == "validation"


def test_new_prompts_are_shared_out_between_training_and_validation() -> None:
    new = [example(f"w{n} x{n} y{n}") for n in range(300)]
    merged = merge({"train": [], "validation": [], "test": []}, new, 0.2)
    assert len(merged.train) + len(merged.validation) == 300
    assert 35 < len(merged.validation) < 85
    assert merge({"train": [], "validation": [], "test": []}, new[::-1], 0.2).new == 300


def test_only_complete_labels_given_in_the_store_are_new(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", create=True)
    store.add_person("ann")
    safe = SafetyLabel(True)
    records = [Record("imported", ("r",), (safe,)), Record("asked", ("r",), (None,))]
    store.add(records, name="x", digest="1")
    assert labelled(store, machines=True) == []
    from training.annotation.queue import Queue

    Queue(store).save("ann", 2, SafetyLabel(False, 2, ("Drugs",)))
    (one,) = labelled(store, machines=True)
    assert (one.prompt, one.severity, one.categories) == ("asked", 2, ["Drugs"])
    assert one.origin == {"severity": "human", "categories": "human"}


# --- installing ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weak(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that has hardly been trained."""
    folder = tmp_path_factory.mktemp("weak")
    train = replace(TRAIN, base=str(tiny_base), data=tiny_data, out=folder / "m", epochs=0.2)
    moderation.main(train)
    artifact = folder / "small"
    export.main(
        export.Args(model=folder / "m", out=artifact, name="weak", data=tiny_data, parity=0)
    )
    calibrate.main(calibrate.Args(model=artifact, data=tiny_data, few=5))
    return artifact


def test_an_installation_that_stopped_half_way_is_put_right(weak: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    shutil.copytree(weak, target)
    os.replace(target, tmp_path / "small.previous")  # killed between the two renames
    retrain.recover(target)
    assert read_manifest(target).id == "weak"
    broken = shutil.copytree(weak, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(Exception, match="altered or damaged"):
        retrain.install(broken, target)
    assert read_manifest(target).id == "weak"


def fill(path: Path, data: Path, count: int) -> None:
    """Texts of the tiny world, labelled by a person, prompts of the frozen test among them."""
    harms = {"kill": (3, "Violence"), "steal": (1, "Economic Crime"), "bomb": (2, "Violence")}
    store = Store(path, create=True)
    store.add_person("ann")
    mild = ["good", "kind", "help", "cake", "rain"]
    rows, labels = [], []
    for n in range(count):
        harm = list(harms)[n % 3] if n % 2 else None
        words = [mild[(n + k) % 5] for k in range(1 + n % 6)]
        text = " ".join([*words, *([harm] if harm else []), "a", *words[:1]])
        rows.append(Record(f"what {9000 + n}", (text,), (None,)))
        severity, name = harms[harm] if harm else (0, "")
        labels.append(SafetyLabel(not harm, severity, (name,) if name else ()))
    frozen = read_examples(data, "test")[0]
    rows.append(Record(frozen.prompt, ("kill kill",), (None,)))
    labels.append(SafetyLabel(False, 3, ("Violence",)))
    store.add(rows, name="rows", digest="rows")
    from training.annotation.queue import Queue

    queue = Queue(store)
    for task, label in enumerate(labels, 1):
        queue.save("ann", task, label)


def test_the_loop_from_labels_to_an_installed_model(
    weak: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = tmp_path / "models" / "small"
    shutil.copytree(weak, installed)
    fill(tmp_path / "s.db", tiny_data, 40)
    args = Args(
        store=tmp_path / "s.db", data=tiny_data, installed=installed, work=tmp_path / "work",
        after=30, parity=0.9, train=replace(TRAIN, base=str(tiny_base)),
        calibration=calibrate.Args(few=5, target_fpr=0.05),
    )  # fmt: skip
    main(replace(args, after=100))
    assert "41 texts have new labels, 100 are wanted" in capsys.readouterr().out
    assert read_manifest(installed).id == "weak"

    main(args)
    said = capsys.readouterr().out
    assert "1 more are kept out" in said
    new = read_manifest(installed)
    assert new.id.startswith("retrained-41-")
    assert read_manifest(installed.with_name("small.previous")).id == "weak"
    (run,) = [p for p in (tmp_path / "work").iterdir() if p.is_dir()]
    assert (run / "data" / "test.jsonl").read_bytes() == (tiny_data / "test.jsonl").read_bytes()
    trained = (run / "data" / "train.jsonl").read_text()
    assert "kill kill" not in trained
    assert "annotated/store" in trained
    flips = [json.loads(line) for line in (run / "flips.jsonl").read_text().splitlines()]
    figures = json.loads((run / "comparison.json").read_text())
    assert figures["better"] is True
    assert len(flips) == figures["flips"] > 0
    assert sum(flip["fixed"] for flip in flips) == figures["fixed"] > figures["broken"]
    assert Guard(str(installed), device="cpu").check("how 1", "good kill the good").severity == 3

    main(args)  # nothing new
    assert "0 texts have new labels" in capsys.readouterr().out

    # The same labels against the model that they made: not better, and nothing is retrained.
    (tmp_path / "work" / "state.json").unlink()
    stamp = (run / "model" / "summary.json").stat().st_mtime_ns
    main(args)
    assert "left as it was (not better)" in capsys.readouterr().out
    assert read_manifest(installed).id == new.id
    assert (run / "model" / "summary.json").stat().st_mtime_ns == stamp
