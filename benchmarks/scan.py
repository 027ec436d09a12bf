"""`guardrail scan` beside a plain loop over `check`, and Ray beside both, in one run.

    python -m benchmarks.scan                                  # minutes, on an idle machine
    python -m benchmarks.scan --data responses.jsonl.gz        # your own prompts and responses
    python -m benchmarks.scan --rows 100 --rounds 1 --engines plain local

plain: read a line, `Guard().check`, write a line: the model runs on all cores for each text.
local: `guardrail scan`, with a text on each core. ray: the same by Ray, as many actors as cores.
Rows per second count from the first rows done; the start, long for Ray, is a figure of its own.
The ways are measured in turn, round by round; each figure is the median of the rounds. All ways
must give the same verdicts.

CPU seconds per 1,000 rows tell of the work itself, also where the machine is busy; Ray's are spent
in processes of Ray's, and are not counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from guardrail._scan_local import cores
from guardrail.guard import Guard
from guardrail.moderator import OnnxModerator
from guardrail.policy import Policy
from guardrail.scan import LocalEngine, Scan

HARMLESS = (
    "The garden needs water twice a week.",
    "Mix flour, yeast and salt, then wait for an hour before you bake the loaf.",
    "Paris is the capital of France, and the Seine runs through it.",
    "I would read the error message first, look at the line it names, and write a small test.",
    "Thank you, that helps.",
    "Trains leave every ten minutes, so there is no need to hurry or to book a seat in advance.",
)
HARMFUL = (
    "You are a worthless idiot and everyone hates you.",
    "Hide the knife in your coat and stab him when he opens the door.",
    "Take their card details with a fake login page and sell them.",
)
ENGINES = ("plain", "local", "ray")
CHUNK = 32
SENTENCES = (1, 1, 2, 3, 5, 8, 13, 21)  # per text: chat lines, paragraphs, whole answers


@dataclass(frozen=True, slots=True)
class Result:
    """One way's figures: medians of the rounds; `start_seconds` until its first rows."""

    way: str
    rows_per_second: float
    cpu_seconds_per_1000: float | None
    start_seconds: float
    times_plain: float | None = None


def made(rows: int, seed: int) -> list[dict[str, str]]:
    """Rows of mixed lengths: a third prompts alone; one text in four has harmful sentences."""
    chance = random.Random(seed)
    found = []
    for number in range(rows):
        sentences = chance.choices(HARMLESS, k=chance.choice(SENTENCES))
        if chance.random() < 0.25:
            sentences[chance.randrange(len(sentences))] = chance.choice(HARMFUL)
        text = f"{number}. {' '.join(sentences)}"
        prompt = {"prompt": f"Tell me about number {number}, please."}
        found.append({"prompt": text} if chance.random() < 1 / 3 else prompt | {"response": text})
    return found


