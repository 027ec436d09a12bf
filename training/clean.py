"""Label cleaning: which labels are probably wrong, and what is done about it. Nothing is lost:
every change keeps what was given, and who gave it.

    python -m training.clean --soft build/distil build/distil2 --out build/clean

1. Agreement of people's labels and AI annotations, where a text has both.
2. Confident learning (Northcutt et al. 2021). Annotated answers: against a bag-of-words model that,
   fold by fold, has not seen their prompt. Answers that only people labelled: against the mean of
   the teachers' soft labels (`training.label`), none of which was trained on them.
3. People's labels that are probably wrong are withdrawn, and the soft labels stand alone (with no
   soft label the text is left out); annotated labels that are suspect keep their word at a lower
   weight. `suspects.jsonl` lists all of them, most suspect first, for people to look at.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from training.annotation.agreement import cohen_kappa, confusion
from training.annotation.confident import Suspects, label_errors, noise
from training.bag_of_words import out_of_fold
from training.data import Example, read_examples, write_examples
from training.ending import ends_in_a_line
from training.eval_sets import human_labels

Soft = dict[str, list[float]]
Key = tuple[str, str]


@dataclass
class Args:
    data: Path = Path("build/data")
    source: Path = Path("../shared/data")
    """Folder of the labelled data: people's own labels of annotated answers are there."""
    soft: tuple[Path, ...] = (Path("build/distil"),)
    """What `training.label` wrote, a folder per teacher; their mean is the ensemble."""
    out: Path = Path("build/clean")
    folds: int = 5
    weight: float = 0.7
    """Weight in the loss of a text with soft labels."""
    suspect_weight: float = 0.5
    """What is left of the weight of an annotated text whose label is suspect."""
    margin: float = 0.2
    """A label is touched from this gap between what it seems to be and what it says."""
    seed: int = 0


@dataclass
class Found:
    """Suspects of one kind of text: which, what they seem to be, how sure, the estimated noise."""

    name: str
    rows: list[Example]
    given: np.ndarray
    probability: np.ndarray
    suspects: Suspects
    noise: np.ndarray = field(repr=False)


# --- pure parts ----------------------------------------------------------------------------------


def ensemble(labelled: Iterable[Sequence[Example]]) -> dict[Key, Soft]:
    """The mean of the soft labels that several teachers gave a text."""
    opinions: dict[Key, list[Soft]] = defaultdict(list)
    for examples in labelled:
        for example in examples:
            if example.soft is not None:
                opinions[example.key].append(example.soft)
    return {
        key: {
            head: [round(float(p), 4) for p in np.mean([o[head] for o in own], axis=0)]
            for head in own[0]
        }
        for key, own in opinions.items()
    }


def find(name: str, rows: Sequence[Example], given: np.ndarray, probability: np.ndarray) -> Found:
    """given (n,) in {0, 1}; probability (n,) of 1, from a model that has not seen them."""
    two = np.stack([1 - probability, probability], axis=1)
    return Found(name, list(rows), given, probability, label_errors(given, two), noise(given, two))


def cleaned_human(
    rows: Sequence[Example], found: Found | None, soft: dict[Key, Soft], args: Args
) -> list[Example]:
    """Rows that people alone labelled: with the ensemble's opinion, and without a label that is
    probably wrong. `origin` says what was given."""
    wrong, teachers = _touched(found, args.margin), len(args.soft)
    cleaned = []
    for row in rows:
        opinion = soft.get(row.key)
        origin = dict(row.origin)
        if opinion is not None:
            origin["soft"] = "teacher" if teachers == 1 else f"{teachers} teachers"
        unsafe = row.unsafe
        if row.key in wrong:
            who = origin.pop("unsafe", "unknown")
            origin["withdrawn"] = f"{who}: {'harmful' if row.unsafe else 'harmless'}"
            unsafe = None
        if unsafe is None and opinion is None:
            continue
        weight = row.weight if opinion is None else args.weight
        cleaned.append(replace(row, unsafe=unsafe, soft=opinion, origin=origin, weight=weight))
    return cleaned


def cleaned_annotated(
    rows: Sequence[Example], found: Found | None, weight: float, margin: float
) -> list[Example]:
    """Annotated rows as they were, those that are suspect at a lower weight."""
    wrong = _touched(found, margin)
    return [
        replace(row, weight=row.weight * weight, origin={**row.origin, "suspect": "out of fold"})
        if row.key in wrong
        else row
        for row in rows
    ]


def _touched(found: Found | None, margin: float) -> set[Key]:
    if found is None:
        return set()
    keep = found.suspects.margin >= margin
    return {found.rows[i].key for i in found.suspects.index[keep]}


def listing(found: Found) -> list[dict[str, Any]]:
    """The suspects, most suspect first, as plain rows."""
    words = ("harmless", "harmful")
    return [
        {
            "kind": found.name,
            "source": found.rows[i].source,
            "given": words[found.given[i]],
            "seems": words[seems],
            "margin": round(float(margin), 4),
            "prompt": found.rows[i].prompt,
            "response": found.rows[i].response,
        }
        for i, seems, margin in zip(
            found.suspects.index, found.suspects.suggested, found.suspects.margin, strict=True
        )
    ]


# --- report --------------------------------------------------------------------------------------


