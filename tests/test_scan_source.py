"""Data sets to scan: folders as they are cloned or saved, and the Hugging Face Hub."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hub_kit import hub
from scan_kit import read_rows, scan, start, write_rows

from guardrail._scan_source import _retries_told, open_source
from guardrail.scan import Scan, ScanUsageError

PAIRS = [
    {"prompt": "Tell me", "response_0": "no", "response_1": "a bomb", "better_response_id": 0},
    {"prompt": "And now", "response_0": "idiot", "response_1": "yes", "better_response_id": 1},
]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of PKU-SafeRLHF as its repository has them, two rows each."""
    folder = tmp_path / "PKU-SafeRLHF"
    for index, model in enumerate(("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B")):
        for split in ("train", "test"):
            rows = [row | {"id": f"{model}/{split}/{n}"} for n, row in enumerate(PAIRS, index)]
            write_rows(folder / "data" / model / f"{split}.jsonl", rows)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    write_rows(folder / ".cache" / "train.jsonl", PAIRS)
    return folder


def test_a_clone_is_scanned_by_split_and_each_answer_of_a_pair_is_judged(
    clone: Path, tmp_path: Path
) -> None:
    tally = scan(str(clone), tmp_path / "out.jsonl")
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [
        "Alpaca-7B/train/0",
        "Alpaca-7B/train/1",
        "Alpaca2-7B/train/1",
        "Alpaca2-7B/train/2",
        "Alpaca3-8B/train/2",
        "Alpaca3-8B/train/3",
    ]
    actions = [
        {name: verdict["action"] for name, verdict in row["guardrail"].items()} for row in rows[:2]
    ]
    assert actions == [
        {"response_0": "allow", "response_1": "refuse"},
        {"response_0": "flag", "response_1": "allow"},
    ]
    assert (tally.rows, tally.verdicts) == (6, 12)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("hf:{}:test", 6),
        ("hf:{}:Alpaca-7B/test", 2),
        ("hf:{}:Alpaca2-7B/train", 2),
    ],
)
def test_a_split_and_a_config_can_be_named(
    name: str, ids: int, clone: Path, tmp_path: Path
) -> None:
    tally = scan(name.format(clone), tmp_path / "out.jsonl")
    words = name.rpartition(":")[2].split("/")
    found = [row["id"] for row in read_rows(tmp_path / "out.jsonl")]
    assert len(found) == tally.rows == ids
    assert all(word in row.split("/") for word in words for row in found)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:{}:validation", "no split 'validation', only test, train"),
        ("hf:{}:Alpaca-9B/test", "no data files below a folder 'Alpaca-9B'"),
        ("{}/data/nowhere", "no such file"),
        ("hf:nowhere", "neither a folder nor OWNER/NAME"),
        ("hf:", "neither a folder nor OWNER/NAME"),
        ("hf::test", "neither a folder nor OWNER/NAME"),
    ],
)
def test_what_a_folder_has_not_is_told(name: str, says: str, clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ScanUsageError, match=says):
        Scan(name.format(clone), tmp_path / "out.jsonl")


def test_a_folder_of_which_some_files_only_seem_to_be_of_a_split_is_not_scanned_in_part(
    tmp_path: Path,
) -> None:
    for name in ("chats", "load-test", "support"):
        write_rows(tmp_path / f"{name}.jsonl", PAIRS)
    with pytest.raises(
        ScanUsageError, match=r"chats\.jsonl and others name no split, where others"
    ):
        open_source(str(tmp_path))
    assert [p.name for p in open_source(f"hf:{tmp_path}:test").files] == ["load-test.jsonl"]


def test_a_file_of_the_clone_that_changes_is_another_input(clone: Path) -> None:
    before = open_source(str(clone)).identity()
    write_rows(clone / "data" / "Alpaca3-8B" / "train.jsonl", PAIRS)
    assert open_source(str(clone)).identity() != before


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_what_save_to_disk_wrote_is_scanned(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row | {"n": n} for n, row in enumerate(PAIRS * 300)]
    saved: Any = datasets.Dataset.from_list(rows)
    if kind == "DatasetDict":
        saved = datasets.DatasetDict({"train": saved, "test": saved.select(range(2))})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert scan(str(tmp_path / "saved"), tmp_path / "out.parquet").verdicts == 1200
    out = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["n"] for row in out] == list(range(600))
    assert json.loads(out[0]["guardrail"])["response_1"]["action"] == "refuse"
    again = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "out.parquet"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert again.column_names[-2:] == ["guardrail", "error"]


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_a_saved_data_set_without_rows_is_told_as_one(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved: Any = datasets.Dataset.from_dict({"prompt": []})
    if kind == "DatasetDict":
        saved = datasets.DatasetDict({"train": saved})
    saved.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ScanUsageError, match="a saved data set without rows: nothing to scan"):
        open_source(str(tmp_path / "saved"))


