"""After new labels: train, export, calibrate, compare with what is installed, install if better.

    python -m training.retrain --store annotations.db

Training goes on from the artifact that is installed, unless `--train.init` says otherwise. The test
split of `--data` is frozen: no label of a text whose prompt is in it, or nearly, is ever trained
on, and the old and the new model are compared on it (`training.compare` has the rule).
Resumes: a run is known by its labels, and a stage that is done is not done again. What was
installed before is kept beside it as `<name>.previous`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro

from guardrail.artifact import read_manifest
from training import calibrate, compare, export, moderation
from training.annotation.exchange import current
from training.annotation.labels import SafetyLabel
from training.annotation.store import Store
from training.data import (
    SPLITS,
    Example,
    Split,
    near_duplicate_groups,
    normalise,
    read_examples,
    write_examples,
)
from training.ending import ends_in_a_line

SOURCE = "annotated/store"


@dataclass
class Args:
    store: Path = Path("annotations.db")
    data: Path = Path("build/data")
    """What `training.data build` wrote; its test split is the frozen test."""
    installed: Path = Path("guardrail/models/small")
    """The artifact in use; replaced by the new one if that is better."""
    work: Path = Path("build/retrain")
    name: str = "retrained"
    """Id of the new model, followed by the number of labels behind it."""
    after: int = 200
    """Do nothing before so many texts have labels that the last run did not have."""
    machines: bool = True
    """AI annotators' labels count where no person gave one."""
    validation: float = 0.1
    """Share of the new prompts that go to validation, i.e. to calibration."""
    install: bool = True
    min_gain: float = 0.0
    tolerance: float = 0.01
    """See `training.compare`."""
    parity: float = 0.995
    """See `training.export`."""
    train: moderation.Args = field(default_factory=lambda: moderation.Args(quantization_aware=True))
    """How it is trained, on the int8 grid, which its export keeps; `data` and `out` are set here,
    `init` too where it is not given."""
    calibration: calibrate.Args = field(default_factory=calibrate.Args)


@dataclass(frozen=True)
class Merged:
    """train, validation: old and new examples; new: of those, from the store; held_out: new texts
    left out because their prompts are in the frozen test."""

    train: list[Example]
    validation: list[Example]
    new: int
    held_out: int


# --- data ----------------------------------------------------------------------------------------


def labelled(store: Store, *, machines: bool) -> list[Example]:
    """Every text with a complete label given in the store, once; imported labels are not new."""
    found: dict[tuple[str, str], Example] = {}
    for record, said in current(store, machines=machines):
        for response, resolved in zip(record.responses, said, strict=False):
            label = resolved.label
            if resolved.by in (None, "import") or not isinstance(label, SafetyLabel):
                continue
            if not label.complete:
                continue
            who = "ai" if resolved.by == "ai" else "human"
            example = Example(
                prompt=record.prompt,
                response=response,
                source=SOURCE,
                unsafe=not label.safe,
                severity=label.severity,
                categories=list(label.categories or ()),
                origin={"severity": who, "categories": who},
            )
            found[example.key] = example
    return list(found.values())


def merge(base: dict[Split, list[Example]], new: Sequence[Example], validation: float) -> Merged:
    """New labels take the place of old ones of the same text; near prompts share a split."""
    prompts = sorted({normalise(e.prompt) for rows in base.values() for e in rows}
                     | {normalise(e.prompt) for e in new})  # fmt: skip
    group = dict(zip(prompts, near_duplicate_groups(prompts), strict=True))
    home: dict[int, Split] = {}
    for split in ("train", "validation", "test"):  # the test wins over the others
        for example in base[split]:
            home[group[normalise(example.prompt)]] = split
    first: dict[int, str] = {}
    for prompt in prompts:
        first.setdefault(group[prompt], prompt)
    placed: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for example in new:
        one = group[normalise(example.prompt)]
        split = home.get(one) or ("validation" if _position(first[one]) < validation else "train")
        placed[split].append(replace(example, split=split))
    keys = {e.key for split in ("train", "validation") for e in placed[split]}
    return Merged(
        train=[e for e in base["train"] if e.key not in keys] + placed["train"],
        validation=[e for e in base["validation"] if e.key not in keys] + placed["validation"],
        new=len(keys),
        held_out=len(placed["test"]),
    )


def _position(prompt: str) -> float:
    return int.from_bytes(hashlib.sha256(f"retrain {prompt}".encode()).digest()[:8], "big") / 2**64


# --- stages --------------------------------------------------------------------------------------


