"""ONNX graphs to smaller ones: int8 for CPUs, fp16 for GPUs.

int8 is mixed by sensitivity (figures in docs/experiments.md):

- The product that narrows a feed-forward layer takes weights and activations in blocks of 128
  (`MatMulNBits`, 8 bits, int8 arithmetic). The range of its activations differs from token to
  token, and one scale per tensor turns decisions.
- Other products are dynamic int8, weights per channel, which is faster. Channels of their
  activations that are larger than others are first evened out (SmoothQuant, Xiao et al. 2023,
  arXiv:2211.10438).
- The word embedding is int8 with a scale per row.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.transformers.float16 import convert_float_to_float16

from training.quantized import BLOCK

__all__ = ["dynamic_int8", "mixed_int8", "to_fp16"]


Feed = Mapping[str, np.ndarray]
_SMOOTHING = 0.7  # how much of the spread of a channel goes from the activation to the weights


def mixed_int8(source: Path, target: Path, samples: Sequence[Feed] = ()) -> None:
    """The int8 graph that ships. samples: inputs of the model, typical ones, from which the range
    of activations is learnt; without any, nothing is evened out."""
    model = onnx.load(source)
    width = _embedding_per_row(model)
    if samples:
        _smooth(model, samples, width)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    others = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not _narrows(shapes.get(node.input[1], ()), width)
    ]
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=8
    )
    blockwise = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=others)
    blockwise.process()
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "blockwise.onnx"
        blockwise.model.save_model_to_file(str(part))
        dynamic_int8(part, target, embeddings=False)


def _narrows(shape: tuple[int, ...], width: int) -> bool:
    """A weight of a feed-forward layer's second product: what it takes is wider than the model."""
    return len(shape) == 2 and shape[0] > width


def _smooth(model: onnx.ModelProto, samples: Sequence[Feed], width: int) -> None:
    """Divide the inputs of products by a constant per channel, and multiply their weights by it."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and not _narrows(tuple(weight.dims), width):
            products[node.input[0]].append(node)
    for number, (name, largest) in enumerate(_largest(model, list(products), samples).items()):
        nodes = products[name]
        arrays = [numpy_helper.to_array(weights[node.input[1]]) for node in nodes]
        heaviest = np.max([np.abs(array).max(axis=1) for array in arrays], axis=0)
        scale = np.maximum(largest, 1e-5) ** _SMOOTHING
        scale = scale / np.maximum(heaviest, 1e-5) ** (1 - _SMOOTHING)
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        divided = f"smooth_{number}"
        graph.initializer.append(numpy_helper.from_array(1 / scale, f"{divided}_by"))
        at = min(list(graph.node).index(node) for node in nodes)
        divide = helper.make_node("Mul", [name, f"{divided}_by"], [divided], f"{divided}_mul")
        graph.node.insert(at, divide)
        for node, array in zip(nodes, arrays, strict=True):
            graph.initializer.remove(weights[node.input[1]])
            graph.initializer.append(numpy_helper.from_array(array * scale[:, None], node.input[1]))
            node.input[0] = divided


def _largest(
    model: onnx.ModelProto, names: Sequence[str], samples: Sequence[Feed]
) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel (last axis) of the named tensors."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {argument.name for argument in session.get_inputs()}
    largest: dict[str, np.ndarray] = {}
    for feed in samples:
        values = session.run(list(names), {k: v for k, v in feed.items() if k in inputs})
        for name, value in zip(names, values, strict=True):
            seen = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
            largest[name] = np.maximum(largest.get(name, seen), seen)
    return largest


def dynamic_int8(source: Path, target: Path, *, embeddings: bool = True) -> None:
    """Dynamic int8 of matrix products (and embeddings), weights with a scale per channel."""
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", *(["Gather"] if embeddings else [])],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def to_fp16(source: Path, target: Path) -> None:
    """Half precision with fp32 outputs, for GPUs."""
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _embedding_per_row(model: onnx.ModelProto) -> int:
    """Replace the largest `Gather(weights, ids)` by int8 rows times a scale per row. Returns
    the rows' length, which is the model's width."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    gathers = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in weights]
    gather = max(gathers, key=lambda n: int(np.prod(weights[n.input[0]].dims)))
    name, ids, out = gather.input[0], gather.input[1], gather.output[0]
    table = numpy_helper.to_array(weights[name])
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12) / 127
    rows = np.rint(table / scale).astype(np.int8)
    nodes = [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"]),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"]),
        helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out]),
    ]
    _replace(graph, gather, nodes)
    graph.initializer.remove(weights[name])
    graph.initializer.extend(
        [
            numpy_helper.from_array(rows, f"{name}_int8"),
            numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
        ]
    )
    return int(table.shape[1])


def _replace(graph: onnx.GraphProto, old: NodeProto, new: list[NodeProto]) -> None:
    at = list(graph.node).index(old)
    graph.node.remove(old)
    for offset, node in enumerate(new):
        graph.node.insert(at + offset, node)
