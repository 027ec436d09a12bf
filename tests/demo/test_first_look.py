from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from demo import first_look
from guardrail import Action, ArtifactError, Direction

ROOT = Path(__file__).parents[2]


def test_the_first_look_prints_a_judged_row_for_each_conversation() -> None:
    command = [sys.executable, "-m", "demo.first_look"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines() if line.split()]
    assert rows[0] == ["side", "text", "severity", "category", "action", "ms"]
    judged = [row for row in rows if row[0] in list(Direction)]
    assert len(judged) == len(first_look.conversations())
    for row in judged:
        assert row[-2] in list(Action)
        assert float(row[-1]) > 0


def test_the_conversations_cover_both_directions_and_harmless_ones_that_sound_bad() -> None:
    pairs = [pair for _, pair in first_look.conversations()]
    assert {pair.direction for pair in pairs} == set(Direction)
    assert 10 <= len(pairs) <= 12
    assert any("kill a Python process" in pair.prompt for pair in pairs)


def test_a_model_that_cannot_be_opened_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ArtifactError("model.onnx: its hash differs")

    monkeypatch.setattr(first_look, "Guard", broken)
    with pytest.raises(SystemExit) as end:
        first_look.main()
    assert end.value.code == "first look: model.onnx: its hash differs"
