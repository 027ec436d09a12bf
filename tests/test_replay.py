"""Replaying verdicts under another policy: right, or said to be uncertain, and nothing lost."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from guardrail import Action, Assessment, Category, Direction, Guard, Policy, Severity, Thresholds
from guardrail.artifact import artifact_folder, read_manifest
from guardrail.audit import AuditLog
from guardrail.cli import app
from guardrail.policy import LEVELS, Rules
from guardrail.replay import ReplayError, replay, thresholds_at_hand
from guardrail.testing import FakeModerator

WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "thief": (Severity.MODERATE, Category.ECONOMIC_CRIME),
    "fool": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
}
FAKE: dict[str, dict[Direction, Thresholds]] = {"fake": {}}
TEXTS = ["a bomb", "hi", "you fool", "a thief", "you fool", "a bomb, fool"]
STRICT, BALANCED, PERMISSIVE = map(Policy.load, ("strict", "balanced", "permissive"))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scanned(tmp_path: Path) -> Path:
    guard = Guard(FakeModerator(WORDS))
    rows = [{"prompt": text, "guardrail": guard.check(text).to_json()} for text in TEXTS]
    return lines(tmp_path / "scan.jsonl", rows)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


# --- what is counted ------------------------------------------------------------------------------


def test_changes_are_counted_by_action_category_and_severity(scanned: Path) -> None:
    found = replay(scanned, PERMISSIVE, FAKE)
    assert (found.rows, found.changed, found.unchanged) == (6, 3, 3)
    assert found.actions[Action.FLAG, Action.ALLOW] == 2
    assert found.actions[Action.REFUSE, Action.REFUSE] == 2
    first, second = found.ordered()
    assert first[0].category is Category.INSULTING_BEHAVIOR
    assert (first[0].severity, first[0].before, first[0].after) == (
        Severity.MINOR, Action.FLAG, Action.ALLOW,
    )  # fmt: skip
    assert first[1].examples == ["3", "5"]
    assert (second[0].category, second[0].after) == (Category.ECONOMIC_CRIME, Action.FLAG)


def test_a_policy_replayed_on_its_own_record_changes_nothing(scanned: Path) -> None:
    found = replay(scanned, BALANCED, FAKE, policy_from=BALANCED)
    assert (found.changed, found.unchanged, found.unlike.rows) == (0, 6, 0)


def test_a_baseline_policy_stands_in_for_the_record_and_is_held_to_it(scanned: Path) -> None:
    found = replay(scanned, PERMISSIVE, FAKE, policy_from=STRICT)
    assert found.actions[Action.REFUSE, Action.ALLOW] == 2
    assert found.unlike.examples == ["3", "5"]  # strict would have refused what was flagged
    assert (found.unlike.rows, found.baseline) == (2, "strict@1")


def test_an_audit_log_is_replayed_over_all_its_files_by_row_number(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=2000, fsync="never")
    guard = Guard(FakeModerator(WORDS), audit=log)
    for text in TEXTS:
        guard.check(text)
    assert len(list(tmp_path.glob("audit.jsonl.0*"))) > 1
    found = replay(log.path, PERMISSIVE, FAKE)
    assert (found.rows, found.changed) == (6, 3)
    assert found.ordered()[0][1].examples == ["3", "5"]


@pytest.mark.parametrize("left", ["plain", "compressed"])
def test_an_audit_log_of_which_only_full_files_are_left_is_replayed(
    tmp_path: Path, left: str
) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", max_bytes=2000, fsync="never")
    guard = Guard(FakeModerator(WORDS), audit=log)
    for text in TEXTS:
        guard.check(text)
    log.path.unlink()
    full = sorted(tmp_path.glob("audit.jsonl.0*"))
    kept = sum(len(file.read_bytes().splitlines()) for file in full)
    assert kept > 1
    for file in full if left == "compressed" else []:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    code, out, error = run(log.path, "--policy", "permissive", "--uncalibrated", "--json")
    assert (code, error) == (0, "")
    assert json.loads(out)["rows"] == kept


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.csv", "out.csv.gz", "out.parquet"])
def test_every_format_of_a_scan_gives_the_same(scanned: Path, name: str) -> None:
    path = scanned.with_name(name)
    rows = [json.loads(line) for line in scanned.read_text().splitlines()]
    columns = {key: [json.dumps(r[key]) for r in rows] for key in ("prompt", "guardrail")}
    columns["error"] = [""] * 6
    if name.endswith(".parquet"):
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)
    else:
        opener: Any = gzip.open if name.endswith(".gz") else open
        with opener(path, "wt", newline="") as file:
            if "csv" in name:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
            else:
                file.write(scanned.read_text())
    assert replay(path, PERMISSIVE, FAKE).to_json() == replay(scanned, PERMISSIVE, FAKE).to_json()


def test_each_of_several_responses_is_replayed_under_its_name(tmp_path: Path) -> None:
    said = {t: Guard(FakeModerator(WORDS)).check("hi", t).to_json() for t in ("ok", "you fool")}
    found = {"response_0": said["ok"], "response_1": said["you fool"]}
    rows = [{"guardrail": found}, {"guardrail": found | {"response_0": None}}]
    path = lines(tmp_path / "scan.jsonl", rows)
    result = replay(path, PERMISSIVE, FAKE)
    assert (result.rows, result.changed, result.malformed.rows) == (3, 2, 0)
    assert result.ordered()[0][1].examples == ["1:response_1", "2:response_1"]


def test_a_row_may_hold_numbers_of_any_length(tmp_path: Path) -> None:
    row = {"n": 7, "guardrail": Guard(FakeModerator(WORDS)).check("a bomb").to_json()}
    path = lines(tmp_path / "scan.jsonl", [row])
    path.write_text(path.read_text().replace('"n": 7', f'"n": {"7" * 5000}'))
    assert replay(path, STRICT, FAKE).malformed.rows == 0


def test_what_has_no_verdict_is_counted_never_lost(tmp_path: Path) -> None:
    def fail(pairs: object) -> None:
        raise RuntimeError("out of memory")

    good = Guard(FakeModerator(WORDS)).check("a bomb").to_json()
    degraded = Guard(FakeModerator(WORDS, on_assess=fail)).check("a bomb").to_json()
    path = lines(
        tmp_path / "scan.jsonl",
        [
            {"guardrail": good},
            {"guardrail": degraded},
            {"prompt": 7, "error": "not a text"},
            {"guardrail": good | {"categories": {"Gossip": 1.0}}},  # an older taxonomy
            {"guardrail": good | {"model": "another-1"}},
            {"guardrail": good | {"severity_probabilities": {"none": 7}}},
            [1],
            {"guardrail": good | {"severity_probabilities": {"none": 10**400}}},
        ],
    )
    found = replay(path, Policy.load("audit-only"), FAKE)
    assert (found.changed, found.errors, found.malformed.rows) == (2, 1, 4)
    assert found.malformed.examples == ["4", "6", "7"]  # the first three
    assert found.unknown_model == {"another-1": 1}
    assert found.degraded == 1
    assert found.actions == {(Action.REFUSE, Action.FLAG): 1, (Action.REFUSE, Action.ALLOW): 1}
    assert found.rows == 8
    assert replay(path, STRICT, FAKE, uncalibrated=True).unknown_model == {}


@given(st.lists(st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.dictionaries(
        st.sampled_from(["guardrail", "error", "categories", "action", "verdict", "prev"]), inner
    ), max_leaves=9,
), max_size=9))  # fmt: skip
@settings(max_examples=100)
def test_whatever_stands_in_a_file_each_line_is_counted(scratch: Path, rows: list[Any]) -> None:
    good = Guard(FakeModerator(WORDS)).check("a bomb").to_json()
    path = lines(scratch / "x.jsonl", [*rows, {"guardrail": good}])
    assert replay(path, STRICT, FAKE).rows >= len(rows) + 1  # more for several responses


def test_a_failed_stage_keeps_the_stronger_of_both_actions(tmp_path: Path) -> None:
    """A verdict that could not be audited was assessed, and is degraded too."""
    said = Guard(FakeModerator(WORDS), "audit-only").check("hi").to_json() | {"degraded": True}
    path = lines(tmp_path / "x.jsonl", [{"guardrail": said}])
    assert replay(path, STRICT, FAKE).actions == {(Action.ALLOW, Action.REFUSE): 1}


def test_text_that_could_not_be_read_is_a_change_without_a_category(tmp_path: Path) -> None:
    said = Guard(FakeModerator(WORDS)).check("hi").to_json() | {
        "unreadable": True,
        "action": "flag",
    }
    found = replay(lines(tmp_path / "x.jsonl", [{"guardrail": said}]), STRICT, FAKE)
    ((group, _),) = found.ordered()
    assert (group.category, group.before, group.after) == (None, Action.FLAG, Action.REFUSE)


def test_the_thresholds_are_those_of_the_model_named_in_the_row(tmp_path: Path) -> None:
    manifest = read_manifest(artifact_folder(), verify=False)
    models = thresholds_at_hand()
    assert models[manifest.id][Direction.OUTPUT] == manifest.thresholds_of(Direction.OUTPUT)
    copy = tmp_path / "mine"
    copy.mkdir()
    text = (artifact_folder() / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(manifest.id, "mine-1"))
    assert "mine-1" in thresholds_at_hand([copy])
    seen = Assessment(
        Direction.OUTPUT,
        {Severity.NONE: 0.6, Severity.MINOR: 0.4, Severity.MODERATE: 0.0, Severity.SEVERE: 0.0},
        {c: float(c is Category.DRUGS) for c in Category},
        model="low",
    )
    low = {"low": {Direction.OUTPUT: Thresholds({Severity.MINOR: 0.3})}}
    said = BALANCED.decide(seen).to_json()
    path = lines(tmp_path / "x.jsonl", [{"guardrail": said}])
    assert replay(path, BALANCED, low).actions == {(Action.ALLOW, Action.FLAG): 1}
    assert replay(path, BALANCED, {}, uncalibrated=True).changed == 0


# --- rounding -------------------------------------------------------------------------------------


def assessed(minor: float, **categories: float) -> Assessment:
    return Assessment(
        Direction.INPUT,
        {Severity.NONE: 1 - minor, Severity.MINOR: minor, Severity.MODERATE: 0.0,
         Severity.SEVERE: 0.0},
        {c: categories.get(c.name, 0.0) for c in Category},
        model="m",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "uncertain"),
    [
        (assessed(0.49996, DRUGS=1.0), True),  # written 0.5: below, or not?
        (assessed(0.50004, DRUGS=1.0), True),
        (assessed(0.49986, DRUGS=1.0), True),  # a sum of three rounded probabilities: 0.00015
        (assessed(0.4997, DRUGS=1.0), False),
        (assessed(0.9, DRUGS=0.6, VIOLENCE=0.49998), True),  # Violence costs more here
        (assessed(0.9, DRUGS=0.6, VIOLENCE=0.4998), False),
        (assessed(0.9, DRUGS=0.30003, VIOLENCE=0.30004), True),  # which of them stands in?
        (assessed(0.9, DRUGS=0.3, VIOLENCE=0.2), False),
        (assessed(0.1, DRUGS=0.30003, VIOLENCE=0.30004), False),  # for nothing, in any case
        (assessed(0.0), False),
    ],
)
def test_a_row_that_rounding_decides_is_uncertain(
    seen: Assessment, uncertain: bool, tmp_path: Path
) -> None:
    own = {Category.VIOLENCE: {Severity.MINOR: Action.REFUSE}}
    grid = Rules({Severity.MINOR: Action.FLAG}, own)
    policy = Policy("p", input=grid)
    path = lines(tmp_path / "x.jsonl", [{"guardrail": policy.decide(seen).to_json()}])
    found = replay(path, policy, {"m": {}})
    assert (found.uncertain.rows, found.changed, found.unchanged) == (
        int(uncertain), 0, int(not uncertain),
    )  # fmt: skip


def test_a_row_with_too_many_ways_to_round_is_uncertain_and_nothing_else(tmp_path: Path) -> None:
    every = {c.name: 0.5 for c in Category}
    policy = Policy("p", input=Rules({Severity.MINOR: Action.FLAG}))
    said = policy.decide(assessed(0.9, **every)).to_json()
    path = lines(tmp_path / "x.jsonl", [{"guardrail": said}])
    found = replay(path, policy, {"m": {}}, policy_from=policy)
    assert (found.uncertain.rows, found.unlike.rows, found.rows) == (1, 0, 1)


near = st.sampled_from([0.0, 0.2, 0.5, 0.50005, 0.7, 1.0]).flatmap(
    lambda p: st.floats(max(0.0, p - 2e-4), min(1.0, p + 2e-4))
)
cut = st.sampled_from([0.0, 0.2, 0.5, 0.50005, 0.7, 1.0])
level = st.sampled_from(LEVELS)
some = st.sampled_from([Category.DRUGS, Category.VIOLENCE, Category.ECONOMIC_CRIME])
actions = st.dictionaries(level, st.sampled_from(list(Action)))
rules = st.builds(
    Rules,
    actions,
    st.dictionaries(some, actions),
    st.builds(
        Thresholds, st.dictionaries(st.sampled_from(LEVELS), cut), st.dictionaries(some, cut)
    ),
    st.dictionaries(some, st.dictionaries(level, cut)),
)
policies = st.builds(lambda r: Policy("p", input=r), rules)


@st.composite
def assessments(draw: st.DrawFn) -> Assessment:
    reached = sorted((draw(near) for _ in LEVELS), reverse=True)
    edges = [1.0, *reached, 0.0]
    found = draw(st.dictionaries(some, near))
    return Assessment(
        Direction.INPUT,
        {s: edges[s] - edges[s + 1] for s in Severity},
        {c: found.get(c, 0.1) for c in Category},
        model="m",
    )


@given(st.lists(assessments(), min_size=1, max_size=4), policies, policies, cut)
@settings(max_examples=100)
def test_a_replay_never_says_what_exact_probabilities_would_not(
    scratch: Path,
    seen: list[Assessment],
    old: Policy,
    new: Policy,
    calibrated: float,
) -> None:
    """Near thresholds, ties and all: what it is certain of is so, row by row."""
    own = Thresholds({Severity.MINOR: calibrated}, {Category.DRUGS: calibrated})
    models = {"m": {Direction.INPUT: own}}
    path = scratch / "x.jsonl"
    for one in seen:
        before, after = old.decide(one, own), new.decide(one, own)
        lines(path, [{"guardrail": before.to_json()}])
        for found in (replay(path, new, models), replay(path, new, models, policy_from=old)):
            assert found.uncertain.rows or found.actions == {(before.action, after.action): 1}
            assert found.unlike.rows == 0


# --- the command line -----------------------------------------------------------------------------


def run(*args: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["policy", "replay", *map(str, args)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_shows_changes_with_examples_and_notes(scanned: Path) -> None:
    with scanned.open("a") as file:
        file.write('junk\n{"error":"blank"}\n')
    code, out, error = run(scanned, "--policy", "permissive", "--uncalibrated")
    assert (code, error) == (0, "")
    assert "permissive@1 against as recorded: of 8 rows 3 change, 3 do not" in out
    assert "flag -> allow: 2" in out
    assert [line.split()[-2:] for line in out.splitlines() if "Insulting" in line] == [["3,", "5"]]
    assert "no verdicts: 1 rows (such as 7)" in out
    assert "not judged by the scan, but given an error: 1 rows" in out


def test_the_command_says_which_model_is_not_at_hand(scanned: Path) -> None:
    code, out, _ = run(scanned, "--policy", "permissive")
    assert code == 0
    assert "the thresholds of model 'fake' are not at hand: 6 rows" in out


def test_a_baseline_that_did_not_decide_the_record_is_not_said_to_have(scanned: Path) -> None:
    code, out, _ = run(
        scanned, "--policy", "permissive", "--policy-from", "strict", "--uncalibrated"
    )
    assert code == 0
    assert "recorded otherwise than strict@1 decides, for another policy," in out
    assert "decided then: 2 rows (such as 3, 5)" in out


def test_the_command_gives_json(scanned: Path) -> None:
    code, out, _ = run(scanned, "--policy", "strict", "--policy-from", "balanced", "--json",
                       "--uncalibrated", "--examples", "1")  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert {"from": "flag", "to": "refuse", "rows": 2} in found["actions"]
    assert [change["examples"] for change in found["changes"]] == [["3"]]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere", "--policy", "strict"], "nowhere: no such file"),
        (["nowhere/x", "--policy", "strict"], "nowhere/x: no such file"),
        ([".", "--policy", "strict"], ".: is a folder: name a file in it"),
        (["IN", "--policy", "strickt"], "did you mean 'strict'?"),
        (["IN", "--policy", "strict", "--policy-from", "nothing"], "neither a preset"),
        (["IN", "--policy", "strict", "--model", "nowhere"], "not a model folder"),
        (["IN"], "--policy"),
        (["POLICY", "--policy", "strict"], "none of its 1 rows has a verdict"),
        (["BROKEN", "--policy", "strict"], "not a readable Parquet file"),
        (["CUT", "--policy", "strict"], "cannot be read to its end"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(scanned: Path, args: list[str], says: str) -> None:
    made = {
        "POLICY": ("policy.toml", b'name = "x"\n'),
        "BROKEN": ("x.parquet", b"PAR1"),
        "CUT": ("x.jsonl.gz", gzip.compress(scanned.read_bytes())[:-9]),
    }
    for name, content in made.values():
        scanned.with_name(name).write_bytes(content)
    paths = {"IN": scanned} | {k: scanned.with_name(name) for k, (name, _) in made.items()}
    code, out, error = run(*(paths.get(arg, arg) for arg in args))
    assert (code, out) == (2, "")
    assert says in error
    assert len(error.splitlines()) == 1


def test_a_file_without_rows_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="none of its 0 rows"):
        replay(lines(tmp_path / "x.jsonl", []), STRICT, FAKE)
