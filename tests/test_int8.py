"""int8 products give the same integers on every processor."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from guardrail._int8 import _PRODUCT, make_exact, saturates
from guardrail._onnx import Session

onnx = pytest.importorskip("onnx")
helper, numpy_helper, T = onnx.helper, onnx.numpy_helper, onnx.TensorProto


def product(weights: np.ndarray | None = None) -> bytes:
    """y = a b in integers; b is an input unless there are weights for it."""
    shapes = {"a": (T.UINT8, ["m", "k"]), "b": (T.INT8, ["k", "n"]), "y": (T.INT32, ["m", "n"])}
    values = {name: helper.make_tensor_value_info(name, *of) for name, of in shapes.items()}
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "g",
        [values["a"]] if weights is not None else [values["a"], values["b"]],
        [values["y"]],
        [numpy_helper.from_array(weights, "b")] if weights is not None else [],
    )
    opset = [helper.make_opsetid("", 13)]
    made: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return made


def test_the_question_is_the_model_that_it_is_said_to_be() -> None:
    assert product() == _PRODUCT


def test_large_products_are_exact_whatever_the_processor(tmp_path: Path) -> None:
    """Fails on processors without VNNI unless the exact kernel is asked for."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-128, 128, (384, 96), np.int8)
    a = rng.integers(0, 256, (5, 384), np.uint8)
    path = tmp_path / "model.onnx"
    path.write_bytes(product(weights))
    (y,) = Session(path, "cpu", 1, ("y",)).run(["y"], {"a": a})
    assert (y == a.astype(np.int64) @ weights.astype(np.int64)).all()


def test_the_exact_kernel_is_asked_for_only_where_the_other_one_saturates() -> None:
    """Where it is exact it is also the faster one."""
    session = onnxruntime.InferenceSession(product(), providers=["CPUExecutionProvider"])
    a, b = np.full((3, 256), 255, np.uint8), np.full((256, 16), -128, np.int8)
    (y,) = session.run(None, {"a": a, "b": b})
    assert saturates(onnxruntime) == bool((y != -255 * 128 * 256).any())
    options = onnxruntime.SessionOptions()
    make_exact(options, onnxruntime)
    if saturates(onnxruntime):
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")
