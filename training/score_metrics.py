"""How good scores of held-out pairs are. Pure functions of arrays.

    python -m training.score_metrics --reward build/reward --cost build/cost

prints the correlation of two exported models over the answers of the test split. Near -1, one model
would do for both questions, and a constraint would have nothing to trade.

    python -m training.score_metrics --kind cost --models build/cost build/cost_lm --limit 600

compares exported models of one kind, an encoder and a language model say, on the same test pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from guardrail.score import ScoreKind
from training.ending import ends_in_a_line
from training.metrics import bootstrap
from training.preference_rows import kinds_of_prompts
from training.preferences import Preference, read_demonstrations, read_preferences
from training.scorers import open_scorer, refuse_wrong_sign


def score_metrics(
    preferences: Sequence[Preference], scores: np.ndarray, kind: ScoreKind
) -> dict[str, float | int]:
    """scores: (pairs, 2). Accuracy over annotated pairs, all and conflicting ones, and over those
    of other sources; for a cost also of its sign, its AUROC, and the gap between unsafe and safe.
    """
    result: dict[str, float | int] = {}
    right = ordered_right(preferences, scores, kind)
    annotated = np.array([p.source == "annotated_pairs" for p in preferences])
    conflicting = np.array([p.conflicting for p in preferences])
    helping = np.array([p.source.startswith("help/") for p in preferences])
    for name, part in (
        ("annotated", annotated),
        ("conflicting", annotated & conflicting),
        ("not_conflicting", annotated & ~conflicting),
        ("other_sources", ~annotated & ~helping),
        ("help", helping),
    ):
        chosen = part & ~np.isnan(right)
        if chosen.any():
            result[f"accuracy_{name}"] = round(float(right[chosen].mean()), 4)
            result[f"pairs_{name}"] = int(chosen.sum())
    if kind == "cost":
        result |= _sign_metrics(preferences, scores, annotated)
    return result


def ordered_right(
    preferences: Sequence[Preference], scores: np.ndarray, kind: ScoreKind
) -> np.ndarray:
    """scores: (pairs, 2). 1 where a pair is ordered as people did, 0 where not; nan where nobody
    said: (pairs,)."""
    labels = [p.more_helpful if kind == "reward" else p.less_harmful for p in preferences]
    called = scores.argmax(axis=1) if kind == "reward" else scores.argmin(axis=1)
    return np.array(
        [
            float("nan") if label is None else float(label == side)
            for label, side in zip(labels, called, strict=True)
        ]
    )


def _sign_metrics(
    preferences: Sequence[Preference], scores: np.ndarray, annotated: np.ndarray
) -> dict[str, float | int]:
    truth = np.array([[-1 if u is None else int(u) for u in p.unsafe] for p in preferences])
    result: dict[str, float | int] = {}
    for name, part in (("", np.ones(len(truth), bool)), ("_annotated", annotated)):
        known = truth[part] >= 0
        unsafe, cost = truth[part][known], scores[part][known]
        if len(set(unsafe.tolist())) < 2:
            continue
        result[f"sign_accuracy{name}"] = round(float(((cost > 0) == (unsafe == 1)).mean()), 4)
        result[f"auroc_unsafe{name}"] = round(float(roc_auc_score(unsafe, cost)), 4)
        gap = cost[unsafe == 1].mean() - cost[unsafe == 0].mean()
        result[f"cost_unsafe_minus_safe{name}"] = round(float(gap), 4)
        result[f"answers{name}"] = int(known.sum())
    return result


# --- do reward and cost say the same? ------------------------------------------------------------

Interval = tuple[float, float]
Statistic = Callable[[np.ndarray, np.ndarray], float]


def correlation(
    first: np.ndarray, second: np.ndarray, prompts: Sequence[str], rounds: int = 1000
) -> dict[str, float | int | Interval | None]:
    """Pearson's and Spearman's, of two (n,) arrays, with bootstrap 95 % intervals (percentiles).

    prompts: of each answer; the answers to one are drawn together, since they are not independent.
    None where one array is constant, or there are less than two prompts.
    """
    found: dict[str, float | int | Interval | None] = {
        "answers": len(first),
        "prompts": len(set(prompts)),
    }
    for name, statistic in (("pearson", _pearson), ("spearman", _spearman)):
        of_rows = partial(_of_rows, statistic, first, second)
        value = of_rows(np.arange(len(first)))
        if len(set(prompts)) < 2 or np.isnan(value):
            found |= {name: None, f"{name}_95": None}
            continue
        low, high = bootstrap(of_rows, prompts, rounds)
        found |= {name: round(value, 4), f"{name}_95": (round(low, 4), round(high, 4))}
    return found


def _of_rows(
    statistic: Statistic, first: np.ndarray, second: np.ndarray, rows: np.ndarray
) -> float:
    return statistic(first[rows], second[rows])


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    return _pearson(rankdata(first), rankdata(second))  # ties get their mean rank


@dataclass(frozen=True)
class HeldOut:
    """A held-out answer. harmful: whether its prompt is of the harmful kind, None where unknown."""

    prompt: str
    answer: str
    harmful: bool | None


def held_out(folder: Path) -> list[HeldOut]:
    """The answers of the test split's pairs and demonstrations, each once, in a fixed order."""
    pairs, demonstrations = read_preferences(folder, "test"), read_demonstrations(folder, "test")
    harmful, harmless = kinds_of_prompts(pairs, demonstrations)
    answers = dict.fromkeys(
        [(p.prompt, answer) for p in pairs for answer in p.answers]
        + [(d.prompt, d.answer) for d in demonstrations]
    )
    kinds = dict.fromkeys(harmless, False) | dict.fromkeys(harmful, True)
    return [HeldOut(prompt, answer, kinds.get(prompt)) for prompt, answer in answers]


