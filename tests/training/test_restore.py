"""An exported artifact becomes a model again, whatever its precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx")

from guardrail.errors import GuardrailError  # noqa: E402
from guardrail.moderator import OnnxModerator  # noqa: E402
from guardrail.verdict import Pair  # noqa: E402
from training import export, moderation, restore  # noqa: E402
from training.batching import encode, predict  # noqa: E402
from training.data import read_examples  # noqa: E402
from training.model import ModerationModel, encoder_of  # noqa: E402
from training.scoring import text_logits  # noqa: E402

TRAIN = moderation.Args(
    epochs=2, learning_rate=3e-3, head_learning_rate=1e-2, tokens_per_batch=300, max_tokens=48,
    prompt_tokens=12, overlap=8, bf16=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    moderation.main(replace(TRAIN, base=str(tiny_base), data=tiny_data, out=folder))
    return folder


def exported(trained: Path, data: Path, out: Path, precision: str) -> Path:
    args = export.Args(model=trained, out=out, name="tiny", data=data, parity=0)
    export.main(replace(args, precision=precision))
    return out


@pytest.mark.parametrize(("precision", "most"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 0.03)])
def test_weights_come_back_by_their_names(
    trained: Path, tiny_data: Path, tmp_path: Path, precision: str, most: float
) -> None:
    artifact = exported(trained, tiny_data, tmp_path / "artifact", precision)
    before = torch.load(trained / "model.pt", weights_only=True)
    after = restore.weights_of(artifact)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        slack = most * float(weight.abs().max())
        if precision == "fp16":
            slack += 6e-8  # the least number that is not zero
        assert after[name].dtype == torch.float32
        assert float((after[name] - weight).abs().max()) <= slack, name


def test_a_restored_model_says_what_its_artifact_says(
    trained: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    artifact = exported(trained, tiny_data, tmp_path / "artifact", "int8")
    out = tmp_path / "restored"
    restore.main(restore.Args(artifact=artifact, out=out, cache=tmp_path))
    examples = read_examples(tiny_data, "test")
    encoder = encoder_of(out)
    rows = encode(examples, encoder, 0.0)
    ours, _ = predict(ModerationModel.load(out), rows, encoder.pad_id, bf16=False)
    pairs = [Pair(e.prompt, e.response) for e in examples]
    theirs, _ = text_logits(OnnxModerator(artifact, device="cpu"), pairs)
    assert np.abs(ours - theirs).max() < 0.15
    assert np.abs(ours).max() > 1  # of something that has learnt


def test_training_goes_on_from_an_artifact(
    trained: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    artifact = exported(trained, tiny_data, tmp_path / "artifact", "int8")
    out = tmp_path / "more"
    still = replace(TRAIN, learning_rate=0.0, head_learning_rate=0.0, limit=20)
    moderation.main(
        replace(still, base=str(tiny_base), data=tiny_data, out=out, init=artifact, weight_decay=0)
    )
    started = restore.weights_of(artifact)
    for name, weight in torch.load(out / "model.pt", weights_only=True).items():
        torch.testing.assert_close(weight, started[name])


def test_what_cannot_be_started_from_is_said(
    trained: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="neither what"):
        restore.weights_of(tmp_path)
    artifact = exported(trained, tiny_data, tmp_path / "artifact", "int8")
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(GuardrailError, match="altered or damaged"):
        restore.weights_of(damaged)
    state = torch.load(trained / "model.pt", weights_only=True)
    state.pop("severity.bias")
    other = tmp_path / "other"
    other.mkdir()
    torch.save(state, other / "model.pt")
    args = replace(TRAIN, base=str(tiny_base), data=tiny_data, out=tmp_path / "o", init=other)
    with pytest.raises(SystemExit, match=r"do not fit .*severity\.bias"):
        moderation.main(args)
    torch.save({name: weight[:1] for name, weight in state.items()}, other / "model.pt")
    with pytest.raises(SystemExit, match=r"do not fit .* and \d+ more like it$") as stop:
        moderation.main(args)
    assert "\n" not in str(stop.value)
