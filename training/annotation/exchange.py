"""Files of rows: JSONL, Parquet and Hugging Face `datasets` folders, into a store and out of it.

What a row says is the business of `forms`. Import takes in every good row of a file in one
transaction and lists the others with their line; export writes a file beside its place and moves
it there whole.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from training.annotation.forms import FORMS, FormName, Row, read_record, write_row
from training.annotation.labels import (
    AnnotationError,
    PairLabel,
    Record,
    SafetyLabel,
    StoredLabel,
)
from training.annotation.resolve import Resolved, resolve
from training.annotation.rows import read_labels
from training.annotation.store import Store

_TEXT = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_KNOWN = (*_TEXT, ".parquet")


@dataclass
class Imported:
    """rows taken in; problems: "file:line: what is wrong", one per row left out."""

    rows: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Exported:
    """rows written; unlabelled: rows that have no label (written all the same unless asked not to);
    disputed: rows whose people disagree and that nobody has settled."""

    rows: int = 0
    unlabelled: int = 0
    disputed: int = 0


# --- in ------------------------------------------------------------------------------------------


def import_path(
    store: Store,
    path: Path,
    *,
    form: FormName | None = None,
    queue_labelled: bool = False,
    person: str | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Imported:
    """Take in a file or folder; nothing at all of it when this stops half way.

    form: what its rows are; told from each row's fields when None. person: see `Store.add`.
    A file without a good row counts as not imported. Raises AnnotationError where the path cannot
    be read, or was imported before (for this person).
    """
    result = Imported()

    def good() -> Iterator[Record]:
        for where, row in progress(read_rows(path)):
            try:
                if not isinstance(row, dict):
                    raise AnnotationError(row if isinstance(row, str) else "not an object")
                json.dumps(row, ensure_ascii=False).encode()  # it is to be kept as it is
                yield read_record(row, form)
            except UnicodeEncodeError:
                result.problems.append(f"{where}: holds half of a character (a surrogate)")
            except AnnotationError as error:
                result.problems.append(f"{where}: {error}")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                result.problems.append(f"{where}: {type(error).__name__}: {error}")

    digest = _digest(path) + (f" of {person}" if person else "")  # another's may say the same
    result.rows = store.add(
        good(), name=str(path), digest=digest, queue_labelled=queue_labelled, person=person
    )
    return result


def read_rows(path: Path) -> Iterator[tuple[str, Row | str | object]]:
    """(where, row) of each row, in order; a str in place of a row says why it cannot be read.

    Raises AnnotationError where the path is nothing that can be read.
    """
    files = data_files(path)
    if not files:
        yield from _read_datasets(path)
        return
    for file in files:
        yield from (_read_parquet if file.name.endswith(".parquet") else _read_text)(file)


def data_files(path: Path) -> list[Path]:
    """The files that a path means; [] for a folder written by `datasets.save_to_disk`."""
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return []
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_KNOWN))
        if not files:
            raise AnnotationError(f"{path}: holds no .jsonl or .parquet file, and no saved dataset")
        return files
    if not path.is_file():
        raise AnnotationError(f"{path}: no such file or folder")
    if not path.name.endswith(_KNOWN):
        raise AnnotationError(f"{path}: give .jsonl, .jsonl.gz, .parquet or a datasets folder")
    return [path]


def _read_text(path: Path) -> Iterator[tuple[str, Row | str]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}:{number}", _parsed(line)
    except (OSError, EOFError, zlib.error) as error:
        raise AnnotationError(f"{path}: cannot be read on: {error}") from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | str]]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", _as_json(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise AnnotationError(f"{path}: cannot be read as Parquet: {error}") from error


def _read_datasets(path: Path) -> Iterator[tuple[str, Row | str]]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise AnnotationError(f"{path}: cannot be read as a saved dataset: {error}") from error
    parts = loaded.items() if isinstance(loaded, DatasetDict) else [(path.name, loaded)]
    for name, part in parts:
        for number, row in enumerate(part, 1):
            yield f"{name}:{number}", _as_json(dict(row))


def _as_json(row: Row) -> Row | str:
    """A table's row with dates and decimals as texts; why not, where JSON has no word for it."""

    def text(value: object) -> str:
        if isinstance(value, date | datetime | time):
            return value.isoformat()
        if isinstance(value, Decimal):
            return str(value)
        raise TypeError(f"a value of type {type(value).__name__}, which JSON has no word for")

    try:
        said: Row = json.loads(json.dumps(row, default=text))
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return said


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


# --- out -----------------------------------------------------------------------------------------


