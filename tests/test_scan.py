"""Scans keep every row and its order, whatever the rows are and however often they are killed."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guardrail
from guardrail import Action, Category, Guard, Pair, Severity
from guardrail.scan import Fields, Scan, ScanError, ScanUsageError, Tally
from guardrail.testing import FakeModerator

ROOT = Path(guardrail.__file__).parents[1]
WORDS = {
    "bomb": (Severity.SEVERE, Category.VIOLENCE),
    "idiot": (Severity.MINOR, Category.INSULTING_BEHAVIOR),
}


def fake_guard(on_assess: Callable[[Sequence[Pair]], None] | None = None) -> Guard:
    return Guard(FakeModerator(WORDS, on_assess=on_assess))


def scan(source: Path, output: Path, guard: Guard | None = None, **options: Any) -> Tally:
    return Scan(source, output, **options).run(guard or fake_guard())


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.decode().splitlines()]


def stop_after(batches: int) -> Guard:
    """A guard whose process is interrupted after so many batches."""
    left = iter(range(batches))

    def on_assess(pairs: Sequence[Pair]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return fake_guard(on_assess)


# --- rows ----------------------------------------------------------------------------------------


def test_each_row_is_written_with_its_verdict_in_order(tmp_path: Path) -> None:
    rows = [
        {"id": 0, "prompt": "how to bake"},
        {"id": 1, "prompt": "a bomb", "response": "You idiot"},
        {"id": 2, "prompt": "a bomb", "response": None},
        {"id": 3, "prompt": "a bomb", "response": " "},
    ]
    tally = scan(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    out = read_rows(tmp_path / "out.jsonl")
    verdicts = [row.pop("guardrail") for row in out]
    assert out == rows
    assert [v["action"] for v in verdicts] == ["allow", "flag", "refuse", "refuse"]
    assert [v["direction"] for v in verdicts] == ["input", "output", "input", "input"]
    assert tally.actions == {Action.ALLOW: 1, Action.FLAG: 1, Action.REFUSE: 2}
    assert tally.held == {
        (Category.INSULTING_BEHAVIOR, Severity.MINOR): 1,
        (Category.VIOLENCE, Severity.SEVERE): 2,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("line", "kept", "says"),
    [
        (b"{broken", {"raw": "{broken"}, "broken JSON"),
        (b'["a"]', {"raw": '["a"]'}, "not a JSON object but list"),
        (b"", {"raw": ""}, "empty line"),
        (b'{"prompt": "caf\xe9"}', {"raw": '{"prompt": "caf�"}'}, "invalid UTF-8 at byte 15"),
        (b'{"prompt": NaN}', {"raw": '{"prompt": NaN}'}, "NaN is not JSON"),
        (b'{"prompt": "a", "n": 1e999}', {"raw": '{"prompt": "a", "n": 1e999}'}, "Out of range"),
        (b"[" * 100_000, {"raw": "[" * 100_000}, "broken JSON"),
        (b'{"id": 7}', {"id": 7}, "no 'prompt'"),
        (b'{"prompt": " "}', {"prompt": " "}, "'prompt' is blank"),
        (b'{"prompt": 5}', {"prompt": 5}, "not a text but int"),
        (b'{"prompt": "a", "response": []}', {"prompt": "a", "response": []}, "but list"),
        (b'{"id": 7, "guardrail": {"action": "allow"}}', {"id": 7}, "no 'prompt'"),
    ],
)
def test_a_bad_row_is_kept_with_an_error_and_stops_nothing(
    line: bytes, kept: dict[str, Any], says: str, tmp_path: Path
) -> None:
    good = b'{"prompt": "hello"}'
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, line, good]))
    tally = scan(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    first, bad, last = read_rows(tmp_path / "out.jsonl")
    assert "guardrail" in first
    assert "guardrail" in last
    assert says in bad.pop("error")
    assert bad == kept
    assert (tally.rows, tally.errors) == (3, 1)


def test_half_a_surrogate_pair_and_a_byte_order_mark_stop_nothing(tmp_path: Path) -> None:
    rows = b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9 \\ud83d"}\n{"prompt": "a bomb \xc3\xa9"}'
    (tmp_path / "in.jsonl").write_bytes(rows)
    assert scan(tmp_path / "in.jsonl", tmp_path / "out.jsonl").errors == 0
    first, second = read_rows(tmp_path / "out.jsonl")
    assert first["prompt"] == "café \ud83d"
    assert second["guardrail"]["action"] == "refuse"
    assert "a bomb é".encode() in (tmp_path / "out.jsonl").read_bytes()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(st.characters(exclude_categories=[])) | st.sampled_from(["a bomb", " ", ""])
records = st.fixed_dictionaries(
    {}, optional={"prompt": texts | values, "response": texts | values, "id": values}
)
lines = (records | values).map(lambda value: json.dumps(value).encode())
anything = st.binary(max_size=40).map(lambda data: data.replace(b"\n", b" "))


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(lines | anything, max_size=12), chunk=st.integers(1, 5))
def test_any_lines_come_back_as_many_and_in_order(rows: list[bytes], chunk: int) -> None:
    with TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_bytes(b"".join(row + b"\n" for row in rows))
        tally = scan(source, output, chunk=chunk)
        out = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert len(out) == len(rows) == tally.rows
    assert tally.errors == sum("guardrail" not in row for row in out)
    read = [row.removeprefix(b"\xef\xbb\xbf") for row in rows[:1]] + rows[1:]
    for row, written in zip(read, out, strict=True):
        assert ("guardrail" in written) is judgeable(row)
        if "raw" in written and set(written) == {"raw", "error"}:
            assert written["raw"] == row.decode("utf-8", "replace").rstrip("\r\n")
        else:
            own = {"guardrail", "error"}
            content = {k: v for k, v in json.loads(row).items() if k not in own}
            assert {k: v for k, v in written.items() if k not in own} == content


def judgeable(line: bytes) -> bool:
    """What a row must be, said in another way than the scan says it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return False
    if not isinstance(row, dict) or not all(map(finite, row.values())):
        return False
    prompt, response = row.get("prompt"), row.get("response")
    spoken = isinstance(prompt, str) and prompt.strip() != ""
    return spoken and (response is None or isinstance(response, str))


def finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | dict):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return True


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"q": "hello", "a": "a bomb"}])
    scan(source, tmp_path / "out.jsonl", fields=Fields("q", "a"))
    assert read_rows(tmp_path / "out.jsonl")[0]["guardrail"]["action"] == "refuse"


def test_a_row_that_could_not_be_judged_is_degraded_and_its_neighbours_are_not(
    tmp_path: Path,
) -> None:
    def on_assess(pairs: Sequence[Pair]) -> None:
        if any("bomb" in pair.text for pair in pairs):
            raise RuntimeError("no memory")

    rows = [{"prompt": "hello"}, {"prompt": "a bomb"}, {"prompt": "bye"}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    tally = scan(source, tmp_path / "out.jsonl", fake_guard(on_assess))
    found = [row["guardrail"]["degraded"] for row in read_rows(tmp_path / "out.jsonl")]
    assert found == [False, True, False]
    assert (tally.degraded, tally.errors) == (1, 0)


# --- formats -------------------------------------------------------------------------------------


def test_csv_keeps_cells_and_adds_a_json_column(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(
        b"\xef\xbb\xbfid,prompt,response\r\n"
        b'1,"hello, ""you""\nthere",\r\n'
        b"2,x,a bomb\r\n"
        b"3,x\r\n"
        b"4,x,y,z\r\n"
        b"5,caf\xe9,y\r\n"
        b"6,,y\r\n"
    )
    tally = scan(tmp_path / "in.csv", tmp_path / "out.csv", chunk=2)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        out = list(csv.DictReader(file))
    assert [row["id"] for row in out] == list("123456")
    assert out[0]["prompt"] == 'hello, "you"\nthere'
    actions = [json.loads(row["guardrail"])["action"] for row in out[:2]]
    assert actions == ["allow", "refuse"]
    assert [row["error"] for row in out] == [
        "",
        "",
        "2 fields, but the header has 3",
        '4 fields, but the header has 3; left over: ["z"]',
        "invalid UTF-8",
        "'prompt' is blank",
    ]
    assert [row["guardrail"] for row in out[2:]] == [""] * 4
    assert tally.errors == 4


def test_csv_cells_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(f"prompt\n{'word ' * 100_000}bomb\n")
    scan(tmp_path / "in.csv", tmp_path / "out.csv")
    assert '""action"": ""refuse""' in (tmp_path / "out.csv").read_text()


def test_gzip_is_read_written_and_resumed(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    rows = [{"id": i, "prompt": "hello"} for i in range(10)]
    source.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    output = tmp_path / "out.jsonl.gz"
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(2), chunk=3)
    assert scan(source, output, chunk=3).rows == 10
    assert [row["id"] for row in read_rows(output)] == list(range(10))


def test_parquet_keeps_the_columns_and_their_types(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    prompts = ["hello", None, "a bomb", "bye"] * 500
    table = arrow.table({"prompt": prompts, "n": arrow.array(range(2000), arrow.int16())})
    parquet.write_table(table, source)
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(3))
    tally = scan(source, output)
    out = parquet.read_table(output)
    assert out.select(["prompt", "n"]).equals(table)
    rows = out.to_pylist()
    assert all((row["error"] is None) is (row["prompt"] is not None) for row in rows)
    assert json.loads(rows[2]["guardrail"])["action"] == "refuse"
    assert (tally.rows, tally.errors) == (2000, 500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_a_file_cut_short_is_an_error_and_not_a_short_output(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "hello"}\n' * 1000)
    (tmp_path / "in.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(ScanError, match="cannot be read to its end"):
        scan(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "text", "output", "says"),
    [
        ("in.txt", "x", "out.txt", "not a format"),
        ("in.jsonl", "{}", "out.csv", "has the format of the input"),
        ("in.csv", "", "out.csv", "names its columns"),
        ("in.csv", "a,b\n", "out.csv", "no column 'prompt'"),
        ("in.csv", "prompt,prompt\n", "out.csv", "one name"),
        ("in.jsonl", "{}", "nowhere/out.jsonl", "no such folder"),
        ("in.jsonl", "{}", "in.jsonl", "is the input itself"),
    ],
)
def test_what_cannot_be_scanned_is_told_before_a_row_is_judged(
    name: str, text: str, output: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ScanUsageError, match=says):
        Scan(tmp_path / name, tmp_path / output)


# --- going on ------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, rows: int = 20) -> tuple[Path, Path]:
    """A scan in chunks of 3 that was stopped after 6 rows."""
    made = [{"id": i, "prompt": "a bomb" if i % 2 else "hello"} for i in range(rows)]
    source, output = write_rows(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(2), chunk=3)
    assert not output.exists()
    return source, output


def test_a_scan_goes_on_after_what_is_safe_and_judges_nothing_twice(tmp_path: Path) -> None:
    source, output = interrupted(tmp_path)
    with (tmp_path / "out.jsonl.partial").open("ab") as file:
        file.write(b'{"id": 6, "prompt": "hel')  # killed while it wrote
    judged: list[Pair] = []
    tally = scan(source, output, fake_guard(judged.extend), chunk=5)
    assert len(judged) == 14
    assert [row["id"] for row in read_rows(output)] == list(range(20))
    assert tally.rows == 20
    assert tally.actions == {Action.ALLOW: 10, Action.REFUSE: 10}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("change", ["input", "policy", "prompt field", "model"])
def test_what_another_scan_left_is_not_gone_on_with(change: str, tmp_path: Path) -> None:
    source, output = interrupted(tmp_path)
    guard, fields = fake_guard(), Fields()
    if change == "input":
        write_rows(source, [{"id": i, "prompt": "hello", "other": 1} for i in range(20)])
    elif change == "policy":
        guard = Guard(FakeModerator(WORDS), "strict")
    elif change == "prompt field":
        fields = Fields(prompt="id")
    else:
        guard.moderator.thresholds = {guardrail.Direction.INPUT: guardrail.Thresholds()}  # type: ignore[misc]
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(ScanUsageError, match=f"left by another scan .*{change}"):
        scan(source, output, guard, fields=fields)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    assert scan(source, output, guard, fields=fields, overwrite=True).rows == 20


@pytest.mark.parametrize("damage", ["state", "partial"])
def test_what_is_left_damaged_is_told(damage: str, tmp_path: Path) -> None:
    source, output = interrupted(tmp_path)
    if damage == "state":
        (tmp_path / "out.jsonl.partial.state").write_text('{"scan": ')
    else:
        os.truncate(tmp_path / "out.jsonl.partial", 10)
    with pytest.raises(ScanUsageError, match="--overwrite starts the scan anew"):
        scan(source, output)
    assert scan(source, output, overwrite=True).rows == 20


def test_an_output_that_is_there_is_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(ScanUsageError, match="is there already"):
        Scan(source, output)
    assert output.read_text() == "mine"
    scan(source, output, overwrite=True)
    assert len(read_rows(output)) == 1


def test_an_input_that_changes_meanwhile_gives_no_output(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}] * 3)

    def append(pairs: Sequence[Pair]) -> None:
        with source.open("a") as file:
            file.write('{"prompt": "more"}\n')

    with pytest.raises(ScanError, match="changed while it was scanned"):
        scan(source, tmp_path / "out.jsonl", fake_guard(append))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(os.name != "posix", reason="file locks of POSIX")
def test_two_scans_do_not_write_one_output(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    output = tmp_path / "out.jsonl"
    errors: list[str] = []

    def second(pairs: Sequence[Pair]) -> None:
        with pytest.raises(ScanUsageError) as caught:
            scan(source, output)
        errors.append(str(caught.value))

    assert scan(source, output, fake_guard(second)).degraded == 0
    assert len(errors) == 1
    assert "another scan is writing it" in errors[0]
    assert len(read_rows(output)) == 1


# --- the real command, the real model ------------------------------------------------------------


def start(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "guardrail.cli", "scan", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A test run that was put in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_rows(state: Path, rows: int, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        done = json.loads(state.read_bytes())["tally"]["rows"] if state.exists() else 0
        if done >= rows:
            return int(done)
        time.sleep(0.005)
    raise AssertionError(f"never came to {rows} rows: {process.communicate(timeout=60)}")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """1,000 rows that differ; every 100th is broken."""
    path = tmp_path / "in.jsonl"
    text = "Tell me about gardens. " * 4
    good = [json.dumps({"id": i, "prompt": f"{i} {text}", "response": text}) for i in range(1000)]
    lines = [f"broken {i}" if i % 100 == 50 else line for i, line in enumerate(good)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_scan_killed_twice_loses_and_doubles_nothing(many: Path, tmp_path: Path) -> None:
    output, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial.state"
    args = (str(many), "--output", str(output), "--batch-size", "4", "--policy", "audit-only")
    for stop_at in (40, 200):
        process = start(*args)
        wait_for_rows(state, stop_at, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
    before = json.loads(state.read_bytes())["tally"]["rows"]
    assert 200 <= before < 1000
    process = start(*args)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert "1,000 rows, 10 with errors, 0 judged by on_error alone" in out.decode()
    rows = read_rows(output)
    assert [row.get("id", row.get("raw")) for row in rows] == [
        f"broken {i}" if i % 100 == 50 else i for i in range(1000)
    ]
    assert all(("guardrail" in row) is ("id" in row) for row in rows)
    assert all(("error" in row) is ("raw" in row) for row in rows)


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to a child")
def test_ctrl_c_says_how_to_go_on(many: Path, tmp_path: Path) -> None:
    process = start(str(many), "--output", str(tmp_path / "out.jsonl"), "--batch-size", "4")
    wait_for_rows(tmp_path / "out.jsonl.partial.state", 8, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1
    assert b"run the same command again to go on" in err


def test_another_policy_does_not_go_on_with_a_scan(many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start(str(many), "--output", str(output), "--batch-size", "4")
    wait_for_rows(tmp_path / "out.jsonl.partial.state", 8, process)
    process.kill()
    process.communicate(timeout=60)
    process = start(str(many), "--output", str(output), "--policy", "strict")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert b"left by another scan (policy differs)" in err


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"  # what Python itself understands as "not there"
    )
    done = subprocess.run(
        [sys.executable, "-m", "guardrail.cli", "scan", str(tmp_path / "in.parquet"),
         "--output", str(tmp_path / "out.parquet")],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert b"pip install 'guardrail-severity[scan]'" in done.stderr
