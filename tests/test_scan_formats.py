"""What a scan reads and writes: JSONL, CSV and Parquet, compressed or not; one response or more."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest
from scan_kit import read_rows, scan, stop_after, write_rows

from guardrail.policy import Policy
from guardrail.replay import replay
from guardrail.scan import Fields, Scan, ScanError, ScanUsageError


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


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_csv_quote_that_is_never_closed_is_an_error_of_its_row(
    end: bytes, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_bytes(b'id,prompt\n1,hello\n2,"a bomb\n3,bye' + end)
    tally = scan(tmp_path / "in.csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        out = list(csv.DictReader(file))
    assert [row["prompt"] for row in out] == ["hello", "a bomb\n3,bye" + end.decode()]
    assert out[1]["error"] == "a quote that is never closed: all that comes after it is in this row"
    assert (tally.rows, tally.errors) == (2, 1)


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
        scan(source, output, stop_after(6), chunk=3)
    assert scan(source, output, chunk=3).rows == 10
    assert [row["id"] for row in read_rows(output)] == list(range(10))


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
        ("in.json", "[]", "out.jsonl", "of an array with `jq -c"),
        ("in.tsv", "x", "out.csv", "save it as CSV in UTF-8; or give a file that ends in"),
        ("in.jsonl.zst", "x", "out.jsonl", "unpack it; or give"),
        ("in.jsonl", "{}", "out.csv", "has the format of the input"),
        ("in.jsonl", "{}", "out", "the output has the format of the input, in.jsonl: end its name"),
        ("in.csv", "", "out.csv", "names its columns"),
        ("in.csv", "a,b\n", "out.csv", "no column 'prompt'"),
        (
            "in.csv",
            "q,a\n",
            "out.csv",
            r"\(there are q, a\): name the right one with --prompt-field",
        ),
        ("in.jsonl", '1\n{"q": 1}\n', "out.jsonl", r"no row has a field 'prompt' \(there are q\)"),
        ("in.csv", "prompt,prompt\n", "out.csv", "one name"),
        ("in.csv", "prompt;response\n", "out.csv", "parted by ';', not commas: save it with"),
        ("in.csv", "prompt\tresponse\n", "out.csv", r"parted by '\\t', not commas: save it"),
        ("in.jsonl", "{}", ".", "is a folder"),
        ("in.jsonl", "{}", "", "is a folder"),
        ("in.jsonl", "{}", "nowhere/out.jsonl", "no such folder"),
        ("in.jsonl", "{}", "in.jsonl", "belongs to the input"),
    ],
)
def test_what_cannot_be_scanned_is_told_before_a_row_is_judged(
    name: str, text: str, output: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ScanUsageError, match=says):
        Scan(tmp_path / name, tmp_path / output)


# --- responses -----------------------------------------------------------------------------------

PAIR = {"prompt": "hi", "response_0": "hello", "response_1": "a bomb", "response_10": "idiot"}


def test_numbered_responses_are_each_judged_where_there_is_no_other(tmp_path: Path) -> None:
    rows = [
        {"prompt": "hi", "better": 1},
        PAIR,
        PAIR | {"response_0": " ", "response_1": None},
        PAIR | {"response_1": 3},
    ]
    tally = scan(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    none, whole, one, bad = read_rows(tmp_path / "out.jsonl")
    assert none["error"] == "no 'response_0' and no 'response_1' and no 'response_10' in this row"
    assert {n: v["action"] for n, v in whole["guardrail"].items()} == {
        "response_0": "allow",
        "response_1": "refuse",
        "response_10": "flag",
    }
    assert one["guardrail"]["response_0"] is one["guardrail"]["response_1"] is None
    assert one["guardrail"]["response_10"]["action"] == "flag"
    assert bad["error"] == "'response_1' is not a text but int"
    assert (tally.rows, tally.errors, tally.verdicts) == (4, 2, 4)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_named_responses_are_judged_and_the_others_are_not(suffix: str, tmp_path: Path) -> None:
    source, output = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist([PAIR]), source)
    elif suffix == ".csv":
        source.write_text(f"{','.join(PAIR)}\n{','.join(PAIR.values())}\n")
    else:
        write_rows(source, [PAIR])
    assert scan(source, output, fields=Fields("prompt", ("response_1",))).verdicts == 1
    if suffix == ".parquet":
        (row,) = parquet.read_table(output).to_pylist()
    elif suffix == ".csv":
        (row,) = csv.DictReader(output.read_text().splitlines())
    else:
        (row,) = read_rows(output)
    found = row["guardrail"]
    assert (found if isinstance(found, dict) else json.loads(found))["action"] == "refuse"


def test_a_response_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt,answer\na,b\n")
    with pytest.raises(ScanUsageError, match=r"no column 'reply' .*--response-field"):
        Scan(tmp_path / "in.csv", tmp_path / "out.csv", fields=Fields("prompt", ("reply",)))


def test_a_field_that_no_jsonl_row_has_is_told_and_one_of_a_late_row_is_found(
    tmp_path: Path,
) -> None:
    rows = [{"q": "hello", "n": n} for n in range(300)]
    source = write_rows(tmp_path / "in.jsonl", [*rows, {"prompt": "a bomb", "reply": "idiot"}])
    for fields, says in (
        (Fields("nope"), r"no row has a field 'nope' \(there are q, n\): .*--prompt-field"),
        (Fields("prompt", ("reply", "nope")), r"a field 'nope' .*--response-field"),
    ):
        with pytest.raises(ScanUsageError, match=says):
            Scan(source, tmp_path / "out.jsonl", fields=fields)
    tally = scan(source, tmp_path / "out.jsonl", fields=Fields("prompt", ("reply",)))
    assert (tally.rows, tally.errors) == (301, 300)


# --- columns -------------------------------------------------------------------------------------


def test_two_columns_of_one_name_are_told_and_leave_nothing(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table([arrow.array(["a"]), arrow.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ScanUsageError, match="two columns have one name: prompt, prompt"):
        scan(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_what_an_earlier_scan_said_of_a_row_does_not_pass_for_this_ones(
    suffix: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a bomb", "error": "old", "guardrail": "old"},
        {"prompt": "hello", "error": "old", "guardrail": "old"},
        {"prompt": " ", "error": "old", "guardrail": "old"},
    ]
    source, output = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), source)
    elif suffix == ".csv":
        source.write_text(
            "".join(
                f"{','.join(row)}\n"
                for row in (["prompt", "error", "guardrail"], *(r.values() for r in rows))
            )
        )
    else:
        write_rows(source, rows)
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(1), chunk=1)
    tally = scan(source, output, chunk=1)
    assert (tally.rows, tally.errors) == (3, 1)
    if suffix == ".parquet":
        out = parquet.read_table(output).to_pylist()
        nothing = [{"error": None}] * 2 + [{"guardrail": None}]
    elif suffix == ".csv":
        out = list(csv.DictReader(output.read_text().splitlines()))
        nothing = [{"error": ""}] * 2 + [{"guardrail": ""}]
    else:
        out = read_rows(output)
        nothing = [{}] * 3
    for row, absent in zip(out, nothing, strict=True):
        assert {k: row[k] for k in ("error", "guardrail") if not row.get(k) and k in row} == absent
    assert [row.get("error") or None for row in out] == [None, None, "'prompt' is blank"]
    replayed = replay(output, Policy.load("balanced"), {}, uncalibrated=True)
    assert (replayed.rows, replayed.errors, replayed.malformed.rows) == (3, 1, 0)


def test_a_field_that_a_scan_would_replace_is_not_judged(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello", "error": "a bomb"}])
    with pytest.raises(ScanUsageError, match="'error' is a scan's own name"):
        Scan(source, tmp_path / "out.jsonl", fields=Fields("prompt", ("error",)))


def test_xz_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.xz").write_bytes(lzma.compress(b'{"prompt": "a bomb"}\n'))
    scan(tmp_path / "in.jsonl.xz", tmp_path / "out.jsonl.gz")
    assert read_rows(tmp_path / "out.jsonl.gz")[0]["guardrail"]["action"] == "refuse"


@pytest.mark.parametrize("names", [("prompt", "prompt"), ("q", "a", "a")])
def test_a_field_that_is_named_twice_is_told(names: tuple[str, ...], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hi", "q": "hi", "a": "a bomb"}])
    with pytest.raises(ScanUsageError, match=f"the field '{names[-1]}' is named twice"):
        Scan(source, tmp_path / "out.jsonl", fields=Fields(names[0], names[1:]))
