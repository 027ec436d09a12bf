"""The mean of several models of one start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training import moderation, soup  # noqa: E402
from training.quantized import block_of, on_grid  # noqa: E402

TRAIN = moderation.Args(
    epochs=0.2, tokens_per_batch=300, max_tokens=48, prompt_tokens=12, overlap=8, bf16=False
)


@pytest.fixture(scope="module")
def runs(
    tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Two runs that went on from a third."""
    folder = tmp_path_factory.mktemp("runs")
    start, one, two = folder / "start", folder / "one", folder / "two"
    args = replace(TRAIN, base=str(tiny_base), data=tiny_data)
    moderation.main(replace(args, out=start))
    moderation.main(replace(args, out=one, init=start, seed=1))
    moderation.main(replace(args, out=two, init=start, seed=2))
    return start, one, two


def _state(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return state


def test_a_soup_is_the_mean_of_its_parts(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, one, two = runs
    soup.main(soup.Args(models=(one, two), out=tmp_path))
    first, second = _state(one), _state(two)
    name = "severity.weight"
    assert not torch.equal(first[name], second[name])
    for key, weight in _state(tmp_path).items():
        torch.testing.assert_close(weight, (first[key] + second[key]) / 2)


def test_the_start_may_be_a_part(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    start, one, two = runs
    soup.main(soup.Args(models=(one, two), start=start, out=tmp_path))
    parts = [_state(folder) for folder in runs]
    for key, weight in _state(tmp_path).items():
        torch.testing.assert_close(weight, sum(part[key] for part in parts) / 3)


def test_one_run_and_its_start_make_a_soup(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    start, one, _ = runs
    soup.main(soup.Args(models=(one,), start=start, out=tmp_path))
    before, after = _state(start), _state(one)
    for key, weight in _state(tmp_path).items():
        torch.testing.assert_close(weight, (before[key] + after[key]) / 2)


def test_the_start_may_count_twice(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    start, one, _ = runs
    soup.main(soup.Args(models=(one,), start=start, start_parts=2, out=tmp_path))
    before, after = _state(start), _state(one)
    for key, weight in _state(tmp_path).items():
        torch.testing.assert_close(weight, (2 * before[key] + after[key]) / 3)
    with pytest.raises(SystemExit, match="--start-parts is 0"):
        soup.main(soup.Args(models=(one,), start=start, start_parts=0, out=tmp_path))


def test_a_soup_on_the_grid_is_what_int8_can_hold(
    runs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    soup.main(soup.Args(models=runs[1:], out=tmp_path, on_grid=True))
    name = "encoder.encoder.layer.0.output.dense"
    weight = _state(tmp_path)[f"{name}.weight"]
    torch.testing.assert_close(on_grid(weight, block_of(name)), weight)


def test_models_that_began_apart_are_refused(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    start, one, two = runs
    with pytest.raises(SystemExit, match="began apart"):
        soup.main(soup.Args(models=(start, one), out=tmp_path))
    with pytest.raises(SystemExit, match="two or more"):
        soup.main(soup.Args(models=(two,), out=tmp_path))
    with pytest.raises(SystemExit, match="no finished run"):
        soup.main(soup.Args(models=(one, tmp_path / "none"), out=tmp_path))
    with pytest.raises(ValueError, match="model 2 is of another kind"):
        soup.mean([_state(one), {}])
