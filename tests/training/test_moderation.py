"""The moderation recipe, run for real on a tiny base: it learns, resumes, scales, exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tyro

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from guardrail import Guard, Policy, Severity  # noqa: E402
from guardrail.artifact import read_manifest  # noqa: E402
from training import calibrate, evaluate, export, label  # noqa: E402
from training.batching import encode  # noqa: E402
from training.data import SPLITS, Example, read_examples, write_examples  # noqa: E402
from training.moderation import Args, choose, heed, main  # noqa: E402

ROOT = Path(__file__).parents[2]


def arguments(base: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [
        "--base", str(base), "--data", str(data), "--out", str(out), "--epochs", "10",
        "--learning-rate", "3e-3", "--head-learning-rate", "1e-2", "--tokens-per-batch", "300",
        "--max-tokens", "48", "--prompt-tokens", "12", "--overlap", "8", "--no-bf16", *extra,
    ]  # fmt: skip


def command(*arguments_: str) -> list[str]:
    return [sys.executable, "-m", "training.moderation", *arguments_]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moderation")
    subprocess.run(
        command(*arguments(tiny_base, tiny_data, out)), cwd=ROOT, check=True, capture_output=True
    )
    return out


@pytest.fixture(scope="module")
def artifact(trained: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact")
    export.main(export.Args(model=trained, out=out, name="tiny-1", data=tiny_data, parity=0.9))
    calibrate.main(calibrate.Args(model=out, data=tiny_data, target_fpr=0.05, few=5))
    return out


def test_training_learns_severity_and_category_in_both_directions(trained: Path) -> None:
    last = json.loads((trained / "summary.json").read_text())["history"][-1]
    assert last["output"]["auroc"] > 0.95
    assert last["output"]["kappa"] > 0.8
    assert last["output"]["category_micro_f1"] > 0.8
    assert last["input"]["auroc"] > 0.9


def test_the_summary_holds_what_is_needed_to_repeat_the_run(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["args"]["seed"] == 0
    assert summary["sources"] == {"annotated": 216, "benign": 24}
    assert not (trained / "checkpoint.pt").exists()


def test_a_killed_run_resumes_and_ends_like_an_unbroken_one(
    trained: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    flags = arguments(tiny_base, tiny_data, tmp_path, "--checkpoint-seconds", "0")
    process = subprocess.Popen(command(*flags), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "summary.json").exists()
    other = shutil.copytree(tiny_data, tmp_path / "other")
    texts = (other / "train.jsonl").read_text().splitlines(keepends=True)
    (other / "train.jsonl").write_text("".join(texts[1:]))
    for changed in ({"data": other}, {"seed": 1}):
        with pytest.raises(SystemExit, match="is of a run with other arguments or data"):
            main(replace(tyro.cli(Args, args=flags), **changed))
    second = subprocess.run(command(*flags), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "resumed at step" in second.stdout
    last = json.loads((tmp_path / "summary.json").read_text())["history"][-1]
    assert last["output"]["auroc"] > 0.95


def test_every_term_of_the_loss_trains_and_the_average_of_the_weights_is_the_result(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    args = Args(
        base=str(tiny_base), data=tiny_data, out=tmp_path / "all", epochs=4, learning_rate=3e-3,
        head_learning_rate=1e-2, tokens_per_batch=300, max_tokens=48, prompt_tokens=12, overlap=8,
        bf16=False, focal=1.0, absent=2.0, r_drop=0.5, ranking=0.3, in_prompt=0.3, average=0.9,
        balance=0.5, framed=0.3, quantization_aware=True,
    )  # fmt: skip
    main(args)
    last = json.loads((args.out / "summary.json").read_text())["history"][-1]
    assert last["output"]["auroc"] > 0.9
    still = replace(args, out=tmp_path / "still", average=1.0)  # an average that never moves
    main(replace(still, init=args.out, epochs=1))
    before, after = (torch.load(o / "model.pt", weights_only=True) for o in (args.out, still.out))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight)


def test_two_processes_train_through_accelerate(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
        "--main_process_port", "0", "-m", "training.moderation",
    ]  # fmt: skip
    subprocess.run(
        [*launch, *arguments(tiny_base, tiny_data, tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["history"][-1]["output"]["auroc"] > 0.9


def test_the_exported_artifact_decides_as_training_saw(artifact: Path, tiny_data: Path) -> None:
    guard = Guard(str(artifact), Policy.load("balanced"), device="cpu")
    test = [e for e in read_examples(tiny_data, "test") if e.response is not None]
    verdicts = [guard.check(e.prompt, e.response) for e in test]
    right = np.mean([v.severity == e.severity for v, e in zip(verdicts, test, strict=True)])
    assert right > 0.9
    grave = [v for v, e in zip(verdicts, test, strict=True) if e.severity == 3]
    assert all(v.severity == Severity.SEVERE for v in grave)
    assert {r.category.value for v in grave for r in v.reasons} == {"Violence"}


def test_the_manifest_names_data_licences_command_and_seed(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.id == "tiny-1"
    assert {source["name"] for source in manifest.data} == {"annotated", "benign"}
    assert all(source["licence"] for source in manifest.data)
    assert "training.moderation" in manifest.command
    assert set(manifest.thresholds) == {"input", "output"}


def test_the_manifest_has_size_parity_and_speed_and_says_why_a_device_was_not_measured(
    artifact: Path,
) -> None:
    metrics = read_manifest(artifact).metrics
    size = (artifact / "model.onnx").stat().st_size / 1e6
    assert metrics["megabytes"] == pytest.approx(size, abs=0.06)
    assert metrics["parity"]["equal"] >= 0.9
    speed = metrics["speed"]
    assert speed["machine"]
    assert speed["cpu"]["ms_by_tokens"]["32"] > 0  # of more tokens this model takes no text
    assert set(speed["cpu"]["ms_by_tokens"]) == {"32"}
    assert speed["cpu"]["texts_per_second"] > 0
    for device, provider in (("cuda", "CUDA"), ("tensorrt", "Tensorrt")):
        row = speed[device]
        assert "ms_by_tokens" in row or f"no {provider}ExecutionProvider" in row["skipped"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_precisions_for_gpus_pass_the_same_gate(
    trained: Path, tiny_data: Path, tmp_path: Path, precision: Literal["fp32", "fp16"]
) -> None:
    args = export.Args(model=trained, out=tmp_path, data=tiny_data, precision=precision)
    export.main(args)
    assert read_manifest(tmp_path).metrics["parity"]["precision"] == precision


def test_the_manifests_command_runs_the_same_again() -> None:
    args = Args(
        include=("annotated/", "benign/"), repeat={"over_refusal/": 3, "benign/": 2}, focal=1.0,
        people=Path("labels"), severity_weight=(1.0, 2.0, 1.0), quantization_aware=True, bf16=False,
    )  # fmt: skip
    trained = json.loads(json.dumps(asdict(args), default=str))  # as a run's summary has them
    assert tyro.cli(Args, args=export.command_of({"args": trained}).split()[3:]) == args
    soup = export.command_of({"args": trained, "soup_seeds": [5, 6, 7], "soup_start": "begun"})
    assert soup.endswith(
        "; the same with each --seed of [6, 7]; python -m training.soup --start begun"
    )
    alone = export.command_of({"args": trained, "soup_seeds": [5], "soup_start": "begun"})
    assert "the same with" not in alone


def test_an_artifact_that_disagrees_with_training_is_not_written(
    trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    args = export.Args(model=trained, out=tmp_path, data=tiny_data, parity=1.01)
    with pytest.raises(SystemExit, match="parity"):
        export.main(args)
    assert not (tmp_path / "manifest.json").exists()


def test_evaluation_scores_the_artifact_and_records_it(
    artifact: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation.md"
    evaluate.main(evaluate.Args(model=artifact, data=tiny_data, source=tmp_path, out=out))
    figures = read_manifest(artifact).metrics["annotated answers"]
    assert figures["n"] == 62
    assert figures["auroc"] > 0.95
    assert figures["f1_low"] <= figures["f1"] <= figures["f1_high"]
    assert "| annotated answers | ai | 62 |" in out.read_text()


def test_a_teacher_labels_texts_and_resumes_where_it_stopped(
    trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    args = label.Args(
        teacher=trained, data=tiny_data, out=tmp_path, trusted=("benign/",), bf16=False
    )
    label.main(args)
    labelled = read_examples(tmp_path, "train")
    soft = [e for e in labelled if e.soft is not None]
    assert len(soft) == 216
    assert all(e.origin["soft"] == "teacher" for e in soft)
    assert np.mean([(e.soft["severity"][0] > 0.5) == e.unsafe for e in soft if e.soft]) > 0.95
    # a run cut short in the middle of a line goes on from the last whole one
    lines = (tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "train.partial").write_bytes(b"".join(lines[:100]) + lines[100][:20])
    label.main(args)
    assert (tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True) == lines


def test_a_finished_run_is_not_trained_again_nor_overwritten_by_another(
    trained: Path, tiny_base: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = tyro.cli(Args, args=arguments(tiny_base, tiny_data, trained))
    before = (trained / "summary.json").read_bytes()
    main(replace(args, checkpoint_seconds=1.0))
    assert "this run has finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has finished here: choose another --out"):
        main(replace(args, seed=3))
    assert (trained / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": 0.0}, "--epochs is 0.0: it has to be more than 0"),
        ({"epochs": -1.0}, "--epochs is -1.0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"average": 2.0}, "--average is 2.0: it has to be from 0 to 1"),
        ({"limit": 0}, "--limit is 0: it has to be 1 or more"),
        ({"max_tokens": 4}, "--max-tokens, --prompt-tokens, --overlap: max_tokens=4 must exceed"),
        ({"layers": 9}, "it has 2 layers, no 9"),
        ({"include": ("nosuch",)}, "leave no labelled text to train on"),
    ],
)
def test_what_no_run_can_mean_is_refused_in_a_line(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        main(Args(base=str(tiny_base), data=tiny_data, out=tmp_path, bf16=False, **changed))
    assert not (tmp_path / "summary.json").exists()


def test_without_a_text_to_measure_by_or_a_folder_to_write_to_nothing_is_trained(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    args = Args(base=str(tiny_base), data=tiny_data, out=tmp_path / "m", bf16=False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="no folder can be made here"):
        main(replace(args, out=tmp_path / "file"))
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "validation.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"no text of annotated/ or pku/ in validation\.jsonl"):
        main(replace(args, data=data))


def test_a_model_learns_from_pku_alone_and_is_calibrated_by_it(
    artifact: Path,
    tiny_base: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `training.data build --source PKU-Alignment/PKU-SafeRLHF` leaves it: answers alone."""
    for split in SPLITS:
        rows = [
            replace(e, source="pku/Alpaca-7B", origin=dict.fromkeys(e.origin, "human"))
            for e in read_examples(tiny_data, split)
            if e.response is not None
        ]
        write_examples(tmp_path / "data" / f"{split}.jsonl", rows)
    data, model = tmp_path / "data", tmp_path / "model"
    main(Args(base=str(tiny_base), data=data, out=model, epochs=1, limit=40, bf16=False))
    assert json.loads((model / "summary.json").read_text())["sources"] == {"pku": 40}
    copy = shutil.copytree(artifact, tmp_path / "artifact")
    calibrate.main(calibrate.Args(model=copy, data=data, few=5))
    said = capsys.readouterr().out
    assert "input: no annotated validation texts, left uncalibrated" in said
    assert "output: 68 annotated, 0 benign" in said
    figures = evaluate.evaluate(
        evaluate.Args(model=copy, data=data, source=tmp_path, record=False, limit=5)
    )
    assert figures["sets"]["PKU-SafeRLHF answers"]["labels"] == "human"


