"""Two artifacts on one frozen test set: which is better, and whose decisions flip.

    python -m training.compare --old guardrail/models/small --new build/retrain/artifact

The rule, fixed before anything is looked at: the new one is better when its quadratic kappa of
severity is higher by more than `min_gain`, and neither its recall of moderate and severe texts nor
its false-positive rate is worse by more than `tolerance`. Intervals and tests go beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from guardrail.moderator import OnnxModerator
from guardrail.taxonomy import Severity
from training.data import Example, normalise, read_examples
from training.decisions import decide
from training.ending import ends_in_a_line

Ints = NDArray[np.int64]


@dataclass
class Args:
    old: Path = Path("guardrail/models/small")
    new: Path = Path("build/retrain/artifact")
    data: Path = Path("build/data")
    """Its `test.jsonl` is the frozen test."""
    out: Path = Path("build/comparison")
    """`comparison.md`, `comparison.json` and `flips.jsonl` are written there."""
    min_gain: float = 0.0
    """How much higher the new kappa must be."""
    tolerance: float = 0.01
    """By how much recall of grave texts and false-positive rate may be worse."""


@dataclass(frozen=True)
class Comparison:
    """Figures of both, the paired difference of kappa with its 95 % interval, and the flips.

    flips: severities that changed; fixed, broken: of those, to the right one and from it;
    p_value: exact McNemar test of right or wrong (McNemar 1947).
    """

    n: int
    old: dict[str, float]
    new: dict[str, float]
    gain: float
    low: float
    high: float
    flips: int
    fixed: int
    broken: int
    p_value: float
    better: bool
    why: str


def figures(truth: Ints, called: Ints) -> dict[str, float]:
    """kappa (quadratic), recall of severity >= 2 being flagged at all, false-positive rate, and the
    share of exact severities. truth, called: (n,) 0-3. NaN where a figure has no texts."""
    grave, harmless = truth >= 2, truth == 0
    return {
        "kappa": _kappa(truth, called),
        "grave_recall": float((called[grave] > 0).mean()) if grave.any() else float("nan"),
        "fpr": float((called[harmless] > 0).mean()) if harmless.any() else float("nan"),
        "exact": float((truth == called).mean()),
    }


def compare(
    truth: Ints,
    old: Ints,
    new: Ints,
    groups: Sequence[str],
    *,
    min_gain: float = 0.0,
    tolerance: float = 0.01,
    draws: int = 400,
) -> Comparison:
    """Severities called (n,) 0-3 by both on the same texts; groups: what is drawn together in the
    bootstrap, e.g. prompts."""
    before, after = figures(truth, old), figures(truth, new)
    gain = after["kappa"] - before["kappa"]
    low, high = _interval(truth, old, new, groups, draws)
    right, now_right = truth == old, truth == new
    fixed, broken = int((~right & now_right).sum()), int((right & ~now_right).sum())
    p = binomtest(min(fixed, broken), fixed + broken).pvalue if fixed + broken else 1.0
    better, why = _judge(before, after, gain, min_gain, tolerance)
    return Comparison(
        n=len(truth),
        old=before,
        new=after,
        gain=gain,
        low=low,
        high=high,
        flips=int((old != new).sum()),
        fixed=fixed,
        broken=broken,
        p_value=float(p),
        better=better,
        why=why,
    )


def _judge(
    old: dict[str, float], new: dict[str, float], gain: float, min_gain: float, tolerance: float
) -> tuple[bool, str]:
    if not gain > min_gain:  # nor where it is NaN: what cannot be measured is not better
        return False, f"kappa {old['kappa']:.3f} -> {new['kappa']:.3f}, not more than {min_gain} up"
    if old["grave_recall"] - new["grave_recall"] > tolerance:
        return (
            False,
            f"recall of grave texts {old['grave_recall']:.3f} -> {new['grave_recall']:.3f}",
        )
    if new["fpr"] - old["fpr"] > tolerance:
        return False, f"false-positive rate {old['fpr']:.3f} -> {new['fpr']:.3f}"
    return True, f"kappa {old['kappa']:.3f} -> {new['kappa']:.3f}, nothing else worse"


def _kappa(truth: Ints, called: Ints) -> float:
    if len(set(truth.tolist()) | set(called.tolist())) < 2:
        return float("nan")
    return float(cohen_kappa_score(truth, called, weights="quadratic", labels=[0, 1, 2, 3]))


def _interval(
    truth: Ints, old: Ints, new: Ints, groups: Sequence[str], draws: int
) -> tuple[float, float]:
    """95 % interval of the difference of kappas, by bootstrap over groups."""
    names, index = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
    members = [np.flatnonzero(index == g) for g in range(len(names))]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(draws):
        rows = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        gains.append(_kappa(truth[rows], new[rows]) - _kappa(truth[rows], old[rows]))
    known = np.array(gains)[~np.isnan(gains)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def frozen_test(data: Path) -> list[Example]:
    """The texts of the test split that have a severity."""
    return [e for e in read_examples(data, "test") if e.severity is not None]


def run(args: Args) -> Comparison:
    """Judge the test with both, write the report, the figures and the flips."""
    test = frozen_test(args.data)
    if not test:
        raise SystemExit(f"{args.data}/test.jsonl has no text with a severity: nothing to compare")
    truth = np.array([e.severity for e in test])
    called = []
    for name, folder in (("old", args.old), ("new", args.new)):
        moderator = OnnxModerator(folder, device="cpu", locate=False)
        called.append(decide(moderator, test, name).severity)
    old, new = called
    result = compare(
        truth,
        old,
        new,
        [normalise(e.prompt) for e in test],
        min_gain=args.min_gain,
        tolerance=args.tolerance,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "flips.jsonl").open("w", encoding="utf-8") as file:
        for example, before, after in zip(test, old, new, strict=True):
            if before != after:
                file.write(json.dumps(_flip(example, before, after), ensure_ascii=False) + "\n")
    (args.out / "comparison.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    (args.out / "comparison.md").write_text(markdown(result), encoding="utf-8")
    return result


def _flip(example: Example, old: int, new: int) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "response": example.response,
        "severity": example.severity,
        "old": Severity(old).label,
        "new": Severity(new).label,
        "fixed": bool(new == example.severity),
        "source": example.source,
    }


def markdown(c: Comparison) -> str:
    lines = ["| figure | old | new |", "|---|---|---|"]
    lines += [f"| {name} | {c.old[name]:.3f} | {c.new[name]:.3f} |" for name in c.old]
    verdict = "better" if c.better else "not better"
    return (
        "\n".join(lines) + f"\n\n{c.n} texts; {c.flips} decisions flip: {c.fixed} to the right "
        f"severity, {c.broken} from it (McNemar p {c.p_value:.3g}). Kappa {c.gain:+.3f} "
        f"({c.low:+.3f} to {c.high:+.3f}). The new one is {verdict}: {c.why}.\n"
    )


def main(args: Args) -> None:
    print(markdown(run(args)))


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
