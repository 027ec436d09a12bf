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
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from guardrail.encoding import Encoder, EncoderConfig, Window, pad
from guardrail.verdict import Pair
from training.bases import MINILM, base_folder
from training.data import Example, read_examples, targets
from training.losses import masked_bce, monotone_logits
from training.metrics import moderation_metrics


@dataclass
class Args:
    """Everything that decides the result; written beside it."""

    data: Path = Path("build/data")
    out: Path = Path("build/moderation")
    base: str = MINILM
    """Hub name or folder of the encoder to start from."""
    include: tuple[str, ...] = ("annotated/", "benign/", "over_refusal/oktest")
    """Prefixes of the sources to train on."""
    epochs: float = 2.0
    tokens_per_batch: int = 5000
    """Padded tokens in a batch; texts of like length go together."""
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    layer_decay: float = 0.9
    """Each layer down learns this much slower."""
    weight_decay: float = 0.01
    warmup: float = 0.06
    category_weight: float = 0.5
    teacher_share: float = 0.0
    """How much of a labelled text's target comes from its teacher's opinion, where it has one."""
    random_window: float = 0.3
    """Share of long texts seen through a window other than the first."""
    prefix: float = 0.0
    """Share of harmless answers cut short, since streams are judged on prefixes."""
    severity_weight: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ema: float = 0.0
    """Decay of a running average of the weights, which is then what is kept; 0 for none."""
    seed: int = 0
    max_tokens: int = 256
    prompt_tokens: int = 80
    overlap: int = 48
    bf16: bool = True
    checkpoint_seconds: float = 300.0
    limit: int | None = None
    """Train on so many texts only (tests)."""

    @property
    def encoder(self) -> EncoderConfig:
        return EncoderConfig(self.max_tokens, self.prompt_tokens, self.overlap)


