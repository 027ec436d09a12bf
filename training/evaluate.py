"""Evaluation of the exported artifact, as the SDK decides: thresholds, calibration, windows.

    python -m training.evaluate --model guardrail/models/small --source ../shared/data
    python -m training.evaluate --docs docs --card docs/model-card.md

Every set is kept out of training (`training.eval_sets`); 95 % intervals by bootstrap over prompts.
Beside the sets: sources and categories apart, disguises, prefixes of answers, reliability, the same
sentences about many groups of people. Writes Markdown, JSON beside it and the manifest's metrics;
`--docs` adds plots, `--card` fills in the model card. Raw scores are kept in `--cache`: a run that
was stopped goes on, and after a new calibration nothing is judged twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from guardrail.artifact import write_manifest
from guardrail.moderator import OnnxModerator
from guardrail.policy import LEVELS
from guardrail.taxonomy import Category, Direction
from training.data import Example, Split, normalise, read_examples, targets
from training.decisions import Decisions, decide
from training.ending import ends_in_a_line
from training.eval_sets import EvalSet, direction_of, held_out_sets, human_labels, public_sets
from training.eval_statements import statement_sets
from training.evaluation_report import fill_card, markdown
from training.everyday_texts import written_sets
from training.identity import by_group, said
from training.metrics import (
    binary_metrics,
    calibration_metrics,
    category_metrics,
    intervals,
    severity_metrics,
)
from training.prefixes import SHARES, caught_by, prefixes
from training.robustness import OBFUSCATIONS, kept, obfuscated, sample
from training.trained import trained_prompts

MIN_TAG = 20  # texts of a source or category below which a row of figures says nothing


@dataclass
class Args:
    model: Path = Path("guardrail/models/small")
    data: Path = Path("build/data")
    source: Path = Path("../shared/data")
    """Folder with the public evaluation sets; left out where there is none."""
    out: Path = Path("build/evaluation.md")
    split: Split = "test"
    record: bool = True
    """Put the figures into the model's manifest."""
    docs: Path | None = None
    """Write `evaluation.md` and `evaluation/` (figures, plots) there."""
    card: Path | None = None
    """Model card whose figures are filled in."""
    cache: Path | None = None
    """Where raw scores are kept: `evaluation_cache` beside `data`, unless said otherwise."""
    hard: int = 300
    """Harmful texts that are disguised, and answers that are cut; a third as many harmless ones."""
    limit: int | None = None
    """At most so many texts of a set: a quick look, whose figures are never recorded."""


def score(each: EvalSet, seen: Decisions) -> dict[str, Any]:
    """Figures that the set's labels allow; `<name>_low`, `<name>_high` bound the main ones."""
    examples = each.examples
    unsafe = np.array([bool(e.unsafe) for e in examples])
    figures = binary_metrics(unsafe, seen.flagged, seen.probabilities[:, 0])
    graded = None
    if unsafe.any() and all(e.severity is not None for e in examples):
        graded = np.array([e.severity for e in examples]), seen.severity
        figures |= severity_metrics(*graded)
        figures["calibration"] = calibration_metrics(
            graded[0], seen.uncalibrated, seen.probabilities, [level.label for level in LEVELS]
        )
    if unsafe.any() and all(e.categories is not None for e in examples):
        names = np.stack([targets(e)[2] for e in examples]) > 0
        both, either = (names & seen.held).sum(), names.sum() + seen.held.sum()
        figures["category_f1"] = 2 * both / max(1, either)
        known = category_metrics(
            names, seen.held, seen.categories, seen.flagged, [c.value for c in Category]
        )
        figures["category_macro_f1"] = np.mean([row["f1"] for row in known.values()])
        figures["categories"] = known
    groups = [normalise(e.prompt) for e in examples]
    if len(set(groups)) == 1:  # small talk before each: the texts themselves are what is drawn
        groups = [normalise(e.response or e.prompt) for e in examples]
    figures |= intervals(figures, groups, unsafe, seen.flagged, seen.probabilities[:, 0], graded)
    if len(set(each.tags)) > 1:
        figures["by_tag"] = _by_tag(each, seen, unsafe)
    return {"labels": each.labels, "kind": each.kind} | _rounded(figures)


def _by_tag(each: EvalSet, seen: Decisions, unsafe: np.ndarray) -> dict[str, dict[str, Any]]:
    tags = np.array([tag.partition("/")[0] for tag in each.tags])
    return {
        tag: binary_metrics(
            unsafe[tags == tag], seen.flagged[tags == tag], seen.probabilities[tags == tag, 0]
        )
        for tag in sorted(set(tags))
        if (tags == tag).sum() >= MIN_TAG
    }


