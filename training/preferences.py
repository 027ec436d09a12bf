"""Preferences: two answers to one prompt, with *more helpful* and *less harmful* asked apart.

    python -m training.preferences build --source ../shared/data --data build/data
    python -m training.preferences build --source PKU-Alignment/PKU-SafeRLHF --data build/pku
    python -m training.preferences report

Every source becomes a `Preference`, or a `Demonstration` for supervised fine-tuning, and gets the
split that `training.data` gave its prompt, or prompts nearly like it: what the moderator and the
judges are tested on is trained on by nobody.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

import tyro

from training.data import (
    SPLITS,
    Example,
    Split,
    assign_splits,
    near_duplicate_groups,
    normalise,
    read_examples,
    read_jsonl,
)
from training.ending import ends_in_a_line
from training.preference_rows import (
    KINDS,
    Demonstration,
    Kind,
    Preference,
    demonstration,
    from_annotated,
    from_built,
    from_chosen,
    from_pku,
    is_text,
    merge,
    refuses,
)
from training.rows import each, published

Row = TypeVar("Row", Preference, Demonstration)

__all__ = [
    "Demonstration",
    "Kind",
    "Preference",
    "build",
    "help_pairs",
    "load_demonstrations",
    "load_pairs",
    "read_demonstrations",
    "read_pairs",
    "read_preferences",
    "read_shown",
    "refuse_flipped",
    "refuses",
    "split_map",
    "write_rows",
]

# --- sources -------------------------------------------------------------------------------------


_PAIR_FILES: dict[str, Callable[[dict[str, Any]], Preference | None]] = {
    "annotated_pairs": from_annotated,
    "preferences": from_chosen,
    "hh_harmless_pairs": from_chosen,
}


def load_pairs(source: str) -> list[Preference]:
    """All preferences of a local data folder, or of PKU-SafeRLHF by hub name. The first of two
    rows on the same answers wins, what it does not know is taken from the second."""
    folder = Path(source)
    if folder.is_dir():
        rows = [
            preference
            for name, convert in _PAIR_FILES.items()
            for preference in _converted(_file(folder, name), convert)
        ]
    else:
        rows = list(each(source, published(source), from_pku))
    return merge(rows)


def _file(folder: Path, name: str) -> Path:
    for suffix in (".jsonl.gz", ".jsonl"):
        if (path := folder / f"{name}{suffix}").exists():
            return path
    raise SystemExit(f"{folder}/{name}.jsonl.gz is missing: --source names the folder of the data")


def _converted(
    path: Path, convert: Callable[[dict[str, Any]], Preference | None]
) -> Iterator[Preference]:
    return each(path, read_jsonl(path), convert)


# Weak models of AlpacaEval, and sets of answers with tags or role play inside, teach bad habits.
_GOOD_BENIGN = ("Meta-Llama-3", "gpt-3.5", "claude", "Mistral", "tulu", "text_davinci", "dolly")
_GOOD_SAFE = ("jincan_bt_train", "spard_bt", "pku_dpo_5k", "spard_latharmful", "pku_safe_sft")
_GOOD_SAFE += ("spard_refusal", "pku_v1_sft_safety")


def load_demonstrations(folder: Path, pairs: Sequence[Preference]) -> list[Demonstration]:
    """Answers to imitate: those that annotators and people found harmless, and benign ones that
    comply."""
    responses = list(
        _answers(folder, "annotated_responses", severity=(int,), human_safe=(bool, NoneType))
    )
    harmful = {normalise(r["prompt"]) for r in responses if r["severity"] > 0}
    harmful |= {normalise(p.prompt) for p in pairs if True in p.unsafe}
    found: list[Demonstration] = []
    for row in responses:
        if row["severity"] > 0 or row["human_safe"] is False or row["source"] not in _GOOD_SAFE:
            continue
        kind: Kind = "redirect" if normalise(row["prompt"]) in harmful else "borderline"
        if refuses(row["response"]):
            kind = "refusal"
        found.append(Demonstration(row["prompt"], row["response"], kind, row["source"]))
    found += [
        Demonstration(row["prompt"], row["response"], "benign", row["source"])
        for row in _answers(folder, "benign")
        if any(name in row["source"] for name in _GOOD_BENIGN) and not refuses(row["response"])
    ]
    return list({(normalise(d.prompt), normalise(d.answer)): d for d in found}.values())


def _answers(folder: Path, name: str, **more: tuple[type, ...]) -> Iterator[dict[str, Any]]:
    """Rows of a file of answered prompts; more: further fields that they need, and their types."""
    fields = {"prompt": (str,), "response": (str,), "source": (str,)} | more

    def checked(row: dict[str, Any]) -> dict[str, Any] | None:
        for field, types in fields.items():
            if type(row[field]) not in types:
                wanted = " or ".join(one.__name__ for one in types)
                raise TypeError(f"{field} is {row[field]!r}, not a {wanted}")
        return row if is_text(row["prompt"]) and is_text(row["response"]) else None

    path = _file(folder, name)
    return each(path, read_jsonl(path), checked)


def help_pairs(
    demonstrations: Sequence[Demonstration],
    count: int,
    seed: int,
    *,
    other: Literal["refusal", "any"],
) -> list[Preference]:
    """Help that harmless prompts got, preferred to what is wrong there: a refusal, or (half of
    `any`) the answer to another prompt. Both are safe; what is taken from elsewhere is of the same
    split, since the demonstrations are."""
    rng = random.Random(seed)
    asked = [d for d in demonstrations if d.kind in ("benign", "borderline")]
    refusals = [d.answer for d in demonstrations if d.kind == "refusal"]
    if not asked or not refusals:
        return []
    pairs = []
    for number, d in enumerate(rng.sample(asked, min(count, len(asked)))):
        foreign = other == "any" and number % 2 == 1
        wrong = rng.choice(asked).answer if foreign else rng.choice(refusals)
        if normalise(wrong) != normalise(d.answer):
            pairs.append(
                Preference(
                    prompt=d.prompt,
                    answers=(d.answer, wrong),
                    source="help/foreign" if foreign else "help/refusal",
                    more_helpful=0,
                    severity=(0, 0),
                    unsafe=(False, False),
                    split=d.split,
                )
            )
    return pairs


def refuse_flipped(preferences: Sequence[Preference]) -> None:
    """SystemExit where the less harmful answer is mostly the unsafe one: flipped labels would
    train a model that prefers harm."""
    decided = [p for p in preferences if p.less_harmful is not None and p.safer is not None]
    flipped = sum(p.less_harmful != p.safer for p in decided)
    if len(decided) >= 10 and flipped > 0.5 * len(decided):
        raise SystemExit(
            f"in {flipped} of {len(decided)} pairs the answer called less harmful is the unsafe "
            "one: the labels are flipped; less_harmful is the index of the safer answer"
        )


# --- splits --------------------------------------------------------------------------------------


def split_map(known: dict[str, Split], prompts: Iterable[str]) -> dict[str, Split]:
    """The split of each normalised prompt: its own where it is known; else the most held out of
    the known prompts that are nearly the same; else by `training.data`'s hash of the group."""
    every = sorted(known.keys() | set(prompts))
    members: dict[int, list[str]] = defaultdict(list)
    for prompt, group in zip(every, near_duplicate_groups(every), strict=True):
        members[group].append(prompt)
    result = dict(known)
    for group in members.values():
        there = [known[prompt] for prompt in group if prompt in known]
        split = max(there, key=SPLITS.index) if there else hash_split(group[0])
        result |= {prompt: split for prompt in group if prompt not in known}
    return result


