"""Export a trained moderation model to ONNX: fp32, then int8, gated on equal decisions.

    python -m training.export --model build/moderation --out guardrail/models/small --name small-1

The int8 file is what ships. Calibration and thresholds are fitted afterwards, on the exported file,
by `training.calibrate`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import torch
import tyro
from onnxruntime.quantization import QuantType, quantize_dynamic

from guardrail.artifact import Manifest, write_manifest
from guardrail.encoding import Encoder, EncoderConfig
from guardrail.moderator import OnnxModerator
from guardrail.verdict import Pair
from training.batching import encode, predict
from training.data import Example, read_examples
from training.model import ModerationModel
from training.scoring import text_logits

LICENCE = "CC-BY-NC-4.0"


@dataclass
class Args:
    model: Path = Path("build/moderation")
    out: Path = Path("guardrail/models/small")
    name: str = "minilm-l6-severity-1"
    """Model id, as verdicts carry it."""
    data: Path = Path("build/data")
    """Validation texts for the parity gate; the gate is skipped where there are none."""
    parity: float = 0.97
    """Share of equal decisions (severity called at 0.5) between torch and int8 that is asked."""
    parity_texts: int = 600


def export_onnx(model: ModerationModel, path: Path) -> None:
    """fp32 graph: three int64 inputs (batch, length) -> `severity_logits`, `category_logits`."""
    ids = torch.randint(5, 1000, (2, 16))
    inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", max=512)}
    program = torch.onnx.export(
        model.eval().float(),
        inputs,
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["severity_logits", "category_logits"],
        dynamic_shapes=(axes, axes, axes),
        dynamo=True,
        opset_version=20,
    )
    assert program is not None
    program.save(str(path))


def quantize(source: Path, target: Path) -> None:
    """Dynamic int8 of matrix products and embeddings, per channel."""
    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def parity(
    model: ModerationModel, moderator: OnnxModerator, examples: list[Example], encoder: Encoder
) -> float:
    """Share of texts on which torch and the artifact call the same severity at 0.5."""
    ours, _ = predict(model, encode(examples, encoder, 0.0), encoder.pad_id, bf16=False)
    theirs, _ = text_logits(moderator, [Pair(e.prompt, e.response) for e in examples])
    return float(((ours >= 0).sum(1) == (theirs >= 0).sum(1)).mean())


def main(args: Args) -> None:
    summary: dict[str, Any] = json.loads((args.model / "summary.json").read_text())
    trained = summary["args"]
    model = ModerationModel.load(args.model)
    scratch = args.model / "onnx"
    scratch.mkdir(exist_ok=True)
    export_onnx(model, scratch / "fp32.onnx")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "manifest.json").unlink(missing_ok=True)
    quantize(scratch / "fp32.onnx", args.out / "model.onnx")
    shutil.copy(args.model / "tokenizer.json", args.out / "tokenizer.json")
    shutil.copy(Path(__file__).with_name("model_license.txt"), args.out / "LICENSE")
    config = EncoderConfig(trained["max_tokens"], trained["prompt_tokens"], trained["overlap"])
    manifest = Manifest(
        id=args.name,
        base=trained["base"],
        licence=LICENCE,
        data=[data_source(name, rows) for name, rows in summary["sources"].items()],
        command=f"python -m training.moderation {' '.join(_flags(trained))}",
        seed=trained["seed"],
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        encoding=config.to_json(),
    )
    write_manifest(args.out, manifest)
    size = (args.out / "model.onnx").stat().st_size / 1e6
    print(f"{args.out}: {size:.1f} MB")
    if (args.data / "validation.jsonl").exists():
        examples = read_examples(args.data, "validation")[: args.parity_texts]
        encoder = Encoder.from_file(args.out / "tokenizer.json", config)
        share = parity(model, OnnxModerator(args.out, device="cpu"), examples, encoder)
        print(f"parity of int8 with torch fp32: {share:.4f} of {len(examples)} decisions")
        if share < args.parity:
            (args.out / "manifest.json").unlink()
            raise SystemExit(f"parity {share:.4f} < {args.parity}: the artifact is not usable")


def data_source(name: str, rows: int) -> dict[str, Any]:
    """Name, rows and licence of a data source, for the manifest."""
    licences = {
        "annotated": "CC-BY-NC-4.0 (BeaverTails and PKU-SafeRLHF texts; AI annotations by RUBRIC)",
        "responses": "CC-BY-NC-4.0 (BeaverTails, PKU-SafeRLHF)",
        "prompts": "CC-BY-NC-4.0 (BeaverTails, PKU-SafeRLHF); MIT (HH-RLHF)",
        "benign": "CC-BY-NC-4.0 (AlpacaFarm, Alpaca); CC-BY-SA-3.0 (Dolly)",
        "over_refusal": "CC-BY-4.0 (XSTest); none stated (OKTest)",
        "unlabelled": "MIT (GPTFuzz); Apache-2.0 (DiaSafety); CC-BY-NC-SA-4.0 (S-Eval)",
        "pku": "CC-BY-NC-4.0 (PKU-SafeRLHF)",
    }
    return {"name": name, "rows": rows, "licence": licences.get(name, "see the data card")}


def _flags(args: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in args.items():
        if value is None:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{option}")
        elif isinstance(value, list):
            flags.append(f"--{option} {' '.join(map(str, value))}")
        else:
            flags.append(f"--{option} {value}")
    return flags


if __name__ == "__main__":
    main(tyro.cli(Args))
