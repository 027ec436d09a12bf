"""An adapter made ready for others: bfloat16, half the size, and with all that it comes from.

    python -m training.publish --policy build/dpo3 --scale 1.3

`--scale` goes on in the direction that training took: chosen on the validation split, it is a dial
between how safe a policy is and how near to its base it stays (task arithmetic, Ilharco et al.
2023, arXiv:2212.04089).

`summary.json`, written last, has a stage per training run that led here, first to last: its recipe,
arguments and figures, as each run wrote them.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from guardrail._files import sha256_of, write_json
from training.ending import ends_in_a_line, in_a_line
from training.lm import refuse_not_finite

WEIGHTS = "adapter_model.safetensors"
_LONG = ("history", "sha256", "files")  # curves, and hashes of weights that are not handed out


@dataclass
class Args:
    policy: Path = Path("build/ppo_lag")
    out: Path = Path("training/adapters/smollm2-135m-safe")
    scale: float = 1.0
    """What the adapter's weights are multiplied by; 0 would be the base."""
    licence: str = (
        "CC-BY-NC-4.0, non-commercial: learns from BeaverTails and PKU-SafeRLHF; the base is "
        "Apache-2.0"
    )


def stages(policy: Path) -> list[dict[str, Any]]:
    """The summary of `policy`, after those of the adapters that it started from. SystemExit where
    a run did not end, for its adapter is not what it was to become."""
    path = policy / "summary.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: the run has not ended: start it again, it resumes")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if "stages" in summary:  # published already, and gone on from
            published: list[dict[str, Any]] = summary["stages"]
            return published
        before = Path(summary["args"]["policy"])
    except (ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{path} is not what a training run writes: {in_a_line(error)}") from error
    earlier = stages(before) if (before / "adapter_config.json").is_file() else []
    own = {name: value for name, value in summary.items() if name not in _LONG}
    stage = {"policy": policy.name} | own
    return earlier if stage in earlier else [*earlier, stage]  # over its own start once already


def main(args: Args) -> None:
    if not (math.isfinite(args.scale) and args.scale > 0):
        raise SystemExit(f"--scale is {args.scale}: it has to be above 0")
    if args.out.resolve() == args.policy.resolve():
        raise SystemExit(f"--out is --policy, {args.out}, which would be written over itself")
    led_here = stages(args.policy)
    try:
        weights = load_file(args.policy / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{args.policy / WEIGHTS} is damaged: {in_a_line(error)}") from error
    refuse_not_finite(weights, args.policy)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.json").unlink(missing_ok=True)  # of what is replaced now
    # One of the two factors of each update: the product is scaled once.
    rounded = {
        name: (tensor * args.scale if "lora_B" in name else tensor).to(torch.bfloat16)
        for name, tensor in weights.items()
    }
    save_file(rounded, args.out / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(args.policy / "adapter_config.json", args.out / "adapter_config.json")
    summary = {
        "base": led_here[-1]["base"],
        "tokenizer": led_here[-1]["tokenizer"],
        "weights": "bfloat16, rounded from the float32 of training",
        "scale": args.scale,
        "licence": args.licence,
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "stages": led_here,
        "sha256": {WEIGHTS: sha256_of(args.out / WEIGHTS)},
    }
    write_json(args.out / "summary.json", summary)
    size = (args.out / WEIGHTS).stat().st_size / 1e6
    print(f"{args.out}: {size:.1f} MB, {' -> '.join(s['policy'] for s in led_here)}")


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
