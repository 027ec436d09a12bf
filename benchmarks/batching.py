"""What a `Batcher` gives: throughput and latency of many callers with it and without, in one run.

    python -m benchmarks.batching                       # a few minutes, on an idle machine
    python -m benchmarks.batching --seconds 1 --rounds 1 --callers 1 64
    python -m benchmarks.batching --only windows        # the model alone, by batch size and threads

Callers are closed loops: each sends its next text when it has the answer to the last. The ways are
measured in turn, round by round, so that a machine that slows down slows all of them; each figure
is the median of the rounds. Ways:

    direct       each caller runs the model in its own thread
    locked       the same behind a lock: one inference at a time, on all cores
    batcher      each caller asks one `Batcher`
    acheck       asyncio tasks, `Guard.acheck` over the bare model (a thread per check)
    acheck+b     asyncio tasks, `Guard.acheck` over the `Batcher`

The second table is why a batcher on a CPU judges texts one by one: windows per second of the model
alone, by how many of one length (so unpadded) are run together, and by the threads of an inference.
`CPU ms` is what a window costs in CPU time, which tells of the work also on a machine that is busy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import numpy as np

from benchmarks import _words
from guardrail._scan_local import cores
from guardrail.batching import Batcher
from guardrail.encoding import Window
from guardrail.guard import Guard
from guardrail.moderator import OnnxModerator, pad
from guardrail.verdict import Pair

LENGTHS = (*_words.LENGTHS, 220)
TOKENS = (16, 32, 64, 128)
TOGETHER = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Load:
    """What one way gave at one number of callers."""

    way: str
    callers: int
    texts_per_second: float
    p50_ms: float
    p95_ms: float


def texts(seed: int) -> Callable[[], Pair]:
    """An endless supply of pairs, the same for every way."""
    chance = random.Random(seed)
    return lambda: Pair("How is that done?", _words.text(chance, LENGTHS))


def by_threads(check: Callable[[Pair], object], callers: int, seconds: float) -> list[float]:
    """Latencies, in seconds, of what `callers` threads get done in `seconds`."""
    latencies: list[list[float]] = [[] for _ in range(callers)]
    gate = threading.Barrier(callers + 1)

    def call(n: int) -> None:
        text = texts(n)
        gate.wait()
        until = time.perf_counter() + seconds
        while (started := time.perf_counter()) < until:
            check(text())
            latencies[n].append(time.perf_counter() - started)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    for thread in threads:
        thread.join()
    return [x for own in latencies for x in own]


def by_tasks(guard: Guard, callers: int, seconds: float) -> list[float]:
    """The same from one event loop."""

    async def call(n: int, until: float) -> list[float]:
        text, found = texts(n), []
        while (started := time.perf_counter()) < until:
            pair = text()
            verdict = await guard.acheck(pair.prompt, pair.response)
            assert not verdict.degraded, verdict.error
            found.append(time.perf_counter() - started)
        return found

    async def main() -> list[float]:
        until = time.perf_counter() + seconds
        found = await asyncio.gather(*(call(n, until) for n in range(callers)))
        return [x for own in found for x in own]

    return asyncio.run(main())


def measured(way: str, callers: int, run: Callable[[], list[float]]) -> Load:
    """Texts per second over the time until the last caller was done."""
    started = time.perf_counter()
    latencies = run()
    took = time.perf_counter() - started
    cuts = quantiles([*latencies, latencies[-1]], n=20)
    return Load(way, callers, len(latencies) / took, 1000 * median(latencies), 1000 * cuts[18])


def load(
    model: OnnxModerator, callers: Sequence[int], seconds: float, rounds: int, latency: float
) -> list[Load]:
    """Every way at every number of callers, the medians of `rounds`."""
    lock = threading.Lock()
    found: dict[tuple[str, int], list[Load]] = {}
    with Batcher(model, latency=latency) as batcher:

        def locked(pair: Pair) -> None:
            with lock:
                model.assess([pair])

        ways: dict[str, Callable[[int], list[float]]] = {
            "direct": lambda n: by_threads(lambda pair: model.assess([pair]), n, seconds),
            "locked": lambda n: by_threads(locked, n, seconds),
            "batcher": lambda n: by_threads(lambda pair: batcher.assess([pair]), n, seconds),
            "acheck": lambda n: by_tasks(Guard(model), n, seconds),
            "acheck+b": lambda n: by_tasks(Guard(batcher), n, seconds),
        }
        for way in ways.values():
            way(1)  # the first inference allocates
        for round_ in range(rounds):
            for n in callers:
                for name in list(ways)[:: -1 if round_ % 2 else 1]:
                    one = measured(name, n, lambda name=name, n=n: ways[name](n))  # type: ignore[misc]
                    found.setdefault((name, n), []).append(one)
                print(f"round {round_ + 1}/{rounds}, {n} callers", end="\r", flush=True)
    print(" " * 60, end="\r")
    return [
        Load(way, n, *(median(getattr(x, f) for x in runs) for f in Load.__slots__[2:]))
        for (way, n), runs in sorted(found.items(), key=lambda item: item[0][1])
    ]


@dataclass(frozen=True, slots=True)
class Batch:
    """The model alone: the best of the rounds."""

    tokens: int
    threads: int
    together: int
    windows_per_second: float
    cpu_ms: float  # of one window


def batches(name: str, device: str, rounds: int) -> list[Batch]:
    """Every length, number of threads and batch size in turn, round by round."""
    chance = np.random.default_rng(0)
    best: dict[tuple[int, int, int], tuple[float, float]] = {}
    for threads in sorted({1, cores()}):
        model = OnnxModerator(name, device=device, threads=threads)
        for round_ in range(rounds):
            print(f"round {round_ + 1}/{rounds}, {threads} threads", end="\r", flush=True)
            for tokens in TOKENS:
                for n in TOGETHER:
                    ids = chance.integers(1000, 20_000, (n, tokens)).tolist()
                    wall, cpu = timed(model, [Window(row, [0] * tokens, 0, 0) for row in ids])
                    seen = best.get((tokens, threads, n), (wall, cpu))
                    best[tokens, threads, n] = (min(wall, seen[0]), min(cpu, seen[1]))
    print(" " * 60, end="\r")
    return [
        Batch(*cell, cell[2] / wall, 1000 * cpu / cell[2]) for cell, (wall, cpu) in best.items()
    ]


def timed(model: OnnxModerator, windows: Sequence[Window]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one inference."""
    feed = pad(windows, 0)
    wall, cpu = time.perf_counter(), time.process_time()
    model._session.run(("severity_logits", "category_logits"), feed)
    return time.perf_counter() - wall, time.process_time() - cpu