def hash_split(prompt: str) -> Split:
    """What `training.data` would give a prompt without any like it."""
    return assign_splits([Example(prompt=prompt, response=None, source="")])[0].split


def with_splits(rows: Sequence[Row], splits: dict[str, Split]) -> list[Row]:
    return [replace(row, split=splits[normalise(row.prompt)]) for row in rows]


# --- files ---------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Preference | Demonstration]) -> None:
    """A line of JSON per row; a kill leaves no file that would pass for a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def _built(folder: Path, name: str, splits: Iterable[Split]) -> Iterator[Path]:
    for split in splits:
        path = folder / f"{name}.{split}.jsonl"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: python -m training.preferences build")
        yield path


def read_pairs(path: Path) -> list[Preference]:
    """A file of preferences: a JSON object with the fields of `Preference` per line. SystemExit
    where it is missing, or names the line that is none."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: a file of preferences, such as training.on_policy's")
    return list(each(path, read_jsonl(path), from_built))


def read_preferences(folder: Path, *splits: Split) -> list[Preference]:
    """What `build` wrote, of the given splits."""
    return [p for path in _built(folder, "pairs", splits) for p in read_pairs(path)]


def read_demonstrations(folder: Path, *splits: Split) -> list[Demonstration]:
    """What `build` wrote, of the given splits. SystemExit names the line that is none."""
    paths = _built(folder, "demonstrations", splits)
    return [d for path in paths for d in read_shown(path)]


