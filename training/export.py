"""Export a trained moderation model to ONNX, gated on equal decisions.

    python -m training.export --model build/moderation --out guardrail/models/small --name small-1
    python -m training.export --model build/moderation --out build/gpu --precision fp16

int8 is for CPUs and ships in the package; fp16 and fp32 are for GPUs. Calibration and thresholds
are fitted afterwards, on the exported file, by `training.calibrate`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from guardrail.artifact import Manifest, write_manifest
from guardrail.encoding import Encoder, pad
from guardrail.moderator import OnnxModerator
from guardrail.verdict import Pair
from training.bases import BASES, MINILM
from training.batching import encode, predict
from training.data import Example, read_examples
from training.ending import ends_in_a_line
from training.model import ModerationModel, encoder_of, summary_of
from training.quantize import mixed_int8, to_fp16
from training.scoring import text_logits
from training.speed import measure, text

LICENCE = "CC-BY-NC-4.0"


@dataclass
class Args:
    model: Path = Path("build/moderation")
    out: Path = Path("guardrail/models/small")
    name: str = "minilm-l6-severity-1"
    """Model id, as verdicts carry it."""
    data: Path = Path("build/data")
    """Texts for the ranges of int8 and for the parity gate, which are left out where there are
    none."""
    precision: Literal["int8", "fp16", "fp32"] = "int8"
    parity: float = 0.995
    """Share of equal decisions (severity called at 0.5) between torch and the file that is asked;
    nor may any severity differ by two levels."""
    parity_texts: int = 2000
    range_texts: int = 240
    """Training texts from which int8 learns the range of activations."""


def export_onnx(model: ModerationModel, path: Path) -> None:
    """fp32 graph: three int64 inputs (batch, length) -> `severity_logits`, `category_logits`."""
    # The fused attention of torch would come out with guards against rows that are all masked.
    model.encoder.set_attn_implementation("eager")
    ids = torch.randint(5, model.encoder.config.vocab_size, (2, 16))
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


@dataclass(frozen=True)
class Parity:
    """How the artifact's decisions compare with torch's in fp32."""

    texts: int
    equal: float
    unsafe_equal: float
    largest_step: int
    """The most levels by which a severity moved."""

    def __str__(self) -> str:
        return (
            f"{self.equal:.4f} of {self.texts} decisions equal (unsafe or not: "
            f"{self.unsafe_equal:.4f}), none moved by more than {self.largest_step}"
        )


def convert(args: Args, source: Path, encoder: Encoder) -> None:
    """The fp32 graph at `source`, in the precision that is asked for, to `args.out`."""
    target = args.out / "model.onnx"
    if args.precision == "fp32":
        shutil.copy(source, target)
    elif args.precision == "fp16":
        to_fp16(source, target)
    elif (args.data / "train.jsonl").exists():
        examples = read_examples(args.data, "train")
        some = examples[:: max(1, len(examples) // args.range_texts)]
        windows = [encoder.encode(Pair(e.prompt, e.response))[0] for e in some]
        mixed_int8(source, target, [pad([window], encoder.pad_id) for window in windows])
    else:
        mixed_int8(source, target)


def parity(
    model: ModerationModel, moderator: OnnxModerator, examples: list[Example], encoder: Encoder
) -> Parity:
    """The severities that torch and the artifact call at 0.5, compared."""
    ours, _ = predict(model, encode(examples, encoder, 0.0), encoder.pad_id, bf16=False)
    theirs, _ = text_logits(moderator, [Pair(e.prompt, e.response) for e in examples])
    called, calls = (ours >= 0).sum(1), (theirs >= 0).sum(1)
    return Parity(
        texts=len(examples),
        equal=float((called == calls).mean()),
        unsafe_equal=float(((called > 0) == (calls > 0)).mean()),
        largest_step=int(np.abs(called - calls).max()),
    )


def main(args: Args) -> None:
    summary = summary_of(args.model)
    trained = summary["args"]
    model = ModerationModel.load(args.model)
    scratch = args.model / "onnx"
    scratch.mkdir(exist_ok=True)
    export_onnx(model, scratch / "fp32.onnx")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "manifest.json").unlink(missing_ok=True)
    encoder = encoder_of(args.model)
    convert(args, scratch / "fp32.onnx", encoder)
    shutil.copy(args.model / "tokenizer.json", args.out / "tokenizer.json")
    terms = Path(__file__).with_name("model_license.txt").read_text(encoding="utf-8")
    if trained["base"] in BASES:
        terms = terms.replace(MINILM, trained["base"])  # all of them are Apache-2.0
    (args.out / "LICENSE").write_text(terms, encoding="utf-8")
    manifest = Manifest(
        id=args.name,
        base=trained["base"],
        licence=LICENCE,
        data=[data_source(name, rows) for name, rows in summary["sources"].items()],
        command=command_of(summary),
        seed=trained["seed"],
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        encoding=encoder.config.to_json(),
    )
    write_manifest(args.out, manifest)
    size = round((args.out / "model.onnx").stat().st_size / 1e6, 1)
    print(f"{args.out}: {size} MB")
    metrics: dict[str, Any] = {"precision": args.precision, "megabytes": size}
    if (args.data / "validation.jsonl").exists():
        examples = read_examples(args.data, "validation")[: args.parity_texts]
        found = parity(model, OnnxModerator(args.out, device="cpu"), examples, encoder)
        print(f"parity of {args.precision} with torch fp32: {found}")
        if found.equal < args.parity or found.largest_step > 1:
            (args.out / "manifest.json").unlink()
            raise SystemExit(f"parity below {args.parity}, or two levels off: not usable")
        metrics["parity"] = {"precision": args.precision, **asdict(found)}
    metrics["speed"] = measure(args.out)
    print(text(metrics["speed"]))
    write_manifest(args.out, replace(manifest, metrics=metrics))


def data_source(name: str, rows: int) -> dict[str, Any]:
    """Name, rows and licence of a data source, for the manifest."""
    licences = {
        "annotated": "AI annotations by RUBRIC of texts: CC-BY-NC-4.0 (BeaverTails, PKU-SafeRLHF, "
        "Alpaca, ToxicChat); MIT (HH-RLHF, GPTFuzz, AdvBench, StrongREJECT, HarmBench, OpenAI "
        "moderation); Apache-2.0 (DiaSafety); CC-BY-NC-SA-4.0 (S-Eval); CC-BY-SA-3.0 (Dolly); "
        "CC-BY-4.0 (XSTest); none stated (OKTest, SPARD)",
        "responses": "CC-BY-NC-4.0 (BeaverTails, PKU-SafeRLHF)",
        "prompts": "CC-BY-NC-4.0 (BeaverTails, PKU-SafeRLHF); MIT (HH-RLHF)",
        "benign": "CC-BY-NC-4.0 (AlpacaFarm, Alpaca); CC-BY-SA-3.0 (Dolly)",
        "over_refusal": "CC-BY-4.0 (XSTest); none stated (OKTest)",
        "contrast": "Apache-2.0 (written for this project)",
        "statements": "Apache-2.0 (written for this project by an AI)",
        "everyday": "Apache-2.0 (drawn from SmolLM2-135M-Instruct, presumed harmless)",
        "plain_talk": "Apache-2.0 (written for this project by an AI)",
        "written": "Apache-2.0 (written for this project by an AI)",
        "unlabelled": "MIT (GPTFuzz); Apache-2.0 (DiaSafety); CC-BY-NC-SA-4.0 (S-Eval)",
        "pku": "CC-BY-NC-4.0 (PKU-SafeRLHF)",
    }
    return {"name": name, "rows": rows, "licence": licences.get(name, "see the data card")}


def command_of(summary: dict[str, Any]) -> str:
    """What was run, from the summary of a run or of a soup; of a soup, for each of its seeds."""
    command = f"python -m training.moderation {' '.join(_flags(summary['args']))}"
    seeds, start = summary.get("soup_seeds"), summary.get("soup_start")
    if seeds is None:
        return command
    soup = "python -m training.soup" + (f" --start {start}" if start else "")
    if start and (parts := summary.get("soup_start_parts", 1)) > 1:
        soup += f" --start-parts {parts}"
    rest = f"the same with each --seed of {seeds[1:]}; " if seeds[1:] else ""
    return f"{command}; {rest}{soup}"


def _flags(args: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in args.items():
        if value is None:
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{option}")
        elif isinstance(value, dict):
            pairs = " ".join(f"{key} {one}" for key, one in value.items())
            flags.append(f"--{option} {pairs}".rstrip())
        elif isinstance(value, list):
            flags.append(f"--{option} {' '.join(map(str, value))}")
        else:
            flags.append(f"--{option} {value}")
    return flags


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing of use is kept: the same command starts anew"):
        main(args)
