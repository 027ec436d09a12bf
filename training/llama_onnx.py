"""A causal language model of the Llama class as an ONNX graph with a key-value cache.

The graph is written node by node from the weights, as ONNX Runtime's own model builder does:
tracing the model through torch gives the same tokens, takes minutes instead of seconds, and leaves
the weights to a second pass that cannot keep a tied embedding in int8 once.

    input_ids (batch, length) int64; keep (1,) int64: of how many last positions logits are wanted;
    past_key_i, past_value_i (batch, kv heads, past, head) float32, past may be 0
    -> logits (batch, keep, vocabulary); present_key_i, present_value_i, past + length long

All rows of a batch have the same length. In fp32 all operators are standard ones of opset 17. In
int8, products are ONNX Runtime's `MatMulNBits`: a scale per 32 weights of an output channel, and
per 32 activations of a token, so that a token's result does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["LlamaShape", "Precision", "build"]

Precision = Literal["fp32", "int8"]
Weights = Mapping[str, NDArray[np.float32]]
_BLOCK = 32
_ZERO = 128  # int8 as unsigned
_INT8_ARITHMETIC = 4  # `accuracy_level` of MatMulNBits


@dataclass(frozen=True)
class LlamaShape:
    """layers, heads, kv_heads, head: sizes; epsilon: of RMSNorm; inv_freq (head / 2,) and
    rope_scale: of the rotary embedding (Su et al. 2021); tied: the head is the embedding."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    epsilon: float
    inv_freq: NDArray[np.float32]
    rope_scale: float
    tied: bool


@dataclass(frozen=True)
class _Matrix:
    """Names of constants, and the shape (rows, width) of what they say."""

    weight: str
    scale: str | None
    rows: int
    width: int


class _Graph:
    """Nodes and constants under fresh names."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, outputs: Any = 1, **attributes: Any) -> Any:
        """Add a node; its output's name, or names when more than one is asked for."""
        name = f"{kind}_{len(self.nodes)}"
        names = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names[0] if len(names) == 1 else names

    def const(self, value: Any, dtype: Any = np.int64, name: str | None = None) -> str:
        array = np.asarray(value, dtype)
        name = name or f"c_{array.dtype}_{'_'.join(map(str, array.shape))}_{array.tolist()}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def norm(self, x: str, weight: NDArray[np.float32], epsilon: float, name: str) -> str:
        """RMSNorm (Zhang and Sennrich 2019), in the shape that ONNX Runtime fuses."""
        square = self.op("Pow", x, self.const(2.0, np.float32))
        mean = self.op("ReduceMean", square, axes=[-1], keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.const(epsilon, np.float32)))
        scaled = self.op("Div", x, root)
        return str(self.op("Mul", scaled, self.const(weight, np.float32, name)))

    def linear(self, x: str, weight: NDArray[np.float32], name: str) -> str:
        """x (..., in) @ weight (out, in).T"""
        return self.matmul(x, self.matrix(weight, name))

    def matrix(self, weight: NDArray[np.float32], name: str) -> _Matrix:
        """weight (out, in) as constants: (in, out) in fp32; in int8 (out, blocks, 32), and a scale
        per block (out, blocks)."""
        rows, width = weight.shape
        if self.precision == "fp32":
            plain = self.const(np.ascontiguousarray(weight.T), np.float32, name)
            return _Matrix(plain, None, rows, width)
        blocks = np.pad(weight, ((0, 0), (0, -width % _BLOCK))).reshape(rows, -1, _BLOCK)
        scale = np.maximum(np.abs(blocks).max(axis=2), 1e-12) / 127
        steps = np.rint(blocks / scale[:, :, None]) + _ZERO
        return _Matrix(
            self.const(steps, np.uint8, name),
            self.const(scale, np.float32, f"{name}.scale"),
            rows,
            width,
        )

    def matmul(self, x: str, matrix: _Matrix) -> str:
        if matrix.scale is None:
            return str(self.op("MatMul", x, matrix.weight))
        return str(
            self.op(
                "MatMulNBits",
                *(x, matrix.weight, matrix.scale),
                domain="com.microsoft",
                K=matrix.width,
                N=matrix.rows,
                bits=8,
                block_size=_BLOCK,
                accuracy_level=_INT8_ARITHMETIC,
            )
        )

    def embed(self, ids: str, matrix: _Matrix) -> str:
        """Rows of the matrix at ids: (batch, length, width)."""
        if matrix.scale is None:
            found = self.op("Gather", matrix.weight, ids, axis=1)
            return str(self.op("Transpose", found, perm=[1, 2, 0]))
        steps = self.op("Cast", self.op("Gather", matrix.weight, ids), to=TensorProto.FLOAT)
        steps = self.op("Sub", steps, self.const(float(_ZERO), np.float32))
        each = self.op("Unsqueeze", self.op("Gather", matrix.scale, ids), self.const([-1]))
        found = self.op("Reshape", self.op("Mul", steps, each), self.const([0, 0, -1]))
        if matrix.width % _BLOCK == 0:
            return str(found)
        ends = (self.const([end]) for end in (0, matrix.width, 2))
        return str(self.op("Slice", found, *ends))