def read_shown(path: Path) -> list[Demonstration]:
    """A file of demonstrations: a JSON object with the fields of `Demonstration` per line.
    SystemExit where it is missing, or names the line that is none."""
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: a file of demonstrations: python -m training.everyday"
        )
    return list(each(path, read_jsonl(path), demonstration))


def report_of(pairs: Sequence[Preference], demonstrations: Sequence[Demonstration]) -> str:
    """Counts per source and split (Markdown): pairs that decide which answer is more helpful,
    which is less harmful, both, and both the other way round."""
    head = ("source", "split", "pairs", "helpful", "harmless", "both", "conflicting")
    lines = ["# Preferences", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups: dict[tuple[str, str], list[Preference]] = defaultdict(list)
    for p in pairs:
        groups[p.source, p.split].append(p)
    for (source, split), rows in sorted(groups.items()):
        counts = (
            len(rows),
            sum(p.more_helpful is not None for p in rows),
            sum(p.less_harmful is not None for p in rows),
            sum(None not in (p.more_helpful, p.less_harmful) for p in rows),
            sum(p.conflicting for p in rows),
        )
        lines.append(f"| {source} | {split} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| demonstrations | " + " | ".join(SPLITS) + " |", "|---|---|---|---|"]
    kinds = Counter((d.kind, d.split) for d in demonstrations)
    for kind in KINDS:
        lines.append(f"| {kind} | " + " | ".join(str(kinds[kind, s]) for s in SPLITS) + " |")
    return "\n".join(lines) + "\n"


# --- commands ------------------------------------------------------------------------------------


def build(
    source: str = "../shared/data",
    data: Path = Path("build/data"),
    out: Path = Path("build/preferences"),
) -> None:
    """Write `pairs.SPLIT.jsonl`, `demonstrations.SPLIT.jsonl` and `card.md` under `out`."""
    pairs = load_pairs(source)
    folder = Path(source)
    demonstrations = load_demonstrations(folder, pairs) if folder.is_dir() else []
    known = {normalise(e.prompt): e.split for e in read_examples(data, *SPLITS)}
    splits = split_map(known, [normalise(row.prompt) for row in (*pairs, *demonstrations)])
    pairs, demonstrations = with_splits(pairs, splits), with_splits(demonstrations, splits)
    for split in SPLITS:
        write_rows(out / f"pairs.{split}.jsonl", (p for p in pairs if p.split == split))
        shown = (d for d in demonstrations if d.split == split)
        write_rows(out / f"demonstrations.{split}.jsonl", shown)
    (out / "card.md").write_text(report_of(pairs, demonstrations), encoding="utf-8")
    print(f"{out}: {len(pairs)} pairs, {len(demonstrations)} demonstrations")


def report(out: Path = Path("build/preferences")) -> None:
    """Print the counts of what `build` wrote."""
    print(report_of(read_preferences(out, *SPLITS), read_demonstrations(out, *SPLITS)))


if __name__ == "__main__":
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        tyro.extras.subcommand_cli_from_dict({"build": build, "report": report})