def agreement_table(rows: Sequence[tuple[str, bool, bool]]) -> list[str]:
    """rows: source, harmful by people, harmful by annotation."""
    if not rows:
        return ["No text has both."]
    lines = ["| source | n | agree | kappa | people harmful, AI harmless | the other way |"]
    lines.append("|---|---|---|---|---|---|")
    by_source: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for source, people, annotated in rows:
        for name in (source, "all"):
            by_source[name].append((people, annotated))
    for name, pairs in sorted(by_source.items(), key=lambda item: (item[0] == "all", item[0])):
        people_, annotated_ = np.array(pairs, int).T
        counts = confusion(people_, annotated_, 2)
        # with one word on one side there is no agreement beyond chance to speak of
        varied = len(set(people_)) > 1 and len(set(annotated_)) > 1
        kappa = f"{cohen_kappa(counts):.3f}" if varied else "-"
        agree = np.trace(counts) / counts.sum()
        rates = (counts[1, 0] / max(1, counts[1].sum()), counts[0, 1] / max(1, counts[0].sum()))
        cells = [name, str(len(pairs)), f"{agree:.3f}", kappa, *(f"{rate:.3f}" for rate in rates)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def suspects_table(all_found: Sequence[Found], margin: float) -> list[str]:
    lines = ["| texts | n | suspect | touched | labelled harmful, are not | the other way |"]
    lines.append("|---|---|---|---|---|---|")
    for found in all_found:
        share = found.noise / np.maximum(1e-12, found.noise.sum(axis=1, keepdims=True))
        touched = int((found.suspects.margin >= margin).sum())
        cells = [found.name, str(len(found.rows)), str(len(found.suspects.index)), str(touched)]
        lines.append(f"| {' | '.join(cells)} | {share[1, 0]:.3f} | {share[0, 1]:.3f} |")
    return lines


def sources_table(found: Found, margin: float) -> list[str]:
    """Per source and label given: how many there are, and how many were touched."""
    wrong = {found.rows[i].key for i in found.suspects.index[found.suspects.margin >= margin]}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row, given in zip(found.rows, found.given, strict=True):
        word = "harmful" if given else "harmless"
        for name in (row.source, "all"):
            counts[name][word] += 1
            counts[name][f"{word}, touched"] += row.key in wrong
    columns = ("harmful", "harmful, touched", "harmless", "harmless, touched")
    lines = [f"| source | labelled {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for name, own in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        lines.append(f"| {' | '.join([name, *(str(own[c]) for c in columns)])} |")
    return lines


# --- command -------------------------------------------------------------------------------------


def main(args: Args) -> None:
    train = read_examples(args.data, "train")
    annotated = [e for e in train if e.source.startswith("annotated/") and e.response is not None]
    human = [e for e in train if e.source.startswith(("responses/", "pku/"))]
    people = human_labels(args.source)
    both = [
        (e.source.partition("/")[2].partition("/")[0], people[e.key], bool(e.unsafe))
        for e in annotated
        if e.key in people
    ]
    soft = ensemble(read_examples(folder, "train") for folder in args.soft)
    all_found: dict[str, Found] = {}
    if len({bool(e.unsafe) for e in annotated}) == 2:
        given = np.array([int(bool(e.unsafe)) for e in annotated])
        print(f"{len(annotated)} annotated answers, {args.folds} folds", flush=True)
        texts = [(e.prompt, e.response) for e in annotated]
        probability = out_of_fold(texts, given[:, None], folds=args.folds, seed=args.seed)[:, 0]
        all_found["annotated"] = find("annotated answers", annotated, given, probability)
    judged = [e for e in human if e.key in soft and e.unsafe is not None]
    if judged:
        given = np.array([int(bool(e.unsafe)) for e in judged])
        opinion = np.array([soft[e.key]["severity"][0] for e in judged])
        all_found["human"] = find("answers labelled by people", judged, given, opinion)
    done = {id(e) for e in (*annotated, *human)}
    rest = [e for e in train if id(e) not in done]
    result = [
        *cleaned_annotated(annotated, all_found.get("annotated"), args.suspect_weight, args.margin),
        *cleaned_human(human, all_found.get("human"), soft, args),
        *cleaned_human(rest, None, soft, args),
    ]
    _write(args, result, all_found.values())
    text = _report(args, both, list(all_found.values()), len(train), result)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(text)


def _write(args: Args, result: list[Example], found: Iterable[Found]) -> None:
    """`train.jsonl` last: a folder that has it is whole."""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.jsonl").unlink(missing_ok=True)
    for split in ("validation", "test"):
        shutil.copy(args.data / f"{split}.jsonl", args.out / f"{split}.jsonl")
    with (args.out / "suspects.jsonl").open("w", encoding="utf-8") as file:
        for row in sorted((r for f in found for r in listing(f)), key=lambda r: -r["margin"]):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_examples(args.out / "train.partial", result)
    (args.out / "train.partial").replace(args.out / "train.jsonl")


def _report(
    args: Args,
    both: Sequence[tuple[str, bool, bool]],
    found: Sequence[Found],
    before: int,
    result: Sequence[Example],
) -> str:
    withdrawn = sum("withdrawn" in e.origin for e in result)
    suspect = sum("suspect" in e.origin for e in result)
    lines = ["# Label cleaning", "", f"`{json.dumps(asdict(args), default=str)}`", ""]
    lines += ["## People and AI annotators on the same answers", "", *agreement_table(both), ""]
    lines += ["## Confident learning", "", *suspects_table(found, args.margin), ""]
    for one in found:
        lines += [f"## {one.name}, touched by source", "", *sources_table(one, args.margin), ""]
    lines += [
        f"{before} texts before, {len(result)} after: {withdrawn} labels of people withdrawn in "
        f"favour of soft ones, {suspect} annotated texts at a lower weight, "
        f"{before - len(result)} left out for having no label at all.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
