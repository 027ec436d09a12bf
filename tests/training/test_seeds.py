"""The spread over seeds: of one recipe only, trained where it is not there yet."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from training import moderation
from training.seeds import FIGURES, Args, main, spread


def summary(seed: int, auroc: float, **changes: Any) -> dict[str, Any]:
    args = json.loads(json.dumps(asdict(moderation.Args(seed=seed)), default=str))
    figures = dict.fromkeys(FIGURES, 0.5) | {"auroc": auroc}
    return {"args": args | changes, "history": [{"output": {}}, {"output": figures}]}


def test_the_spread_is_that_of_the_last_validation() -> None:
    table = spread([summary(1, 0.90), summary(2, 0.92), summary(3, 0.94)])
    assert set(table) == {"output"}
    assert table["output"]["auroc"] == pytest.approx(
        {"mean": 0.92, "deviation": 0.02, "low": 0.90, "high": 0.94}
    )
    assert table["output"]["kappa"]["deviation"] == 0


def test_runs_of_two_recipes_have_no_spread() -> None:
    with pytest.raises(SystemExit, match=r"differ in \['focal'\]"):
        spread([summary(1, 0.9), summary(2, 0.9, focal=1.0)])


def test_an_option_that_an_older_run_did_not_know_is_no_difference() -> None:
    older = summary(1, 0.9)
    del older["args"]["in_prompt"]
    assert spread([older, summary(2, 0.9)])


def test_the_command_trains_each_seed_once(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = moderation.Args(
        base=str(tiny_base), data=tiny_data, epochs=0.2, tokens_per_batch=300, max_tokens=48,
        prompt_tokens=12, overlap=8, bf16=False,
    )  # fmt: skip
    args = Args(seeds=(1, 2), out=tmp_path, train=recipe)
    main(args)
    assert "| output | auroc |" in capsys.readouterr().out
    weights = {s: (tmp_path / s / "model.pt").read_bytes() for s in ("1", "2")}
    assert weights["1"] != weights["2"]
    first = (tmp_path / "1" / "model.pt").stat().st_mtime_ns
    main(args)
    assert (tmp_path / "1" / "model.pt").stat().st_mtime_ns == first
    assert json.loads((tmp_path / "spread.json").read_text())["output"]["auroc"]["mean"] > 0


def test_one_run_or_an_unfinished_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="two runs or more"):
        main(Args(models=(tmp_path,)))
    with pytest.raises(SystemExit, match="no finished run"):
        main(Args(models=(tmp_path / "a", tmp_path / "b")))
