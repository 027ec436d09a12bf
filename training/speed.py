"""How fast an artifact is, on each device there is; a device there is not is named with the reason.

    python -m training.speed --model guardrail/models/small     # writes it into the manifest

`training.export` does so too. Speeds are of this machine and its load: the manifest names it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tyro

from guardrail._onnx import Device, DeviceError
from guardrail.artifact import read_manifest, write_manifest
from guardrail.encoding import Window
from guardrail.moderator import OnnxModerator
from training.ending import ends_in_a_line

__all__ = ["measure"]

LENGTHS = (32, 128, 256)
MANY, MANY_LENGTH = 32, 128


@dataclass
class Args:
    model: Path = Path("guardrail/models/small")
    devices: tuple[Device, ...] = ("cpu", "cuda", "tensorrt")
    rounds: int = 20


def measure(
    folder: Path, devices: Sequence[Device] = ("cpu", "cuda", "tensorrt"), rounds: int = 20
) -> dict[str, Any]:
    """Per device: median milliseconds of one text of so many tokens, and texts a second of many;
    or `skipped`, why it was not measured."""
    found: dict[str, Any] = {
        "machine": _machine(),
        "load": round(os.getloadavg()[0], 1),  # of others, before: above 0, a machine that shares
        "onnxruntime": ort.__version__,
    }
    for device in devices:
        try:
            moderator = OnnxModerator(folder, device=device, locate=False)
        except DeviceError as error:
            found[device] = {"skipped": str(error)}
            continue
        longest = moderator.manifest.encoder_config().max_tokens
        one = {
            str(length): round(1000 * _seconds(moderator, [length], rounds), 2)
            for length in LENGTHS
            if length <= longest
        }
        many = [min(MANY_LENGTH, longest)] * MANY
        rate = MANY / _seconds(moderator, many, max(1, rounds // 5))
        found[device] = {"ms_by_tokens": one, "texts_per_second": round(rate, 1)}
    return found


def _seconds(moderator: OnnxModerator, lengths: Sequence[int], rounds: int) -> float:
    """Median over `rounds`, after one to warm up; of windows, for tokenising takes no time."""
    rng = np.random.default_rng(0)
    windows = [
        Window(rng.integers(5, 1000, length).tolist(), [0] * length, 0, length)
        for length in lengths
    ]
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        moderator.logits(windows)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _machine() -> str:
    """The processor and its cores, as far as the system tells."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, name)}, {os.cpu_count()} cores"


def text(speed: dict[str, Any]) -> str:
    """A line per device."""
    lines = [
        f"speed on {speed['machine']} under a load of {speed['load']}, "
        f"onnxruntime {speed['onnxruntime']}"
    ]
    for device, row in speed.items():
        if not isinstance(row, dict):
            continue
        if "skipped" in row:
            lines.append(f"  {device}: not measured: {row['skipped']}")
            continue
        each = ", ".join(f"{ms} ms for {n} tokens" for n, ms in row["ms_by_tokens"].items())
        lines.append(f"  {device}: {each}; {row['texts_per_second']} texts a second")
    return "\n".join(lines)


def main(args: Args) -> None:
    manifest = read_manifest(args.model)
    speed = measure(args.model, args.devices, args.rounds)
    print(text(speed))
    write_manifest(args.model, replace(manifest, metrics={**manifest.metrics, "speed": speed}))


if __name__ == "__main__":
    args = tyro.cli(Args)
    with ends_in_a_line("nothing is kept: the same command starts anew"):
        main(args)
