"""Calibration of an exported artifact: probabilities that mean what they say, and thresholds.

    python -m training.calibrate --model guardrail/models/small --data build/data

On the validation split, per direction: a scaling per severity level and per category, chosen by
cross-validated log-loss (`training.scaling`), then the thresholds. `minor` maximises F1 among
thresholds that flag at most a target share of the benign texts: the mean of F1 against the
annotation and against people's own labels of answers, where `--source` has any, or the labels of
prompts written for it (`training.eval_statements`), since few prompts are annotated, and none of
them is an insult. `moderate` and `severe` maximise quadratic kappa; categories take one shared
threshold, or each its own for a target rate of false positives, whichever names categories better
across folds. Writes the manifest; a report gets the comparison, the thresholds' intervals, and
what it costs to promise that at most alpha of the harms pass (risk control).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from guardrail.artifact import Calibration, write_manifest
from guardrail.calibration import (
    Scale,
    expected_calibration_error,
    expected_error_by_chance,
    fit_platt,
    threshold_for_rate,
)
from guardrail.moderator import OnnxModerator, calibrated
from guardrail.policy import LEVELS
from guardrail.taxonomy import Category, Direction
from guardrail.verdict import Pair
from training.data import Example, read_examples, targets
from training.ending import ends_in_a_line
from training.eval_sets import direction_of, held_out_sets, human_labels
from training.eval_statements import statements_held_out
from training.everyday_texts import everyday_texts
from training.scaling import Choice, choose
from training.scoring import text_logits
from training.thresholds import category_thresholds, fit_categories, fit_levels, risk_control

CLEARLY = 0.02  # share of log-loss from which isotonic regression would be worth a new format


@dataclass
class Args:
    model: Path = Path("guardrail/models/small")
    data: Path = Path("build/data")
    source: Path = Path("../shared/data")
    """Folder of the labelled data, for what people said of annotated answers."""
    everyday: tuple[Path, ...] = ()
    """`turns.jsonl` of `training.everyday`, `training/harmless_turns.jsonl`: their held-out third
    counts as benign."""
    target_fpr: float = 0.01
    """Benign answers that may be flagged, as a share."""
    target_fpr_input: float = 0.035
    """The same for prompts, where many benign ones are over-refusal questions, hard on purpose."""
    slack_input: float = 0.02
    """F1 on prompts, of which few are annotated, that counts as level with the best: the threshold
    is in the middle of those."""
    few: int = 25
    """Categories with fewer positives share one scaling, and one threshold."""
    delta: float = 0.1
    """Chance that a promise of risk control fails; one minus its confidence."""
    report: Path | None = None
    """The comparison in Markdown, its figures beside it as JSON: `calibration.md` beside `data`."""


@dataclass(frozen=True)
class Scored:
    """Validation texts of one direction: annotated ones, benign ones, others of which only
    harmful or not is known, and the raw logits of all of them, in this order."""

    annotated: list[Example]
    benign: list[Example]
    others: list[Example]
    severity: np.ndarray
    categories: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        return np.array([e.severity for e in self.annotated])

    @property
    def names(self) -> np.ndarray:
        return np.stack([targets(e)[2] for e in self.annotated])


# --- scalings ------------------------------------------------------------------------------------


def fit_calibration(
    rows: Scored, other: Scored | None, few: int
) -> tuple[Calibration, dict[str, Choice]]:
    """The scalings of one direction and how each was chosen. Severity levels lean on the other
    direction's, categories on a fit over all of them."""
    n = len(rows.annotated)
    prompts = [e.prompt for e in rows.annotated]
    severity, categories, names = rows.severity[:n], rows.categories[:n], rows.names
    choices: dict[str, Choice] = {}
    scales: list[Scale] = []
    for k, level in enumerate(LEVELS):
        truth = (rows.levels > k).astype(float)
        prior = (1.0, 0.0)
        if other is not None and len(other.annotated):
            prior = fit_platt(other.severity[: len(other.annotated), k], other.levels > k)
        if truth.sum() in (0, n):
            scales.append(prior)
            continue
        choices[level.label] = choose(severity[:, k], truth, prompts, prior)
        scales.append(choices[level.label].scale)
    pooled = fit_platt(categories.ravel(), names.ravel())
    own = [pooled] * len(Category)
    for c, category in enumerate(Category):
        if few <= names[:, c].sum() < n:
            choices[category.value] = choose(
                categories[:, c], names[:, c], prompts, pooled, near=True
            )
            own[c] = choices[category.value].scale
    return Calibration(scales, own), choices