def compare(
    models: Sequence[Path], kind: ScoreKind, data: Path, limit: int | None, rounds: int
) -> None:
    """Print each model's figures on the same test pairs, and how many more (a share, 95 % interval
    over prompts) it orders right than the first."""
    from training.score_model import Args, choose  # which imports this module

    scorers = [open_scorer(folder, kind) for folder in models]
    tested = choose(Args(kind=kind, data=data, limit=limit), "test")
    answers = [(p.prompt, answer) for p in tested for answer in p.answers]
    first: np.ndarray | None = None
    for folder, scorer in zip(models, scorers, strict=True):
        scores = scorer.score(answers).reshape(-1, 2)
        right = ordered_right(tested, scores, kind)
        first = right if first is None else first
        gained = right - first
        low, high = bootstrap(
            lambda rows, gained=gained: float(np.nanmean(gained[rows])),
            [p.prompt for p in tested],
            rounds,
        )
        found = {
            "model": str(folder),
            **score_metrics(tested, scores, kind),
            "right": round(float(np.nanmean(right)), 4),
            "more_right": round(float(np.nanmean(gained)), 4),
            "more_right_95": (round(low, 4), round(high, 4)),
        }
        print(json.dumps(found), flush=True)


def main(
    reward: Path = Path("build/reward"),
    cost: Path = Path("build/cost"),
    data: Path = Path("build/preferences"),
    models: tuple[Path, ...] = (),
    kind: ScoreKind = "cost",
    limit: int | None = None,
    rounds: int = 1000,
) -> None:
    """Reward-cost correlation over held-out answers, all of them and by the kind of prompt; or,
    with `models` of one kind, how good each is on the same pairs.

    limit: so many answers, or pairs; rounds: of the bootstrap.
    """
    if limit is not None and limit < 1:
        raise SystemExit(f"--limit is {limit}: it has to be 1 or more")
    if models:
        compare(models, kind, data, limit, rounds)
    else:
        correlate(reward, cost, data, limit, rounds)


def correlate(reward: Path, cost: Path, data: Path, limit: int | None, rounds: int) -> None:
    """Print how far a reward and a cost say the same."""
    scorers = open_scorer(reward, "reward"), open_scorer(cost, "cost")
    refuse_wrong_sign(scorers[1], cost)  # a flipped one would turn every correlation round
    rows = held_out(data)
    if limit is not None:  # some of everything, not the first sources alone
        rows = random.Random(0).sample(rows, min(limit, len(rows)))
    if len({row.prompt for row in rows}) < 2:
        raise SystemExit(
            f"{data}: fewer than two test prompts: python -m training.preferences build"
        )
    scores = [scorer.score([(row.prompt, row.answer) for row in rows]) for scorer in scorers]
    for name, kinds in (("all", (True, False, None)), ("harmful", (True,)), ("harmless", (False,))):
        chosen = [i for i, row in enumerate(rows) if row.harmful in kinds]
        found = correlation(
            scores[0][chosen], scores[1][chosen], [rows[i].prompt for i in chosen], rounds
        )
        print(json.dumps({"prompts of kind": name, **found}))


if __name__ == "__main__":
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        tyro.cli(main)
