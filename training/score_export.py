"""A trained score model as ONNX: int8 for encoders, gated on equal scores, then its manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from guardrail.score import OnnxScorer, ScoreKind, ScoreManifest
from training.preferences import Preference
from training.score_backbone import Backbone, LmScore, Score, score

_LICENCE = "CC-BY-NC-4.0"


class ExportArgs(Protocol):
    """The arguments of `score_model` that go into the manifest."""

    kind: ScoreKind
    out: Path
    seed: int


def export_onnx(model: Score, path: Path, length: int) -> None:
    """fp32 graph: `input_ids`, `attention_mask`, `token_type_ids`, (batch, length) -> `score`."""
    ids = torch.randint(5, 12, (2, 16))
    axes = {
        0: torch.export.Dim("batch", min=1, max=4096),
        1: torch.export.Dim("length", min=2, max=length),
    }
    program = torch.onnx.export(
        model.eval().float(),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["score"],
        dynamic_shapes=(axes, axes, axes),
        dynamo=True,
        opset_version=20,
    )
    assert program is not None
    program.save(str(path))


def export(
    backbone: Backbone,
    args: ExportArgs,
    run: str,
    metrics: Mapping[str, Any],
    rows: Mapping[str, int],
    held_out: Sequence[Preference],
    *,
    parity: float = 0.98,
) -> None:
    """Write `model.onnx` and, if its scores are those of torch, `manifest.json` into `args.out`.

    run: what tells the training from others (`training.runs.identity`).
    parity: the correlation of scores of held-out answers that is asked.
    """
    model = backbone.model
    scratch = args.out / "fp32.onnx"
    if isinstance(model, LmScore):
        model.body = model.body.merge_and_unload()  # type: ignore[operator]
    else:
        model.body.set_attn_implementation("eager")  # type: ignore[operator]
    export_onnx(model, scratch, backbone.encoding["max_tokens"])
    quantize_dynamic(
        scratch,
        args.out / "model.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    for path in args.out.glob("fp32.onnx*"):
        path.unlink()
    manifest = ScoreManifest(
        kind=args.kind,
        id=f"{args.kind}-{args.out.name}",
        base=backbone.base,
        licence=_LICENCE,
        command=f"python -m training.score_model {' '.join(sys.argv[1:])}",
        run=run,
        seed=args.seed,
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        data=dict(rows),
        encoding=backbone.encoding,
        metrics=dict(metrics),
    )
    manifest.write(args.out)
    found = agreement(backbone, args.out, held_out[:100])
    print(f"{args.out}: int8 scores correlate {found:.4f} with torch's", flush=True)
    if not found >= parity:
        (args.out / "manifest.json").unlink()
        raise SystemExit(f"{args.out}: {found:.4f} < {parity}: the exported model is not usable")


def agreement(backbone: Backbone, folder: Path, held_out: Sequence[Preference]) -> float:
    """Pearson's correlation of scores by torch and by the exported file."""
    pairs = [(p.prompt, answer) for p in held_out for answer in p.answers]
    short = [pair for pair in pairs if len(backbone.layout.encode(*pair)) == 1]
    windows = [backbone.layout.encode(*pair)[0] for pair in short]
    ours = score(backbone.model, windows, backbone.layout.pad_id)
    return float(np.corrcoef(ours, OnnxScorer(folder).score(short))[0, 1])
