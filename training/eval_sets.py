"""What an evaluation is made of: sets kept out of training, each with one kind of label.

Test splits by prompt; public sets without the texts whose prompt was trained on, or nearly. Human
labels, AI annotations and labels that follow from how a text came about are never pooled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from guardrail.taxonomy import Direction
from guardrail.verdict import Pair
from training.data import (
    Example,
    benign_answer,
    deduplicate,
    near_duplicate_groups,
    normalise,
    read_jsonl,
)

Kind = Literal["annotated", "human", "harmless", "public", "written"]
_EVALUATION = {"mara_bteval": "beavertails_evaluation", "mara_harmfulqa": "harmfulqa"}


@dataclass(frozen=True)
class EvalSet:
    """Texts with one kind of label. labels: who gave them; kind: the table they belong in; tags: a
    word per text by which the set can be broken down (its source, or a benchmark's category)."""

    name: str
    labels: str
    kind: Kind
    examples: list[Example]
    tags: list[str]


def direction_of(example: Example) -> Direction:
    return Pair(example.prompt, example.response).direction


def held_out_sets(
    examples: Sequence[Example], human: dict[tuple[str, str], bool]
) -> Iterator[EvalSet]:
    """Sets from a split of our own data; human: people's own labels of annotated answers."""

    def pick(prefix: str, direction: Direction) -> list[Example]:
        return [e for e in examples if e.source.startswith(prefix) and direction_of(e) is direction]

    def people(*names: str) -> list[Example]:
        """Annotated answers as people labelled them, and those that only people labelled."""
        found = [e for name in names for e in pick(f"responses/{name}", Direction.OUTPUT)]
        annotated = [e for name in names for e in pick(f"annotated/{name}", Direction.OUTPUT)]
        return found + [
            replace(e, unsafe=human[e.key], severity=None, categories=None)
            for e in annotated
            if e.key in human
        ]

    def made(name: str, labels: str, kind: Kind, rows: list[Example]) -> EvalSet:
        return EvalSet(name, labels, kind, rows, [e.source.partition("/")[2] for e in rows])

    yield made("annotated answers", "ai", "annotated", pick("annotated/", Direction.OUTPUT))
    yield made("annotated prompts", "ai", "annotated", pick("annotated/", Direction.INPUT))
    yield made("PKU-SafeRLHF answers", "human", "annotated", pick("pku/", Direction.OUTPUT))
    yield made("BeaverTails answers", "human", "human", people("jincan_bt_train", "spard_bt"))
    pku = people("pku_dpo_5k", "pku_v1_sft_safety", "pku_safe_sft")
    yield made("PKU-SafeRLHF answers, balanced", "human/derived", "human", balanced(pku))
    yield made("jailbreak answers (GPTFuzz)", "human", "human", people("gptfuzz"))
    refusals = pick("responses/spard_refusal", Direction.OUTPUT)
    yield made("LLM refusals", "proxy", "harmless", refusals)
    yield made("benign answers", "derived", "harmless", pick("benign/", Direction.OUTPUT))
    yield made("benign prompts", "derived", "harmless", pick("benign/", Direction.INPUT))
    oktest, xstest = (
        pick(f"over_refusal/{name}", Direction.INPUT) for name in ("oktest", "xstest")
    )
    yield made("OKTest prompts", "human", "harmless", oktest)
    yield made("XSTest safe prompts", "human", "harmless", xstest)


def human_labels(folder: Path) -> dict[tuple[str, str], bool]:
    """People's own safe/unsafe labels of the annotated answers: key of the text -> unsafe. Empty
    where the source is not there."""
    path = folder / "annotated_responses.jsonl.gz"
    if not path.exists():
        return {}
    return {
        Example(row["prompt"], row["response"], row["source"]).key: not row["human_safe"]
        for row in read_jsonl(path)
        if row.get("human_safe") is not None
    }


def benign_answers(folder: Path, split: Sequence[Example]) -> list[Example]:
    """Every benign answer to a split's benign prompts, each once; `training.data build` takes a
    part of them, and no split shares a prompt with another. Empty where the source is not there."""
    prompts = {normalise(e.prompt) for e in split if e.source.startswith("benign/")}
    path = folder / "benign.jsonl.gz"
    rows = read_jsonl(path) if path.exists() else ()
    return deduplicate(benign_answer(row) for row in rows if normalise(row["prompt"]) in prompts)


def balanced(examples: Sequence[Example]) -> list[Example]:
    """As many safe as unsafe texts, in file order."""
    unsafe = [e for e in examples if e.unsafe]
    safe = [e for e in examples if not e.unsafe]
    size = min(len(unsafe), len(safe))
    return unsafe[:size] + safe[:size]


def public_sets(folder: Path, trained: Collection[str]) -> Iterator[EvalSet]:
    """PKU's own severities and parts of public benchmarks, without prompts trained on; trained:
    those, normalised."""
    path = folder / "severity_real.jsonl.gz"
    real = list(read_jsonl(path)) if path.exists() else []
    files = sorted((folder / "eval_public").glob("*.jsonl.gz"))
    public = {path: list(read_jsonl(path)) for path in files}
    every = (r for rows in (real, *public.values()) for r in rows)
    known = like({normalise(r["prompt"]) for r in every}, trained)
    if real:
        rows = [
            Example(r["prompt"], r["response"], r["source"], not r["safe"], r["severity"])
            for r in real
            if normalise(r["prompt"]) not in known
        ]
        tags = [e.source for e in rows]
        yield EvalSet("PKU's own severities", "human", "human", rows, tags)
    for path, found in public.items():
        raw = [r for r in found if normalise(r["prompt"]) not in known]
        if not raw:
            continue
        rows = [Example(r["prompt"], r["response"], r["source"], bool(r["unsafe"])) for r in raw]
        tags = [str(r.get("category") or r["source"]) for r in raw]
        labels = str(raw[0].get("label_kind", "?"))
        yield EvalSet(path.name.partition(".")[0], labels, "public", rows, tags)


def evaluation_prompts(folder: Path, trained: Collection[str]) -> list[Example]:
    """The harmful prompts of BeaverTails-Evaluation and HarmfulQA in `folder`, of which no split
    has any, without those trained on; trained: those, normalised."""
    found = [
        Example(row["prompt"], None, f"evaluation/{_EVALUATION[row['source']]}", True)
        for row in read_jsonl(folder / "prompts.jsonl.gz")
        if row["source"] in _EVALUATION
    ]
    known = like({normalise(e.prompt) for e in found}, trained)
    return deduplicate(e for e in found if normalise(e.prompt) not in known)


def like(prompts: Collection[str], trained: Collection[str]) -> set[str]:
    """Those of `prompts` that are among `trained`, or nearly; all are normalised."""
    every = sorted({*prompts, *trained})
    group = dict(zip(every, near_duplicate_groups(every), strict=True))
    seen = {group[prompt] for prompt in trained}
    return {prompt for prompt in prompts if group[prompt] in seen}
