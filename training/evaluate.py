"""Evaluation of the exported artifact, as the SDK decides: thresholds, calibration, windows.

    python -m training.evaluate --model guardrail/models/small --source ../shared/data

Every set is kept out of training: test splits by prompt, and public sets without the texts whose
normalised prompt is in the training split. Label kinds are never pooled. 95 % intervals by
bootstrap. Writes the table (Markdown) and puts the figures into the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

from guardrail.artifact import write_manifest
from guardrail.moderator import OnnxModerator, calibrated
from guardrail.policy import LEVELS
from guardrail.taxonomy import Category, Direction
from guardrail.verdict import Pair
from training.data import Example, normalise, read_examples, read_jsonl, targets
from training.metrics import expected_calibration_error
from training.scoring import text_logits


@dataclass
class Args:
    model: Path = Path("guardrail/models/small")
    data: Path = Path("build/data")
    source: Path = Path("../shared/data")
    """Folder with the public evaluation sets; left out where there is none."""
    out: Path = Path("build/evaluation.md")
    split: str = "test"
    record: bool = True
    """Put the figures into the model's manifest."""


@dataclass(frozen=True)
class EvalSet:
    """Texts with one kind of label. labels: who gave them."""

    name: str
    labels: str
    examples: list[Example]


@dataclass(frozen=True)
class Decisions:
    """What the SDK decides on n texts: P(>= level) (n, 3), categories (n, 19), severity (n,)."""

    probabilities: np.ndarray
    categories: np.ndarray
    held: np.ndarray
    severity: np.ndarray


def decide(moderator: OnnxModerator, examples: Sequence[Example], label: str) -> Decisions:
    """The decisions of a policy without thresholds of its own, i.e. the model's calibrated ones."""
    logits_s, logits_c = text_logits(
        moderator, [Pair(e.prompt, e.response) for e in examples], label=label
    )
    severity, categories = np.empty_like(logits_s), np.empty_like(logits_c)
    reached = np.zeros(len(examples), int)
    held = np.zeros(logits_c.shape, bool)
    for direction in Direction:
        rows = np.array([Pair(e.prompt, e.response).direction is direction for e in examples])
        if not rows.any():
            continue
        s, c = calibrated(
            logits_s[rows], logits_c[rows], moderator.manifest.calibration_of(direction)
        )
        thresholds = moderator.thresholds[direction]
        levels = np.array([thresholds.severity.get(level, 0.5) for level in LEVELS])
        limits = np.array([thresholds.categories.get(category, 0.5) for category in Category])
        reached[rows] = (s >= levels).cumprod(axis=1).sum(axis=1)
        over = c >= limits
        none = ~over.any(axis=1)
        over[none, c[none].argmax(axis=1)] = True
        held[rows] = over & (reached[rows] > 0)[:, None]
        severity[rows], categories[rows] = s, c
    return Decisions(severity, categories, held, reached)


def score(examples: Sequence[Example], seen: Decisions) -> dict[str, Any]:
    """Figures that the set's labels allow; `f1_low`, `f1_high` bound F1's 95 % interval."""
    unsafe = np.array([bool(e.unsafe) for e in examples])
    flagged = seen.severity > 0
    figures: dict[str, Any] = {"n": len(examples), "unsafe": int(unsafe.sum())}
    if not unsafe.all():
        figures["fpr"] = flagged[~unsafe].mean()
    if unsafe.any():
        figures["recall"] = flagged[unsafe].mean()
        figures["f1"] = f1_score(unsafe, flagged, zero_division=0)
        figures["f1_low"], figures["f1_high"] = bootstrap(
            lambda i: f1_score(unsafe[i], flagged[i], zero_division=0), len(examples)
        )
    if unsafe.any() and not unsafe.all():
        figures["auroc"] = roc_auc_score(unsafe, seen.probabilities[:, 0])
        figures["ece"] = expected_calibration_error(seen.probabilities[:, 0], unsafe)
    graded = np.array([e.severity is not None for e in examples])
    if graded.all() and unsafe.any():
        truth = np.array([e.severity for e in examples])
        figures["kappa"] = cohen_kappa_score(
            truth, seen.severity, weights="quadratic", labels=[0, 1, 2, 3]
        )
        figures["severity_exact"] = (truth == seen.severity).mean()
        figures["grave_recall"] = flagged[truth >= 2].mean() if (truth >= 2).any() else None
    if unsafe.any() and all(e.categories is not None for e in examples):
        names = np.stack([targets(e)[2] for e in examples])
        figures["category_f1"] = f1_score(names, seen.held, average="micro", zero_division=0)
    return {
        k: v if v is None or isinstance(v, int) else round(float(v), 4) for k, v in figures.items()
    }


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, rounds: int = 300, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (95 %) of a statistic of resampled indices."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(rounds)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# --- sets ----------------------------------------------------------------------------------------


