"""What `sft` and `dpo` share around TRL's trainers: arguments, resuming, stopping, the result.

A run keeps checkpoints under `out/checkpoints`, goes on from the last whole one, stops at a signal
with one more, and writes the adapter and, last of all, `summary.json` into `out`. Loss that is not
a number stops it with the batch saved. Started by `accelerate launch`, the same commands run on
many processes (docs/scale_training.md).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guardrail._files import sha256_of, write_json
from training.bases import SMOLLM2
from training.lm import (
    BASES_FOLDER,
    DType,
    LanguageModel,
    grouped,
    load_policy,
    new_adapter,
    tokenizer_fingerprint,
)


@dataclass(kw_only=True)
class TuningArgs:
    """What decides a run; written beside its result."""

    policy: str = SMOLLM2
    """Base (hub name or folder), or the folder of an adapter to train on."""
    data: Path = Path("build/preferences")
    bases: Path = BASES_FOLDER
    """Where bases are unpacked."""
    epochs: int = 1
    batch: int = 16
    """Rows per step and process."""
    accumulate: int = 1
    """Steps whose gradients make one update."""
    max_tokens: int = 160
    """Longer texts are left out or cut."""
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 2e-4
    warmup: float = 0.06
    clip: float = 1.0
    bf16: bool = True
    """Autocast; half as slow again without on CPUs that know bf16."""
    dtype: DType = "float32"
    """Of the frozen weights; bfloat16 for models of billions of parameters."""
    checkpoint_activations: bool = False
    """Less memory for a third more time."""
    save_steps: int = 25
    log_steps: int = 5
    seed: int = 0
    limit: int | None = None
    """Train on so many rows only."""


def open_policy(args: TuningArgs) -> LanguageModel:
    """The policy with a trainable adapter: a fresh one on a base, or the one it already has."""
    torch.manual_seed(args.seed)  # a LoRA begins at random
    lm = load_policy(args.policy, args.bases, trainable=True, dtype=args.dtype)
    return lm if lm.adapter else new_adapter(lm, rank=args.rank, alpha=args.alpha)


def rows_per_update(args: TuningArgs) -> int:
    """Over all processes, which torchrun and `accelerate launch` count in the environment."""
    return args.batch * args.accumulate * int(os.environ.get("WORLD_SIZE", "1"))


def epochs_of(lengths: Sequence[int], args: TuningArgs) -> list[int]:
    """Indices of all epochs in the order of training: whole batches of like lengths, each epoch
    anew. Rows beyond the last whole batch are left out, unless there is no whole one."""
    size = rows_per_update(args)
    order: list[int] = []
    for epoch in range(args.epochs):
        one = grouped(lengths, size, args.seed + epoch)
        order += one[: len(one) // size * size] or one
    return order


def config_fields(args: TuningArgs, out: Path, steps: int) -> dict[str, Any]:
    """The fields that `SFTConfig` and `DPOConfig` have in common."""
    return {
        "output_dir": str(out / "checkpoints"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "train_sampling_strategy": "sequential",
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, int(steps * args.warmup)),
        "max_grad_norm": args.clip,
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": args.checkpoint_activations,
        "save_steps": args.save_steps,
        "save_total_limit": 2,
        "logging_steps": args.log_steps,
        "report_to": ["tensorboard"],
        "seed": args.seed,
        "data_seed": args.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_length": args.max_tokens,
    }


class Watched:
    """Mixed into a TRL trainer: a loss that is not a number stops the run, its batch saved."""

    args: TrainingArguments
    state: TrainerState

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs, num_items_in_batch
        )
        check_loss(
            result[0] if return_outputs else result,
            inputs,
            Path(self.args.output_dir).parent,
            self.state.global_step,
        )
        return result

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card would name folders of this machine; `summary.json` says what was done."""


def check_loss(loss: torch.Tensor, batch: Mapping[str, Any], out: Path, step: int) -> None:
    """SystemExit, the batch saved as `nan_batch.pt` in `out`, unless `loss` is finite."""
    if bool(torch.isfinite(loss.detach()).all()):
        return
    path = out / "nan_batch.pt"
    torch.save({k: v.cpu() if torch.is_tensor(v) else v for k, v in batch.items()}, path)
    raise SystemExit(
        f"the loss is {float(loss.detach()):g} at step {step}: stopped, its batch is in {path}. "
        "The last checkpoint is from before it: lower the learning rate, or look at the batch"
    )


class StopAtSignal(TrainerCallback):
    """SIGINT and SIGTERM end the run after its current step, with a checkpoint. As a context, it
    gives the signals back at its end."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAtSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked:  # the second time means now
            raise SystemExit(128 + number)
        self.asked = True
        print("stopping after this step, with a checkpoint", file=sys.stderr, flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that is whole: its state is written last."""
    found = [
        path
        for path in (out / "checkpoints").glob("checkpoint-*")
        if (path / "trainer_state.json").exists() and path.name.split("-")[1].isdigit()
    ]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


_MAY_CHANGE = ("save_steps", "log_steps", "bases", "batch", "accumulate", "steps", "save_every")


def claim(out: Path, args: TuningArgs) -> None:
    """Write the arguments into `out`; SystemExit if a run with other ones is there."""
    out.mkdir(parents=True, exist_ok=True)
    ours = json.loads(json.dumps(asdict(args), default=str))
    path = out / "args.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(
            name
            for name in ours.keys() | theirs.keys()
            if name not in _MAY_CHANGE and ours.get(name) != theirs.get(name)
        )
        if other:
            raise SystemExit(
                f"{out} holds a run with another {', '.join(other)}: resume it with the same "
                "arguments, remove it, or choose another --out"
            )
    path.write_text(json.dumps(ours, indent=1), encoding="utf-8")


def train(trainer: Any, out: Path) -> None:
    """Run to the end, from the last checkpoint if there is one."""
    checkpoint = last_checkpoint(out)
    if checkpoint:
        print(f"resuming from {checkpoint}", flush=True)
    with StopAtSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise SystemExit(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: "
            "the same command goes on from there"
        )


def finish(
    trainer: Any,
    lm: LanguageModel,
    args: TuningArgs,
    out: Path,
    rows: Mapping[str, int],
    held_out: Mapping[str, float] | None = None,
) -> None:
    """Write the adapter, then `summary.json`. Every process calls it; one writes.

    rows: how many of what was trained on; held_out: figures on texts that were not.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.accelerator.is_main_process:
        return
    model.save_pretrained(out, selected_adapters=["default"], state_dict=state)
    (out / "README.md").unlink(missing_ok=True)  # peft's card is a form to be filled in
    summary = {
        "args": json.loads(json.dumps(asdict(args), default=str)),
        "base": lm.base,
        "init": lm.adapter.name if lm.adapter else None,
        "rows": dict(rows),
        "held_out": dict(held_out or {}),
        "tokenizer": tokenizer_fingerprint(lm.tokenizer),
        "sha256": {"adapter_model.safetensors": sha256_of(out / "adapter_model.safetensors")},
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "history": [_finite(entry) for entry in trainer.state.log_history],
    }
    write_json(out / "summary.json", summary)
    print(f"{out}: adapter and summary written", flush=True)


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in entry.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
