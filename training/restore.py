"""An exported artifact as a trained model again, to train on from what is installed.

    python -m training.moderation --init guardrail/models/small ...
    python -m training.restore --artifact guardrail/models/small --out build/small  # as a teacher

The second writes what `training.moderation` would have written. int8 weights come back as the
numbers that int8 holds, and what smoothing moved between channels is moved back: the model decides
as the artifact does, but for the rounding of activations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
import tyro
from onnx import NodeProto, numpy_helper

from guardrail.artifact import read_manifest
from training.bases import base_folder
from training.ending import ends_in_a_line, in_a_line
from training.model import ModerationModel
from training.runs import load_whole

_PRODUCTS = {"MatMul", "MatMulInteger", "MatMulNBits", "Gemm"}
_EMBEDDING = "encoder.embeddings.word_embeddings.weight"


@dataclass
class Args:
    artifact: Path = Path("guardrail/models/small")
    out: Path = Path("build/small")
    cache: Path = Path("build/bases")
    """Where the configuration of its base comes from, or is kept."""


class _Graph:
    """Where each tensor of an ONNX graph comes from."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._made_by = {name: node for node in self.nodes for name in node.output}

    def before(self, name: str) -> Iterator[NodeProto]:
        """The nodes that lead to a tensor, nearest first, by what each takes in first."""
        while (node := self._made_by.get(name)) is not None:
            yield node
            name = node.input[0]

    def constant(self, name: str) -> np.ndarray:
        return self.constants[name].astype(np.float32)


def exported_weights(path: Path) -> dict[str, torch.Tensor]:
    """The parameters of the moderation model in an exported graph, by their names in torch; int8 or
    not, float32. A product has no name of its own: it is known by the bias that is added to it."""
    graph = _Graph(path)
    found = {
        name: graph.constant(name) for name in graph.constants if name.endswith(("weight", "bias"))
    }
    if f"{_EMBEDDING}_int8" in graph.constants:
        rows, scale = graph.constant(f"{_EMBEDDING}_int8"), graph.constant(f"{_EMBEDDING}_scale")
        found[_EMBEDDING] = rows * scale
    for node in graph.nodes:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        if node.op_type not in {"Add", "Gemm"} or bias is None:
            continue
        added = node.output[0] if node.op_type == "Gemm" else _other(node, bias)
        product = next((n for n in graph.before(added) if n.op_type in _PRODUCTS), None)
        if product is not None:
            found[f"{bias.removesuffix('.bias')}.weight"] = _matrix(graph, product)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}


def _other(add: NodeProto, bias: str) -> str:
    return next(name for name in add.input if name != bias)


def _matrix(graph: _Graph, product: NodeProto) -> np.ndarray:
    """(outputs, inputs), as `nn.Linear` has it."""
    held = product.input[1]
    attributes = {a.name: a.i for a in product.attribute}
    if product.op_type == "MatMulNBits":
        scale = graph.constant(product.input[2]).reshape(attributes["N"], -1, 1)
        blocks = graph.constant(held) - 2.0 ** (attributes["bits"] - 1)  # stored without a sign
        matrix = (blocks * scale).reshape(attributes["N"], -1)
        return np.asarray(matrix[:, : attributes["K"]])
    if product.op_type == "MatMulInteger":
        name = held.removesuffix("_quantized")
        zero, scale = graph.constant(f"{name}_zero_point"), graph.constant(f"{name}_scale")
        matrix = (graph.constant(held) - zero) * scale
    else:
        matrix = graph.constant(held)
        if attributes.get("transB"):
            matrix = matrix.T
    return np.asarray(_unsmoothed(graph, product, matrix).T)


def _unsmoothed(graph: _Graph, product: NodeProto, matrix: np.ndarray) -> np.ndarray:
    """(inputs, outputs), with what smoothing multiplied each input channel by divided out again."""
    for node in graph.before(product.input[0]):
        if node.op_type == "Mul" and node.input[1].startswith("smooth_"):
            return matrix * graph.constant(node.input[1])[:, None]
        if node.op_type not in {"DynamicQuantizeLinear", "Mul"}:
            break
    return matrix


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of what a training run wrote, or of an artifact."""
    if (folder / "model.pt").exists():
        return load_whole(folder / "model.pt")
    if (folder / "manifest.json").exists():
        read_manifest(folder)  # that no byte of it has changed
        return exported_weights(folder / "model.onnx")
    raise SystemExit(f"{folder}: neither what training.moderation nor what training.export writes")


def begin(model: ModerationModel, init: Path, base: str) -> None:
    """Take over the weights of `init`."""
    try:
        model.load_state_dict(weights_of(init))
    except RuntimeError as error:  # names every parameter that differs, below a heading
        _, first, *more = str(error).split("\n\t")
        others = f" and {len(more)} more like it" if more else ""
        raise SystemExit(
            f"{init}: its weights do not fit {base}: {in_a_line(first)}{others}"
        ) from None


def main(args: Args) -> None:
    manifest = read_manifest(args.artifact)
    folder = base_folder(manifest.base, args.cache)
    model = ModerationModel.from_base(folder)
    model.load_state_dict(weights_of(args.artifact))
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.out / "model.pt")
    model.encoder.config.save_pretrained(args.out)
    (args.out / "tokenizer.json").write_bytes((args.artifact / "tokenizer.json").read_bytes())
    sources = {one["name"]: one["rows"] for one in manifest.data}
    trained = {"base": manifest.base, "seed": manifest.seed, **manifest.encoding}
    summary = {"args": trained, "sources": sources}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(f"{args.out}: {manifest.id}")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing of use is kept: the same command starts anew"):
        main(args)