def build(weights: Weights, shape: LlamaShape, precision: Precision) -> onnx.ModelProto:
    """The graph of a `LlamaForCausalLM`. weights: its state dict, by transformers' names."""
    g = _Graph(precision)
    table = g.matrix(weights["model.embed_tokens.weight"], "embedding")
    hidden = g.embed("input_ids", table)
    past = g.op("Shape", "past_key_0", start=2, end=3)
    length = g.op("Shape", "input_ids", start=1, end=2)
    total = g.op("Add", past, length)
    zero, one = g.const(0), g.const(1)
    first, end = (g.op("Squeeze", x, g.const([0])) for x in (past, total))
    own = g.op("Unsqueeze", g.op("Range", first, end, one), g.const([1]))  # (length, 1)
    rotation = _rotation(g, own, shape)
    mask = _mask(g, own, g.op("Range", zero, end, one), shape)
    for i in range(shape.layers):
        hidden = _layer(g, hidden, i, weights, shape, rotation, mask)
    hidden = g.op("Slice", hidden, g.op("Neg", "keep"), g.const([2**62]), g.const([1]))
    hidden = g.norm(hidden, weights["model.norm.weight"], shape.epsilon, "norm")
    head = table if shape.tied else g.matrix(weights["lm_head.weight"], "head")
    g.op("Identity", g.matmul(hidden, head), outputs=["logits"])
    return _model(g, shape, len(weights["model.embed_tokens.weight"]))


def _rotation(g: _Graph, own: str, shape: LlamaShape) -> tuple[str, str]:
    """Cosine and signed sine (length, head) of each position."""
    angles = g.op("Cast", own, to=TensorProto.FLOAT)
    angles = g.op("Mul", angles, g.const(shape.inv_freq[None], np.float32, "inv_freq"))
    scale = g.const(shape.rope_scale, np.float32)
    cos, sin = (g.op("Mul", g.op(kind, angles), scale) for kind in ("Cos", "Sin"))
    return (
        g.op("Concat", cos, cos, axis=-1),
        g.op("Concat", g.op("Neg", sin), sin, axis=-1),
    )


