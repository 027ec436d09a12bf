"""The larger model, `base`, in one command: train, export, calibrate, install.

    python -m training.base                       # about an hour on two cores; resumes
    python -m training.base --finished build/judge    # of a run of training.moderation

MPNet (109 M parameters) as int8, over 100 MB, so it is not in the wheel. Installed into
`$GUARDRAIL_MODELS` (default `~/.local/share/guardrail/models`), where `Guard(model="base")` finds
it. Whether it pays beside the bundled one is in docs/experiments.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from guardrail.artifact import installed_models, read_manifest
from training import calibrate, export, moderation
from training.bases import MPNET
from training.ending import ends_in_a_line
from training.retrain import install

LIMIT_MB = 150


def _train() -> moderation.Args:
    """As run 22 trained its judge, on harmless prompts of both kinds besides."""
    return moderation.Args(
        base=MPNET,
        include=("annotated/", "benign/", "over_refusal/"),
        epochs=1.0,
        tokens_per_batch=4096,
        layer_decay=0.95,
        max_tokens=224,
        prompt_tokens=64,
    )


@dataclass
class Args:
    data: Path = Path("build/data")
    work: Path = Path("build/base")
    """The run, and the artifact before it is installed."""
    name: str = "mpnet-base-severity-1"
    target: Path = field(default_factory=lambda: installed_models() / "base")
    finished: Path | None = None
    """What a run of `training.moderation` wrote: nothing is trained then."""
    parity: float = 0.995
    """See `training.export`."""
    parity_texts: int = 1000
    train: moderation.Args = field(default_factory=_train)
    """How it is trained; `data` and `out` are set here."""
    calibration: calibrate.Args = field(default_factory=calibrate.Args)


def main(args: Args) -> None:
    model, artifact = args.finished or args.work / "model", args.work / "artifact"
    if not (model / "summary.json").exists():
        if args.finished is not None:
            raise SystemExit(f"{args.finished}: no finished run of training.moderation")
        moderation.main(replace(args.train, data=args.data, out=model))
    export.main(
        export.Args(
            model=model,
            out=artifact,
            name=args.name,
            data=args.data,
            parity=args.parity,
            parity_texts=args.parity_texts,
        )
    )
    size = (artifact / "model.onnx").stat().st_size / 1e6
    if size > LIMIT_MB:
        raise SystemExit(f"{artifact}: {size:.0f} MB, {LIMIT_MB} are allowed: not installed")
    calibrate.main(replace(args.calibration, model=artifact, data=args.data))
    args.target.parent.mkdir(parents=True, exist_ok=True)
    install(artifact, args.target)
    print(f"{args.target}: {read_manifest(args.target).id}, {size:.0f} MB")
    print(f'Guard(model="{args.target.name}") finds it')


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("what is trained is kept: the same command goes on from there"):
        main(args)
