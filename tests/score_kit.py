"""A score model in ONNX that adds up a weight per word: for tests of what uses one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from guardrail.score import ScoreKind, ScoreManifest

if TYPE_CHECKING:
    import onnx

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "filler", "broken"]
WEIGHTS = [0, 0, 0, 0, 1, -1, 0, np.nan]
PAIR = {"layout": "pair", "max_tokens": 24, "prompt_tokens": 6, "overlap": 2}
CHAT = {
    "layout": "chat",
    "before": "",
    "between": " filler ",
    "after": " good",
    "max_tokens": 20,
    "pad_id": 0,
}


def word_weights(weights: Sequence[float] | np.ndarray) -> onnx.ModelProto:
    """input_ids (batch, length) -> score (batch,), the sum of a weight per id."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["weights", "input_ids"], ["each"]),
            helper.make_node("ReduceSum", ["each", "axis"], ["score"], keepdims=0),
        ],
        "bag",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])],
        [
            numpy_helper.from_array(np.array(weights, np.float32), "weights"),
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def scorer_folder(
    folder: Path,
    kind: ScoreKind = "reward",
    encoding: object = None,
    weights: Sequence[float] = WEIGHTS,
) -> Path:
    """A folder that OnnxScorer opens; one weight for each of WORDS."""
    import onnx
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    onnx.save(word_weights(weights), str(folder / "model.onnx"))
    manifest = ScoreManifest(
        kind=kind,
        id="bag",
        base="none",
        licence="Apache-2.0",
        command="",
        seed=0,
        created="2026-01-01",
        data={},
        encoding=encoding or PAIR,  # type: ignore[arg-type]
    )
    manifest.write(folder)
    return folder
