"""Score models: reward from *more helpful*, cost from *less harmful*, a cost above 0 being unsafe.

    python -m training.score_model reward --out build/reward
    python -m training.score_model cost --init build/moderation --out build/cost
    accelerate launch -m training.score_model reward --backbone lm ...

Bradley-Terry on pairs; a cost has a sign term too, and both a small penalty on size. A score is
then normalised: a reward to mean 0, both to standard deviation 1. The result is exported to ONNX
(`training.score_export`). Resumes from its last checkpoint; the manifest is written last.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, PartialState
from torch import Tensor

from guardrail.encoding import Window, pad
from guardrail.score import Layout, ScoreKind
from training.bases import MINILM, SMOLLM2
from training.ending import ends_in_a_line
from training.losses import bradley_terry, magnitude, sign_loss
from training.precision import bf16_pays
from training.preferences import (
    Preference,
    help_pairs,
    read_demonstrations,
    read_preferences,
    refuse_flipped,
)
from training.resuming import refuse_below_one
from training.runs import (
    accelerator_of,
    has_finished,
    identity,
    load_whole,
    make_folder,
    refuse_another,
    refuse_other_weights,
    save_whole,
    warmup_then_linear,
)
from training.score_backbone import Backbone, Score, open_backbone, score
from training.score_export import export
from training.score_metrics import score_metrics
from training.tuning import StopAtSignal


@dataclass(kw_only=True)
class Args:
    """Everything that decides the result; written beside it."""

    kind: tyro.conf.Positional[ScoreKind]
    data: Path = Path("build/preferences")
    bases: Path = Path("build/bases")
    out: Path = Path("build/score")
    backbone: Literal["encoder", "lm"] = "encoder"
    base: str | None = None
    """Hub name or folder; MiniLM for an encoder, SmolLM2 for a language model."""
    init: Path | None = None
    """A trained moderation model, whose encoder to start from."""
    sources: tuple[str, ...] = ()
    """Prefixes of the sources of pairs to train on; all by default."""
    help_pairs: int = 1500
    """Pairs of help on harmless prompts against refusals and foreign answers."""
    epochs: int = 2
    tokens_per_batch: int = 4000
    """Padded tokens in a batch, over both answers."""
    learning_rate: float = 4e-5
    head_learning_rate: float = 1e-3
    regularisation: float = 0.01
    """Weight of the scores' mean square."""
    sign: float = 1.0
    """Weight of the sign term of a cost."""
    warmup: float = 0.06
    max_tokens: int = 256
    prompt_tokens: int = 80
    overlap: int = 48
    rank: int = 16
    """Of the LoRA of a language model."""
    seed: int = 0
    bf16: bool = field(default_factory=bf16_pays)
    """Autocast; by default where the machine is faster in bfloat16."""
    checkpoint_seconds: float = 120.0
    limit: int | None = None


@dataclass
class Pairs:
    """Two answers as windows, the first the better one where `known`.

    signs: +1 unsafe, -1 safe, 0 unknown, per answer.
    """

    windows: tuple[Window, Window]
    known: bool
    signs: tuple[float, float]


def choose(args: Args, split: Literal["train", "validation", "test"]) -> list[Preference]:
    """The preferences a kind of score can be trained or tested on; how many those are, and how
    many are left out, goes to stderr."""
    pairs = read_preferences(args.data, split)
    demonstrations = read_demonstrations(args.data, split)
    if args.sources:
        pairs = [p for p in pairs if p.source.startswith(args.sources)]
    if args.kind == "cost":
        refuse_flipped(pairs)
    chosen = [p for p in pairs if teaches(p, args.kind)]
    ordered = sum(label_of(p, args.kind) is not None for p in chosen)
    question = "which answer helps more" if args.kind == "reward" else "which answer harms less"
    counts = (
        f"of {len(pairs)} {split} pairs {ordered} say {question}, {len(chosen) - ordered} only "
        f"whether answers are unsafe, {len(pairs) - len(chosen)} neither"
    )
    if not chosen:
        raise SystemExit(f"{args.data}: no {split} pairs for a {args.kind}: {counts}")
    print(f"{args.kind}: {counts}", file=sys.stderr, flush=True)
    chosen += help_pairs(demonstrations, args.help_pairs, args.seed, other="any")
    random.Random(args.seed).shuffle(chosen)
    return chosen[: args.limit]


def teaches(p: Preference, kind: ScoreKind) -> bool:
    """Whether the pair says anything to this kind of score: its own question is decided or, for a
    cost, whether an answer is unsafe is known."""
    return label_of(p, kind) is not None or (kind == "cost" and p.unsafe != (None, None))


