"""The Ray engine of `guardrail scan`: many machines, by Ray Data (extra `scan`).

    one reader  ->  actors with one model each  ->  this process, which writes in order

The reader sends only what is judged. This process reads the same files beside it, sets each row
and its verdicts together, and writes as the local engine does: same output, same resume.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from guardrail._rows import Format, Outcome, Row, ScanError, ScanUsageError
from guardrail._scan_local import Judged, cores, identity
from guardrail.artifact import artifact_folder, read_manifest
from guardrail.errors import GuardrailError, require
from guardrail.guard import Guard
from guardrail.moderator import Device, OnnxModerator
from guardrail.policy import Policy

__all__ = ["RayEngine"]

# Ray would report home, and write between our lines; what goes wrong it raises.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
ray: Any = require("ray", extra="scan")
data: Any = require("ray.data", extra="scan")
arrow: Any = require("pyarrow", extra="scan")
for _handler in logging.getLogger("ray.data").handlers:
    if _handler.name == "console":
        _handler.setLevel(logging.CRITICAL)

_ROWS = 32  # per task on a CPU: some hundred milliseconds, hundred times what Ray adds
_GPU_ROWS = 512
_STORE = 512 << 20  # bytes of the object store of a Ray that this process starts


@dataclass(frozen=True)
class RayEngine:
    """Judges with `workers` actors, each a process with one model on one core.

    model: a name or folder that every machine has; an actor whose model differs refuses to start.
    workers: actors; by default one per core of the cluster, or as many as its GPUs have room for.
    gpus: of each actor; 0.25 puts four models on a GPU, 0 judges on the CPU.
    address: of a running cluster (`auto`, HOST:PORT, ray://HOST:PORT); None starts one here.
    """

    model: str
    policy: Policy
    device: Device = "auto"
    workers: int | None = None
    gpus: float = 0.0
    address: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        manifest = read_manifest(artifact_folder(self.model))
        return identity(self.policy, manifest.id, manifest)

    def judge(self, source: Format, skip: int, chunk: int) -> Generator[Judged, None, None]:
        started = _connect(self.address, self.workers)
        try:
            rows = (source.row(raw) for raw in source.raw(skip))
            with closing(self._outcomes(source, skip)) as outcomes:
                while part := list(islice(rows, chunk)):
                    yield _together(part, outcomes)
        finally:
            if started:
                ray.shutdown()

    def _outcomes(self, source: Format, skip: int) -> Generator[Outcome, None, None]:
        """The outcomes of the rows but the first `skip`, in order. Raises ScanError."""
        expected = 0
        try:
            judged = self._judged(source, skip)
            for batch in judged.iter_batches(batch_size=1, prefetch_batches=4):
                for number, found in zip(batch["number"], batch["outcomes"], strict=True):
                    if number != expected:
                        raise ScanError(f"Ray gave batch {number} in place of {expected}")
                    expected += 1
                    yield from pickle.loads(found)
        except ray.exceptions.RayError as error:
            raise ScanError(_one_line(error)) from error

    def _judged(self, source: Format, skip: int) -> Any:
        batches = _Batches(source, skip, _GPU_ROWS if self.gpus else _ROWS)
        with _context() as context:  # a data set keeps the context that it was made in
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False
            # One micro-batch is one row of Ray's; a row as large as this is a block, and a task.
            context.target_max_block_size = 1
            return data.read_datasource(batches, override_num_blocks=1, num_cpus=0).map_batches(
                _Judge,
                fn_constructor_kwargs={"engine": self, "expected": self.identity},
                batch_size=1,
                compute=data.ActorPoolStrategy(size=self.workers or _room(self.gpus)),
                num_cpus=1,
                num_gpus=self.gpus,
            )


@contextmanager
def _context() -> Iterator[Any]:
    """Ray Data's context, put back as it was afterwards."""
    context = data.DataContext.get_current()
    before = copy.deepcopy(vars(context))
    try:
        yield context
    finally:
        vars(context).update(before)


def _together(rows: list[Row], outcomes: Iterator[Outcome]) -> Judged:
    judged = list(zip(rows, outcomes, strict=False))
    if len(judged) != len(rows):
        raise ScanError("Ray gave fewer verdicts than there are rows: was the input changed?")
    return judged


class _Batches(data.Datasource):  # type: ignore[misc]
    """Micro-batches of what is to be judged, read by one task that goes on as they are wanted."""

    def __init__(self, source: Format, skip: int, size: int) -> None:
        super().__init__()
        self._source, self._skip, self._size = source, skip, size

    def get_name(self) -> str:
        return "Scan"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[Any]:
        unknown = data.block.BlockMetadata(
            num_rows=None, size_bytes=None, input_files=None, exec_stats=None
        )
        return [data.ReadTask(self._read, unknown)]

    def _read(self) -> Iterator[Any]:
        pairs = (self._source.row(raw).pairs for raw in self._source.raw(self._skip))
        number = 0
        while part := list(islice(pairs, self._size)):
            yield arrow.table({"number": [number], "pairs": [pickle.dumps(part)]})
            number += 1


class _Judge:
    """An actor: a model of its own."""

    def __init__(self, engine: RayEngine, expected: dict[str, Any]) -> None:
        if engine.identity != expected:
            raise ScanUsageError(
                f"the model {engine.model!r} of this machine is another than where the scan was "
                "started: install the same on both"
            )
        device = engine.device if engine.gpus else "cpu"
        model = OnnxModerator(artifact_folder(engine.model), device=device, threads=1)
        self._guard = Guard(model, engine.policy)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "number": batch["number"],
            "outcomes": [pickle.dumps(self._outcomes(pickle.loads(p))) for p in batch["pairs"]],
        }

    def _outcomes(self, rows: list[Any]) -> list[Outcome]:
        texts = [pair for pairs in rows if not isinstance(pairs, str) for pair in pairs.values()]
        verdicts = iter(self._guard.check_many(texts) if texts else [])
        return [
            pairs if isinstance(pairs, str) else {name: next(verdicts) for name in pairs}
            for pairs in rows
        ]


def _connect(address: str | None, workers: int | None) -> bool:
    """True when this call connected, and so has to disconnect."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {
            "num_cpus": workers or cores(),
            "include_dashboard": False,
            "object_store_memory": _STORE,
        }
    try:
        ray.init(address or "local", **options)
    except Exception as error:  # ConnectionError, ValueError, gRPC's: as the address has it
        where = address or "this machine"
        raise ScanError(
            f"Ray at {where}: {_one_line(error)} What is safe is kept: run the same command again, "
            "with another --address or when the machine is less busy"
        ) from error
    return True


def _room(gpus: float) -> int:
    """How many actors the cluster has room for."""
    there = ray.cluster_resources()
    room = int(there.get("CPU", 0))
    if gpus:
        room = min(room, int(there.get("GPU", 0) / gpus))
    if room < 1:
        raise ScanUsageError(
            f"this Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: "
            f"no room for an actor with 1 CPU and {gpus:g} GPUs"
        )
    return room


def _one_line(error: Exception) -> str:
    """What failed on the worker, without the stack that led there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, GuardrailError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"Ray failed: {lines[-1] if lines else type(error).__name__}"
