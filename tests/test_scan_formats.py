"""What a scan reads and writes: JSONL, CSV and Parquet, compressed or not; one response or more."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from scan_kit import read_rows, scan, stop_after

from guardrail.scan import Scan, ScanError, ScanUsageError


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
