"""Data: every source through one schema, with provenance per label and splits that do not leak.

    python -m training.data build --source ../shared/data --out build/data
    python -m training.data build --source PKU-Alignment/PKU-SafeRLHF --out build/pku
    python -m training.data report --out build/data

A label that a source lacks stays None and is masked in the loss; it is never guessed. Of texts
that are the same, or nearly (word sets with Jaccard >= 0.9) with the same labels, the most trusted
stays. Prompts that are the same, or nearly (0.8), share a split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from guardrail.taxonomy import Category
from training.duplicates import near_duplicate_groups
from training.ending import ends_in_a_line
from training.rows import checked, each

CATEGORIES = [category.value for category in Category]
_INDEX = {name: index for index, name in enumerate(CATEGORIES)}
_WORD_SEVERITY = {"none": 0, "minor": 1, "moderate": 2, "severe": 3}
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One text with the labels that its source has.

    response: None for a prompt alone (direction input).
    unsafe: whether it harms at all; severity: 0-3; categories: names, [] for a harmless text.
    origin: per label, who gave it: human, ai (AI annotators), derived, proxy, teacher.
    soft: a teacher's probabilities, {"severity": [P(>=1), P(>=2), P(>=3)], "categories": [19]}.
    """

    prompt: str
    response: str | None
    source: str
    unsafe: bool | None = None
    severity: int | None = None
    categories: list[str] | None = None
    origin: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    split: Split = "train"
    soft: dict[str, list[float]] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Exact duplicates have the same key."""
        return normalise(self.prompt), "\0" if self.response is None else normalise(self.response)

    @property
    def is_rated(self) -> bool:
        """Whether its severity and categories were judged, by the rubric or by PKU's people,
        rather than follow from where it comes from."""
        judged = self.severity is not None and self.categories is not None
        return judged and self.source.startswith(("annotated/", "pku/"))


def normalise(text: str) -> str:
    """NFKC, lower case, word characters only: what makes two prompts the same prompt."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def targets(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training targets: severity (3,) as P(>= minor, moderate, severe), its mask, categories (19,),
    their mask. Unknown labels have mask 0."""
    severity, severity_mask = np.zeros(3, np.float32), np.zeros(3, np.float32)
    if example.severity is not None:
        severity[: example.severity] = 1
        severity_mask[:] = 1
    elif example.unsafe is not None:
        severity[0] = example.unsafe
        severity_mask[:] = 1 if not example.unsafe else (1, 0, 0)
    categories, category_mask = np.zeros(19, np.float32), np.zeros(19, np.float32)
    if example.categories is not None:
        categories[[_INDEX[name] for name in example.categories]] = 1
        category_mask[:] = 1
    elif example.unsafe is False:
        category_mask[:] = 1
    return severity, severity_mask, categories, category_mask


# --- sources -------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file; a malformed line is an error that names it."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise SystemExit(f"{path}:{number}: not JSON: {error}") from error
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise SystemExit(f"{path}: damaged, or no text in UTF-8: {error}") from error


def _annotated(row: dict[str, Any]) -> Example:
    return Example(
        prompt=row["prompt"],
        response=row.get("response"),
        source=f"annotated/{row['source']}",
        unsafe=row["severity"] > 0,
        severity=row["severity"],
        categories=row["categories"],
        origin={"severity": row["label_source"], "categories": row["label_source"]},
    )


def benign_answer(row: dict[str, Any]) -> Example:
    """A row of `benign.jsonl.gz`."""
    return Example(
        prompt=row["prompt"],
        response=row["response"],
        source=f"benign/{row['source']}",
        unsafe=False,
        severity=0,
        categories=[],
        origin={"severity": "derived", "categories": "derived"},
    )


def _benign_prompt(row: dict[str, Any]) -> Example:
    return replace(benign_answer(row), response=None)


def _over_refusal(row: dict[str, Any]) -> Example:
    return replace(
        benign_answer({**row, "response": None}),
        source=f"over_refusal/{row['source']}",
        origin={"severity": "human", "categories": "derived"},
    )


# Rows with PKU's own severities: they validate severity, and are never trained on.
_SEVERITY_REAL = ("linearsteering", "courtguard_pku180", "upsrm_pku_test")


def _response(row: dict[str, Any]) -> Example | None:
    """Human, derived or proxy safe/unsafe labels."""
    if row["source"] in _SEVERITY_REAL:
        return None
    return Example(
        prompt=row["prompt"],
        response=row["response"],
        source=f"responses/{row['source']}",
        unsafe=not row["safe"],
        origin={"unsafe": row["label_source"]},
        weight=0.3,
    )


def _severity_tagged_prompt(row: dict[str, Any]) -> Example | None:
    """PKU's severity tags of a prompt's answers: what a willing answer would give, a weak label."""
    tags = row.get("pku_severity_tags")
    if not tags:
        return None
    severity = max(int(tag) if str(tag).isdigit() else _WORD_SEVERITY[str(tag)] for tag in tags)
    return Example(
        prompt=row["prompt"],
        response=None,
        source=f"prompts/{row['source']}",
        unsafe=True,
        severity=severity,
        categories=row["categories19"] or None,
        origin={"severity": "weak", "categories": "weak"},
        weight=0.3,
    )


def _unlabelled(row: dict[str, Any]) -> Example | None:
    if row["source"] == "harmbench_behaviors":  # a benchmark that the model is reported on
        return None
    return Example(
        prompt=row["prompt"], response=row.get("response"), source=f"unlabelled/{row['source']}"
    )


@dataclass(frozen=True)
class Source:
    """A file of the local data folder, what it becomes, and at most how many of its rows."""

    file: str
    convert: Callable[[dict[str, Any]], Example | None]
    limit: int | None = None


# In order of trust: the first example of a text wins over later ones.
LOCAL_SOURCES = (
    Source("annotated_responses", _annotated),
    Source("annotated_prompts", _annotated),
    Source("over_refusal_prompts", _over_refusal),
    Source("benign", benign_answer, limit=4000),
    Source("benign", _benign_prompt, limit=1500),
    Source("prompts", _severity_tagged_prompt, limit=3000),
    Source("responses", _response),
    Source("jailbreak_responses", _unlabelled, limit=9000),
    Source("red_team_prompts", _unlabelled, limit=4000),
)


def _sample(rows: list[Example], limit: int | None) -> list[Example]:
    """A fixed pseudo-random choice that does not depend on the order of the file."""
    if limit is None or len(rows) <= limit:
        return rows
    return sorted(rows, key=lambda e: hashlib.sha256("\0".join(e.key).encode()).digest())[:limit]


def load_local(folder: Path) -> list[Example]:
    """Every source of `LOCAL_SOURCES` that is in `folder`."""
    examples: list[Example] = []
    for source in LOCAL_SOURCES:
        path = folder / f"{source.file}.jsonl.gz"
        if not path.exists():
            raise SystemExit(f"{path} is missing: --source names the folder of the labelled data")
        known = deduplicate(each(path, read_jsonl(path), source.convert))
        examples += _sample(known, source.limit)
    return examples


def the_rest(folder: Path, examples: Sequence[Example]) -> list[Example]:
    """Rows beyond the limits, and scored answers to jailbreaks as unlabelled ones, for training
    alone: none whose prompt is like one of another split, so that no split moves for them."""
    sources = [source for source in LOCAL_SOURCES if source.limit is not None]
    sources.append(Source("severity_proxy", _unlabelled))
    paths = ((source, folder / f"{source.file}.jsonl.gz") for source in sources)
    there = ((source, path) for source, path in paths if path.exists())
    read = (e for source, path in there for e in each(path, read_jsonl(path), source.convert))
    known = {example.key for example in examples}
    rest = [e for e in deduplicate(read) if e.key not in known]
    groups = prompt_groups([*examples, *rest])
    closed = {groups[normalise(e.prompt)] for e in examples if e.split != "train"}
    return [e for e in rest if groups[normalise(e.prompt)] not in closed]


# --- cleaning and splits -------------------------------------------------------------------------


def deduplicate(examples: Iterable[Example]) -> list[Example]:
    """Exact duplicates (normalised prompt and response) go; the first stays."""
    seen: dict[tuple[str, str], Example] = {}
    for example in examples:
        seen.setdefault(example.key, example)
    return list(seen.values())


def prompt_groups(examples: Iterable[Example]) -> dict[str, int]:
    """The group of each normalised prompt, in sort order; like prompts share one."""
    prompts = sorted({normalise(e.prompt) for e in examples})
    return dict(zip(prompts, near_duplicate_groups(prompts), strict=True))


def assign_splits(
    examples: Sequence[Example],
    validation: float = 0.08,
    test: float = 0.12,
    groups: Mapping[str, int] | None = None,
) -> list[Example]:
    """Give every group of like prompts one split, by the hash of its first prompt in sort order."""
    groups = prompt_groups(examples) if groups is None else groups
    first: dict[int, str] = {}
    for prompt, group in groups.items():
        first.setdefault(group, prompt)
    split_of = {prompt: _split(first[group], validation, test) for prompt, group in groups.items()}
    return [replace(e, split=split_of[normalise(e.prompt)]) for e in examples]


def without_near_duplicates(
    examples: Sequence[Example], groups: Mapping[str, int], threshold: float = 0.9
) -> list[Example]:
    """Without texts that are nearly (word sets with Jaccard >= `threshold`) an earlier one to a
    like prompt and have its labels. Those with other labels stay: they are what tells harm apart.
    """
    kept: dict[tuple[Any, ...], list[frozenset[str]]] = defaultdict(list)
    result = []
    for example in examples:
        alone = example.response is None
        words = frozenset(normalise(example.response or example.prompt).split())
        names = None if example.categories is None else tuple(sorted(example.categories))
        labels = (example.unsafe, example.severity, names)
        earlier = kept[groups[normalise(example.prompt)], alone, labels]
        if not any(len(words & one) >= threshold * len(words | one) for one in earlier):
            earlier.append(words)
            result.append(example)
    return result


def _split(prompt: str, validation: float, test: float) -> Split:
    position = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    if position < test:
        return "test"
    return "validation" if position < test + validation else "train"


# --- files ---------------------------------------------------------------------------------------


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")


def read_examples(folder: Path, *splits: Split) -> list[Example]:
    """Examples that `build` wrote, of the given splits."""
    examples: list[Example] = []
    for split in splits:
        path = folder / f"{split}.jsonl"
        if not path.exists():
            raise SystemExit(f"{path} is missing: python -m training.data build --out {folder}")
        examples += each(path, read_jsonl(path), lambda row: checked(Example(**row)))
    return examples


# --- commands ------------------------------------------------------------------------------------


def build(
    source: str = "../shared/data", out: Path = Path("build/data"), everything: bool = False
) -> None:
    """Write `train`, `validation` and `test.jsonl` and `card.md` under `out`.

    everything: train on what is beyond the limits of the sources too, e.g. for a teacher to label.
    """
    from training.data_card import report
    from training.pku import load_pku

    local = Path(source)
    if (local / "annotated_responses.jsonl.gz").exists():
        examples = load_local(local)
    else:
        examples = load_pku(source)
    read, examples = len(examples), deduplicate(examples)
    groups = prompt_groups(examples)
    # Splits first: they must not move when what counts as near changes.
    examples = assign_splits(examples, groups=groups)
    exact = read - len(examples)
    if everything and local.is_dir():
        examples += the_rest(local, examples)
        read, groups = len(examples) + exact, prompt_groups(examples)
    examples = without_near_duplicates(examples, groups)
    removed = {"exact": exact, "near": read - exact - len(examples)}
    for split in SPLITS:
        write_examples(out / f"{split}.jsonl", (e for e in examples if e.split == split))
    (out / "removed.json").write_text(json.dumps(removed), encoding="utf-8")
    (out / "card.md").write_text(report(examples, removed), encoding="utf-8")
    counts = Counter(e.split for e in examples)
    print(f"{out}: " + ", ".join(f"{counts[s]} {s}" for s in SPLITS))


def card(out: Path = Path("build/data")) -> None:
    """Print the data card of what `build` wrote."""
    from training.data_card import report

    path = out / "removed.json"  # not there where an earlier version built
    removed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    print(report(read_examples(out, *SPLITS), removed))


if __name__ == "__main__":
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        tyro.extras.subcommand_cli_from_dict({"build": build, "report": card})