# --- the Hub -------------------------------------------------------------------------------------

REPO = "PKU-Alignment/PKU-SafeRLHF"


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    rows = rows or [{"prompt": None}]
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FILES = {"train/0000": PAIRS, "train/0001": PAIRS[:1], "test/0000": PAIRS[1:], "partial-huge/0": []}
ASK = """
import sys
from guardrail._scan_source import open_source
from guardrail.scan import ScanError
for name in sys.argv[1:]:
    try:
        print([path.name for path in open_source(name).files])
    except ScanError as error:
        print(f"{type(error).__name__}: {error}")
"""


def ask(*names: str, **env: str) -> list[str]:
    """What a fresh process finds behind the names: the client reads its settings only once."""
    pytest.importorskip("huggingface_hub")
    process = start(*names, program=("-c", ASK), **env)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, b"")
    return list(out.decode().splitlines())


def test_a_data_set_is_taken_from_the_hub_by_name_and_later_without_it(tmp_path: Path) -> None:
    files = {f"default/{name}.parquet": parquet_of(rows) for name, rows in FILES.items()}
    env = {"HF_HOME": str(tmp_path / "hub")}
    known = (f"hf:{REPO}", f"hf:{REPO}:test", f"hf:{REPO}:default/train")
    there = ["['0000.parquet', '0001.parquet']", "['0000.parquet']"]
    with hub(REPO, files, revision="refs/convert/parquet") as env["HF_ENDPOINT"]:
        unknown = (f"hf:{REPO}:dev", f"hf:{REPO}:huge", "hf:PKU-Alignment/No", f"hf:{REPO}@v9")
        found = ask(*known, *unknown, **env)
    assert found[:3] == [*there, there[0]]
    for line, says in zip(
        found[3:],
        (
            "no default/dev there (there are: partial-huge, test, train)",
            "only the first part of 'huge' as Parquet: download its files with `hf download",
            "no such data set on the Hub",
            "the Hub has no Parquet of it",
        ),
        strict=True,
    ):
        assert line.startswith("ScanUsageError: ")
        assert says in line
    assert ask(*known, HF_HUB_OFFLINE="1", **env) == found[:3]
    env["HF_HOME"] = str(tmp_path / "empty")
    (line,) = ask(known[0], HF_HUB_OFFLINE="1", **env)
    assert line.startswith(f"ScanError: hf:{REPO}: cannot be had from the Hub: ")


def test_the_command_scans_what_the_hub_has(tmp_path: Path) -> None:
    files = {f"default/{name}.parquet": parquet_of(rows) for name, rows in FILES.items()}
    output = str(tmp_path / "out.parquet")
    with hub(REPO, files, revision="refs/convert/parquet") as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        process = start(f"hf:{REPO}", "--output", output, **env)
        out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, b"")
    assert b"3 rows, 0 with errors" in out


def test_a_retry_of_the_hub_is_a_line_that_names_the_data_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("huggingface_hub.utils._http")
    log.addHandler(caplog.handler)
    try:
        with _retries_told(REPO):
            log.warning("'Connection refused' thrown while requesting GET http://h/api/secret")
            log.warning("Retrying in 1s [Retry 1/5].")
            log.warning("another word")
        log.warning("Retrying in 1s [Retry 1/5].")
    finally:
        log.removeHandler(caplog.handler)
    assert list(dict.fromkeys(caplog.messages)) == [
        f"hf:{REPO}: the Hub: Connection refused. Retrying in 1s [Retry 1/5].",
        "another word",
        "Retrying in 1s [Retry 1/5].",
    ]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_one_is_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    with pytest.raises(ScanUsageError, match="IN is empty: name a file"):
        open_source(name)


def test_an_address_of_a_file_is_told_to_be_downloaded() -> None:
    with pytest.raises(ScanUsageError, match=r"https://a.b/c.jsonl: an address, and no file"):
        open_source("https://a.b/c.jsonl")