def test_damaged_weights_and_unfinished_runs_are_named(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is damaged"):
        main(Args(base=str(tiny_base), data=tiny_data, out=tmp_path, bf16=False, limit=5))
    with pytest.raises(SystemExit, match="no finished run of"):
        export.main(export.Args(model=tmp_path))
    with pytest.raises(SystemExit, match="no finished run of"):
        label.main(label.Args(teacher=tmp_path))


def test_hard_negatives_are_repeated_and_answers_thinned_out() -> None:
    examples = [
        *(Example("p", None, "over_refusal/x", unsafe=False) for _ in range(10)),
        *(Example("p", "r", "annotated/x", unsafe=True) for _ in range(200)),
        Example("p", None, "unlabelled/x"),
    ]
    args = Args(include=("over_refusal/", "annotated/", "unlabelled/"), answers=0.25)
    args.repeat = {"over_refusal/": 3}
    chosen = choose(examples, args)
    assert sum(e.response is None for e in chosen) == 30
    assert 25 <= sum(e.response is not None for e in chosen) <= 75
    assert all(e.unsafe is not None for e in chosen)
    assert choose(examples, args) == chosen


def test_a_share_of_the_prompts_is_framed_and_no_answer() -> None:
    examples = [
        *(Example(f"prompt {n}", None, "annotated/x", unsafe=False) for n in range(200)),
        *(Example(f"prompt {n}", "r", "annotated/x", unsafe=True) for n in range(200)),
    ]
    chosen = choose(examples, Args(framed=0.25))
    framed = [now.prompt != was.prompt for was, now in zip(examples, chosen, strict=True)]
    assert 25 <= sum(framed[:200]) <= 75
    assert not any(framed[200:])


def test_training_can_go_on_from_an_earlier_model(
    trained: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    flags = arguments(tiny_base, tiny_data, tmp_path, "--init", str(trained), "--epochs", "0.1")
    subprocess.run(command(*flags), cwd=ROOT, check=True, capture_output=True)
    last = json.loads((tmp_path / "summary.json").read_text())["history"][-1]
    assert last["output"]["auroc"] > 0.95


def test_soft_labels_are_blended_with_human_ones_and_stand_alone_without(
    tiny_base: Path,
) -> None:
    from guardrail.encoding import Encoder

    soft = {"severity": [0.8, 0.4, 0.2], "categories": [0.1] * 19}
    human = Example("how", "kill", "s", unsafe=False, soft=soft)
    unknown = Example("how", "cake", "s", soft=soft)
    encoder = Encoder.from_file(tiny_base / "tokenizer.json")
    blended, alone = encode([human, unknown], encoder, teacher_share=0.75)
    assert blended.severity == pytest.approx([0.6, 0.3, 0.15])
    assert alone.severity == pytest.approx(soft["severity"])
    assert alone.severity_mask.tolist() == [1, 1, 1]


def test_what_people_said_moves_only_whether_an_answer_is_harmful_at_all(tiny_base: Path) -> None:
    from guardrail.encoding import Encoder

    severities = (0, 1, 2, 0)
    source = "annotated/s"
    examples = [Example("how", f"r{i}", source, bool(s), s) for i, s in enumerate(severities)]
    rows = encode(examples, Encoder.from_file(tiny_base / "tokenizer.json"), 0.0)
    people = {examples[i].key: said for i, said in enumerate((True, False, False))}
    assert heed(rows, people, 0.25) == 2
    targets = [row.severity.tolist() for row in rows]
    assert targets == [[0.25, 0, 0], [0.75, 0, 0], [1, 1, 0], [0, 0, 0]]
