"""An adapter that is handed out: half the size, still the same policy, with its whole history."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny_policy  # noqa: E402

from guardrail._files import sha256_of  # noqa: E402
from training import publish  # noqa: E402
from training.lm import load_policy, new_adapter, tokenizer_fingerprint  # noqa: E402


def run(folder: Path, policy: Path, base: Path) -> Path:
    """What a training run leaves, its weights pushed away from 0."""
    lm = new_adapter(load_policy(str(base)), rank=4)
    torch.manual_seed(0)
    for p in lm.model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    lm.model.save_pretrained(folder, selected_adapters=["default"])
    summary = {
        "base": str(base),
        "tokenizer": tokenizer_fingerprint(lm.tokenizer),
        "args": {"policy": str(policy), "seed": 0},
        "held_out": {"accuracy": 0.7},
        "history": [{"loss": 1.0}] * 500,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_published_adapter_opens_and_tells_every_stage(tmp_path: Path) -> None:
    base = tiny_policy.llama(tmp_path / "base")
    first = run(tmp_path / "sft", base, base)
    second = run(tmp_path / "dpo", first, base)
    out = tmp_path / "out"
    publish.main(publish.Args(second, out))
    summary = json.loads((out / "summary.json").read_text())
    assert [stage["policy"] for stage in summary["stages"]] == ["sft", "dpo"]
    assert summary["stages"][1]["held_out"] == {"accuracy": 0.7}
    assert "history" not in summary["stages"][1]
    assert summary["sha256"] == {publish.WEIGHTS: sha256_of(out / publish.WEIGHTS)}
    sizes = [(folder / publish.WEIGHTS).stat().st_size for folder in (second, out)]
    assert sizes[1] < 0.75 * sizes[0]
    ids = torch.arange(12).reshape(1, 12)
    ours, theirs, bare = (load_policy(str(f)).model(ids).logits for f in (out, second, base))
    assert (ours - theirs).abs().mean() < 0.1 * (bare - theirs).abs().mean()


def test_a_run_that_went_on_from_a_published_adapter_tells_its_stages_too(tmp_path: Path) -> None:
    base = tiny_policy.llama(tmp_path / "base")
    out = tmp_path / "out"
    publish.main(publish.Args(run(tmp_path / "sft", base, base), out))
    second = run(tmp_path / "dpo", out, base)
    for scale in (1.0, 1.3):
        publish.main(publish.Args(second, out, scale))  # in place of its start
    summary = json.loads((out / "summary.json").read_text())
    assert [stage["policy"] for stage in summary["stages"]] == ["sft", "dpo"]


def test_a_scale_goes_on_in_the_direction_of_training(tmp_path: Path) -> None:
    base = tiny_policy.llama(tmp_path / "base")
    policy = run(tmp_path / "sft", base, base)
    out = tmp_path / "out"
    publish.main(publish.Args(policy, out, scale=1.5))
    ids = torch.arange(12).reshape(1, 12)
    scaled, theirs = load_policy(str(out)), load_policy(str(policy))
    for module in theirs.model.modules():
        if isinstance(factors := getattr(module, "scaling", None), dict):
            factors.update({name: 1.5 * factor for name, factor in factors.items()})
    ours, expected = (lm.model(ids).logits for lm in (scaled, theirs))
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()
    assert json.loads((out / "summary.json").read_text())["scale"] == 1.5


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(SystemExit, match=r"--scale is .*: it has to be above 0"):
        publish.main(publish.Args(tmp_path, tmp_path / "out", scale))


def test_an_adapter_is_not_written_over_itself(tmp_path: Path) -> None:
    base = tiny_policy.llama(tmp_path / "base")
    policy = run(tmp_path / "sft", base, base)
    with pytest.raises(SystemExit, match="which would be written over itself"):
        publish.main(publish.Args(policy, tmp_path / "base" / ".." / "sft", 1.3))
    assert (policy / "summary.json").exists()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("summary.json", "{", "is not what a training run writes"),
        ("summary.json", "{}", "is not what a training run writes"),
        ("adapter_model.safetensors", "half", "is damaged"),
    ],
)
def test_a_damaged_adapter_is_named(tmp_path: Path, name: str, damage: str, message: str) -> None:
    policy = run(tmp_path / "sft", *2 * (tiny_policy.llama(tmp_path / "base"),))
    (policy / name).write_text(damage)
    with pytest.raises(SystemExit, match=message):
        publish.main(publish.Args(policy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_ended_is_not_published(tmp_path: Path) -> None:
    base = tiny_policy.llama(tmp_path / "base")
    unfinished = run(tmp_path / "sft", base, base)
    (unfinished / "summary.json").unlink()
    with pytest.raises(SystemExit, match=r"summary\.json is missing: the run has not ended"):
        publish.main(publish.Args(unfinished, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