def held_out_sets(examples: Sequence[Example]) -> Iterator[EvalSet]:
    """Sets from a split of our own data."""

    def pick(prefix: str, direction: Direction) -> list[Example]:
        return [
            e for e in examples
            if e.source.startswith(prefix) and Pair(e.prompt, e.response).direction is direction
        ]  # fmt: skip

    yield EvalSet("annotated answers", "ai", pick("annotated/", Direction.OUTPUT))
    yield EvalSet("annotated prompts", "ai", pick("annotated/", Direction.INPUT))
    yield EvalSet("BeaverTails answers", "human", pick("responses/jincan", Direction.OUTPUT))
    pku = pick("responses/pku", Direction.OUTPUT)
    yield EvalSet("PKU-SafeRLHF answers, balanced", "human/derived", balanced(pku))
    yield EvalSet("LLM refusals", "proxy", pick("responses/spard_refusal", Direction.OUTPUT))
    yield EvalSet("benign answers", "derived", pick("benign/", Direction.OUTPUT))
    yield EvalSet("benign prompts", "derived", pick("benign/", Direction.INPUT))
    yield EvalSet("OKTest prompts", "human", pick("over_refusal/oktest", Direction.INPUT))
    yield EvalSet("XSTest safe prompts", "human", pick("over_refusal/xstest", Direction.INPUT))


def balanced(examples: Sequence[Example]) -> list[Example]:
    """As many safe as unsafe texts, in file order."""
    unsafe = [e for e in examples if e.unsafe]
    safe = [e for e in examples if not e.unsafe]
    size = min(len(unsafe), len(safe))
    return unsafe[:size] + safe[:size]


def public_sets(folder: Path, trained: set[str]) -> Iterator[EvalSet]:
    """PKU's own severities and parts of public benchmarks, without prompts trained on."""
    path = folder / "severity_real.jsonl.gz"
    if path.exists():
        rows = [
            Example(r["prompt"], r["response"], "severity_real", not r["safe"], r["severity"])
            for r in read_jsonl(path)
        ]
        yield EvalSet("PKU's own severities", "human", _unseen(rows, trained))
    for path in sorted((folder / "eval_public").glob("*.jsonl.gz")):
        rows = [
            Example(r["prompt"], r["response"], r["source"], bool(r["unsafe"]))
            for r in read_jsonl(path)
        ]
        kind = next(read_jsonl(path)).get("label_kind", "?")
        yield EvalSet(path.name.partition(".")[0], kind, _unseen(rows, trained))


def _unseen(examples: list[Example], trained: set[str]) -> list[Example]:
    return [e for e in examples if normalise(e.prompt) not in trained]


# --- report --------------------------------------------------------------------------------------

COLUMNS = (
    "n", "unsafe", "auroc", "f1", "recall", "fpr", "kappa", "grave_recall", "category_f1", "ece",
)  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row per set."""
    lines = ["| set | labels | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, figures in results.items():
        cells = [_cell(figures, column) for column in COLUMNS]
        lines.append(f"| {name} | {figures['labels']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(figures: dict[str, Any], column: str) -> str:
    value = figures.get(column)
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    if column == "f1":
        return f"{value:.3f} ({figures['f1_low']:.2f}-{figures['f1_high']:.2f})"
    return f"{value:.3f}"


def main(args: Args) -> None:
    moderator = OnnxModerator(args.model, device="cpu", locate=False)
    split = read_examples(args.data, args.split)  # type: ignore[arg-type]
    trained = {normalise(e.prompt) for e in read_examples(args.data, "train")}
    sets = [*held_out_sets(split), *public_sets(args.source, trained)]
    results: dict[str, dict[str, Any]] = {}
    for each in sets:
        if each.examples:
            figures = score(each.examples, decide(moderator, each.examples, each.name))
            results[each.name] = {"labels": each.labels, **figures}
    text = f"# {moderator.id}, {args.split} split\n\n{table(results)}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    if args.record:
        write_manifest(args.model, replace(moderator.manifest, metrics=results))


if __name__ == "__main__":
    main(tyro.cli(Args))