def _mask(g: _Graph, own: str, keys: str, shape: LlamaShape) -> str:
    """What a query adds to the scores of each key, (heads per kv head * length, total)."""
    sees = g.op("LessOrEqual", keys, own)
    mask = g.op("Where", sees, g.const(0.0, np.float32), g.const(-np.inf, np.float32))
    return str(g.op("Tile", mask, g.const([shape.heads // shape.kv_heads, 1])))


def _layer(
    g: _Graph,
    hidden: str,
    i: int,
    weights: Weights,
    shape: LlamaShape,
    rotation: tuple[str, str],
    mask: str,
) -> str:
    def of(*names: str) -> NDArray[np.float32]:
        return np.concatenate([weights[f"model.layers.{i}.{name}.weight"] for name in names])

    def norm(x: str, name: str) -> str:
        return g.norm(x, of(name), shape.epsilon, f"{name}.{i}")

    x = norm(hidden, "input_layernorm")
    x = g.linear(x, of(*(f"self_attn.{name}_proj" for name in "qkv")), f"qkv.{i}")
    x = _attention(g, x, i, shape, rotation, mask)
    hidden = g.op("Add", hidden, g.linear(x, of("self_attn.o_proj"), f"o.{i}"))
    x = norm(hidden, "post_attention_layernorm")
    both = g.linear(x, of("mlp.gate_proj", "mlp.up_proj"), f"gate_up.{i}")
    half = g.const([of("mlp.up_proj").shape[0]] * 2)
    gate, up = g.op("Split", both, half, outputs=2, axis=-1)
    x = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return str(g.op("Add", hidden, g.linear(x, of("mlp.down_proj"), f"down.{i}")))


def _attention(
    g: _Graph, qkv: str, i: int, shape: LlamaShape, rotation: tuple[str, str], mask: str
) -> str:
    """Grouped-query attention (Ainslie et al. 2023): (batch, length, all heads) in and out."""
    h, kv, d = shape.heads, shape.kv_heads, shape.head
    x = g.op("Reshape", qkv, g.const([0, 0, h + 2 * kv, d]))
    x = g.op("Transpose", x, perm=[0, 2, 1, 3])
    x, value = g.op("Split", x, g.const([h + kv, kv]), outputs=2, axis=1)
    low, high = g.op("Split", x, g.const([d // 2, d // 2]), outputs=2, axis=-1)
    turned = g.op("Mul", g.op("Concat", high, low, axis=-1), rotation[1])
    x = g.op("Add", g.op("Mul", x, rotation[0]), turned)
    query, key = g.op("Split", x, g.const([h, kv]), outputs=2, axis=1)
    key = g.op("Concat", f"past_key_{i}", key, axis=2, outputs=[f"present_key_{i}"])
    value = g.op("Concat", f"past_value_{i}", value, axis=2, outputs=[f"present_value_{i}"])
    # The heads that share a key lie side by side: as more rows of one product, nothing is repeated.
    query = g.op("Reshape", query, g.const([0, kv, -1, d]))
    query = g.op("Mul", query, g.const(d**-0.5, np.float32))
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
    shares = g.op("Softmax", g.op("Add", scores, mask), axis=-1)
    mixed = g.op("MatMul", shares, value)
    mixed = g.op("Reshape", mixed, _split_heads(g, qkv, h, d))
    mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return str(g.op("Reshape", mixed, g.const([0, 0, h * d])))


def _split_heads(g: _Graph, qkv: str, heads: int, head: int) -> str:
    """The shape (batch, heads, length, head), which has two sizes that only the input knows."""
    batch, length = (g.op("Shape", qkv, start=n, end=n + 1) for n in (0, 1))
    return str(g.op("Concat", batch, g.const([heads]), length, g.const([head]), axis=0))


def _model(g: _Graph, shape: LlamaShape, vocabulary: int) -> onnx.ModelProto:
    def value(name: str, dtype: int, *dims: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, dims)

    def cache(when: str, time: str) -> list[onnx.ValueInfoProto]:
        dims = ("batch", shape.kv_heads, time, shape.head)
        return [
            value(f"{when}_{what}_{i}", TensorProto.FLOAT, *dims)
            for i in range(shape.layers)
            for what in ("key", "value")
        ]

    graph = helper.make_graph(
        g.nodes,
        "llama",
        [
            value("input_ids", TensorProto.INT64, "batch", "length"),
            value("keep", TensorProto.INT64, 1),
            *cache("past", "past"),
        ],
        [
            value("logits", TensorProto.FLOAT, "batch", "kept", vocabulary),
            *cache("present", "total"),
        ],
        list(g.constants.values()),
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
        producer_name="guardrail",
    )
