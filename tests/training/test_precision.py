"""bfloat16 is taken where the machine is faster in it, and nowhere else."""

import time

import pytest

torch = pytest.importorskip("torch")

from training import ppo_lag, precision, tuning  # noqa: E402


def _seconds(dtype: torch.dtype) -> float:
    square = torch.ones(768, 768).to(dtype)
    times = []
    for _ in range(8):
        started = time.thread_time()
        square @ square
        times.append(time.thread_time() - started)
    return min(times)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about the processor")
@pytest.mark.usefixtures("one_thread")
def test_bfloat16_is_taken_only_where_it_is_the_faster() -> None:
    slower = _seconds(torch.bfloat16) / _seconds(torch.float32)
    if precision.bf16_pays():
        assert slower < 1.5  # well under 1; the caches are shared
    else:
        assert slower > 0.5
        assert precision.fast_dtype() == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about the processor")
@pytest.mark.parametrize(("seconds", "pays"), [(0.5, True), (0.9, False), (2.0, False)])
def test_instructions_for_bfloat16_are_not_enough(
    monkeypatch: pytest.MonkeyPatch, seconds: float, pays: bool
) -> None:
    took = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(precision, "_seconds", took.__getitem__)
    assert precision.bf16_pays.__wrapped__() is pays


def test_recipes_take_what_the_machine_knows_and_what_they_are_told() -> None:
    assert tuning.TuningArgs().bf16 is precision.bf16_pays()
    assert ppo_lag.Args().dtype == precision.fast_dtype()
    assert ppo_lag.Args(dtype="bfloat16").dtype == "bfloat16"
