"""A turn of the page's chat, without the page."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the tiny policy is made with the training extra")

import policy_kit

from demo.turns import Connection, answer
from guardrail import Category, Guard, Severity
from guardrail.testing import FakeModerator


def test_a_policy_that_was_built_answers_guarded_in_place_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDRAIL_DEMO_POLICY", str(tmp_path / "policy"))
    assert "canned answers" in Connection().name
    policy_kit.reciting_policy(tmp_path / "policy", "Hi you!")
    assert Connection().name == "tiny, on this machine"
    assert Connection("http://127.0.0.1:9", "other").name == "other at http://127.0.0.1:9"

    def last(word: str) -> str:
        guard = Guard(FakeModerator({word: (Severity.SEVERE, Category.VIOLENCE)}))
        return list(answer("Hello", [], guard, Connection()))[-1].answer

    assert last("bomb") == "Hi you!"
    assert "Hi you!" not in last("you!")