# --- report --------------------------------------------------------------------------------------


def markdown(report: dict[str, Any], delta: float) -> str:
    lines = [f"# Calibration of {report['model']}", ""]
    lines += ["Validation split and statements held out; nothing else was seen."]
    for direction in [d.value for d in Direction if d.value in report]:
        part = report[direction]
        lines += [
            "", f"## {direction}: {part['annotated']} annotated, {part['benign']} benign, "
            f"{part['others']} others for the threshold", "",
            "| head | scaling | log-loss off | on | isotonic | ECE off | on | by chance |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for head, row in part["heads"].items():
            losses = row["losses"]
            first = losses.get("none", losses.get("pooled"))
            cells = [first, losses[row["chosen"]], losses["isotonic"]]
            cells += [row.get(k) for k in ("ece_before", "ece_after", "ece_by_chance")]
            text = " | ".join("-" if x is None else f"{x:.4f}" for x in cells)
            lines.append(f"| {head} | {row['chosen']} | {text} |")
        lines += [
            "",
            f"{_isotonic(part['heads'])} For a category, `off` is one fit over all.",
            "",
        ]
        lines += ["| threshold | value | 95 % interval | rate | its interval | n |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {t['value']:.3f} | {t['low']:.3f}-{t['high']:.3f} | {t['rate']:.4f} "
            f"| {t['rate_low']:.4f}-{t['rate_high']:.4f} | {t['n']} |"
            for name, t in part["for_target_fpr"].items()
        ]
        ways = ", ".join(f"{way} {f1:.4f}" for way, f1 in part["category_ways"].items())
        lines += ["", f"Micro F1 of categories on unseen folds, by thresholds: {ways}.", ""]
        lines += [f"Of such harms at most alpha pass, with confidence {1 - delta:g}:", ""]
        lines += ["| harm | alpha | n | threshold | pass | bound | harmless flagged | benign |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_promise(row) for row in part["risk_control"]]
    return "\n".join(lines) + "\n"


def _isotonic(heads: dict[str, Any]) -> str:
    clearly = [
        name
        for name, row in heads.items()
        if row["losses"]["isotonic"] < (1 - CLEARLY) * row["losses"][row["chosen"]]
    ]
    if not clearly:
        return "Isotonic regression, which the artifact cannot hold, is clearly better nowhere."
    return f"Isotonic regression, which the artifact cannot hold, is better for {clearly}."


def _promise(row: dict[str, Any]) -> str:
    worse = "" if row["harm"] == "severe" else " or worse"
    head = f"| {row['harm']}{worse} | {row['alpha']:g} | {row['n']} |"
    if "needed" in row:
        return f"{head} needs {row['needed']} | - | - | - | - |"
    names = ("threshold", "passed", "bound", "harmless_flagged", "benign_flagged")
    cells = ("-" if row[k] is None else f"{row[k]:.4f}" for k in names)
    return f"{head} {' | '.join(cells)} |"


def _head(
    choice: Choice, before: np.ndarray, after: np.ndarray, truth: np.ndarray
) -> dict[str, Any]:
    return {
        "chosen": choice.name,
        "losses": choice.losses,
        "ece_before": expected_calibration_error(before, truth),
        "ece_after": expected_calibration_error(after, truth),
        "ece_by_chance": expected_error_by_chance(after),
    }


# --- command -------------------------------------------------------------------------------------


_BENIGN = ("benign/", "over_refusal/", "everyday", "written")


def _is_benign(example: Example) -> bool:
    return example.severity == 0 and example.source.startswith(_BENIGN)


def _scored(
    moderator: OnnxModerator, rows: Sequence[Example], others: list[Example], label: str
) -> Scored:
    annotated = [e for e in rows if e.is_rated]
    benign = [e for e in rows if _is_benign(e) and e.origin.get("severity")]
    pairs = [Pair(e.prompt, e.response) for e in [*annotated, *benign, *others]]
    severity, categories = text_logits(moderator, pairs, label=label)
    return Scored(annotated, benign, others, severity, categories)


def calibrate(
    rows: Scored, other: Scored | None, target_fpr: float, args: Args
) -> tuple[Calibration, dict[str, Any], dict[str, Any]]:
    """One direction: its scalings, its thresholds as the manifest has them, and the report."""
    n, truth, names = len(rows.annotated), rows.levels, rows.names
    last = n + len(rows.benign)
    fitted, choices = fit_calibration(rows, other, args.few)
    severity, categories = calibrated(rows.severity, rows.categories, fitted)
    raw, _ = calibrated(rows.severity, rows.categories, Calibration())
    is_input = rows.annotated[0].response is None
    slack = args.slack_input if is_input else 0.0
    benign = severity[n:last, 0]
    said = np.array([bool(e.unsafe) for e in rows.others])
    others = [(severity[last:, 0], said)] if said.any() else []
    levels = fit_levels(severity[:n], truth, benign, target_fpr, slack, others)
    flagged = severity[:n, 0] >= levels["minor"]
    own, ways = fit_categories(
        categories[:n], names, flagged, [e.prompt for e in rows.annotated], args.few
    )
    for_target = {
        f"{category.value}": found
        for category, found in zip(
            Category,
            category_thresholds(categories[:n], names, flagged, target_fpr, args.few),
            strict=True,
        )
        if found is not None
    }
    if len(rows.benign):
        for_target = {"minor": threshold_for_rate(benign, target_fpr), **for_target}
    thresholds = {
        "severity": {label: round(value, 3) for label, value in levels.items()},
        "categories": {c.value: round(float(t), 3) for c, t in zip(Category, own, strict=True)},
    }
    heads = {
        level.label: _head(choices[level.label], raw[:n, k], severity[:n, k], truth > k)
        for k, level in enumerate(LEVELS)
        if level.label in choices
    }
    heads |= {
        name: {"chosen": choice.name, "losses": choice.losses}
        for name, choice in choices.items()
        if name not in heads
    }
    report = {
        "annotated": n,
        "benign": len(rows.benign),
        "others": len(rows.others),
        "heads": heads,
        "thresholds": thresholds,
        "target_fpr": target_fpr,
        "for_target_fpr": {
            name: {slot: getattr(t, slot) for slot in t.__slots__} for name, t in for_target.items()
        },
        "category_ways": ways,
        "risk_control": risk_control(severity[:n], truth, benign, args.delta),
    }
    return fitted, thresholds, report


def main(args: Args) -> None:
    for name in ("target_fpr", "target_fpr_input", "delta"):
        if not 0 <= (value := getattr(args, name)) <= 1:
            option = f"--{name.replace('_', '-')}"
            raise SystemExit(f"{option} is {value}: it has to be from 0 to 1")
    moderator = OnnxModerator(args.model, device="cpu", locate=False)
    examples = read_examples(args.data, "validation")
    examples += everyday_texts(args.everyday, held_out=True)
    sets = held_out_sets(examples, human_labels(args.source))
    others = [example for each in sets if each.kind == "human" for example in each.examples]
    others += statements_held_out()
    scored = {
        direction: _scored(
            moderator,
            [e for e in examples if direction_of(e) is direction],
            [e for e in others if direction_of(e) is direction],
            direction.value,
        )
        for direction in Direction
    }
    calibration: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}
    report: dict[str, Any] = {"model": moderator.id}
    for direction, rows in scored.items():
        if not rows.annotated:
            print(f"{direction.value}: no annotated validation texts, left uncalibrated")
            continue
        other = scored[Direction.OUTPUT if direction is Direction.INPUT else Direction.INPUT]
        is_input = direction is Direction.INPUT
        target_fpr = args.target_fpr_input if is_input else args.target_fpr
        fitted, found, part = calibrate(rows, other, target_fpr, args)
        thresholds[direction.value], report[direction.value] = found, part
        calibration[direction.value] = {
            "severity": [[round(x, 4) for x in pair] for pair in fitted.severity],
            "categories": [[round(x, 4) for x in pair] for pair in fitted.categories],
        }
        print(
            f"{direction.value}: {part['annotated']} annotated, {part['benign']} benign, "
            f"{part['others']} others: {found['severity']}"
        )
    path = args.report or args.data.parent / "calibration.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(report, args.delta), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    write_manifest(
        args.model,
        replace(moderator.manifest, calibration=calibration, thresholds=thresholds),
    )


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("the manifest is as it was: the same command starts anew"):
        main(args)