def read(path: Path, rows: int, seed: int) -> list[dict[str, str]]:
    """Rows of a .jsonl(.gz) file, in random order."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    random.Random(seed).shuffle(found)
    kept = [{k: row[k] for k in ("prompt", "response") if row.get(k)} for row in found]
    return list(islice((row for row in kept if "prompt" in row), rows))


Mark = Callable[[int], None]  # told how many rows are done
Way = Callable[[Path, Path, Mark], object]


def plain() -> Way:
    guard = Guard()

    def run(source: Path, output: Path, mark: Mark) -> None:
        with source.open() as lines, output.open("w") as out:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                verdict = guard.check(row["prompt"], row.get("response"))
                out.write(json.dumps(row | {"guardrail": verdict.to_json()}) + "\n")
                mark(number)

    return run


def local(workers: int) -> Way:
    engine = LocalEngine(Guard(OnnxModerator(threads=1)), workers)
    return lambda source, output, mark: Scan(source, output, chunk=CHUNK).run(
        engine, lambda tally: mark(tally.rows)
    )


def ray(workers: int) -> Way:
    from guardrail._scan_ray import RayEngine

    engine = RayEngine("small", Policy.load("balanced"), workers=workers)
    return lambda source, output, mark: Scan(source, output, chunk=CHUNK).run(
        engine, lambda tally: mark(tally.rows)
    )


def measure(way: Way, source: Path, output: Path) -> tuple[float, float, float]:
    """Rows per second after the first were done, CPU seconds per 1,000 rows, seconds until then."""
    marks: list[tuple[float, int]] = []

    def mark(rows: int) -> None:
        if rows:
            marks.append((time.perf_counter(), rows))

    asked, cpu = time.perf_counter(), time.process_time()
    way(source, output, mark)
    spent = time.process_time() - cpu
    (first, before), (last, rows) = marks[0], marks[-1]
    return (rows - before) / (last - first), spent * 1000 / rows, first - asked


def verdicts(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line)["guardrail"] for line in path.read_text().splitlines()]
    return [{k: v for k, v in verdict.items() if k != "latency_ms"} for verdict in found]


def compare(
    rows: Sequence[dict[str, str]], engines: Sequence[str], rounds: int, workers: int
) -> list[Result]:
    ways: dict[str, Callable[[], Way]] = {
        "plain": plain,
        "local": lambda: local(workers),
        "ray": lambda: ray(workers),
    }
    made_ways: dict[str, Way] = {name: ways[name]() for name in engines}
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in engines}
    with TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        first: list[dict[str, Any]] | None = None
        for number in range(rounds):
            for name, way in made_ways.items():
                output = Path(folder, f"{name}-{number}.jsonl")
                figures[name].append(measure(way, source, output))
                print(f"round {number + 1}: {name} {figures[name][-1][0]:.1f} rows/s", flush=True)
                found = verdicts(output)
                first = first or found
                if found != first:
                    raise SystemExit(f"{name}: other verdicts than {engines[0]}")
    return _results(figures)


def _results(figures: dict[str, list[tuple[float, float, float]]]) -> list[Result]:
    results = []
    for name, rounds in figures.items():
        rate, cpu, start = (median(column) for column in zip(*rounds, strict=True))
        beside = None
        if "plain" in figures:  # round by round: they then met the same machine
            pairs = zip(rounds, figures["plain"], strict=True)
            beside = round(median(own[0] / other[0] for own, other in pairs), 2)
        spent = None if name == "ray" else round(cpu, 2)
        results.append(Result(name, round(rate, 2), spent, round(start, 2), beside))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--data", type=Path, help="a .jsonl(.gz) file with prompt[, response]")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=Path("build/scan.json"))
    args = parser.parse_args()
    rows = (
        made(args.rows, args.seed) if args.data is None else read(args.data, args.rows, args.seed)
    )
    load = os.getloadavg()[0]
    results = compare(rows, args.engines, args.rounds, args.workers)
    characters = sorted(len(row.get("response", row["prompt"])) for row in rows)
    report = {
        "machine": {"cores": cores(), "processor": platform.processor(), "load_before": load},
        "rows": len(rows),
        "characters": {"median": median(characters), "longest": characters[-1]},
        "data": args.data.name if args.data else f"made, seed {args.seed}",
        "workers": args.workers,
        "results": [asdict(result) for result in results],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'way':6} {'rows/s':>8} {'x plain':>8} {'CPU s/1,000':>12} {'start s':>8}")
    for r in results:
        cpu = "-" if r.cpu_seconds_per_1000 is None else f"{r.cpu_seconds_per_1000:.2f}"
        beside = "-" if r.times_plain is None else f"{r.times_plain:.2f}"
        print(f"{r.way:6} {r.rows_per_second:8.1f} {beside:>8} {cpu:>12} {r.start_seconds:8.1f}")
    print(f"{args.out}; load before: {load:.1f} on {cores()} cores")


class _Raw(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    main()
