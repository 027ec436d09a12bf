"""Parquet and Arrow files of `guardrail scan`: their columns, and cells that nobody can read."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scan_kit import scan, stop_after

from guardrail.scan import Scan, ScanError, ScanUsageError


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


@pytest.mark.parametrize("name", ["in.arrow", "in.feather", "in.parquet"])
def test_a_feather_file_is_told_with_the_command_that_makes_it_parquet(
    name: str, tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow")
    feather = pytest.importorskip("pyarrow.feather")
    source = tmp_path / name
    feather.write_feather(arrow.table({"prompt": ["a bomb"]}), source)
    with pytest.raises(ScanUsageError, match="convert it to Parquet with") as error:
        scan(source, tmp_path / "out.parquet")
    _, *command = shlex.split(str(error.value).split("`")[1])
    files = {"IN": str(source), "OUT.parquet": str(tmp_path / "made.parquet")}
    subprocess.run([sys.executable, *(files.get(arg, arg) for arg in command)], check=True)
    assert scan(tmp_path / "made.parquet", tmp_path / "out.parquet").rows == 1


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
    table = arrow.table(
        {"prompt": ["a"], "response": arrow.array([0], arrow.timestamp("s", "No/Zone"))}
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    scan(tmp_path / "in.parquet", tmp_path / "out.parquet", overwrite=True)
    assert parquet.read_table(tmp_path / "out.parquet")["error"].to_pylist() == [
        "'response' cannot be read: 'No/Zone'"
    ]


def arrow_stream(path: Path, table: Any) -> Path:
    ipc = pytest.importorskip("pyarrow.ipc")
    with path.open("wb") as file, ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return path


@pytest.mark.parametrize("indices", ["int8", "int32", "uint64"])
def test_a_dictionary_in_an_arrow_file_may_hold_nulls_and_what_is_not_utf8(
    indices: str, tmp_path: Path
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words = arrow.array([b"hello", None, b"caf\xe9"], arrow.binary()).view(arrow.string())
    numbers = arrow.array([0, 1, 2, None], getattr(arrow, indices)())
    column = arrow.DictionaryArray.from_arrays(numbers, words)
    table = arrow.table({"prompt": column, "other": column})
    source = arrow_stream(tmp_path / "in.arrow", table)
    scan(source, tmp_path / "out.parquet")
    out = parquet.read_table(tmp_path / "out.parquet")
    missing = "no 'prompt' in this row"
    assert out["error"].to_pylist() == [
        None,
        missing,
        "'prompt' is not valid UTF-8 at byte 3",
        missing,
    ]
    binary = out["other"].cast(arrow.string()).cast(arrow.binary())
    assert binary.to_pylist() == [b"hello", None, b"caf\xe9", None]


def test_arrow_columns_that_parquet_has_not_are_told_before_a_row_is_judged(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    union = arrow.UnionArray.from_sparse(
        arrow.array([0], arrow.int8()), [arrow.array([1]), arrow.array(["a"])]
    )
    source = arrow_stream(tmp_path / "in.arrow", arrow.table({"prompt": ["hello"], "other": union}))
    with pytest.raises(ScanUsageError, match=r"Parquet, which cannot hold its columns.*union"):
        scan(source, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["in.arrow"]


@pytest.mark.parametrize("inside", ["column", "list", "struct"])
def test_a_dictionary_of_structs_is_told_before_a_row_is_judged(
    inside: str, tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow")
    values = arrow.array([{"a": 1}])
    column: Any = arrow.DictionaryArray.from_arrays(arrow.array([0], arrow.int8()), values)
    if inside == "list":
        column = arrow.ListArray.from_arrays([0, 1], column)
    if inside == "struct":
        column = arrow.StructArray.from_arrays([column], ["of"])
    table = arrow.table({"prompt": ["hello"], "other": column})
    source = arrow_stream(tmp_path / "in.arrow", table)
    with pytest.raises(ScanUsageError, match=r"cannot hold its columns: 'other', a dictionary of"):
        scan(source, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["in.arrow"]


def test_the_types_that_parquet_lacks_become_what_the_documentation_says(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    numbers = arrow.array([7]).dictionary_encode()
    columns = {
        "time": arrow.array([1], arrow.int32()).cast(arrow.time32("s")),
        "date": arrow.array([86_400_000], arrow.int64()).cast(arrow.date64()),
        "at": arrow.array([1], arrow.timestamp("s")),
        "number": numbers,
    }
    source = arrow_stream(tmp_path / "in.arrow", arrow.table({"prompt": ["hello"], **columns}))
    scan(source, tmp_path / "out.parquet")
    schema = parquet.read_schema(tmp_path / "out.parquet")
    became = [str(schema.field(name).type) for name in columns]
    assert became == ["time32[ms]", "date32[day]", "timestamp[ms]", "int64"]


def test_an_arrow_value_that_parquet_cannot_hold_is_told(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    times = arrow.array([2**62], arrow.timestamp("s"))  # Parquet has milliseconds, at most
    source = arrow_stream(tmp_path / "in.arrow", arrow.table({"prompt": ["hello"], "at": times}))
    with pytest.raises(ScanError, match="Parquet, which cannot hold a value"):
        scan(source, tmp_path / "out.parquet")


def test_a_parquet_dictionary_that_pyarrow_cannot_read_is_told(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words = arrow.array([b"caf\xe9"], arrow.binary()).view(arrow.string())
    column = arrow.DictionaryArray.from_arrays(arrow.array([0], arrow.int8()), words)
    parquet.write_table(arrow.table({"prompt": column}), tmp_path / "in.parquet")
    with pytest.raises(ScanError, match=r"UTF8.*dictionary.*save it as a column of texts"):
        scan(tmp_path / "in.parquet", tmp_path / "out.parquet")


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