def export_path(
    store: Store,
    path: Path,
    *,
    form: FormName | None = None,
    machines: bool = True,
    labelled_only: bool = False,
    settled_only: bool = False,
) -> Exported:
    """Every imported row, in order, with the labels that stand for it now.

    form: one for all rows, which leaves out rows of the other kind; None: `plain` and `pairs`.
    machines: an AI annotator's label stands where no person's and no imported one does.
    labelled_only: leave out rows without any label; settled_only: those under dispute.
    A path without a suffix becomes a folder that `datasets.load_from_disk` reads.
    """
    result = Exported()
    write_rows(path, _export_rows(store, result, form, machines, labelled_only, settled_only))
    return result


def _export_rows(
    store: Store,
    result: Exported,
    form: FormName | None,
    machines: bool,
    labelled_only: bool,
    settled_only: bool,
) -> Iterator[Row]:
    for record, said in current(store, machines=machines):
        if form is not None and FORMS[form].pair != (record.kind == "pair"):
            continue
        fresh = [one for one in said if one.by not in (None, "import")]
        agreed = all(one.agreed for one in fresh)
        labelled = any(one.label is not None for one in said)
        result.unlabelled += not labelled
        result.disputed += not agreed
        if (labelled_only and not labelled) or (settled_only and not agreed):
            continue
        if fresh:
            names = sorted({name for one in fresh for name in one.annotators})
            more = {**record.extra, "annotators": names, "agreed": agreed}
            record = replace(record, extra=more, origin=_origin(said, record.origin))
        chosen: FormName = form or ("pairs" if record.kind == "pair" else "plain")
        result.rows += 1
        yield write_row(record, chosen, relabelled=bool(fresh))


def _origin(said: Sequence[Resolved], imported: str | None) -> str:
    """Who gave all of a row's labels; `mixed` where not all are of one kind."""
    given = {"import": imported or "unknown", "ai": "ai"}
    kinds = {given.get(one.by or "", "human") for one in said if one.label is not None}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def current(store: Store, *, machines: bool = True) -> Iterator[tuple[Record, list[Resolved]]]:
    """Every record with its labels as they stand: an adjudicator's, else people's, else those it
    was imported with, else (`machines`) an AI annotator's; and how each came about."""
    ranks = (
        ("adjudicated", "human", "import", "ai") if machines else ("adjudicated", "human", "import")
    )
    with store.read() as db:
        by_task: dict[int, list[StoredLabel]] = defaultdict(list)
        own: dict[tuple[int | None, int | None], list[StoredLabel]] = defaultdict(list)
        for label in read_labels(db):
            if label.record_id is None:
                by_task[label.task_id].append(label)
            else:
                own[label.record_id, label.side].append(label)
        tasks = {row["id"]: row for row in db.execute("SELECT * FROM tasks")}
        records = db.execute("SELECT * FROM records ORDER BY id").fetchall()
    for row in records:
        task = tasks[row["task_id"]]
        pair = task["kind"] == "pair"
        items = [task["item_0"], task["item_1"]] if pair else [task["id"]]
        said = [
            resolve([*own[row["id"], side], *by_task[item]], ranks)
            for side, item in enumerate(items)
        ]
        if pair:
            said.append(resolve([*own[row["id"], None], *by_task[task["id"]]], ranks))
        labels = [one.label for one in said]
        yield (
            Record(
                prompt=task["prompt"],
                responses=tuple(tasks[item]["response"] for item in items),
                safety=tuple(
                    s if isinstance(s, SafetyLabel) else None for s in labels[: len(items)]
                ),
                preference=labels[-1] if isinstance(labels[-1], PairLabel) else None,
                sources=tuple(json.loads(row["sources"])),
                origin=row["origin"],
                extra=json.loads(row["extra"]),
                raw=json.loads(row["raw"]),
            ),
            said,
        )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file or a dataset folder; whole, or not at all. Raises AnnotationError."""
    if not path.parent.is_dir():
        raise AnnotationError(f"{path.parent}: no such folder: make it first")
    if path.exists():
        raise AnnotationError(f"{path}: is there already: give another name")
    partial = path.with_name(path.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    if path.name.endswith(_TEXT):
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(partial, "wt", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif path.suffix in (".parquet", ""):
        _write_table(partial, list(rows), parquet=path.suffix == ".parquet")
    else:
        raise AnnotationError(f"{path}: ends in no format: .jsonl, .jsonl.gz, .parquet or a folder")
    os.replace(partial, path)


def _write_table(path: Path, rows: list[Row], *, parquet: bool) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    if not rows:
        raise AnnotationError("there is nothing to export: no row was chosen")
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        if parquet:
            pq.write_table(table, path)
            return
    except pyarrow.ArrowException as error:
        raise AnnotationError(
            f"a field holds what a table cannot, such as values of several kinds: export .jsonl "
            f"({error})"
        ) from error
    from datasets import Dataset

    Dataset(table).save_to_disk(str(path))
