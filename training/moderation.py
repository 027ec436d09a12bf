"""The moderation model: one encoder, an ordinal severity head, a multi-label category head.

    python -m training.moderation --data build/data --out build/moderation
    accelerate launch -m training.moderation ...

A (prompt, response) pair or a prompt alone goes in; out come 3 cumulative severity logits, monotone
by construction, and 19 category logits. Labels that a source lacks are masked. Resumes from its
last checkpoint; `summary.json` is written last.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from guardrail.encoding import Encoder, EncoderConfig
from training import contrast
from training.augment import framed, obfuscate
from training.balance import balanced
from training.bases import MINILM
from training.batching import Encoded, batches, encode, predict, tensors
from training.causal import moderation_base
from training.data import Example, read_examples
from training.ending import ends_in_a_line
from training.eval_sets import human_labels
from training.everyday_texts import everyday_texts
from training.metrics import moderation_metrics
from training.model import ModerationModel
from training.moderation_checks import refuse_empty, refuse_nonsense
from training.objective import Objective, loss_of
from training.plain_talk import plain_talk
from training.precision import bf16_pays
from training.quantized import quantization_aware, settle
from training.restore import begin
from training.runs import (
    accelerator_of,
    has_finished,
    identity,
    load_whole,
    make_folder,
    refuse_another,
    save_whole,
    warmup_then_linear,
)
from training.statements import statements


@dataclass
class Args(Objective):
    """Everything that decides the result; written beside it."""

    data: Path = Path("build/data")
    out: Path = Path("build/moderation")
    base: str = MINILM
    """Hub name or folder of the encoder to start from, or of a small causal language model."""
    layers: int | None = None
    """Keep the base's first so many layers; all of them by default."""
    init: Path | None = None
    """What an earlier run or `training.export` wrote: start from its weights, heads included."""
    include: tuple[str, ...] = ("annotated/", "pku/", "benign/", "over_refusal/oktest")
    """Prefixes of the sources to train on."""
    answers: float = 1.0
    """Share of the answers to train on; prompts alone are all used."""
    repeat: dict[str, int] = field(default_factory=dict)
    """How often the texts of sources with a prefix are seen per epoch, e.g. hard negatives."""
    balance: float = 0.0
    """How far sources and classes weigh alike, from 0 to 1 (`training.balance`)."""
    epochs: float = 2.0
    tokens_per_batch: int = 5000
    """Padded tokens in a batch; texts of like length go together."""
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    layer_decay: float = 0.9
    """Each layer down learns this much slower."""
    weight_decay: float = 0.01
    warmup: float = 0.06
    teacher_share: float = 0.0
    """How much of a labelled text's target comes from its teacher's opinion, where it has one."""
    people: Path | None = None
    """Folder of the labelled data, for what people said of annotated answers."""
    people_share: float = 0.3
    """How much that counts in whether such an answer is harmful at all."""
    random_window: float = 0.3
    """Share of long texts seen through a window other than the first."""
    prefix: float = 0.0
    """Share of harmless answers cut short, since streams are judged on prefixes."""
    obfuscate: float = 0.0
    """Share of the texts that are seen with typing errors and the like (`training.augment`)."""
    framed: float = 0.0
    """Share of the prompts that are seen in a frame, such as "Please answer: "."""
    contrast: int = 0
    """How often what `training.contrast`, `statements` and `plain_talk` wrote is seen per epoch."""
    everyday: tuple[Path, ...] = ()
    """Harmless talk, seen as often as that: `turns.jsonl` of `training.everyday`,
    `training/harmless_turns.jsonl`."""
    average: float = 0.0
    """Decay per step of a running average of the weights, which then is the result (EMA)."""
    quantization_aware: bool = False
    """Train on weights that int8 can hold exactly (`training.quantized`)."""
    seed: int = 0
    max_tokens: int = 256
    prompt_tokens: int = 80
    overlap: int = 48
    bf16: bool = field(default_factory=bf16_pays)
    """Autocast; by default where the machine is faster in bfloat16."""
    checkpoint_seconds: float = 300.0
    limit: int | None = None
    """Train on so many texts only (tests)."""

    @property
    def encoder(self) -> EncoderConfig:
        return EncoderConfig(self.max_tokens, self.prompt_tokens, self.overlap)


def heed(rows: Sequence[Encoded], people: dict[tuple[str, str], bool], share: float) -> int:
    """Move the targets of annotated answers a `share` of the way to what people called them, where
    the annotation has them harmless or minor: of more, people dispute the words, not the harm.
    Returns how many rows people had labelled."""
    heeded = 0
    for row in rows:
        said = people.get(row.example.key)
        if said is not None and row.example.severity in (0, 1) and _annotated(row.example):
            row.severity[0] = (1 - share) * row.severity[0] + share * said
            heeded += 1
    return heeded