def label_of(p: Preference, kind: ScoreKind) -> int | None:
    """Index of the answer that should score higher: the more helpful, or the more harmful one."""
    if kind == "reward":
        return p.more_helpful
    return None if p.less_harmful is None else 1 - p.less_harmful


def encode(preferences: Sequence[Preference], layout: Layout, kind: ScoreKind) -> list[Pairs]:
    """Windows of both answers, the one that should score higher first. Of a long answer the first
    window counts."""
    rows = []
    for p in preferences:
        label = label_of(p, kind)
        order = (0, 1) if label in (0, None) else (1, 0)
        signs = [
            0.0 if p.unsafe[side] is None else (1.0 if p.unsafe[side] else -1.0) for side in order
        ]
        first, second = (layout.encode(p.prompt, p.answers[side])[0] for side in order)
        rows.append(Pairs((first, second), label is not None, (signs[0], signs[1])))
    return rows


def batches(rows: Sequence[Pairs], tokens: int, rng: random.Random) -> list[list[Pairs]]:
    """Rows of like lengths together, batches in random order."""

    def length(row: Pairs) -> int:
        return max(len(window.ids) for window in row.windows)

    groups: list[list[Pairs]] = [[]]
    for row in sorted(rows, key=lambda row: (length(row) // 8, rng.random())):
        if groups[-1] and 2 * length(row) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return groups


def loss_of(model: Any, rows: Sequence[Pairs], args: Args, pad_id: int, device: Any) -> Tensor:
    """Bradley-Terry + regularisation, and for a cost the sign term."""
    windows = [row.windows[0] for row in rows] + [row.windows[1] for row in rows]
    inputs = {k: torch.from_numpy(v).to(device) for k, v in pad(windows, pad_id).items()}
    scores = model(**inputs).float()
    higher, lower = scores[: len(rows)], scores[len(rows) :]
    known = torch.tensor([float(row.known) for row in rows], device=device)
    loss = bradley_terry(higher, lower, known) + args.regularisation * magnitude(scores)
    if args.kind == "cost":
        signs = torch.tensor(
            [row.signs[0] for row in rows] + [row.signs[1] for row in rows], device=device
        )
        loss = loss + args.sign * sign_loss(scores, signs)
    return loss


# --- the run -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a resumed run needs besides weights."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class Run:
    """The state of one training run: a step of it, its clock, its checkpoints."""

    def __init__(
        self,
        args: Args,
        backbone: Backbone,
        accelerator: Accelerator,
        name: str,
        steps: int,
    ):
        """name: see `identity`."""
        self.args, self.name, self.steps, self.accelerator = args, name, steps, accelerator
        self.pad_id = backbone.layout.pad_id
        groups = backbone.model.parameter_groups(args.learning_rate, args.head_learning_rate)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        self.schedule = warmup_then_linear(optimizer, steps, args.warmup)
        self.parallel, self.optimizer = accelerator.prepare(backbone.model, optimizer)
        self.model: Score = accelerator.unwrap_model(self.parallel)
        self.progress = Progress()
        self._resume()
        self._started = self._saved = time.monotonic()

    def step(self, rows: Sequence[Pairs]) -> None:
        self.parallel.train()
        # The dropout of a step is the same in a run that was stopped and resumed.
        torch.manual_seed(1_000_003 * self.args.seed + self.progress.step)
        with self.accelerator.autocast():
            loss = loss_of(self.parallel, rows, self.args, self.pad_id, self.accelerator.device)
        if not torch.isfinite(loss):
            path = self.args.out / "nan_batch.pt"
            torch.save([asdict(row) for row in rows], path)
            raise SystemExit(
                f"the loss is {loss.item():g} at step {self.progress.step}: stopped, its batch is "
                f"in {path}. Lower the learning rate, or look at the batch"
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parallel.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.losses.append(round(loss.item(), 6))
        if self.accelerator.is_main_process:
            if self.progress.step % 10 == 0:
                self._report()
            if time.monotonic() - self._saved > self.args.checkpoint_seconds:
                self.save()

    def _report(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._started
        self._started = now
        done, seconds = self.progress.step, self.progress.seconds
        print(
            f"step {done}/{self.steps} loss {np.mean(self.progress.losses[-25:]):.4f} "
            f"{seconds / 60:.1f} min, {seconds / done * (self.steps - done) / 60:.1f} left",
            flush=True,
        )

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the last whole one."""
        self._report()
        state = {
            "run": self.name,
            "model": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress),
        }
        save_whole(state, self.args.out / "checkpoint.pt")
        self._saved = time.monotonic()

    def stopping(self, asked: bool) -> bool:
        """Whether a stop is asked for in any process; then the checkpoint is written."""
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(flag, "sum") > 0)
        if stop and self.accelerator.is_main_process:
            self.save()
        return stop

    def _trained(self) -> dict[str, Tensor]:
        """What moves: under a LoRA a tenth of the model, whose base need not be written."""
        moving = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: t for name, t in self.model.state_dict().items() if name in moving}

    def _resume(self) -> None:
        path = self.args.out / "checkpoint.pt"
        if not path.exists():
            return
        state = load_whole(path)
        refuse_another(path, state.get("run"), self.name)
        refuse_other_weights(path, state["model"].keys(), self._trained().keys())
        self.model.load_state_dict(state["model"], strict=False)  # what is frozen is not in it
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        print(f"resumed at step {self.progress.step}", flush=True)


def plan(rows: Sequence[Pairs], args: Args, share: int) -> Iterator[list[list[Pairs]]]:
    """Batches of each step, one per process, over all epochs."""
    for epoch in range(args.epochs):
        order = batches(rows, args.tokens_per_batch, random.Random(args.seed + epoch))
        for first in range(0, len(order) - share + 1, share):
            yield order[first : first + share]


def main(args: Args) -> None:
    refuse_below_one(args)
    accelerator = accelerator_of(bf16=args.bf16)
    torch.manual_seed(args.seed)
    args.base = args.base or (MINILM if args.backbone == "encoder" else SMOLLM2)
    preferences = choose(args, "train")
    held_out = {split: choose(args, split) for split in ("validation", "test")}
    make_folder(args.out)
    name = identity(args, (asdict(p) for p in preferences), accelerator.num_processes)
    if has_finished(args.out / "manifest.json", name):
        print(f"{args.out}: this run has finished: nothing to do", flush=True)
        return
    backbone = open_backbone(args)
    rows = encode(preferences, backbone.layout, args.kind)
    steps = list(plan(rows, args, accelerator.num_processes))
    if not steps:
        raise SystemExit("fewer batches than processes: lower --tokens-per-batch")
    run = Run(args, backbone, accelerator, name, len(steps))
    if accelerator.is_main_process:
        print(f"{len(rows)} pairs, {len(steps)} steps", flush=True)
    with StopAtSignal() as stop:
        for step in steps[run.progress.step :]:
            run.step(step[accelerator.process_index])
            if run.stopping(stop.asked):
                raise stop.stopped(f"step {run.progress.step}")
    if not accelerator.is_main_process:
        return
    run.save()
    # Else the wrapper that casts to bf16 would be evaluated, and exported.
    backbone.model = accelerator.unwrap_model(run.parallel, keep_fp32_wrapper=False)
    metrics = evaluate(args, backbone, rows, held_out)
    metrics["minutes"] = round(run.progress.seconds / 60, 1)
    metrics["losses"] = run.progress.losses
    sources = Counter(p.source for p in preferences)
    export(backbone, args, name, metrics, sources, held_out["validation"])
    (args.out / "checkpoint.pt").unlink()


def evaluate(
    args: Args,
    backbone: Backbone,
    rows: Sequence[Pairs],
    held_out: Mapping[str, Sequence[Preference]],
) -> dict[str, Any]:
    """Normalise the model by what it says of training `rows`, and measure it on each split of
    `held_out`. SystemExit for a cost with the wrong sign."""
    model, layout = backbone.model, backbone.layout
    windows = [window for row in rows[:1500] for window in row.windows]
    bf16 = args.bf16 and args.backbone == "lm"  # else it would be evaluated longer than trained
    scale = score(model, windows, layout.pad_id, bf16=bf16)
    model.normalise(scale, centre=args.kind == "reward")
    metrics: dict[str, Any] = {}
    for split, tested in held_out.items():
        firsts = [layout.encode(p.prompt, a)[0] for p in tested for a in p.answers]
        scores = score(model, firsts, layout.pad_id, bf16=bf16).reshape(-1, 2)
        metrics[split] = score_metrics(tested, scores, args.kind)
        print(split, json.dumps(metrics[split]), flush=True)
    if args.kind == "cost":
        refuse_wrong_order(metrics)
    return metrics


def refuse_wrong_order(metrics: dict[str, Any]) -> None:
    """SystemExit for a cost that puts unsafe answers below safe ones on held-out texts."""
    gap = metrics["validation"].get("cost_unsafe_minus_safe")
    if gap is not None and gap <= 0:
        raise SystemExit(
            f"held-out unsafe answers cost {-gap:.2f} less than safe ones: the sign is flipped in "
            "the data, or nothing was learnt; nothing was exported"
        )


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"{args.out} keeps the last checkpoint: the same command goes on from it"):
        main(args)
    PartialState().destroy_process_group()  # else its threads may abort the exit