def batch_table(found: Sequence[Batch]) -> str:
    lines = ["tokens  threads  of a window" + "".join(f"{n:9}" for n in TOGETHER)]
    for tokens, threads in dict.fromkeys((x.tokens, x.threads) for x in found):
        row = [x for x in found if (x.tokens, x.threads) == (tokens, threads)]
        for what, figures in (
            ("per second ", [x.windows_per_second for x in row]),
            ("CPU ms     ", [x.cpu_ms for x in row]),
        ):
            cells = "".join(f"{figure:9.1f}" for figure in figures)
            lines.append(f"{tokens:6}  {threads:7}  {what}{cells}")
    return "\n".join(lines)


def table(loads: Sequence[Load]) -> str:
    lines = ["callers  way        texts/s   p50 ms   p95 ms   of direct"]
    direct = {x.callers: x.texts_per_second for x in loads if x.way == "direct"}
    lines += [
        f"{x.callers:7}  {x.way:9} {x.texts_per_second:8.1f} {x.p50_ms:8.1f} {x.p95_ms:8.1f} "
        f"{x.texts_per_second / direct[x.callers]:10.2f}x"
        for x in loads
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Batching on and off, in the same run.")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of one inference; all cores by default")
    parser.add_argument("--latency", type=float, default=0.1, help="the batcher's, in seconds")
    parser.add_argument("--model", default="small")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--only", choices=["callers", "windows"], help="one of the two tables")
    args = parser.parse_args()
    figures: dict[str, object] = {
        "machine": {"cores": cores(), "processor": platform.processor() or "unknown"},
        "model": args.model,
        "device": args.device,
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "output"},
    }
    if args.only != "windows":
        model = OnnxModerator(args.model, device=args.device, threads=args.threads)
        loads = load(model, args.callers, args.seconds, args.rounds, args.latency)
        figures["load"] = [asdict(x) for x in loads]
        print(table(loads))
    if args.only != "callers":
        found = batches(args.model, args.device, args.rounds)
        figures["batches"] = [asdict(x) for x in found]
        print(batch_table(found))
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