def parameter_groups(model: ModerationModel, args: Args) -> list[dict[str, Any]]:
    """Layer-wise learning rates (Howard & Ruder 2018); no decay for biases and norms."""
    layers = model.encoder.config.num_hidden_layers
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            rate = args.head_learning_rate
        else:
            layer = re.search(r"\blayers?\.(\d+)\.", name)
            depth = int(layer[1]) + 1 if layer else 0
            rate = args.learning_rate * args.layer_decay ** (layers - depth)
        decay = 0.0 if parameter.ndim < 2 else args.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


@dataclass
class Progress:
    """What a resumed run needs besides weights."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """The state of one training run: a step of it, its clock, its checkpoints."""

    def __init__(
        self,
        args: Args,
        model: ModerationModel,
        accelerator: Accelerator,
        run: str,
        steps: int,
    ):
        optimizer = torch.optim.AdamW(parameter_groups(model, args))
        self.args, self.steps, self.accelerator = args, steps, accelerator
        self.identity = run
        self.schedule = warmup_then_linear(optimizer, steps, args.warmup)
        self.parallel, self.optimizer = accelerator.prepare(model, optimizer)
        self.model = accelerator.unwrap_model(self.parallel)
        self.averaged: AveragedModel | None = None
        if args.average:
            follow = get_ema_multi_avg_fn(args.average)
            self.averaged = AveragedModel(self.model, multi_avg_fn=follow)
            self.averaged.n_averaged += 1  # the start counts
        self.losses: list[float] = []
        self.progress = Progress()
        self._resume()
        self._started = self._saved = time.monotonic()

    @property
    def result(self) -> ModerationModel:
        """What the run is for: the weights as they are, or their running average."""
        model: ModerationModel = self.model if self.averaged is None else self.averaged.module
        return model

    def step(self, batch: dict[str, Tensor]) -> None:
        self.parallel.train()
        with self.accelerator.autocast():
            loss = loss_of(self.parallel, batch, self.args)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parallel.parameters(), 1.0)
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.losses.append(loss.item())
        if self.accelerator.is_main_process:
            if self.progress.step % 25 == 0:
                self._report()
            if time.monotonic() - self._saved > self.args.checkpoint_seconds:
                self.save()

    def seconds(self) -> float:
        """Spent so far, over all resumed parts."""
        now = time.monotonic()
        self.progress.seconds += now - self._started
        self._started = now
        return self.progress.seconds

    def _report(self) -> None:
        done, seconds = self.progress.step, self.seconds()
        left = seconds / done * (self.steps - done)
        print(
            f"step {done}/{self.steps} loss {np.mean(self.losses[-50:]):.4f} "
            f"{seconds / 60:.1f} min, {left / 60:.1f} left",
            flush=True,
        )

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the last whole one."""
        self.seconds()
        state = {
            "run": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "progress": asdict(self.progress),
        }
        save_whole(state, self.args.out / "checkpoint.pt")
        self._saved = time.monotonic()

    def _resume(self) -> None:
        path = self.args.out / "checkpoint.pt"
        if not path.exists():
            return
        state = load_whole(path)
        refuse_another(path, state.get("run"), self.identity)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.progress = Progress(**state["progress"])
        print(f"resumed at step {self.progress.step}", flush=True)