def _rounded(value: Any) -> Any:
    """Four decimals, plain types, and None for what is not a number, all the way down."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, bool | str | int | None):
        return value
    return None if math.isnan(value) else round(float(value), 4)


# --- disguises, prefixes, groups ------------------------------------------------------------------


def robustness(
    moderator: OnnxModerator, examples: Sequence[Example], args: Args
) -> list[dict[str, Any]]:
    """A row per disguise: recall kept on annotated harms, and harmless texts flagged in it."""
    harms = _annotated(examples, unsafe=True, limit=args.hard)
    benign = [e for e in examples if e.source.startswith("benign/")]
    harmless = sample(benign, args.hard // 3)
    if not harms:
        return []
    plain = decide(moderator, harms, "in the open", args.cache).flagged
    rows = []
    for name, how in {"none": None, **OBFUSCATIONS}.items():
        texts, safe = (harms, harmless) if how is None else (
            obfuscated(harms, how), obfuscated(harmless, how)
        )  # fmt: skip
        seen = decide(moderator, [*texts, *safe], name, args.cache)
        row = kept(plain, seen.flagged[: len(harms)], seen.unreadable[: len(harms)])
        if safe:
            row["fpr"] = float(seen.flagged[len(harms) :].mean())
        rows.append({"disguise": name} | row)
    return rows


def prefix_table(
    moderator: OnnxModerator, examples: Sequence[Example], args: Args
) -> dict[str, list[dict[str, Any]]]:
    """Harmful, gravely harmful and harmless answers, cut: what is flagged by then."""
    answers = [e for e in examples if direction_of(e) is Direction.OUTPUT]
    harms = _annotated(answers, unsafe=True, limit=args.hard)
    harmless = sample([e for e in answers if e.source.startswith("benign/")], args.hard // 3)
    if not harms:
        return {}
    texts = [*harms, *harmless]
    flagged = np.stack(
        [
            decide(moderator, prefixes(texts, share), f"first {share:.0%}", args.cache).flagged
            for share in SHARES
        ]
    )
    grave = np.array([(e.severity or 0) >= 2 for e in texts])
    harmful = np.arange(len(texts)) < len(harms)
    parts = {"harmful": harmful, "moderate or severe": grave, "harmless": ~harmful}
    return {name: caught_by(flagged[:, rows]) for name, rows in parts.items() if rows.any()}


def groups_of_people(moderator: OnnxModerator, args: Args) -> list[dict[str, Any]]:
    """The same sentences about many groups of people, by kind of group."""
    rows = said()
    texts = [row.example for row in rows]
    return by_group(rows, decide(moderator, texts, "groups of people", args.cache).flagged)


def _annotated(examples: Sequence[Example], *, unsafe: bool, limit: int) -> list[Example]:
    rows = [e for e in examples if e.is_rated and e.unsafe is unsafe]
    return sample(rows, limit)


# --- command -------------------------------------------------------------------------------------


def evaluate(args: Args) -> dict[str, Any]:
    """Every figure, as one plain value; the manifest and the plots are written on the way."""
    args = replace(args, cache=args.cache or args.data.parent / "evaluation_cache")
    moderator = OnnxModerator(args.model, device="cpu", locate=False)
    split = read_examples(args.data, args.split)
    sets = [
        *held_out_sets(split, human_labels(args.source)),
        *public_sets(args.source, trained_prompts(args.data)),
        *statement_sets(),
        *written_sets(),
    ]
    results: dict[str, dict[str, Any]] = {}
    drawn: dict[str, tuple[EvalSet, Decisions]] = {}
    for each in sets:
        chosen = _cut(each, args.limit)
        if chosen.examples:
            seen = decide(moderator, chosen.examples, chosen.name, args.cache)
            results[chosen.name] = score(chosen, seen)
            drawn[chosen.name] = chosen, seen
    hard = split if args.limit is None else sample(split, 20 * args.limit)
    figures = {
        "model": moderator.id,
        "split": args.split,
        "limit": args.limit,
        "artifact": {
            name: moderator.manifest.metrics[name]
            for name in ("megabytes", "parity", "speed")
            if name in moderator.manifest.metrics
        },
        "sets": results,
        "robustness": _rounded(robustness(moderator, hard, args)),
        "prefixes": _rounded(prefix_table(moderator, hard, args)),
        "groups": _rounded(groups_of_people(moderator, args)),
    }
    if args.record and args.limit is None:
        flat = {name: _flat(row) for name, row in results.items()}
        write_manifest(
            args.model, replace(moderator.manifest, metrics={**moderator.manifest.metrics, **flat})
        )
    if args.docs is not None:
        from training.plots_moderation import draw

        draw(drawn, args.docs / "evaluation")
    return figures


def _cut(each: EvalSet, limit: int | None) -> EvalSet:
    if limit is None:
        return each
    index = sample(range(len(each.examples)), limit)
    examples, tags = [each.examples[i] for i in index], [each.tags[i] for i in index]
    return replace(each, examples=examples, tags=tags)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not isinstance(v, dict)}


def main(args: Args) -> None:
    if args.limit is not None and (args.docs or args.card):
        raise SystemExit("--limit is for a quick look: leave it out to write --docs or --card")
    figures = evaluate(args)
    text = markdown(figures)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    data = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    args.out.with_suffix(".json").write_text(data, encoding="utf-8")
    if args.docs is not None:
        (args.docs / "evaluation.md").write_text(markdown(figures, plots=True), encoding="utf-8")
        (args.docs / "evaluation" / "figures.json").write_text(data, encoding="utf-8")
    if args.card is not None:
        fill_card(args.card, figures)
    print(text)


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("raw scores are kept: the same command goes on from there"):
        main(args)