class ModerationModel(nn.Module):
    """Encoder, mean pooling, two linear heads."""

    def __init__(self, encoder: nn.Module, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.severity = nn.Linear(width, 3)
        self.categories = nn.Linear(width, 19)
        nn.init.constant_(self.categories.bias, -3.0)  # each of the 19 is rare

    @classmethod
    def from_base(cls, folder: Path) -> ModerationModel:
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        return cls(encoder, encoder.config.hidden_size)

    @classmethod
    def load(cls, folder: Path) -> ModerationModel:
        """What `main` wrote: `config.json` of the encoder and `model.pt`."""
        config = AutoConfig.from_pretrained(folder)
        model = cls(AutoModel.from_config(config, add_pooling_layer=False), config.hidden_size)
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return model.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(batch, length) each -> severity logits (batch, 3), category logits (batch, 19)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.encoder(**inputs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        pooled = self.dropout(pooled)
        return monotone_logits(self.severity(pooled)), self.categories(pooled)


@dataclass
class Encoded:
    """An example, its windows and its targets."""

    example: Example
    windows: list[Window]
    severity: np.ndarray
    severity_mask: np.ndarray
    categories: np.ndarray
    category_mask: np.ndarray


def encode(examples: Sequence[Example], encoder: Encoder, teacher_share: float) -> list[Encoded]:
    """Tokenise once, and blend in a teacher's opinion where there is one."""
    encoded = []
    for example in examples:
        windows = encoder.encode(Pair(example.prompt, example.response))
        severity, severity_mask, categories, category_mask = targets(example)
        if example.soft is not None:
            for hard, mask, soft in (
                (severity, severity_mask, example.soft["severity"]),
                (categories, category_mask, example.soft["categories"]),
            ):
                share = np.where(mask > 0, teacher_share, 1.0)
                hard[:] = share * np.asarray(soft, np.float32) + (1 - share) * hard
                mask[:] = 1
        encoded.append(
            Encoded(example, windows, severity, severity_mask, categories, category_mask)
        )
    return encoded


def batches(
    rows: Sequence[Encoded], args: Args, rng: random.Random
) -> Iterator[tuple[list[Encoded], list[Window]]]:
    """One epoch: a window per text, texts of like length together, batches in random order."""
    chosen = [(row, _pick_window(row, args, rng)) for row in rows]
    chosen.sort(key=lambda pair: (len(pair[1].ids) // 8, rng.random()))
    groups: list[list[tuple[Encoded, Window]]] = [[]]
    for row, window in chosen:
        if groups[-1] and len(window.ids) * (len(groups[-1]) + 1) > args.tokens_per_batch:
            groups.append([])
        groups[-1].append((row, window))
    rng.shuffle(groups)
    for group in groups:
        yield [row for row, _ in group], [window for _, window in group]


def _pick_window(row: Encoded, args: Args, rng: random.Random) -> Window:
    window = row.windows[0]
    if len(row.windows) > 1 and rng.random() < args.random_window:
        window = rng.choice(row.windows[1:])
    if row.example.unsafe is False and args.prefix and rng.random() < args.prefix:
        first = sum(s == 0 for s in window.segments)  # BERT's prompt; the cut falls after it
        if row.example.response is not None and first < len(window.ids) - 8:
            keep = rng.randint(first + 6, len(window.ids) - 1)
            ids = [*window.ids[:keep], window.ids[-1]]
            return Window(ids, window.segments[: len(ids)], window.start, window.end)
    return window


def _tensors(rows: Sequence[Encoded], windows: Sequence[Window], pad_id: int) -> dict[str, Tensor]:
    arrays: dict[str, Any] = dict(pad(windows, pad_id))
    for name in ("severity", "severity_mask", "categories", "category_mask"):
        arrays[name] = np.stack([getattr(row, name) for row in rows])
    arrays["weight"] = np.array([row.example.weight for row in rows], np.float32)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def loss_of(model: nn.Module, batch: dict[str, Tensor], args: Args) -> Tensor:
    """Severity BCE + category_weight x category BCE, over known labels."""
    severity, categories = model(
        batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    )
    levels = torch.tensor(args.severity_weight, device=severity.device)
    return masked_bce(
        severity.float(), batch["severity"], batch["severity_mask"] * levels, batch["weight"]
    ) + args.category_weight * masked_bce(
        categories.float(), batch["categories"], batch["category_mask"], batch["weight"]
    )


def parameter_groups(model: ModerationModel, args: Args) -> list[dict[str, Any]]:
    """Layer-wise learning rates (Howard & Ruder 2018); no decay for biases and norms."""
    layers = model.encoder.config.num_hidden_layers
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            rate = args.head_learning_rate
        else:
            part = name.split("layer.")
            depth = int(part[1].split(".")[0]) + 1 if len(part) > 1 else 0
            rate = args.learning_rate * args.layer_decay ** (layers - depth)
        decay = 0.0 if parameter.ndim < 2 else args.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


@torch.inference_mode()
def predict(
    model: nn.Module, rows: Sequence[Encoded], pad_id: int, *, bf16: bool, tokens: int = 8192
) -> tuple[np.ndarray, np.ndarray]:
    """Logits per text, the highest over its windows: severity (n, 3), categories (n, 19)."""
    model.eval()
    flat = sorted(
        ((index, window) for index, row in enumerate(rows) for window in row.windows),
        key=lambda item: len(item[1].ids),
    )
    severity = np.full((len(rows), 3), -np.inf, np.float32)
    categories = np.full((len(rows), 19), -np.inf, np.float32)
    device = next(model.parameters()).device
    while flat:
        size = max(1, tokens // len(flat[-1][1].ids))
        part, flat = flat[-size:], flat[:-size]
        batch = {k: torch.from_numpy(v).to(device) for k, v in pad([w for _, w in part], pad_id).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            s, c = model(**batch)
        for (index, _), row_s, row_c in zip(part, s.float().cpu(), c.float().cpu(), strict=True):
            severity[index] = np.maximum(severity[index], row_s.numpy())
            categories[index] = np.maximum(categories[index], row_c.numpy())
    return severity, categories


@dataclass
class Progress:
    """What a resumed run needs besides weights."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def main(args: Args) -> None:
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    folder = base_folder(args.base, args.data.parent / "bases")
    encoder = Encoder.from_file(folder / "tokenizer.json", args.encoder)
    chosen = [e for e in read_examples(args.data, "train") if _included(e, args)]
    rows = encode(chosen[: args.limit], encoder, args.teacher_share)
    held_out = [
        e for e in read_examples(args.data, "validation")
        if e.source.startswith("annotated/")
    ][: args.limit]
    validation = encode(held_out, encoder, 0.0)

    model = ModerationModel.from_base(folder)
    optimizer = torch.optim.AdamW(parameter_groups(model, args))
    share = accelerator.num_processes
    per_epoch = len(list(batches(rows, args, random.Random(args.seed)))) // share
    steps = max(1, int(per_epoch * args.epochs))
    warmup = max(1, int(steps * args.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    average = torch.optim.swa_utils.AveragedModel(
        accelerator.unwrap_model(model),
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema),
    ) if args.ema else None
    progress = _resume(args.out, accelerator.unwrap_model(model), optimizer, schedule, average)
    if accelerator.is_main_process:
        print(f"{len(rows)} texts, {steps} steps, {len(validation)} validation texts", flush=True)

    started, saved, losses = time.monotonic(), time.monotonic(), []
    for epoch in range(math.ceil(args.epochs)):
        order = batches(rows, args, random.Random(args.seed + epoch))
        for index, (chosen_rows, windows) in enumerate(order):
            step, turn = epoch * per_epoch + index // share, index % share
            if step >= min(steps, (epoch + 1) * per_epoch):
                break
            if step < progress.step or turn != accelerator.process_index:
                continue
            model.train()
            batch = {
                k: v.to(accelerator.device)
                for k, v in _tensors(chosen_rows, windows, encoder.pad_id).items()
            }
            with accelerator.autocast():
                loss = loss_of(model, batch, args)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update_parameters(accelerator.unwrap_model(model))
            progress.step = step + 1
            losses.append(loss.item())
            if accelerator.is_main_process and progress.step % 25 == 0:
                elapsed = progress.seconds + time.monotonic() - started
                left = elapsed / progress.step * (steps - progress.step)
                print(f"step {progress.step}/{steps} loss {np.mean(losses[-50:]):.4f} "
                      f"{elapsed / 60:.1f} min, {left / 60:.1f} left", flush=True)
            if time.monotonic() - saved > args.checkpoint_seconds and accelerator.is_main_process:
                saved = time.monotonic()
                progress.seconds += saved - started
                started = saved
                _save(args.out, accelerator.unwrap_model(model), optimizer, schedule, average, progress)
        if accelerator.is_main_process:
            kept = average.module if average is not None else accelerator.unwrap_model(model)
            entry = {"epoch": epoch + 1, "loss": float(np.mean(losses[-per_epoch:] or [0.0])),
                     **evaluate(kept, validation, encoder.pad_id, bf16=args.bf16)}
            progress.history.append(entry)
            print(json.dumps(entry), flush=True)
    progress.seconds += time.monotonic() - started
    if accelerator.is_main_process:
        kept = average.module if average is not None else accelerator.unwrap_model(model)
        _finish(args, kept, folder, progress, chosen)


def _included(example: Example, args: Args) -> bool:
    known = example.unsafe is not None or example.soft is not None
    return known and example.source.startswith(args.include)


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


def _save(out: Path, model: nn.Module, optimizer: Any, schedule: Any, average: Any, progress: Progress) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "average": average.state_dict() if average is not None else None,
        "progress": asdict(progress),
    }
    partial = out / "checkpoint.partial"
    torch.save(state, partial)
    os.replace(partial, out / "checkpoint.pt")


def _resume(out: Path, model: nn.Module, optimizer: Any, schedule: Any, average: Any) -> Progress:
    path = out / "checkpoint.pt"
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if average is not None:
        average.load_state_dict(state["average"])
    progress = Progress(**state["progress"])
    print(f"resumed at step {progress.step}", flush=True)
    return progress


def _finish(
    args: Args, model: ModerationModel, folder: Path, progress: Progress, examples: list[Example]
) -> None:
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
        "minutes": round(progress.seconds / 60, 1),
        "history": progress.history,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (args.out / "checkpoint.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
