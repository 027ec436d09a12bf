"""bfloat16 is taken where the machine computes in it, and nowhere else."""

import time

import pytest

torch = pytest.importorskip("torch")

from training import ppo_lag, precision, tuning  # noqa: E402


def _seconds(dtype: torch.dtype) -> float:
    square = torch.ones(768, 768).to(dtype)
    square @ square
    times = []
    for _ in range(3):
        started = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - started)
    return min(times)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about the processor")
def test_bfloat16_is_taken_only_where_it_is_not_many_times_slower() -> None:
    slower = _seconds(torch.bfloat16) / _seconds(torch.float32)
    if precision.knows_bf16():
        assert slower < 8
    else:
        assert slower > 1  # so nothing is lost by leaving it
        assert precision.fast_dtype() == "float32"


def test_recipes_take_what_the_machine_knows_and_what_they_are_told() -> None:
    assert tuning.TuningArgs().bf16 is precision.knows_bf16()
    assert ppo_lag.Args().dtype == precision.fast_dtype()
    assert ppo_lag.Args(dtype="bfloat16").dtype == "bfloat16"
