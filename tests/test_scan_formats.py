"""What a scan reads and writes: JSONL, CSV and Parquet, compressed or not; one response or more."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

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


def test_parquet_keeps_the_columns_and_their_types(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    prompts = ["hello", None, "a bomb", "bye"] * 500
    table = arrow.table({"prompt": prompts, "n": arrow.array(range(2000), arrow.int16())})
    parquet.write_table(table, source)
    with pytest.raises(KeyboardInterrupt):
        scan(source, output, stop_after(600))
    tally = scan(source, output)
    out = parquet.read_table(output)
    assert out.select(["prompt", "n"]).equals(table)
    rows = out.to_pylist()
    assert all((row["error"] is None) is (row["prompt"] is not None) for row in rows)
    assert json.loads(rows[2]["guardrail"])["action"] == "refuse"
    assert (tally.rows, tally.errors) == (2000, 500)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


KINDS = ["string", "large_string", "dictionary"]


def texts(cells: list[bytes | None], kind: str) -> Any:
    """A column of texts of these bytes, UTF-8 or not: pyarrow does not look when it is made so."""
    arrow = pytest.importorskip("pyarrow")
    if kind == "large_string":
        return arrow.array(cells, arrow.large_binary()).view(arrow.large_string())
    if kind == "string":
        return arrow.array(cells, arrow.binary()).view(arrow.string())
    words = arrow.array([c for c in cells if c is not None], arrow.binary()).view(arrow.string())
    numbers = iter(range(len(words)))
    indices = [None if c is None else next(numbers) for c in cells]
    return arrow.DictionaryArray.from_arrays(arrow.array(indices, arrow.int32()), words)


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_that_is_not_utf8_is_an_error_of_its_row_alone(kind: str, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    prompts = texts([b"hello", b"caf\xe9", b"a bomb", None, b"bye"], kind)
    responses = texts([b"hi", b"hi", b"hi", b"hi", b"\xff"], kind)
    others = texts([b"\xe9"] * 5, kind)
    table = arrow.table({"prompt": prompts, "response": responses, "other": others})
    parquet.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "in.parquet", output, stop_after(1), chunk=2)
    tally = scan(tmp_path / "in.parquet", output, chunk=2)
    out = parquet.read_table(output)
    assert out.column("error").to_pylist() == [
        None,
        "'prompt' is not valid UTF-8 at byte 3",
        None,
        "no 'prompt' in this row",
        "'response' is not valid UTF-8 at byte 0",
    ]
    verdicts = [v and json.loads(v)["action"] for v in out.column("guardrail").to_pylist()]
    assert verdicts == ["allow", None, "allow", None, None]
    assert (tally.rows, tally.errors) == (5, 3)
    read = parquet.read_table(tmp_path / "in.parquet")
    assert out.select(["prompt", "response", "other"]).equals(read), "its bytes as they were"


def test_parquet_cells_that_python_has_no_value_for_stop_nothing(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = arrow.array([2**62, None, 0], arrow.timestamp("us"))
    table = arrow.table({"prompt": ["a", "b", "c"], "response": times})
    parquet.write_table(table, tmp_path / "in.parquet")
    scan(tmp_path / "in.parquet", tmp_path / "out.parquet")
    first, second, third = parquet.read_table(tmp_path / "out.parquet")["error"].to_pylist()
    assert first.startswith("'response' cannot be read: ")
    assert (second, third) == (None, "'response' is not a text but datetime")


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
        (
            "in.csv",
            "q,a\n",
            "out.csv",
            r"\(there are q, a\): name the right one with --prompt-field",
        ),
        ("in.jsonl", '1\n{"q": 1}\n', "out.jsonl", r"no row has a field 'prompt' \(there are q\)"),
        ("in.csv", "prompt,prompt\n", "out.csv", "one name"),
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


def test_parquet_keeps_nested_columns_metadata_and_large_row_groups(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    schema = arrow.schema(
        [
            arrow.field("prompt", arrow.large_string(), metadata={b"unit": b"text"}),
            arrow.field("labels", arrow.map_(arrow.string(), arrow.bool_())),
            arrow.field("seen", arrow.timestamp("us", tz="UTC")),
            arrow.field("kind", arrow.dictionary(arrow.int8(), arrow.string())),
        ],
        metadata={b"origin": b"here", b"huggingface": b"{}"},
    )
    row = {"prompt": "a bomb", "labels": [("x", True)], "seen": 0, "kind": "b"}
    table = arrow.Table.from_pylist([row] * 1000, schema)
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=10)
    scan(tmp_path / "in.parquet", tmp_path / "out.parquet")
    out = parquet.read_table(tmp_path / "out.parquet")
    assert out.select(schema.names).equals(table)
    assert out.schema.field("prompt").metadata[b"unit"] == b"text"
    assert out.schema.metadata[b"origin"] == b"here"
    assert b"huggingface" not in out.schema.metadata
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 1


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


def test_several_parquet_files_are_one_input_and_must_agree(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(3):
        rows = [{"prompt": "a bomb", "n": 10 * n + i} for i in range(n + 1)]
        parquet.write_table(arrow.Table.from_pylist(rows), folder / f"train-{n}.parquet")
    with pytest.raises(KeyboardInterrupt):
        scan(folder, tmp_path / "out.parquet", stop_after(3), chunk=2)
    assert scan(folder, tmp_path / "out.parquet", chunk=2).rows == 6
    out = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["n"] for row in out] == [0, 10, 11, 20, 21, 22]
    parquet.write_table(arrow.table({"prompt": ["x"]}), folder / "train-9.parquet")
    with pytest.raises(ScanUsageError, match="another schema"):
        Scan(folder, tmp_path / "other.parquet")


def test_xz_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.xz").write_bytes(lzma.compress(b'{"prompt": "a bomb"}\n'))
    scan(tmp_path / "in.jsonl.xz", tmp_path / "out.jsonl.gz")
    assert read_rows(tmp_path / "out.jsonl.gz")[0]["guardrail"]["action"] == "refuse"
