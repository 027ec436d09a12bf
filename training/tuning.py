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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guardrail._files import sha256_of, write_json
from training.bases import SMOLLM2
from training.ending import SIGNALS, stopped
from training.lm import (
    BASES_FOLDER,
    LanguageModel,
    grouped,
    load_policy,
    new_adapter,
    refuse_not_finite,
    tokenizer_fingerprint,
)
from training.plots import PANELS, Curves, draw, read
from training.precision import DType, bf16_pays
from training.resuming import last_checkpoint


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
    bf16: bool = field(default_factory=bf16_pays)
    """Autocast; by default where the machine is faster in bfloat16."""
    dtype: DType = "float32"
    """Of the frozen weights; bfloat16 for models of billions of parameters."""
    checkpoint_activations: bool = False
    """Less memory for a third more time."""
    save_steps: int = 25
    log_steps: int = 5
    plot: Path | None = None
    """Where its curves are drawn at the end (.svg or .png); curves.svg in `out` by default."""
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
        "logging_steps": max(1, min(args.log_steps, steps)),  # a short run has a curve too
        "report_to": "none",  # `Logged` writes the curves, the same ones after a kill
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
    good = last_checkpoint(out)
    raise SystemExit(
        f"the loss is {float(loss.detach()):g} at step {step}: stopped, its batch is in {path}. "
        + (f"The last checkpoint, {good}, is from before it" if good else "No checkpoint yet")
        + ": lower the learning rate, or look at the batch"
    )


class StopAtSignal(TrainerCallback):
    """SIGINT and SIGTERM end the run after its current step, with a checkpoint. As a context, it
    gives the signals back at its end."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this process got a signal."""
        return self._number is not None

    def stopped(self, where: str) -> SystemExit:
        """What ends the run, once its checkpoint is written; in a process that got no signal
        itself, as if by SIGTERM."""
        number = signal.SIGTERM if self._number is None else self._number
        return stopped(number, f"stopped at {where}: the same command goes on from there")

    def __enter__(self) -> StopAtSignal:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked:  # the second time means now
            raise SystemExit(128 + number)
        self._number = number
        print("stopping after this step, with a checkpoint", file=sys.stderr, flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


class Logged(TrainerCallback):
    """What a trainer logs of a step becomes a row of its curves."""

    def __init__(self, curves: Curves) -> None:
        self._curves = curves

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        if "train_runtime" not in logs:  # the summary of all steps
            # TRL counts tokens from 0 again in a run that goes on.
            other = ("epoch", "runtime", "per_second", "preparation_time", "num_tokens")
            row = {k: v for k, v in _finite(logs).items() if not k.endswith(other)}
            self._curves.add(state.global_step, row)


# --- running -------------------------------------------------------------------------------------


def train(trainer: Any, out: Path) -> None:
    """Run to the end, from the last checkpoint if there is one."""
    checkpoint = last_checkpoint(out)
    if checkpoint:
        print(f"resuming from {checkpoint}", flush=True)
    step = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    writer = Curves(out, step) if trainer.accelerator.is_main_process else nullcontext()
    with StopAtSignal() as stop, writer as curves:
        trainer.add_callback(stop)
        if curves is not None:
            trainer.add_callback(Logged(curves))
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise stop.stopped(f"step {trainer.state.global_step} of {trainer.state.max_steps}")


def finish(
    trainer: Any,
    lm: LanguageModel,
    args: TuningArgs,
    out: Path,
    rows: Mapping[str, int],
    held_out: Mapping[str, float] | None = None,
) -> None:
    """Write the adapter, draw the curves, then `summary.json`. Every process calls it; one writes.

    rows: how many of what was trained on; held_out: figures on texts that were not.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.accelerator.is_main_process:
        return
    refuse_not_finite({n: t for n, t in state.items() if "lora_" in n}, out)  # by the last update
    model.save_pretrained(out, selected_adapters=["default"], state_dict=state)
    (out / "README.md").unlink(missing_ok=True)  # peft's card is a form to be filled in
    if any(panel in row for row in read(out) for panel in PANELS):  # else nothing was logged
        draw((out,), args.plot or out / "curves.svg")
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