def main(args: Args) -> None:
    accelerator = accelerator_of(bf16=args.bf16)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    refuse_nonsense(args)
    make_folder(args.out)
    folder = moderation_base(args.base, args.data.parent / "bases")
    encoder = Encoder.from_file(folder / "tokenizer.json", args.encoder)
    chosen = choose(read_examples(args.data, "train"), args)
    held_out = [e for e in read_examples(args.data, "validation") if e.is_rated][: args.limit]
    refuse_empty(chosen, held_out, args.data)
    chosen = balanced(chosen, args.balance)
    rows = encode(chosen, encoder, args.teacher_share)
    people = human_labels(args.people) if args.people else {}
    heeded = heed(rows, people, args.people_share)
    targets = ((*r.example.key, r.severity.tolist(), r.categories.tolist()) for r in rows)
    name = identity(args, targets, accelerator.num_processes)
    if has_finished(args.out / "summary.json", name):
        print(f"{args.out}: this run has finished: nothing to do", flush=True)
        return
    validation = encode(held_out, encoder, 0.0)
    share = accelerator.num_processes
    per_epoch = len(list(batches(rows, args, random.Random(args.seed)))) // share
    steps = max(1, int(per_epoch * args.epochs))
    model = ModerationModel.from_base(folder, args.layers)
    if args.init is not None:
        begin(model, args.init, args.base)
    if args.quantization_aware:
        quantization_aware(model)
    run = Run(args, model, accelerator, name, steps)
    if accelerator.is_main_process:
        print(
            f"{len(rows)} texts ({heeded} labelled by people too), {steps} steps, "
            f"{len(validation)} validation texts",
            flush=True,
        )
    # A checkpoint at the very end of an epoch was written before that epoch's evaluation.
    first = max(0, run.progress.step - 1) // max(1, per_epoch)
    for epoch in range(first, math.ceil(args.epochs)):
        order = batches(rows, args, random.Random(args.seed + epoch))
        for index, (texts, windows) in enumerate(order):
            step, turn = epoch * per_epoch + index // share, index % share
            if step >= min(steps, (epoch + 1) * per_epoch):
                break
            if step >= run.progress.step and turn == accelerator.process_index:
                arrays = tensors(texts, windows, encoder.pad_id)
                run.step({k: v.to(accelerator.device) for k, v in arrays.items()})
        if accelerator.is_main_process:
            figures = evaluate(run.result, validation, encoder.pad_id, bf16=args.bf16)
            loss = float(np.mean(run.losses[-per_epoch:] or [0.0]))
            run.progress.history.append({"epoch": epoch + 1, "loss": loss, **figures})
            print(json.dumps(run.progress.history[-1]), flush=True)
    if accelerator.is_main_process:
        run.seconds()
        settle(run.result)
        _finish(run, folder, chosen)


def _annotated(example: Example) -> bool:
    return example.source.startswith("annotated/")


def choose(examples: Sequence[Example], args: Args) -> list[Example]:
    """The texts of one epoch: labelled, of the sources asked for, as often as asked for."""
    rng = random.Random(args.seed)
    chosen: list[Example] = []
    for example in examples:
        known = example.unsafe is not None or example.soft is not None
        if not known or not example.source.startswith(args.include):
            continue
        if example.response is not None and rng.random() >= args.answers:
            continue
        times = [n for prefix, n in args.repeat.items() if example.source.startswith(prefix)]
        chosen += [example] * max(times, default=1)
    everyday = everyday_texts(args.everyday, held_out=False)
    said = [*contrast.examples(), *statements(), *plain_talk(), *everyday]
    chosen += said * args.contrast
    chosen = [
        _obfuscated(e, rng) if rng.random() < args.obfuscate else e for e in chosen[: args.limit]
    ]
    return [
        replace(e, prompt=framed(e.prompt, rng))
        if e.response is None and rng.random() < args.framed
        else e
        for e in chosen
    ]


def _obfuscated(example: Example, rng: random.Random) -> Example:
    if example.response is None:
        return replace(example, prompt=obfuscate(example.prompt, rng))
    return replace(example, response=obfuscate(example.response, rng))


def evaluate(
    model: nn.Module, rows: Sequence[Encoded], pad_id: int, *, bf16: bool
) -> dict[str, dict[str, float]]:
    """Metrics per direction on texts with severity labels, at probability 0.5."""
    severity, categories = (1 / (1 + np.exp(-z)) for z in predict(model, rows, pad_id, bf16=bf16))
    truth = np.array([row.example.severity for row in rows])
    names = np.stack([row.categories for row in rows])
    is_input = np.array([row.example.response is None for row in rows])
    return {
        direction: moderation_metrics(severity[part], categories[part], truth[part], names[part])
        for direction, part in (("input", is_input), ("output", ~is_input))
        if part.any()
    }


def _finish(run: Run, folder: Path, examples: list[Example]) -> None:
    args, model = run.args, run.result
    torch.save(model.state_dict(), args.out / "model.pt")
    model.encoder.config.save_pretrained(args.out)
    (args.out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    sources: dict[str, int] = {}
    for example in examples:
        name = example.source.partition("/")[0]
        sources[name] = sources.get(name, 0) + 1
    summary = {
        "args": json.loads(json.dumps(asdict(args), default=str)),
        "sources": sources,
        "minutes": round(run.progress.seconds / 60, 1),
        "history": run.progress.history,
        "run": run.identity,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"{args.out} keeps the last checkpoint: the same command goes on from it"):
        main(args)
    PartialState().destroy_process_group()  # else its threads may abort the exit
