"""What changes between two policies: everything that decides, and nothing that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guardrail import Action, Category, Direction, Policy, Severity
from guardrail._policy_diff import Change, changes
from guardrail.cli import app
from guardrail.policy import LEVELS

BALANCED = Policy.load("balanced")


def mine(text: str) -> Policy:
    return Policy.parse(f'name = "mine"\nextends = "balanced"\n{text}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ('refusal = ""\n[output.categories."Violence"]\nminor = "flag"', []),  # as it was anyway
        ('on_error = "allow"', [("on_error", "refuse", "allow", None, 0, "looser")]),
        ('refusal = "No."', [("refusal", "", "No.", None, 0, "other")]),
        ('refusals = { Drugs = "No." }', [("refusal", "", "No.", None, 1, "other")]),
        ('language = "fr"', [("language", "en", "fr", None, 0, "other")]),
        ('[input]\nminor = "refuse"', [("minor", "flag", "refuse", "input", 19, "stricter")]),
        ('[output]\nminor = "allow"', [("minor", "flag", "allow", "output", 18, "looser")]),
        (
            '[input.categories."Drugs"]\nthreshold = 0.2\nthresholds = { severe = 0.3 }',
            [("held from", None, 0.2, "input", 1, "other"),
             ("P(>= severe)", None, 0.3, "input", 1, "other")],
        ),
    ],
)  # fmt: skip
def test_changes_are_grouped_and_weighed(text: str, expected: list[tuple[object, ...]]) -> None:
    found = changes(BALANCED, mine(text))
    assert [
        (c.what, c.before, c.after, c.direction, len(c.categories), c.effect) for c in found
    ] == expected


def test_a_lower_threshold_is_stricter() -> None:
    low, high = (mine(f"[input.thresholds]\nminor = {t}") for t in (0.2, 0.4))
    (change,) = changes(high, low)
    assert (change.effect, len(change.categories)) == ("stricter", 19)
    assert changes(low, high)[0].effect == "looser"


actions = st.sampled_from([action.value for action in Action])
words = st.sampled_from([level.label for level in LEVELS])
probabilities = st.sampled_from([0.1, 0.5])
rows = st.fixed_dictionaries(
    {},
    optional={
        **{level.label: actions for level in LEVELS},
        "threshold": probabilities,
        "thresholds": st.dictionaries(words, probabilities),
    },
)
directions = st.fixed_dictionaries(
    {},
    optional={
        **{level.label: actions for level in LEVELS},
        "thresholds": st.dictionaries(words, probabilities),
        "categories": st.dictionaries(st.sampled_from([c.value for c in Category][:3]), rows),
    },
)


def toml(data: dict, prefix: str) -> str:
    plain = [f"{k} = {json.dumps(v)}" for k, v in data.items() if not isinstance(v, dict)]
    tables = [toml(v, f'{prefix}."{k}"') for k, v in data.items() if isinstance(v, dict)]
    return "\n".join([f"[{prefix}]", *plain, *tables])


@given(directions, directions)
@settings(max_examples=200)
def test_the_changes_are_all_there_is_between_two_policies(old: dict, new: dict) -> None:
    """Each cell that differs is in one change, and each change is about cells that differ."""
    before, after = (mine(toml(data, "output")) for data in (old, new))
    named = {
        (c.what, category): (c.before, c.after) for c in changes(before, after)
        for category in c.categories
    }  # fmt: skip
    for category in Category:
        for level in LEVELS:
            pair = tuple(p.output.action(category, level) for p in (before, after))
            assert named.get((level.label, category), (0, 0)) == (
                pair if pair[0] != pair[1] else (0, 0)
            )
    assert changes(before, before) == []
    back = {(c.what, c.direction, c.categories, c.after, c.before) for c in changes(after, before)}
    assert back == {
        (c.what, c.direction, c.categories, c.before, c.after) for c in changes(before, after)
    }


def test_a_change_as_json_names_its_categories() -> None:
    change = Change("minor", Action.ALLOW, Action.FLAG, Direction.INPUT, (Category.DRUGS,))
    assert json.loads(json.dumps(change.to_json())) == {
        "direction": "input", "categories": ["Drugs"], "what": "minor", "from": "allow",
        "to": "flag", "effect": "stricter",
    }  # fmt: skip


def run(*args: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["policy", "diff", *map(str, args)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_exits_like_diff(tmp_path: Path) -> None:
    assert run("strict", "strict") == (0, "no difference\n", "")
    code, out, _ = run("balanced", "strict", "--json")
    assert code == 1
    assert {change["what"] for change in json.loads(out)} >= {"unreadable", Severity.MINOR.label}
    code, out, error = run("balanced", "nothing")
    assert (code, out) == (2, "")
    assert len(error.splitlines()) == 1


def test_the_command_puts_what_is_alike_in_one_line(tmp_path: Path) -> None:
    policy = tmp_path / "mine.toml"
    policy.write_text('name = "mine"\nextends = "balanced"\n[output]\nminor = "allow"\n')
    code, out, _ = run("balanced", policy)
    assert code == 1
    (line,) = (line for line in out.splitlines() if "output" in line)
    assert "all but Privacy Violation" in line
    assert line.split()[-3:] == ["flag", "allow", "looser"]
