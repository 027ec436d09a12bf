"""What runs find at a given price: F1 of each where all flag the same share of benign answers.

    python -m training.frontier --models build/small build/plain14

F1 moves with the threshold, and before calibration each run has its own; at equal shares it says
which run ranks better where it matters. Of runs of `training.moderation`, before export, on the
validation split; each threshold is the lowest that flags at most so many benign answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import f1_score, roc_auc_score

from guardrail.calibration import threshold_for_rate
from guardrail.taxonomy import Direction
from training.batching import encode, predict
from training.data import Example, read_examples
from training.ending import ends_in_a_line
from training.eval_sets import benign_answers, direction_of, held_out_sets, human_labels
from training.model import ModerationModel, encoder_of
from training.precision import bf16_pays

Floats = NDArray[np.float64]


@dataclass
class Args:
    models: tuple[Path, ...]
    """What `training.moderation`, `soup` or `restore` wrote."""
    data: Path = Path("build/data")
    source: Path = Path("../shared/data")
    """Folder of the labelled data: people's labels of annotated answers, and every benign answer to
    the split's prompts, of which `--data` has a third."""
    shares: tuple[float, ...] = (0.01, 0.015, 0.02)
    """Of the benign answers, which may be flagged."""
    prompt_shares: tuple[float, ...] = (0.0,)
    """How much of the logit of its prompt alone is added to an answer's, a table for each."""


def at_equal_shares(
    harmful: Mapping[str, tuple[Floats, Floats]], benign: Floats, shares: Sequence[float]
) -> dict[str, dict[str, float]]:
    """set -> AUROC, and F1 at each share. harmful: P(harmful) and truth, each (n,), by set; benign:
    P(harmful) (m,). Raises ValueError without benign texts."""
    table = {
        name: {"AUROC": float(roc_auc_score(truth, p))} for name, (p, truth) in harmful.items()
    }
    for share in shares:
        threshold = threshold_for_rate(benign, share).value
        for name, (p, truth) in harmful.items():
            table[name][f"F1 at {share:.1%}"] = float(f1_score(truth, p >= threshold))
    return table


def _texts(args: Args) -> tuple[dict[str, list[Example]], list[Example]]:
    """The validation sets of answers that hold both kinds, and the benign answers."""
    examples = read_examples(args.data, "validation")
    sets = {
        each.name: each.examples
        for each in held_out_sets(examples, human_labels(args.source))
        if len({bool(e.unsafe) for e in each.examples}) == 2
        and direction_of(each.examples[0]) is Direction.OUTPUT
    }
    return sets, benign_answers(args.source, examples)


def main(args: Args) -> None:
    sets, benign = _texts(args)
    if not benign:
        raise SystemExit(f"{args.source}: no benign answer to a validation prompt of {args.data}")
    truth = {
        name: np.array([bool(e.unsafe) for e in texts], np.float64) for name, texts in sets.items()
    }
    for folder in args.models:
        logits_of = _scorer(folder, alone=any(args.prompt_shares))
        harmful = {name: logits_of(texts) for name, texts in sets.items()}
        harmless = logits_of(benign)
        for share in args.prompt_shares:
            with_prompt = {name: (combined(z, share), truth[name]) for name, z in harmful.items()}
            table = at_equal_shares(with_prompt, combined(harmless, share), args.shares)
            prompts = f", {share:g} of the prompt's logit" if share else ""
            print(f"{folder}{prompts}, {len(benign)} benign answers")
            for name, row in table.items():
                figures = json.dumps({key: round(value, 3) for key, value in row.items()})
                print(f"  {name} ({len(sets[name])}): {figures}", flush=True)


def combined(logits: Floats, prompt_share: float) -> Floats:
    """P(harmful), (n,), of the logits of answers and of their prompts, (2, n)."""
    return np.asarray(expit(logits[0] + prompt_share * logits[1]), np.float64)


def _scorer(folder: Path, *, alone: bool) -> Callable[[Sequence[Example]], Floats]:
    """What gives answers their logits of harm by the run in `folder`, and, if `alone`, those of
    their prompts (else zeros): (2, n)."""
    model, encoder = ModerationModel.load(folder), encoder_of(folder)

    def harm(texts: Sequence[Example]) -> Floats:
        severity, _ = predict(model, encode(texts, encoder, 0.0), encoder.pad_id, bf16=bf16_pays())
        return np.asarray(severity[:, 0], np.float64)

    def score(texts: Sequence[Example]) -> Floats:
        own = harm(texts)
        prompts = [replace(e, response=None) for e in texts]
        return np.stack([own, harm(prompts) if alone else np.zeros_like(own)])

    return score


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
