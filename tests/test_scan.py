"""Scans keep every row and its order, whatever the rows are and however often they are stopped."""

from __future__ import annotations

import gzip
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_kit import WORDS, fake_guard, read_rows, scan, stop_after, write_rows

import guardrail
from guardrail import Action, Category, Guard, Pair, Severity
from guardrail.scan import Fields, Scan, ScanError, ScanUsageError
from guardrail.testing import FakeModerator

_LONG = b"1" * 5000  # more digits than Python reads

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


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (b'{"prompt":"hello","n":1e3,"m":1.10,"k":-0.0,"k":12345678901234567890}', ...),
        (b'{ "prompt" : "caf\\u00e9 \\/ \xc3\xa9" , "n":\t[1.0,{"a":{}, "a":[]}] }  \r', ...),
        (b"{}", ...),
        (b"{ }", b"{"),
        (
            b'{"error": {"}": ["\\"", 1.0]} ,"prompt":"hello", "x": {"error": 2.50}, "n": 1.50}',
            b'{"prompt":"hello", "x": {"error": 2.50}, "n": 1.50',
        ),
        (
            b'{ "guardrail": 1, "prompt": "a", "guardrail" :"{", "prompt":"b", "err\\u006fr":1}',
            b'{"prompt": "a", "prompt":"b"',
        ),
        (b'{"guardrail":{"action":"allow"}}', b"{"),
        pytest.param(b'{"prompt":"hello","n":-%b}' % _LONG, ..., id="a long number"),
        pytest.param(
            b'{"error":%b,"prompt":"hello","n":%b}' % (_LONG, _LONG),
            b'{"prompt":"hello", "n":%b' % _LONG,
            id="a long number after another scan",
        ),
    ],
)
def test_a_row_keeps_its_own_text_to_the_letter(
    row: bytes, kept: bytes | Any, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(row + b'\n{"prompt": "hello"}\n')
    scan(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    first, second, end = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    if kept is ...:
        kept = row.strip().removesuffix(b"}").rstrip()
    assert first.startswith(kept)
    added = first.removeprefix(kept).removeprefix(b", ")
    assert json.loads(b"{" + added if kept else first).keys() & {"guardrail", "error"}
    assert second.startswith(b'{"prompt": "hello", "guardrail": {')
    assert end == b""


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
        rows = [*rows, b'{"prompt": "hello"}']  # where no row has a prompt, a scan is refused
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
    scan(source, tmp_path / "out.jsonl", fields=Fields("q", ("a",)))
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


# --- going on ------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, rows: int = 20) -> tuple[Path, Path]:
    """A scan in chunks of 3 that was stopped after 6 rows."""
    made = [{"id": i, "prompt": "a bomb" if i % 2 else "hello"} for i in range(rows)]
    source, output = write_rows(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(6), chunk=3)
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


@pytest.mark.parametrize("suffix", [".jsonl", ".csv.gz", ".parquet"])
def test_an_input_edited_in_place_is_not_gone_on_with_though_size_and_time_are_the_same(
    suffix: str, tmp_path: Path
) -> None:
    source, output = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"

    def write(prompts: list[str]) -> None:
        if suffix == ".parquet":
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            table = arrow.table({"prompt": prompts})
            parquet.write_table(table, source, compression="none", write_statistics=False)
        elif suffix == ".jsonl":
            write_rows(source, [{"prompt": prompt} for prompt in prompts])
        else:
            text = "".join(f"{line}\n" for line in ["prompt", *prompts]).encode()
            source.write_bytes(gzip.compress(text, 0, mtime=0))
        os.utime(source, (1_700_000_000, 1_700_000_000))

    prompts = [f"hello {n}" for n in range(10, 20)]
    write(prompts)
    size = source.stat().st_size
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(6), chunk=3)
    write([*prompts[:2], "a bomb 1", *prompts[3:]])
    assert source.stat().st_size == size
    with pytest.raises(ScanUsageError, match=r"left by another scan \(input differs\)"):
        scan(source, output)
    write([*prompts[:9], "a bomb 1"])  # not judged yet, so it is judged as it is now
    judged: list[Pair] = []
    assert scan(source, output, fake_guard(judged.extend)).rows == 10
    assert len(judged) < 10
    assert judged[-1].text == "a bomb 1"


@pytest.mark.parametrize("damage", ['{"scan": ', "[" * 100_000, "partial"])
def test_what_is_left_damaged_is_told(damage: str, tmp_path: Path) -> None:
    source, output = interrupted(tmp_path)
    if damage == "partial":
        os.truncate(tmp_path / "out.jsonl.partial", 10)
    else:
        (tmp_path / "out.jsonl.partial.state").write_text(damage)
    with pytest.raises(ScanUsageError, match="--overwrite starts the scan anew"):
        scan(source, output)
    assert scan(source, output, overwrite=True).rows == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 1e999),
        ("actions", {"allow": "1"}),
        ("problems", [1]),
        ("unsafe", [0]),
        ("worst", [["severe", 0.9, "first", "response", "", None]]),
        ("severities", [["input", "none", -0.5]]),
    ],
)
def test_counts_that_a_scan_did_not_leave_are_told(
    name: str, value: object, tmp_path: Path
) -> None:
    source, output = interrupted(tmp_path)
    state = tmp_path / "out.jsonl.partial.state"
    left = json.loads(state.read_text())
    left["tally"][name] = value
    state.write_text(json.dumps(left))
    with pytest.raises(ScanUsageError, match=r"cannot be read .*--overwrite starts"):
        scan(source, output)


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


# --- killed when all was done --------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before the output", "after the output"])
def test_killed_when_all_was_judged_the_next_run_ends_it(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "a bomb"}] * 5)
    output, replace = tmp_path / "out.jsonl", os.replace

    def die(old: Path, new: Path) -> None:
        if new != output:
            replace(old, new)
            return
        if moment == "after the output":
            replace(old, new)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            scan(source, output)
    judged: list[Pair] = []
    tally = scan(source, output, fake_guard(judged.extend))
    assert (tally.rows, tally.actions, judged) == (5, {Action.REFUSE: 5}, [])
    assert len(read_rows(output)) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


# --- the local engine ----------------------------------------------------------------------------


def test_workers_judge_at_once_and_rows_keep_their_order(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": "x" * (i * 37 % 11 + 1)} for i in range(40)]
    together = threading.Barrier(3)

    def meet(pairs: Sequence[Pair]) -> None:
        if "x" * 11 in pairs[0].text:  # the longest of a chunk come first, so these meet
            together.wait(timeout=30)

    meeting = [{"id": 40 + i, "prompt": "x" * 11} for i in range(3)]
    rows = meeting + [row for row in rows if len(row["prompt"]) < 11]
    source = write_rows(tmp_path / "in.jsonl", rows)
    tally = scan(source, tmp_path / "out.jsonl", fake_guard(meet), workers=3, chunk=16)
    assert tally.degraded == 0
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == [row["id"] for row in rows]


def test_no_worker_is_left_when_a_scan_is_interrupted(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}] * 50)
    with pytest.raises(KeyboardInterrupt):
        scan(source, tmp_path / "out.jsonl", stop_after(10), workers=3, chunk=4)
    assert not [t for t in threading.enumerate() if t.name.startswith("guardrail-scan")]
