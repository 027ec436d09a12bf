"""PPO-Lagrangian: the policy that gains most reward while its mean cost stays under a limit.

    python -m training.ppo_lag --policy build/dpo --reward build/reward --cost build/cost
    accelerate launch -m training.ppo_lag ...

A step: draw answers to prompts, score them twice, move the multiplier by the costs, move the policy
(a LoRA) by the advantage (A_r - lambda A_c) / (1 + lambda). The update itself is `training.ppo`'s.
--lambda-init 0 is PPO. A killed run goes on from its checkpoint to the same curve, since the
randomness of a step is a function of (seed, step); `summary.json` is written last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator, PartialState
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from guardrail._files import sha256_of, write_json
from guardrail.errors import ModerationError
from training.bases import SMOLLM2
from training.ending import ends_in_a_line
from training.lagrange import LagrangeMultiplier
from training.lm import (
    BASES_FOLDER,
    LanguageModel,
    encode_prompt,
    refuse_not_finite,
    tokenizer_fingerprint,
)
from training.losses import kl_estimate, masked_mean
from training.plots import Curves, draw, read
from training.ppo import Critics, Learner, NotFiniteError, Ppo, Rollout
from training.precision import DType, fast_dtype
from training.preferences import read_demonstrations
from training.resuming import claim, manifest_of, refuse_below_one
from training.rollout import (
    EndlessPrompts,
    Sequences,
    answer_logprobs,
    given,
    open_policy,
    rollout_prompts,
    sample,
    survey,
    texts,
)
from training.runs import accelerator_of, digest_of, load_whole, refuse_other_weights, save_whole
from training.scorers import Scorer, open_scorer, refuse_wrong_sign
from training.tuning import StopAtSignal


@dataclass
class Args(Ppo):
    """A run; everything that decides its result."""

    reward: Path = Path("build/reward")
    cost: Path = Path("build/cost")
    """Score models (training.score_model); cost > 0 means unsafe."""
    policy: str = SMOLLM2
    """A base, which gets a new LoRA, or the folder of a LoRA; the reference is what it is now."""
    bases: Path = BASES_FOLDER
    """Where bases are unpacked."""
    data: Path = Path("build/preferences")
    """What `training.preferences build` wrote: prompts, and demonstrations for --ptx."""
    out: Path = Path("build/ppo_lag")
    steps: int = 60
    rollouts: int = 32
    """Answers per step and process."""
    new_tokens: int = 48
    prompt_tokens: int = 96
    """Prompts that are longer, chat template included, are left out."""
    harmful_share: float = 0.5
    cost_limit: float = 0.0
    lambda_init: float = 1.0
    lambda_rate: float = 0.1
    lambda_max: float = 5.0
    window: int = 128
    """Answers in the moving average of the cost, at least; whole steps of them count."""
    rank: int = 16
    dtype: DType = field(default_factory=fast_dtype)
    """Of the frozen weights: bfloat16 where the machine is faster in it; the LoRA's and the
    critics' are float32."""
    seed: int = 0
    save_every: int = 5
    """Steps between checkpoints."""
    plot: Path | None = None
    """Where its curves are drawn at the end (.svg or .png); curves.svg in `out` by default."""


