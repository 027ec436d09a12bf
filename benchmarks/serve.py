"""`guardrail serve` under load: locust against the real server on loopback, batching on and off.

    python -m benchmarks.serve                              # some minutes, on an idle machine
    python -m benchmarks.serve --seconds 3 --rounds 1 --clients 1 64 --mode moderation
    python -m benchmarks.serve --soak 600 --clients 16      # does memory stay flat?

Two servers run, one that batches and one that does not, before a chat API that answers at once;
clients are closed loops (see `_serve_users`). What is measured in turn, round by round, is given as
the median of the rounds: answers (200) per second, their latencies, and what else came. One gentle
client asks before, during and after each load: `recovery` is the time from the load's last request
until that client's p95 (of its next 20 requests) is within twice its idle p95, the slowest of the
rounds. At the end it is said whether what was promised held: at saturation nothing but 429,
recovered within a second, batching on twice as fast as off at 64 clients and no slower at 1.
Clients that do not wait as they are told: GUARDRAIL_RUDE=1. The soak exits with 1 where it fails.

Server, clients and upstream share the machine: with few cores, the figures are those of all three.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

USERS = {"moderation": "Moderator", "chat": "Chatter"}
PROBE_SECONDS = 0.02
PROBES = 20  # of the gentle client, whose p95 tells whether the server has recovered
IDLE_SECONDS, AFTER_SECONDS = 2.0, 3.0  # for which it asks before and after the load
FLAT_PERCENT = 5.0
SOAK_SECONDS = 120  # at least: what is allocated once is there by a tenth of that
ANSWER = "Knead the dough, let it rest, and bake it for an hour in a hot oven. " * 4


@dataclass(frozen=True, slots=True)
class Load:
    """What one server gave at one number of clients. statuses: requests by what came of them."""

    mode: str
    batching: bool
    clients: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    statuses: dict[str, int] = field(default_factory=dict)
    recovery_ms: float | None = None


# --- processes -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], ready: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 120
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"error: it did not start: {log.read_text()[-2000:]}")
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(ready, timeout=5).status_code == 200:
                        break
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def upstream(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serve", "--as-upstream", str(port)]
    with running(command, f"http://127.0.0.1:{port}/", folder / "upstream.log"):
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def server(
    folder: Path, url: str, *, batching: bool, workers: int, model: str
) -> Iterator[tuple[str, int]]:
    """Its address and process id."""
    port = free_port()
    name = "batching" if batching else "plain"
    config = folder / f"{name}.toml"
    config.write_text(f'[model]\nbatching = {str(batching).lower()}\n[log]\nlevel = "warning"\n')
    command = [sys.executable, "-m", "guardrail.cli", "serve", "--config", str(config)]
    command += ["--port", str(port), "--upstream", url, "--workers", str(workers)]
    command += ["--model", model]
    root = f"http://127.0.0.1:{port}"
    with running(command, f"{root}/readyz", folder / f"{name}.log") as process:
        yield root, process.pid


def serve_upstream(port: int) -> None:
    """A chat API that answers at once, as fast as can be: one ASGI function."""
    import uvicorn

    words = ANSWER.split(" ")
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "fast"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": f"{w} "} for w in words)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    events = [f"data: {json.dumps({**head, 'choices': [c]})}\n\n".encode() for c in choices]
    pieces = [b"".join(events[at : at + 8]) for at in range(0, len(events), 8)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        kind = b"text/event-stream"
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        )
        while (await receive()).get("more_body"):
            pass
        for piece in pieces if scope["method"] == "POST" else ():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    uvicorn.run(app, port=port, log_level="warning", lifespan="off")


# --- measuring -----------------------------------------------------------------------------------


def locust(root: str, mode: str, clients: int, seconds: float) -> list[dict[str, Any]]:
    """What locust counted, a row for each status."""
    users = Path(__file__).with_name("_serve_users.py")
    command = [sys.executable, "-m", "locust", "-f", str(users), USERS[mode], "--headless"]
    command += ["--host", root, "-u", str(clients), "-r", str(clients), "-t", f"{seconds:g}s"]
    command += ["--json", "--skip-log", "--stop-timeout", "30"]
    top = users.parents[1]  # where locust finds the package `benchmarks`
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=top)
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"error: locust failed: {done.stderr[-2000:]}") from None
    return rows


def load(root: str, mode: str, batching: bool, clients: int, seconds: float) -> Load:
    with probing(root) as probes:
        rows = locust(root, mode, clients, seconds)
        time.sleep(AFTER_SECONDS)
    statuses = {row["name"]: row["num_requests"] for row in rows}
    times: Counter[float] = Counter()
    spans = [(row["start_time"], row["last_request_timestamp"] or 0.0) for row in rows]
    for row in rows:
        if row["name"] == "200":
            times.update({float(ms): n for ms, n in row["response_times"].items()})
    began = min((start for start, _ in spans), default=0.0)
    ended = max((end for _, end in spans), default=0.0)
    took = ended - began
    p50, p95, p99 = (percentile(times, share) for share in (0.50, 0.95, 0.99))
    rate = statuses.get("200", 0) / took if took else 0.0
    return Load(
        mode, batching, clients, rate, p50, p95, p99, statuses, recovery(probes, began, ended)
    )


def percentile(times: Counter[float], share: float) -> float:
    """Of a histogram {milliseconds: count}; NaN of nothing."""
    wanted, seen = share * times.total(), 0
    for ms in sorted(times):
        seen += times[ms]
        if seen >= wanted:
            return ms
    return float("nan")


@contextlib.contextmanager
def probing(root: str) -> Iterator[list[tuple[float, int, float]]]:
    """A gentle client that goes on asking: (when, status, seconds), `when` by time.time()."""
    probes: list[tuple[float, int, float]] = []
    stop = threading.Event()

    def probe() -> None:
        with httpx.Client(timeout=60) as http:
            while not stop.wait(PROBE_SECONDS):
                when, began = time.time(), time.perf_counter()
                with contextlib.suppress(httpx.TransportError):
                    answer = http.post(f"{root}/v1/moderations", json={"input": "How is bread?"})
                    probes.append((when, answer.status_code, time.perf_counter() - began))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        time.sleep(IDLE_SECONDS)
        yield probes
    finally:
        stop.set()
        thread.join()


def recovery(
    probes: Sequence[tuple[float, int, float]], began: float, ended: float
) -> float | None:
    """Milliseconds from the end of a load until the gentle client is served as when idle: its next
    PROBES requests are answered, with a p95 within twice that before the load. None without probes
    to tell by; infinite where it did not come to that."""
    idle = Counter(took for when, _, took in probes if when + took < began)
    after = [probe for probe in probes if probe[0] + probe[2] >= ended]
    if not idle or len(after) < PROBES:
        return None
    usual = 2 * percentile(idle, 0.95)
    for at in range(len(after) - PROBES + 1):
        some = after[at : at + PROBES]
        answered = all(status == 200 for _, status, _ in some)
        if answered and percentile(Counter(took for *_, took in some), 0.95) <= usual:
            when, _, took = some[0]
            return 1000 * (when + took - ended)
    return float("inf")


def medians(loads: Sequence[Load]) -> Load:
    """Of the rounds of one cell; statuses are summed, the slowest recovery counts."""
    first = loads[0]
    total: Counter[str] = Counter()
    for one in loads:
        total.update(one.statuses)
    rates, p50, p95, p99 = (
        median(getattr(one, name) for one in loads)
        for name in ("per_second", "p50_ms", "p95_ms", "p99_ms")
    )
    slowest = max((r for one in loads if (r := one.recovery_ms) is not None), default=None)
    cell = (first.mode, first.batching, first.clients)
    return Load(*cell, rates, p50, p95, p99, dict(total), slowest)


def table(loads: Sequence[Load]) -> str:
    lines = ["mode        clients  batching   200/s   p50 ms   p95 ms   p99 ms  recovery  statuses"]
    for x in loads:
        recovered = "-" if x.recovery_ms is None else f"{x.recovery_ms:.0f} ms"
        said = ", ".join(f"{status}: {n}" for status, n in sorted(x.statuses.items()))
        lines.append(
            f"{x.mode:10} {x.clients:8}  {'on' if x.batching else 'off':8} {x.per_second:7.1f} "
            f"{x.p50_ms:8.0f} {x.p95_ms:8.0f} {x.p99_ms:8.0f}  {recovered:>8}  {said}"
        )
    return "\n".join(lines)


def kept(loads: Sequence[Load]) -> list[str]:
    """What was promised, and whether it held."""
    said = []
    others = sorted({status for x in loads for status in x.statuses} - {"200", "429"})
    said.append(f"nothing but 200 and 429: {'yes' if not others else 'NO: ' + ', '.join(others)}")
    slowest = max((x.recovery_ms for x in loads if x.recovery_ms is not None), default=None)
    if slowest is not None:
        held = "yes" if slowest <= 1000 else "NO"
        said.append(f"recovered within a second: {held}, {slowest:.0f} ms at most")
    rates = {(x.mode, x.clients, x.batching): x.per_second for x in loads}
    for (mode, clients, batching), rate in rates.items():
        if batching and clients in (1, 64) and rates[mode, clients, False]:
            times = rate / rates[mode, clients, False]
            aim = "2.00" if clients == 64 else "1.00"
            said.append(f"batching at {clients} clients, {mode}: {times:.2f}x (aim {aim}x)")
    return said


# --- soak ----------------------------------------------------------------------------------------


def soak(root: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Both kinds of clients at once, and the memory of the server's processes, once a second."""
    samples: list[int] = []
    statuses: Counter[str] = Counter()
    each = max(1, clients // 2)
    with ThreadPoolExecutor(len(USERS)) as pool:
        loads = [pool.submit(locust, root, mode, each, seconds) for mode in USERS]
        while not all(load.done() for load in loads):
            samples.append(resident(pid))
            left = max(0.0, seconds - len(samples))
            print(f"{samples[-1] / 2**20:.1f} MiB, {left:.0f} s left ", end="\r", flush=True)
            time.sleep(1)
        for row in (row for load in loads for row in load.result()):
            statuses[row["name"]] += row["num_requests"]
    tenth = max(1, len(samples) // 10)
    early, late = median(samples[tenth : 2 * tenth] or samples), median(samples[-tenth:])
    drift = 100 * (late / early - 1)
    flat: bool | None = abs(drift) <= FLAT_PERCENT
    verdict = "yes" if flat else "NO"
    if len(samples) < SOAK_SECONDS:
        flat, verdict = None, f"cannot be told from less than {SOAK_SECONDS} s"
    print(
        f"resident memory over {len(samples)} s at {2 * each} clients: {early / 2**20:.1f} MiB in "
        f"the second tenth, {late / 2**20:.1f} MiB in the last, drift {drift:+.1f} %; "
        f"{', '.join(f'{status}: {n}' for status, n in sorted(statuses.items()))}\n"
        f"memory flat within {FLAT_PERCENT:g} %: {verdict}"
    )
    return {
        "seconds": len(samples),
        "drift_percent": drift,
        "flat": flat,
        "statuses": statuses,
        "bytes": samples,
    }


def resident(pid: int) -> int:
    """Bytes of a process and its children."""
    import psutil  # comes with locust

    total = 0
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


# --- the command ---------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="guardrail serve under load, by locust.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--mode", choices=list(USERS), nargs="+", default=list(USERS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", default="small")
    parser.add_argument("--soak", type=float, help="seconds of steady load, instead of the table")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--as-upstream", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, roots: dict[bool, str]) -> list[Load]:
    found: dict[tuple[str, int, bool], list[Load]] = {}
    for round_ in range(args.rounds):
        for mode in args.mode:
            for clients in args.clients:
                for batching in (True, False)[:: -1 if round_ % 2 else 1]:
                    print(f"round {round_ + 1}/{args.rounds}, {mode}, {clients}  ", end="\r")
                    one = load(roots[batching], mode, batching, clients, args.seconds)
                    found.setdefault((mode, clients, batching), []).append(one)
    print(" " * 60, end="\r")
    return [medians(loads) for loads in found.values()]


def main() -> None:
    args = arguments()
    if args.as_upstream is not None:
        serve_upstream(args.as_upstream)
        return
    figures: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or "unknown"},
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "output"},
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(upstream(folder))
        options = {"workers": args.workers, "model": args.model}
        on = stack.enter_context(server(folder, url, batching=True, **options))
        if args.soak is not None:
            figures["soak"] = soak(*on, args.clients[0], args.soak)
        else:
            off = stack.enter_context(server(folder, url, batching=False, **options))
            loads = compare(args, {True: on[0], False: off[0]})
            print(table(loads), *kept(loads), sep="\n")
            figures["load"] = [asdict(one) for one in loads]
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.output}")
    if figures.get("soak", {}).get("flat") is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
