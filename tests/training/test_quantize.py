"""Weights on an int8 grid while training, and the graphs that export makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("transformers")

from transformers import AutoConfig  # noqa: E402

from guardrail._onnx import Session  # noqa: E402
from training.causal import moderation_base  # noqa: E402
from training.export import export_onnx  # noqa: E402
from training.model import ModerationModel  # noqa: E402
from training.quantize import dynamic_int8, mixed_int8, to_fp16  # noqa: E402
from training.quantized import block_of, on_grid, quantization_aware, settle  # noqa: E402


@pytest.mark.parametrize("block", [None, 16])
def test_a_weight_on_the_grid_stays_there_and_is_near_where_it_was(block: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64) * torch.rand(8, 1)
    grid = on_grid(weight, block)
    parts = weight.reshape(8, -1, block or 64)
    half_a_step = parts.abs().amax(-1, keepdim=True) / 254
    assert ((grid.reshape_as(parts) - parts).abs() <= half_a_step + 1e-7).all()
    torch.testing.assert_close(on_grid(grid, block), grid)


def test_a_row_of_zeros_is_on_the_grid() -> None:
    assert torch.equal(on_grid(torch.zeros(2, 4), None), torch.zeros(2, 4))


def test_only_the_narrowing_feed_forward_product_is_block_wise() -> None:
    layer = "encoder.encoder.layer.0"
    assert block_of(f"{layer}.output.dense") is not None
    assert block_of(f"{layer}.intermediate.dense") is None
    assert block_of(f"{layer}.attention.output.dense") is None
    assert block_of("encoder.layers.0.mlp.down_proj") is not None
    assert block_of("encoder.layers.0.self_attn.k_proj") is None


def test_training_sees_rounded_weights_learns_through_them_and_settles_on_them() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    quantization_aware(model)
    names = {name for name, _ in model.named_parameters()}
    model(torch.randn(3, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    seen = model[0].weight.detach().clone()
    settle(model)
    assert torch.equal(model[0].weight, seen)
    assert torch.equal(on_grid(seen, None), seen) or torch.allclose(on_grid(seen, None), seen)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias"} != names


@pytest.fixture(scope="module")
def fp32(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "fp32.onnx"
    export_onnx(ModerationModel.from_base(tiny_base), path)
    return path


def _feed(seed: int, length: int = 9, vocabulary: int = 1000) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(4, vocabulary, (1, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}


def _run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = Session(path, "cpu", 1, ()).here()  # exact products, as the SDK has them
    names = {argument.name for argument in session.get_inputs()}
    outputs = session.run(None, {k: v for k, v in feed.items() if k in names})
    return np.concatenate([o.ravel() for o in outputs])


def test_every_small_graph_says_what_the_large_one_says(fp32: Path, tmp_path: Path) -> None:
    samples = [_feed(n) for n in range(4)]
    mixed_int8(fp32, tmp_path / "mixed.onnx", samples)
    mixed_int8(fp32, tmp_path / "unsmoothed.onnx")
    dynamic_int8(fp32, tmp_path / "dynamic.onnx")
    to_fp16(fp32, tmp_path / "fp16.onnx")
    for seed in range(100, 105):
        truth = _run(fp32, _feed(seed, 5 + seed % 7))
        for name, slack in (("mixed", 0.1), ("unsmoothed", 0.1), ("dynamic", 0.2), ("fp16", 0.01)):
            found = _run(tmp_path / f"{name}.onnx", _feed(seed, 5 + seed % 7))
            assert np.abs(found - truth).max() < slack, name


def test_the_int8_graph_is_mixed_and_its_embedding_is_int8(fp32: Path, tmp_path: Path) -> None:
    mixed_int8(fp32, tmp_path / "mixed.onnx", [_feed(0)])
    graph = onnx.load(tmp_path / "mixed.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulNBits") == 2  # one in each of two layers
    assert kinds.count("MatMulInteger") > 2 * 5
    large = [t for t in graph.initializer if np.prod(t.dims) >= 1100 * 32]
    assert {t.data_type for t in large} == {onnx.TensorProto.INT8}


def test_a_causal_model_becomes_small_too(tmp_path: Path) -> None:
    from tiny_policy import llama

    torch.manual_seed(0)
    base = moderation_base(str(llama(tmp_path / "chat")), tmp_path)
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    export_onnx(ModerationModel.from_base(base), tmp_path / "fp32.onnx")
    mixed_int8(tmp_path / "fp32.onnx", tmp_path / "mixed.onnx", [_feed(0, vocabulary=vocabulary)])
    kinds = [node.op_type for node in onnx.load(tmp_path / "mixed.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 2
    for seed in range(100, 105):
        feed = _feed(seed, 5 + seed % 7, vocabulary)
        truth = _run(tmp_path / "fp32.onnx", feed)
        assert np.abs(_run(tmp_path / "mixed.onnx", feed) - truth).max() < 0.1


def test_the_exported_attention_has_no_guard_against_rows_that_are_all_masked(fp32: Path) -> None:
    kinds = {node.op_type for node in onnx.load(fp32).graph.node}
    assert "IsNaN" not in kinds
    assert "Softmax" in kinds