class Run:
    """A run's state: the language model as a policy, what scores it, the multiplier, the step.

    demonstrations: (prompt, answer) texts for `args.ptx`.
    """

    def __init__(
        self,
        args: Args,
        model: Any,
        tokenizer: Any,
        scorers: tuple[Scorer, Scorer],
        prompts: EndlessPrompts,
        demonstrations: Sequence[tuple[str, str]],
        accelerator: Accelerator,
    ) -> None:
        self.args, self.model, self.tokenizer = args, model.eval(), tokenizer
        self.scorers, self.prompts, self.accelerator = scorers, prompts, accelerator
        self.demonstrations = demonstrations
        self.learner = Learner(
            lambda sequences: answer_logprobs(model, sequences)[0],
            [p for p in model.parameters() if p.requires_grad],
            Critics(model.get_base_model().config.hidden_size).to(accelerator.device),
            args,
            lambda tensor: accelerator.reduce(tensor, "mean"),
        )
        self.multiplier = multiplier_of(args)
        self.step, self.seconds = 0, 0.0
        self.phases: dict[str, float] = {}
        self.rollout: Rollout | None = None
        self.answers: list[dict[str, Any]] = []
        self.refused: str | None = None

    def advance(self) -> dict[str, float]:
        """One step; its figures, averaged over the processes. Raises NotFiniteError."""
        started, place = time.monotonic(), self.accelerator.process_index
        index = self.step * self.accelerator.num_processes + place
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + index)
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        self.rollout, figures = self._collect(self.prompts.batch(index, self.args.rollouts))
        with self._phase("update"):
            costs, rewards = (
                self.accelerator.gather(t) for t in (self.rollout.cost, self.rollout.reward)
            )
            if not torch.isfinite(costs + rewards).all():  # in every process, or others would wait
                raise NotFiniteError("a score of reward or cost")
            multiplier = self.multiplier.observe(costs.tolist())
            ptx = (lambda: self._demonstrations(generator)) if self.args.ptx else None
            figures |= self.learner.update(self.rollout, multiplier, generator, ptx)
        values = torch.tensor(list(figures.values()), device=costs.device)
        figures = dict(zip(figures, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self.step += 1
        self.seconds += time.monotonic() - started
        figures |= {"lambda": multiplier, "cost_limit": self.args.cost_limit}
        figures |= {"cost_average": self.multiplier.mean_cost}
        return figures | {f"seconds/{name}": spent for name, spent in self.phases.items()}

    def _collect(self, prompts: list[tuple[str, bool]]) -> tuple[Rollout, dict[str, float]]:
        with self._phase("generate"):
            ids = [encode_prompt(self.tokenizer, prompt) for prompt, _ in prompts]
            drawn = sample(self.model, self.tokenizer, ids, self.args.new_tokens)
        with self._phase("score"):
            answers = texts(self.tokenizer, drawn)
            pairs = [(p, answer) for (p, _), answer in zip(prompts, answers, strict=True)]
            reward, cost = (
                torch.tensor(self._scores(s, pairs), dtype=torch.float32, device=drawn.mask.device)
                for s in self.scorers
            )
        with self._phase("evaluate"):
            seen = survey(self.model, drawn, self.args.minibatch)
        rows = zip(pairs, reward.tolist(), cost.tolist(), strict=True)
        self.answers = [
            {"step": self.step, "prompt": p, "answer": a, "reward": r, "cost": c}
            for (p, a), r, c in rows
        ]
        harmful = torch.tensor([float(kind) for _, kind in prompts], device=cost.device)
        kl = kl_estimate(seen.logprobs, seen.reference, drawn.mask)
        figures = {
            "reward": reward.mean(),
            "cost": cost.mean(),
            "unsafe": (cost > 0).float().mean(),
            "unsafe_of_harmful_prompts": masked_mean((cost > 0).float(), harmful),
            "kl": kl.sum(dim=1).mean(),
            "length": drawn.mask.sum(dim=1).mean(),
            "entropy": masked_mean(seen.entropy, drawn.mask),
        }
        rollout = Rollout(drawn, seen.logprobs, seen.reference, seen.states, reward, cost)
        return rollout, {name: value.item() for name, value in figures.items()}

    def _scores(self, scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(len(pairs),), nan for the answers that `scorer` gives no number, and why in `refused`.
        Raising here would leave other processes waiting, and the batch unsaved."""
        try:
            return scorer.score(pairs)
        except ModerationError as error:
            self.refused = str(error)
        if len(pairs) == 1:
            return np.array([np.nan])
        return np.concatenate([self._scores(scorer, [pair]) for pair in pairs])

    def _demonstrations(self, generator: torch.Generator) -> Sequences:
        rows = torch.randint(len(self.demonstrations), (self.args.minibatch,), generator=generator)
        pairs = [self.demonstrations[row] for row in rows]
        return given(self.tokenizer, pairs, self.args.new_tokens).to(self.rollout.cost.device)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.phases[name] = time.monotonic() - started

    def _parts(self) -> dict[str, Any]:
        own = self.learner
        return {"critics": own.critics, "actor": own.actor, "critic": own.critic} | {
            "multiplier": self.multiplier
        }

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; its randomness depends on seed and step alone."""
        return {name: part.state_dict() for name, part in self._parts().items()} | {
            "adapter": get_peft_model_state_dict(self.model),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; SystemExit for one of another model."""
        state = load_whole(path, self.accelerator.device)
        refuse_other_weights(path, state["adapter"], get_peft_model_state_dict(self.model))
        set_peft_model_state_dict(self.model, state["adapter"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        device = self.accelerator.device
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=device), "sum") > 0)

    def save(self) -> None:
        """Checkpoint, and a few answers to read; a kill at any moment leaves the last whole one."""
        save_whole(self.state(), self.args.out / "checkpoint.pt")
        with (self.args.out / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(a) + "\n" for a in self.answers[::8])

    def save_failed(self, error: NotFiniteError) -> SystemExit:
        place = self.accelerator.process_index
        path = self.args.out / (f"failed_batch.{place}.pt" if place else "failed_batch.pt")
        if self.rollout is not None:
            batch = vars(self.rollout) | {"sequences": vars(self.rollout.sequences)}
            torch.save(batch | {"answers": self.answers}, path)
        good = self.args.out / "checkpoint.pt"
        return SystemExit(
            f"step {self.step + 1}: {error} is not finite"
            + (f" ({self.refused})" if self.refused else "")
            + f"; its batch is in {path}, "
            + (f"the last good state in {good}" if good.exists() else "no checkpoint was due yet")
            + ": look at its scores, or lower --learning-rate"
        )


def multiplier_of(args: Args) -> LagrangeMultiplier:
    """SystemExit for settings that it cannot have."""
    try:
        return LagrangeMultiplier(
            initial=args.lambda_init,
            limit=args.cost_limit,
            rate=args.lambda_rate,
            maximum=args.lambda_max,
            window=args.window,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error


def align(args: Args, reward: Scorer, cost: Scorer) -> None:
    """Train, or go on training, the policy of `args` on what `reward` and `cost` say."""
    refuse_wrong_sign(cost, args.cost)
    accelerator = accelerator_of()
    torch.manual_seed(args.seed)
    refuse_below_one(args)
    lm = open_policy(args.policy, args.bases, rank=args.rank, dtype=args.dtype)
    lm.model.to(accelerator.device)
    harmful, benign = rollout_prompts(args.data, lm.tokenizer, args.prompt_tokens)
    prompts = EndlessPrompts(harmful, benign, args.harmful_share, args.seed)
    answers = [(d.prompt, d.answer) for d in read_demonstrations(args.data, "train")]
    learnt_from = {
        "processes": accelerator.num_processes,  # they share out the prompts
        "reward_model": manifest_of(args.reward),
        "cost_model": manifest_of(args.cost),
        "rows": digest_of([harmful, benign, answers])[:16],
    }
    claim(args.out, args, learnt_from)
    run = Run(args, lm.model, lm.tokenizer, (reward, cost), prompts, answers, accelerator)
    if (path := args.out / "checkpoint.pt").exists():
        run.load(path)
        accelerator.print(f"resumed at step {run.step}", flush=True)
    accelerator.print(f"{len(harmful)} harmful and {len(benign)} benign prompts", flush=True)
    train(run)
    if accelerator.is_main_process:
        finish(run, lm)


def train(run: Run) -> None:
    """All steps that are left; curves, samples and checkpoints as they go. SIGINT and SIGTERM end
    it after a step, with a checkpoint."""
    args = run.args
    writer = Curves(args.out, run.step) if run.accelerator.is_main_process else nullcontext()
    with StopAtSignal() as stop, writer as curves:
        while run.step < args.steps:
            try:
                figures = run.advance()
            except NotFiniteError as error:
                raise run.save_failed(error) from error
            asked = run.anywhere(stop.asked)
            if curves is not None:
                curves.add(run.step, figures)
                print(line_of(run, figures), flush=True)
                if asked or run.step % args.save_every == 0 or run.step == args.steps:
                    run.save()
            if asked and run.step < args.steps:
                raise stop.stopped(f"step {run.step}")


def line_of(run: Run, figures: dict[str, float]) -> str:
    shown = ("reward", "cost", "unsafe", "lambda", "kl", "length", "entropy")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.phases.items())
    left = run.seconds / run.step * (run.args.steps - run.step) / 60
    return (
        f"step {run.step}/{run.args.steps} "
        + " ".join(f"{name} {figures[name]:.3f}" for name in shown)
        + f" | seconds: {spent} | {left:.1f} min left"
    )


def finish(run: Run, lm: LanguageModel) -> None:
    """The adapter, and last the summary that says where it comes from."""
    args = run.args
    refuse_not_finite(get_peft_model_state_dict(run.model), args.out)  # by the last update
    run.model.save_pretrained(args.out, selected_adapters=["default"])
    draw((args.out,), args.plot or args.out / "curves.svg")
    rows = read(args.out)[-10:]
    summary = {
        "recipe": "ppo_lag",
        "base": lm.base,
        "tokenizer": tokenizer_fingerprint(lm.tokenizer),
        "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "steps": run.step,
        "processes": run.accelerator.num_processes,
        "seconds": round(run.seconds, 1),
        "last_steps": {name: float(np.mean([row[name] for row in rows])) for name in rows[0]},
        "files": {"adapter_model.safetensors": sha256_of(args.out / "adapter_model.safetensors")},
    }
    write_json(args.out / "summary.json", summary)
    print(args.out / "summary.json")


def main(args: Args) -> None:
    align(args, open_scorer(args.reward, "reward"), open_scorer(args.cost, "cost"))


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line(f"{args.out} keeps the last checkpoint: the same command goes on from it"):
        main(args)
    PartialState().destroy_process_group()  # else its threads may abort the exit
