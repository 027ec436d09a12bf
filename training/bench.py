"""Latency and throughput of the bundled model beside a 125M RoBERTa-shaped peer, in one run.

    python -m training.bench            (or: make bench)

The peer has random weights (speed does not depend on them) and the shape of RoBERTa-base, the
backbone of the guards people run on CPUs today; fp32 and int8, same runtime, same threads. Runs are
interleaved, so that a machine whose speed drifts slows all of them alike. One row is one text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import tyro
from transformers import RobertaConfig, RobertaForSequenceClassification

from guardrail._int8 import make_exact
from guardrail.artifact import artifact_folder, read_manifest
from training.ending import ends_in_a_line
from training.quantize import dynamic_int8


@dataclass
class Args:
    model: str = "small"
    cache: Path = Path("build/bench")
    lengths: tuple[int, ...] = (32, 128, 256, 512)
    batch: int = 16
    """Rows at once for the throughput columns."""
    rounds: int = 20
    threads: int = 2
    out: Path = Path("build/bench.json")


class Peer(torch.nn.Module):
    """RoBERTa-base (125M parameters) with a two-way head."""

    def __init__(self) -> None:
        super().__init__()
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, num_labels=2)
        self.model = RobertaForSequenceClassification(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids, attention_mask).logits
        return logits


def export_peer(folder: Path) -> tuple[Path, Path]:
    """fp32 and int8 ONNX of the peer, made once."""
    fp32, int8 = folder / "peer-fp32.onnx", folder / "peer-int8.onnx"
    if not int8.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        ids = torch.randint(5, 1000, (2, 16))
        axes = {
            0: torch.export.Dim("batch", min=1, max=4096),
            1: torch.export.Dim("length", max=512),
        }
        program = torch.onnx.export(
            Peer().eval(),
            (ids, torch.ones_like(ids)),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=(axes, axes),
            dynamo=True,
            opset_version=20,
        )
        assert program is not None
        program.save(str(fp32))
        dynamic_int8(fp32, int8)
    return fp32, int8


def runner(path: Path, threads: int) -> Callable[[int, int], None]:
    """A function that runs the model once on a (batch, length) of random tokens."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # As the SDK sets them, for both: without spinning, else the idle threads of one model would
    # take cores from the next; exact in int8; without a fusion that slows either down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    make_exact(options, ort)
    session = ort.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],
    )
    names = [argument.name for argument in session.get_inputs()]
    rng = np.random.default_rng(0)

    def run(batch: int, length: int) -> None:
        shape = (batch, length)
        arrays = {
            "input_ids": rng.integers(5, 20000, shape),
            "attention_mask": np.ones(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        session.run(None, {name: arrays[name] for name in names})

    return run


def measure(
    runners: dict[str, Callable[[int, int], None]], batch: int, length: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds per run of each, taken in turn, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 2):
        for name, run in runners.items():
            started = time.perf_counter()
            run(batch, length)
            if turn >= 2:
                times[name].append((time.perf_counter() - started) * 1000)
    return times


def main(args: Args) -> None:
    folder = artifact_folder(args.model)
    ours = read_manifest(folder).id
    fp32, int8 = export_peer(args.cache)
    runners = {
        ours: runner(folder / "model.onnx", args.threads),
        "RoBERTa-125M int8": runner(int8, args.threads),
        "RoBERTa-125M fp32": runner(fp32, args.threads),
    }
    rows: list[dict[str, Any]] = []
    print(f"{args.threads} threads, onnxruntime {ort.__version__}, {args.rounds} rounds in turn")
    print(f"{'model':<28}{'tokens':>7}{'p50 ms':>9}{'p95 ms':>9}{'rows/s':>9}{'ours faster':>13}")
    for length in args.lengths:
        one = measure(runners, 1, length, args.rounds)
        many = measure(runners, args.batch, length, max(3, args.rounds // 5))
        reference = float(np.median(one[ours]))
        for name in runners:
            p50, p95 = (float(np.percentile(one[name], q)) for q in (50, 95))
            rate = args.batch / (float(np.median(many[name])) / 1000)
            row = {"model": name, "tokens": length, "p50_ms": p50, "p95_ms": p95,
                   "rows_per_s": rate, "ratio": p50 / reference}  # fmt: skip
            rows.append(row)
            print(f"{name:<28}{length:>7}{p50:>9.1f}{p95:>9.1f}{rate:>9.0f}"
                  f"{row['ratio']:>12.1f}x", flush=True)  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
