"""The data card: what there is, who labelled it, whether it leaks, and the traps that are in it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from guardrail.taxonomy import Severity
from training.data import CATEGORIES, SPLITS, Example, normalise, prompt_groups

__all__ = ["report"]

LABELS = ("unsafe", "severity", "categories")
RARE = 100  # training texts below which a category is called rare
ONE_SIDED = 0.95  # share of one label from which a source tells it
# Words with which an answer declines, warns or takes distance, whatever else it says.
_DISCLAIMER = re.compile(
    r"\b(i['’]?m sorry|i apologi[sz]e|i can(no|['’])t|as an ai|it is (not|never) (legal|ethical)|"
    r"illegal|unethical|i (do|would) not (recommend|condone|encourage)|not recommended|"
    r"important to (note|remember)|please (note|seek|consult))",
    re.IGNORECASE,
)


def report(examples: Sequence[Example], removed: Mapping[str, int] | None = None) -> str:
    """Markdown. removed: how many exact and near duplicates `build` took out."""
    lines = ["# Data card", "", f"{len(examples)} examples", ""]
    if removed is not None:
        lines += [
            f"Taken out: {removed['exact']} exact duplicates between sources (those within a file "
            f"go when it is read), {removed['near']} near ones with the same labels.",
            "",
        ]
    lines += _sources(examples)
    lines += ["", "## Labels", "", *_labels(examples)]
    lines += ["", "## Who gave a label", "", *_origins(examples)]
    lines += ["", "## Leaks between splits", "", *_leaks(examples)]
    lines += ["", "## Balance", "", *_balance(examples)]
    lines += ["", "## Traps", "", *_traps(examples)]
    return "\n".join(lines) + "\n"


def origin_of(example: Example, label: str) -> str | None:
    """Who gave a label; whether a text harms follows from its severity where that was given."""
    if getattr(example, label) is None:
        return None
    fallback = example.origin.get("severity") if label == "unsafe" else None
    return example.origin.get(label, fallback or "unknown")


def _direction(example: Example) -> str:
    return "input" if example.response is None else "output"


def _sources(examples: Sequence[Example]) -> list[str]:
    heads = ["source", "direction", *SPLITS, "unsafe", *(f"{label} by" for label in LABELS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    groups: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.source, _direction(example)].append(example)
    for (source, direction), rows in sorted(groups.items()):
        counts = Counter(e.split for e in rows)
        unsafe = sum(e.unsafe is True for e in rows)
        origins = [
            ", ".join(sorted({o for e in rows if (o := origin_of(e, label))})) or "-"
            for label in LABELS
        ]
        cells = [source, direction, *(str(counts[s]) for s in SPLITS), str(unsafe), *origins]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _labels(examples: Sequence[Example]) -> list[str]:
    lines = [f"| label | {' | '.join(SPLITS)} |", "|---|---|---|---|"]

    def row(name: str, rows: Iterable[Example]) -> str:
        counts = Counter(e.split for e in rows)
        return f"| {name} | {' | '.join(str(counts[s]) for s in SPLITS)} |"

    lines += [row(s.label, (e for e in examples if e.severity == s)) for s in Severity]
    lines += [row(c, (e for e in examples if c in (e.categories or ()))) for c in CATEGORIES]
    return lines


def _origins(examples: Sequence[Example]) -> list[str]:
    counts = {label: Counter(origin_of(e, label) or "none" for e in examples) for label in LABELS}
    names = sorted({name for counted in counts.values() for name in counted})
    lines = [f"| label | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for label, counted in counts.items():
        lines.append(f"| {label} | {' | '.join(str(counted[name]) for name in names)} |")
    return lines


def _leaks(examples: Sequence[Example]) -> list[str]:
    """Counted anew from the splits as they are."""
    groups = prompt_groups(examples)
    where: dict[str, dict[object, set[str]]] = {"prompt": {}, "near": {}, "answer": {}}
    for e in examples:
        prompt = normalise(e.prompt)
        where["prompt"].setdefault(prompt, set()).add(e.split)
        where["near"].setdefault(groups[prompt], set()).add(e.split)
        answer = normalise(e.response or "")
        if len(answer) > 60:  # short ones ("I can't help with that") say nothing of a prompt
            where["answer"].setdefault(answer, set()).add(e.split)
    found = {name: sum(len(splits) > 1 for splits in seen.values()) for name, seen in where.items()}
    return [
        f"Prompts in two splits: {found['prompt']}; groups of like prompts in two: "
        f"{found['near']}; answers of more than 60 characters, to other prompts, in two: "
        f"{found['answer']}.",
    ]


def _balance(examples: Sequence[Example]) -> list[str]:
    lines = ["| training texts | n | labelled | harmful of these | largest source |"]
    lines.append("|---|---|---|---|---|")
    for direction in ("input", "output"):
        rows = [e for e in examples if e.split == "train" and _direction(e) == direction]
        known = [e for e in rows if e.unsafe is not None]
        harmful = sum(bool(e.unsafe) for e in known) / max(1, len(known))
        name, most = max(
            Counter(e.source for e in rows).items(), key=lambda i: i[1], default=("-", 0)
        )
        lines.append(
            f"| {direction} | {len(rows)} | {len(known)} | {harmful:.2f} | "
            f"{name} ({most / max(1, len(rows)):.2f}) |"
        )
    return lines


def _traps(examples: Sequence[Example]) -> list[str]:
    train = [e for e in examples if e.split == "train"]
    answers = [e for e in train if e.response is not None and e.unsafe is not None]
    declines = {True: 0, False: 0}
    for e in answers:
        declines[bool(e.unsafe)] += bool(_DISCLAIMER.search(e.response or ""))
    harmless = sum(not e.unsafe for e in answers)
    sounding = sum(e.source.startswith("over_refusal/") for e in train)
    weak = sum(origin_of(e, "severity") == "weak" for e in train)
    on_answers = sum(origin_of(e, "severity") == "weak" for e in train if e.response is not None)
    counts = Counter(name for e in train for name in e.categories or ())
    rare = [f"{name} ({counts[name]})" for name in CATEGORIES if counts[name] < RARE]
    by_source: dict[str, list[bool]] = defaultdict(list)
    for e in answers:
        by_source["/".join(e.source.split("/")[:2])].append(bool(e.unsafe))
    telling = [
        f"{source} ({sum(said) / len(said):.2f} harmful of {len(said)})"
        for source, said in sorted(by_source.items())
        if len(said) >= RARE and max(sum(said), len(said) - sum(said)) >= ONE_SIDED * len(said)
    ]
    return [
        "Of training texts, counted:",
        "",
        f"- **Refusal is not what safe means.** {harmless - declines[False]} harmless answers have "
        f"no word of refusal or warning, {declines[False]} have one; {declines[True]} of "
        f"{len(answers) - harmless} harmful answers have one too.",
        f"- **Harmful-sounding, harmless**: {sounding} prompts of over-refusal sets.",
        f"- **Tags of a prompt are not labels of answers**: {weak} prompts carry weak tags, at a "
        f"lower weight; {on_answers} answers do.",
        f"- **Rare categories** (fewer than {RARE} texts): {', '.join(rare) or 'none'}.",
        f"- **The source tells the label** (at least {ONE_SIDED:.0%} of one): "
        f"{', '.join(telling) or 'none'}. So figures are given per source, and people's labels "
        "count for part of a target only.",
    ]
