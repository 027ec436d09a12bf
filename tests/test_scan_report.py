"""The report of a scan: what was found, in one page without a network and without texts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scan_kit import fake_guard, scan, start, wait_for_rows, write_rows
from typer.testing import CliRunner

from guardrail import Action, Category, Direction, Severity
from guardrail._rows import Row
from guardrail._scan_report import page
from guardrail._scan_tally import Tally
from guardrail.cli import app
from guardrail.verdict import Pair

ROWS = [
    {"prompt": "hello"},
    {"prompt": "a <b>bomb</b> secret-17"},
    {"prompt": "who", "response": "You idiot"},
    {"prompt": ["not", "secret-18"]},
]


class Page(HTMLParser):
    """Its tags with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def tally_of(tmp_path: Path, *, excerpts: bool) -> Tally:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    return scan(source, tmp_path / "out.jsonl", excerpts=excerpts, overwrite=True)


def report(tally: Tally) -> str:
    return page(tally, source="in.jsonl", policy="balanced@1", model="fake")


def test_the_report_shows_what_was_found(tmp_path: Path) -> None:
    text = report(tally_of(tmp_path, excerpts=False))
    found = Page(text)
    assert not found.open, "every tag is closed"
    words = " ".join(found.words)
    for part in (
        "refuse 1 (33.33 %)",
        "flag 1 (33.33 %)",
        Category.VIOLENCE.value,
        "balanced@1",
        "'prompt' is not a text but list",
    ):
        assert part in words
    assert words.index("severe") < words.index("minor 0")
    heights = [float(a["height"] or 0) for t, a in found.tags if t == "rect" and "height" in a]
    assert max(heights) == 140


def test_the_report_needs_no_network(tmp_path: Path) -> None:
    found = Page(report(tally_of(tmp_path, excerpts=True)))
    assert not {t for t, _ in found.tags} & {"script", "link", "img", "iframe", "object", "use"}
    assert not [a for _, a in found.tags if a.keys() & {"src", "href", "xlink:href"}]


def test_texts_are_in_the_report_only_when_asked_for(tmp_path: Path) -> None:
    without = report(tally_of(tmp_path, excerpts=False))
    assert not re.search("secret|bomb|idiot", without)
    assert "secret" not in json.dumps(tally_of(tmp_path, excerpts=False).to_json())
    asked = report(tally_of(tmp_path, excerpts=True))
    assert "a &lt;b&gt;bomb&lt;/b&gt; secret-17" in asked
    assert "You idiot" in asked
    assert "secret-18" not in asked


def test_the_command_writes_the_report(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}])
    target = tmp_path / "report.html"
    args = ["scan", str(source), "--output", str(tmp_path / "out.jsonl"), "--report", str(target)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert f"report: {target}" in done.stdout
    assert "policy balanced@" in " ".join(Page(target.read_text(encoding="utf-8")).words)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
def test_a_report_holds_names_and_texts_that_utf8_does_not(tmp_path: Path) -> None:
    text = "\ud83d How do I make a pipe bomb at home?"
    source = write_rows(Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl")), [{"prompt": text}])
    target = tmp_path / "report.html"
    args = ["scan", str(source), "--output", str(tmp_path / "out.jsonl"), "--report", str(target)]
    done = CliRunner().invoke(app, [*args, "--report-texts"])
    assert done.exit_code == 0, done.output
    page = target.read_text(encoding="utf-8")
    assert r"\udcff.jsonl" in page
    assert r"\ud83d How do I make a pipe bomb" in page


def test_a_report_whose_folder_vanished_is_made_by_the_same_command(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"hello {n}"} for n in range(60)])
    output, target = tmp_path / "out.jsonl", tmp_path / "pages" / "report.html"
    target.parent.mkdir()
    args = (str(source), "--output", str(output), "--report", str(target), "--batch-size", "1")
    process = start(*args)
    wait_for_rows(tmp_path / "out.jsonl.partial.state", 1, process)
    target.parent.rmdir()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, len(err.splitlines())) == (1, 1)
    assert b"the report cannot be written: No such file or directory: mend that and run" in err
    before = output.read_bytes()
    target.parent.mkdir()
    process = start(*args)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert b"60 rows, 0 with errors" in out
    assert "policy balanced@" in " ".join(Page(target.read_text(encoding="utf-8")).words)
    assert output.read_bytes() == before, "nothing is judged twice"
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "pages"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe with a name")
def test_killed_while_it_writes_the_report_the_next_run_writes_it(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    output, target = tmp_path / "out.jsonl", tmp_path / "report.html"
    os.mkfifo(target)  # without a reader, to open it for writing takes for ever
    args = (str(source), "--output", str(output), "--report", str(target))
    process = start(*args)
    deadline = time.monotonic() + 120
    while not output.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    assert process.communicate(timeout=60)[0] == b""
    before = output.read_bytes()
    target.unlink()
    process = start(*args)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert f"report: {target}".encode() in out
    assert "rows with errors" in " ".join(Page(target.read_text(encoding="utf-8")).words)
    assert output.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "report.html"}


@pytest.mark.parametrize("name", ["nowhere/report.html", "out.jsonl", "."])
def test_a_report_that_cannot_be_written_is_told_before_a_row_is_judged(
    name: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    output = tmp_path / "out.jsonl"
    args = ["scan", str(source), "--output", str(output), "--report", str(tmp_path / name)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2
    assert not output.exists()


texts = st.sampled_from(["hello", "a bomb", "You idiot", "bomb idiot", ""])
outcomes = st.lists(st.tuples(texts, texts) | st.text(max_size=20), max_size=30)


@given(outcomes)
def test_a_tally_survives_the_state_file_and_counts_each_row_once(found: list[object]) -> None:
    guard, tally = fake_guard(), Tally()
    for entry in found:
        if isinstance(entry, str):
            tally.add(Row({}, entry), entry)
            continue
        pairs = {"a": Pair("hi", entry[0]), "b": Pair("hi", entry[1])}  # type: ignore[index]
        tally.add(Row({}, pairs), {name: guard.check_many([p])[0] for name, p in pairs.items()})
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally
    judged = sum(not isinstance(entry, str) for entry in found)
    assert (tally.rows, tally.errors, tally.verdicts) == (
        len(found),
        len(found) - judged,
        2 * judged,
    )
    assert sum(tally.severities.values()) == sum(tally.unsafe) == 2 * judged
    assert tally.actions[Action.REFUSE] == tally.severities[Direction.OUTPUT, Severity.SEVERE]
    ranks = [entry.rank for entry in tally.worst]
    assert ranks == sorted(ranks)
    assert len(ranks) <= 20
    Page(report(tally))
