"""`guardrail calibrate`: what it asks of rows, what it writes, and whether that keeps its word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guardrail
from guardrail import Category, Direction, Guard, Policy, Severity
from guardrail._calibrate import CalibrationError, Goal, Row, calibrate
from guardrail._cli_calibrate import _judged, _said
from guardrail._labelled import Labelled, LabelledFileError, read_labelled
from guardrail._policy_toml import extends_of, policy_toml, read_back
from guardrail.moderator import OnnxModerator
from guardrail.policy import Thresholds
from guardrail.testing import FakeModerator
from guardrail.verdict import Assessment, Pair

ROOT = Path(guardrail.__file__).parents[1]
NOUNS = ["lamp", "river", "violin", "ladder", "soup", "garden", "letter", "window", "coat", "train"]
VERBS = ["paint", "mend", "sell", "draw", "find", "wash", "carry", "describe", "steal", "burn"]


def run(*args: str, timeout: float = 300) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "guardrail.cli", "calibrate", *args],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=timeout,
    )


def prompts(n: int) -> list[dict[str, Any]]:
    """Distinct texts, labelled by a rule that no model has to agree with."""
    return [
        {
            "prompt": f"How do I {VERBS[i % 10]} a {NOUNS[i // 10 % 10]} in {1900 + i}?",
            "unsafe": i % 10 >= 8,
        }
        for i in range(n)
    ]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- rows ----------------------------------------------------------------------------------------


def test_every_kind_of_label_is_understood(tmp_path: Path) -> None:
    rows, problems = read_labelled(
        write(
            tmp_path / "rows.jsonl",
            [
                {"prompt": "a", "severity": 3},
                {"prompt": "a", "severity": "Minor", "categories": ["Violence"]},
                {"prompt": "a", "response": "b", "is_safe": True},
                {"prompt": "a", "response": " ", "unsafe": 1},
                {"prompt": "a", "categories": []},
                {"response": "b", "unsafe": True, "categories": []},
            ],
        )
    )
    assert problems == []
    assert [r.unsafe for r in rows] == [True, True, False, True, False, True]
    assert [r.severity for r in rows] == [3, 1, 0, None, 0, None]
    assert rows[1].categories == {Category.VIOLENCE}
    assert rows[2].categories == frozenset()  # harmless: in none
    assert rows[2].pair.direction is Direction.OUTPUT
    assert rows[3].pair.direction is Direction.INPUT


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, "no label"),
        ({"unsafe": True}, "no text"),
        ({"prompt": "a", "severity": 4}, "severity"),
        ({"prompt": "a", "severity": True}, "severity"),
        ({"prompt": "a", "severity": "awful"}, "'awful' is not a severity"),
        ({"prompt": "a", "unsafe": "yes"}, "neither true nor false"),
        ({"prompt": 1, "unsafe": True}, "not a text but int"),
        ({"prompt": "a", "categories": "Violence"}, "not a list"),
        ({"prompt": "a", "categories": ["Violense"]}, "did you mean 'Violence'?"),
        ({"prompt": "a", "unsafe": True, "severity": 0}, "contradict"),
        ({"prompt": "a", "is_safe": True, "categories": ["Drugs"]}, "contradict"),
        (["a"], "not an object but list"),
        ({"prompt": "a" * 2_000_001, "unsafe": True}, "a text of 2,000,001 characters, more than"),
    ],
)
def test_a_malformed_row_is_listed_with_its_line_and_left_out(
    tmp_path: Path, row: object, says: str
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "fine", "unsafe": False}, row])
    rows, (problem,) = read_labelled(path)
    assert len(rows) == 1
    assert problem.startswith("line 2: ")
    assert says in problem


def test_a_number_of_any_length_beside_the_labels_is_of_no_concern(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "a", "severity": 2, "unsafe": 1, "n": {"1" * 5000}}}\n')
    rows, problems = read_labelled(path)
    assert (len(rows), problems) == (1, [])


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LabelledFileError, match="no such file"):
        read_labelled(tmp_path / "nowhere.jsonl")


# --- fitting -------------------------------------------------------------------------------------


def texts(n: int, seed: int = 0, direction: Direction = Direction.OUTPUT) -> list[Row]:
    """Texts with a true severity, seen by a model that is right on average and never sure."""
    rng = np.random.default_rng(seed)
    rows = []
    for severity in rng.integers(0, 4, n):
        logits = rng.normal(2.0 * severity - 2, 1.5) - np.array([0.0, 2.0, 4.0])
        edges = np.concatenate([[1.0], 1 / (1 + np.exp(-logits)), [0.0]])
        category = list(Category)[int(rng.integers(0, 3))]
        names = frozenset({category}) if severity else frozenset[Category]()
        chances = dict.fromkeys(Category, 0.01)
        chances |= {c: float(rng.beta(2, 5)) for c in list(Category)[:3]}
        if names:
            chances[category] = float(rng.beta(5, 2))
        seen = Assessment(direction, {s: float(edges[s] - edges[s + 1]) for s in Severity}, chances)
        pair = Pair("p") if direction is Direction.INPUT else Pair("p", "r")
        rows.append((Labelled(pair, bool(severity), Severity(severity), names), seen))
    return rows


def decide(policy: Policy, rows: Sequence[Row]) -> list[Any]:
    return [policy.decide(seen) for _, seen in rows]


def test_the_target_rate_is_kept_by_the_policy_itself() -> None:
    rows = texts(1000)
    policy, (found,) = calibrate(Policy.load("balanced"), {}, rows, Goal(target_fpr=0.05))
    harmless = [row for row in rows if not row[0].unsafe]
    flagged = np.mean([v.severity > 0 for v in decide(policy, harmless)])
    assert flagged <= 0.05
    assert flagged > 0.03
    rate = found.rates["harmless flagged"]
    assert rate.after == pytest.approx(flagged)
    assert rate.low <= 0.05 <= rate.high or rate.high < 0.06


def test_a_category_is_named_in_at_most_the_target_share_of_the_texts_it_is_not_in() -> None:
    rows = texts(2000)
    policy, (found,) = calibrate(Policy.load("balanced"), {}, rows, Goal(target_fpr=0.05))
    assert set(found.categories) == set(list(Category)[:3])
    for category in found.categories:
        outside = [row for row in rows if category not in (row[0].categories or ())]
        threshold = policy.output.thresholds.categories[category]
        over = np.mean([seen.categories[category] >= threshold for _, seen in outside])
        assert over <= 0.05


@pytest.mark.parametrize("harm", [Severity.SEVERE, Severity.MODERATE, Severity.MINOR])
@pytest.mark.parametrize("preset", ["balanced", "strict", "permissive", "audit-only"])
def test_a_promise_is_kept_by_the_policy_itself(preset: str, harm: Severity) -> None:
    rows = texts(800)
    goal = Goal(target_fpr=0.05, alpha=0.2, delta=0.1, harm=harm)
    if preset == "permissive" and harm < Severity.SEVERE:
        pytest.skip("permissive delivers these harms by its grid")
    policy, (found,) = calibrate(Policy.load(preset), {}, rows, goal)
    harms = [row for row in rows if (row[0].severity or 0) >= harm]
    verdicts = decide(policy, harms)
    passed = np.mean([v.severity == 0 if preset == "audit-only" else v.delivers for v in verdicts])
    assert found.promise is not None
    assert passed == pytest.approx(found.promise.passed)
    assert found.promise.passed < found.promise.bound <= 0.2


def test_a_promise_holds_on_new_texts_with_its_confidence() -> None:
    """delta 0.1: of 40 calibrations at most a few break their word on fresh texts."""
    fresh = [row for row in texts(8000, seed=999) if row[0].severity == Severity.SEVERE]
    goal = Goal(target_fpr=0.1, alpha=0.1, delta=0.1)
    broken = 0
    for seed in range(40):
        policy, _ = calibrate(Policy.load("balanced"), {}, texts(250, seed), goal)
        broken += float(np.mean([v.delivers for v in decide(policy, fresh)])) > 0.105
    assert broken <= 9  # 4 expected at most; 10 or more has a chance below 1 %


def test_a_promise_has_its_price_in_harmless_texts() -> None:
    rows = texts(800)
    _, (without,) = calibrate(Policy.load("balanced"), {}, rows, Goal(0.02))
    _, (found,) = calibrate(Policy.load("balanced"), {}, rows, Goal(0.02, alpha=0.05))
    withheld = found.rates["harmless withheld"]
    assert withheld.after > without.rates["harmless withheld"].after
    assert found.promise is not None
    assert found.promise.lowered > 0
    # What is said of the target is not said of the thresholds that the promise has lowered.
    assert any("target alone would be met" in line for line in _said(found, Goal(0.02, alpha=0.05)))
    assert any("target is met" in line for line in _said(without, Goal(0.02)))


def test_too_few_harmless_rows_are_told_with_the_number_needed() -> None:
    with pytest.raises(CalibrationError, match="1000 are needed"):
        calibrate(Policy.load("balanced"), {}, texts(100), Goal(0.001))


def test_too_few_severe_rows_are_told_with_the_number_needed() -> None:
    with pytest.raises(CalibrationError, match=r"230 are needed to promise alpha=0\.01"):
        calibrate(Policy.load("balanced"), {}, texts(200), Goal(0.1, alpha=0.01))


def test_a_grid_that_delivers_severe_harm_allows_no_promise() -> None:
    policy = Policy.parse(
        'name = "x"\nextends = "balanced"\n[output.categories]\n'
        + "\n".join(
            f'"{c.value}" = {{ minor = "allow", moderate = "allow", severe = "allow" }}'
            for c in Category
        )
    )
    with pytest.raises(CalibrationError, match="the grid"):
        calibrate(policy, {}, texts(400), Goal(0.1, alpha=0.1))


def test_a_direction_without_rows_is_left_as_it_was() -> None:
    base = Policy.load("balanced")
    policy, found = calibrate(base, {}, texts(400, direction=Direction.INPUT), Goal(0.05))
    assert [f.direction for f in found] == [Direction.INPUT]
    assert policy.output == base.output


def test_what_is_written_reads_back_as_what_was_fitted(tmp_path: Path) -> None:
    rows = [*texts(600), *texts(600, seed=5, direction=Direction.INPUT)]
    policy, found = calibrate(Policy.load("strict"), {}, rows, Goal(0.05, alpha=0.1))
    path = tmp_path / "p.toml"
    path.write_text(policy_toml('odd "name"\\', "strict", ["a comment"], found))
    read_back(path, policy)
    assert Policy.load(path).name == 'odd "name"\\'


def test_the_models_own_thresholds_are_where_it_starts() -> None:
    model = {Direction.OUTPUT: Thresholds({Severity.MODERATE: 0.999})}
    rows = texts(600)
    _, (found,) = calibrate(Policy.load("balanced"), model, rows, Goal(0.05))
    assert found.rates["harmful withheld"].before < 0.2


# --- the command ---------------------------------------------------------------------------------


def test_the_policy_it_writes_keeps_the_target_with_the_real_model(tmp_path: Path) -> None:
    rows = prompts(120)
    source, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "mine.toml"
    done = run(str(source), "--target-fpr", "0.1", "--output", str(output), "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["directions"]
    guard = Guard(OnnxModerator("small", device="cpu", locate=False), Policy.load(output))
    harmless = [row["prompt"] for row in rows if not row["unsafe"]]
    flagged = np.mean([guard.check(prompt=text).severity > 0 for text in harmless])
    assert flagged <= 0.1
    assert report["rates"]["harmless flagged"]["after"] == pytest.approx(flagged)
    assert not (tmp_path / "mine.toml.partial").exists()
    for command in (["policy", "validate"], ["policy", "show"]):
        shown = subprocess.run(
            [sys.executable, "-m", "guardrail.cli", *command, str(output)],
            capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert b"mine@1" in shown.stdout


def test_a_policy_file_can_be_what_it_extends(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text('name = "base"\nextends = "strict"\n[input]\nminor = "flag"\n')
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "mine.toml"
    source = write(tmp_path / "rows.jsonl", prompts(30))
    done = run(str(source), "--target-fpr", "0.2", "--output", str(output), "--policy", str(base))
    assert done.returncode == 0, done.stderr
    assert 'extends = "../base.toml"' in output.read_text()
    assert Policy.load(output).input.actions[Severity.MINOR].value == "flag"


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_policy_is_extended_whatever_its_folder_is_called_or_told_not_to_be_before_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "rows.jsonl", prompts(30))
    for folder in (b"e\x7f", b"d\xff"):
        os.mkdir(folder)
        Path(os.fsdecode(folder), "base.toml").write_text('name = "base"\nextends = "strict"\n')
    made = run(
        str(source), "--target-fpr", "0.2", "--output", "p.toml", "--policy", "e\x7f/base.toml"
    )
    assert made.returncode == 0, made.stderr
    assert Policy.load("p.toml").output == Policy.load("strict").output
    for output in ([], ["--output", "q.toml"]):
        done = run("no-such-rows.jsonl", *output, "--policy", os.fsdecode(b"d\xff/base.toml"))
        (line,) = done.stderr.decode().splitlines()
        assert done.returncode == 2
        assert "base.toml: not valid UTF-8, so that no policy can extend it" in line


def test_without_an_output_the_policy_is_all_of_stdout_and_the_report_is_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "rows.jsonl", prompts(30))
    (tmp_path / "base.toml").write_text('name = "base"\nextends = "strict"\n')
    for base in ("balanced", "base.toml"):
        done = run("rows.jsonl", "--target-fpr", "0.2", "--policy", base)
        assert done.returncode == 0, done.stderr
        assert b"harmless flagged" in done.stderr
        assert sorted(tmp_path.iterdir()) == [tmp_path / "base.toml", source]
        (tmp_path / "mine.toml").write_bytes(done.stdout)
        assert Policy.load("mine.toml").name == "rows"
        assert f'extends = "{base}"'.encode() in done.stdout
        to_file = run("rows.jsonl", "--target-fpr", "0.2", "--policy", base, "--output",
                      "rows.toml", "--json")  # fmt: skip
        assert (tmp_path / "rows.toml").read_bytes() == done.stdout
        assert json.loads(to_file.stdout)["policy"] == done.stdout.decode()
        for path in ("rows.toml", "mine.toml"):
            (tmp_path / path).unlink()


def test_a_policy_is_found_from_an_output_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far" / "away")
    base = tmp_path / "base.toml"
    base.write_text('name = "base"\nextends = "strict"\n')
    at = tmp_path / "near" / "mine.toml"
    at.write_text(f'name = "x"\nextends = "{extends_of(str(base), at.parent)}"\n')
    assert Policy.load(at).input == Policy.load("strict").input


def test_what_an_earlier_run_did_not_leave_is_no_start(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", prompts(40))
    (tmp_path / "p.toml.partial").write_text("[" * 100_000 + "\n")
    done = run(str(source), "--target-fpr", "0.1", "--output", str(tmp_path / "p.toml"))
    assert (done.returncode, done.stderr) == (0, b"")


def test_assessments_that_were_damaged_are_made_anew(tmp_path: Path) -> None:
    rows = [Labelled(Pair(f"{n}"), False, Severity.NONE, frozenset()) for n in range(3)]
    judged: list[Pair] = []
    moderator = FakeModerator({}, on_assess=judged.extend)
    whole = list(_judged(moderator, rows, tmp_path / "p.partial"))
    head, first, *rest = (tmp_path / "p.partial").read_bytes().splitlines(keepends=True)
    for damaged in (b"{}\n", b"[1]\n", first.replace(b"0.", b"7."), first.replace(b"input", b"?")):
        (tmp_path / "p.partial").write_bytes(b"".join([head, damaged, *rest]))
        judged.clear()
        assert list(_judged(moderator, rows, tmp_path / "p.partial")) == whole
        assert len(judged) == 3
    assert len(list(_judged(moderator, rows, tmp_path / "p.partial"))) == 3
    assert len(judged) == 3  # for nothing was damaged any more


def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", prompts(200))
    whole, broken = tmp_path / "whole" / "p.toml", tmp_path / "broken" / "p.toml"
    for path in (whole, broken):
        path.parent.mkdir()
    assert run(str(source), "--output", str(whole)).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "guardrail.cli", "calibrate", str(source), "--output", str(broken)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    partial = broken.with_name("p.toml.partial")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 3000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with partial.open("ab") as file:  # a line cut short
        file.write(b'{"direction": "inp')
    judged = partial.read_bytes().count(b"\n")
    assert 1 < judged <= 200
    assert run(str(source), "--output", str(broken)).returncode == 0
    assert broken.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--target-fpr", "0"], "--target-fpr: a share between 0 and 1"),
        (["--target-fpr", "1.5"], "--target-fpr: a share between 0 and 1"),
        (["--alpha", "1"], "--alpha: a share between 0 and 1"),
        (["--target-fpr", "1e-300"], "1e-300 is a smaller share than rows can show"),
        (["--target-fpr", "1e-320"], "is a smaller share than rows can show"),
        (["--target-fpr", "0.0001"], "10000 are needed"),
        (["--target-fpr", "0.2", "--harm", "minor"], "--delta and --harm are of --alpha"),
        (["--target-fpr", "0.2", "--delta", "0.2"], "--delta and --harm are of --alpha"),
        (["--target-fpr", "0.1", "--alpha", "0.1"], "22 are needed to promise"),
        (["--policy", "balancd"], "did you mean 'balanced'?"),
        (["--model", "tiny"], "'tiny'"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(tmp_path: Path, extra: list[str], says: str) -> None:
    source = write(tmp_path / "rows.jsonl", prompts(20))
    done = run(str(source), "--output", str(tmp_path / "p.toml"), *extra)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert says in line
    assert list(tmp_path.iterdir()) == [source]  # nothing was judged


@pytest.mark.parametrize(
    ("name", "says"),
    [("a\nb.toml", "printable"), (b"\xff.toml", "printable"), ("strict", "name of a preset")],
)
def test_an_output_whose_policy_could_have_no_such_name_is_refused_before_the_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | bytes, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("no-such-rows.jsonl", "--output", os.fsdecode(name))
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert says in line


def test_rows_of_any_name_make_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"a\nname = 'other' \xff.jsonl")
    write(tmp_path / name, prompts(20))
    done = run(name, "--target-fpr", "0.2")
    assert done.returncode == 0, done.stderr
    assert Policy.parse(done.stdout.decode()).name == "calibrated"


def test_an_output_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    source, output = write(tmp_path / "rows.jsonl", prompts(20)), tmp_path / "p.toml"
    output.write_text("mine")
    done = run(str(source), "--output", str(output), "--target-fpr", "0.2")
    assert done.returncode == 2
    assert output.read_text() == "mine"
    done = run(str(source), "--output", str(output), "--target-fpr", "0.2", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert Policy.load(output).name == "p"


def test_malformed_rows_are_listed_on_stderr(tmp_path: Path) -> None:
    rows: list[object] = [*prompts(20), {"prompt": "x"}, "nonsense"]
    source = write(tmp_path / "rows.jsonl", rows)
    done = run(str(source), "--output", str(tmp_path / "p.toml"), "--target-fpr", "0.2")
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode()
    assert "line 21: no label" in said
    assert "line 22: not an object" in said
    assert "2 malformed rows are left out" in said