def identity(args: Args, examples: Sequence[Example]) -> str:
    """Names a run by what decides its result; another run of the same goes on with it."""
    facts = [
        sorted(json.dumps(asdict(e), sort_keys=True) for e in examples),
        json.dumps([asdict(args.train), asdict(args.calibration), args.validation], default=str),
        hashlib.sha256((args.data / "train.jsonl").read_bytes()).hexdigest(),
        hashlib.sha256((args.data / "test.jsonl").read_bytes()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def build(args: Args, folder: Path, new: Sequence[Example]) -> Path:
    """Train, export and calibrate in `folder`; returns the artifact."""
    data = folder / "data"
    if not (data / "test.jsonl").exists():
        base = {split: read_examples(args.data, split) for split in SPLITS}
        merged = merge(base, new, args.validation)
        print(
            f"{merged.new} new texts; {merged.held_out} more are kept out, since their prompts are "
            "in the frozen test",
            flush=True,
        )
        if not merged.new:
            raise SystemExit("every new label is of a prompt in the frozen test: nothing to learn")
        write_examples(data / "train.jsonl", merged.train)
        write_examples(data / "validation.jsonl", merged.validation)
        shutil.copy(args.data / "test.jsonl", data / "test.jsonl.partial")
        os.replace(data / "test.jsonl.partial", data / "test.jsonl")
    model, artifact = folder / "model", folder / "artifact"
    if not (model / "summary.json").exists():
        moderation.main(replace(from_installed(args, folder / "start"), data=data, out=model))
    if not (artifact / "manifest.json").exists():
        name = f"{args.name}-{len(new)}-{folder.name[:6]}"
        export.main(
            export.Args(model=model, out=artifact, name=name, data=data, parity=args.parity)
        )
    if not read_manifest(artifact).thresholds:
        calibrate.main(replace(args.calibration, model=artifact, data=data))
    return artifact


def from_installed(args: Args, start: Path) -> moderation.Args:
    """How to train, from a copy of what is installed: a run goes on from where it began, whatever
    is installed meanwhile."""
    if args.train.init is not None:
        return args.train
    if not start.exists():
        partial = start.with_name(f"{start.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(args.installed, partial)
        os.replace(partial, start)
    manifest = read_manifest(start)
    return replace(args.train, init=start, base=manifest.base, **manifest.encoding)


def install(artifact: Path, target: Path) -> None:
    """Put an artifact in place, the one before it beside it. A crash leaves the old or the new one,
    at worst as `.previous` or `.next`, which the next call puts right."""
    fresh = target.with_name(target.name + ".next")
    before = target.with_name(target.name + ".previous")
    recover(target)
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(artifact, fresh)
    read_manifest(fresh)  # every hash, before anything is moved
    if target.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(target, before)
    os.replace(fresh, target)


def recover(target: Path) -> None:
    """Undo an installation that stopped between its two renames."""
    before = target.with_name(target.name + ".previous")
    if not target.exists() and before.exists():
        os.replace(before, target)


def main(args: Args) -> None:
    recover(args.installed)
    new = labelled(Store(args.store), machines=args.machines)
    state = args.work / "state.json"
    seen = set(json.loads(state.read_text())["texts"]) if state.exists() else set()
    digests = {_digest(e) for e in new}
    fresh = len(digests - seen)
    if fresh < args.after:
        print(f"{fresh} texts have new labels, {args.after} are wanted (--after): nothing done")
        return
    who = Counter(e.origin["severity"] for e in new)
    print(f"{fresh} texts have new labels, {len(new)} in all: {dict(who)}", flush=True)
    folder = args.work / identity(args, new)
    artifact = build(args, folder, new)
    result = compare.run(
        compare.Args(
            old=args.installed,
            new=artifact,
            data=args.data,
            out=folder,
            min_gain=args.min_gain,
            tolerance=args.tolerance,
        )
    )
    print(compare.markdown(result))
    print(f"decisions that flip: {folder / 'flips.jsonl'}")
    if result.better and args.install:
        install(artifact, args.installed)
        print(f"{args.installed}: now {read_manifest(args.installed).id}")
    else:
        why = "asked not to" if result.better else "not better"
        print(f"{args.installed}: left as it was ({why}); the new one is {artifact}")
    partial = state.with_suffix(".partial")
    partial.write_text(json.dumps({"run": folder.name, "texts": sorted(digests)}))
    os.replace(partial, state)


def _digest(example: Example) -> str:
    """Of a text and its label: a text that is labelled otherwise is new."""
    return hashlib.sha256(json.dumps(asdict(example), sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("the stages that are done are kept: the same command goes on from there"):
        main(args)
