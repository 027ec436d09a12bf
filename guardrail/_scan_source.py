"""What `guardrail scan IN` names: a file, a data-set folder, or a data set on the Hugging Face Hub.

chats.jsonl                              a file
./PKU-SafeRLHF                           a folder: a clone of a data set, or `save_to_disk`'s
hf:./PKU-SafeRLHF:test                   a split of it
hf:PKU-Alignment/PKU-SafeRLHF            on the Hub (split train), downloaded to its usual cache
hf:PKU-Alignment/PKU-SafeRLHF:alpaca-7b/test     a config and a split
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from guardrail._rows import OWN, Fields, Format, ScanError, ScanUsageError
from guardrail._scan_arrow import TO_PARQUET, Arrow
from guardrail._scan_text import Csv, JsonLines
from guardrail.errors import require

__all__ = ["Source", "open_format", "open_source"]

logger = logging.getLogger("guardrail")

_CONVERTED = "refs/convert/parquet"  # the Hub keeps every public data set as Parquet here
_SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})
_COMPRESSED = (".gz", ".xz")
_TEXT = (".jsonl", ".ndjson", ".csv")
_ARROW = (".parquet", ".arrow")
_CURES = {
    ".feather": TO_PARQUET,
    ".json": "write one object a line, of an array with `jq -c '.[]' IN.json > OUT.jsonl`",
    **dict.fromkeys((".tsv", ".xls", ".xlsx", ".ods"), "save it as CSV in UTF-8"),
    **dict.fromkeys((".bz2", ".zip", ".zst"), "unpack it"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """The files behind one name, in the order in which their rows count."""

    name: str
    files: Sequence[Path]

    def identity(self) -> list[list[Any]]:
        """Differs when a file was changed: name, bytes, and time of change in nanoseconds."""
        stats = [(path.name, path.stat()) for path in self.files]
        return [[name, found.st_size, found.st_mtime_ns] for name, found in stats]


def open_source(name: str) -> Source:
    """Find the files that `name` stands for; downloads those of the Hub. Raises ScanUsageError,
    ScanError, MissingExtra."""
    if not name.strip():  # as a path, the empty one is the folder one happens to be in
        raise ScanUsageError("IN is empty: name a file, a data-set folder, or hf:OWNER/NAME")
    if re.match("(?!hf:)[a-z0-9]{2,}://", name):
        raise ScanUsageError(f"{name}: an address, and no file: download it, and scan that")
    if not name.startswith("hf:"):
        path = Path(name)
        return Source(name, _in_folder(path, None, None) if path.is_dir() else [_file(path)])
    where, _, wanted = name.removeprefix("hf:").partition(":")
    config, _, split = wanted.rpartition("/")
    if where and Path(where).is_dir():
        return Source(name, _in_folder(Path(where), config or None, split or None))
    return Source(name, _on_hub(where, config or "default", split or "train"))


def open_format(source: Source, output: Path, fields: Fields) -> Format:
    """The format of the files. Raises ScanUsageError where they have several, or the output's name
    says another; MissingExtra."""
    names = (fields.prompt, *fields.responses)
    for name in names:
        if name in OWN:
            raise ScanUsageError(f"{source.name}: {name!r} is a scan's own name: rename the field")
        if names.count(name) > 1:
            raise ScanUsageError(f"{source.name}: the field {name!r} is named twice: name it once")
    kinds = {_kind(path) or _refuse(path) for path in source.files}
    if len(kinds) > 1:
        raise ScanUsageError(f"{source.name}: has files of several formats: scan them one by one")
    kind = kinds.pop()
    if _kind(output) is not kind or output.suffix.lower() in (".xz", ".arrow"):
        ends = {Arrow: ".parquet", Csv: ".csv or .csv.gz"}.get(kind, ".jsonl or .jsonl.gz")
        raise ScanUsageError(
            f"{output}: the output has the format of the input, {source.files[0].name}: "
            f"end its name in {ends}"
        )
    made: Format = kind(source.files, output, fields)
    return made


def _kind(path: Path) -> type[Any] | None:
    """By the name; None for a format that is not known."""
    name = path.name.lower()
    if name.endswith(_ARROW):
        return Arrow
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".ndjson")):
        return JsonLines
    return Csv if name.endswith(".csv") else None


def _refuse(path: Path) -> NoReturn:
    cure = _CURES.get(path.suffix.lower())
    raise ScanUsageError(
        f"{path}: not a format that can be scanned: "
        + (f"{cure}; or " if cure else "")
        + "give a file that ends in .jsonl, .csv (either with .gz after it) or .parquet, a "
        "data-set folder, or hf:OWNER/NAME"
    )


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ScanUsageError(f"{path}: no such file")
    return path


# --- folders -------------------------------------------------------------------------------------


def _in_folder(folder: Path, config: str | None, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return _in_folder(folder / _choose(folder, splits, split), None, None)
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        named = _json(folder / "state.json").get("_data_files", [])
        files = [_file(folder / entry["filename"]) for entry in named]
        if not files:  # so `datasets` saves what has no rows
            raise ScanUsageError(f"{folder}: a saved data set without rows: nothing to scan")
    else:
        files = _by_name(folder, config, split)
    if not files:
        raise ScanUsageError(f"{folder}: no .jsonl, .csv, .parquet or .arrow files in it")
    return files


def _by_name(folder: Path, config: str | None, split: str | None) -> list[Path]:
    """Data files of a cloned data set: a split stands in the path, as in data/A/train.jsonl or
    data/train-00000-of-00002.parquet; where no path has one, all files are one split.
    ScanUsageError where only some have one and none is asked for: load-test.jsonl is no split."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith((".", "_")) for part in inside.parts)
        if path.is_file() and not hidden and _is_data(path):
            found.append((path, inside))
    if config is not None:
        found = [(path, inside) for path, inside in found if config in inside.parts]
        if not found:
            raise ScanUsageError(f"{folder}: no data files below a folder {config!r}")
    words = {path: set(re.split(r"[-._/\\]", str(inside).lower())) for path, inside in found}
    splits = sorted({word for own in words.values() for word in own & _SPLITS})
    if split is None and not splits:
        return [path for path, _ in found]
    if split is None and (without := [str(p) for p, own in words.items() if not own & _SPLITS]):
        raise ScanUsageError(
            f"{folder}: {without[0]}{' and others name' if without[1:] else ' names'} no split, "
            f"where others are of {', '.join(splits)}: scan them one by one, or name a split, as "
            f"in hf:FOLDER:{splits[0]}"
        )
    if split is not None and any(split.lower() in own for own in words.values()):
        chosen = split.lower()
    else:
        chosen = _choose(folder, splits, split)
    return [path for path, _ in found if chosen in words[path]]


def _choose(where: object, splits: Sequence[str], split: str | None) -> str:
    """The split asked for, else train, else the only one."""
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if chosen not in splits:
        raise ScanUsageError(
            f"{where}: no split {chosen!r}, only {', '.join(splits) or 'files without one'}: "
            "name one, as in hf:FOLDER:SPLIT"
        )
    return chosen


def _is_data(path: Path) -> bool:
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name.endswith(_TEXT + _ARROW)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScanError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ScanError(f"{path}: not what `save_to_disk` writes")
    return data


# --- the Hub -------------------------------------------------------------------------------------


def _on_hub(where: str, config: str, split: str) -> list[Path]:
    repo, _, revision = where.partition("@")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", repo):
        raise ScanUsageError(
            f"hf:{where}: neither a folder nor OWNER/NAME of a data set on the Hugging Face Hub"
        )
    hub = require("huggingface_hub", extra="scan")
    errors = require("huggingface_hub.errors", extra="scan")
    if not sys.stderr.isatty():
        require("huggingface_hub.utils", extra="scan").disable_progress_bars()
    at = {"repo_type": "dataset", "revision": revision or _CONVERTED}
    folder = f"{config}/{split}"
    try:
        with _retries_told(repo):
            there = _listed(hub, errors, repo, at)
        if there is not None and not any(name.startswith(f"{folder}/") for name in there):
            raise ScanUsageError(_no_split(repo, config, split, there))
        with _retries_told(repo):
            found = hub.snapshot_download(repo, allow_patterns=[f"{folder}/*.parquet"], **at)
    except errors.RevisionNotFoundError as error:
        raise ScanUsageError(_download(repo, "the Hub has no Parquet of it")) from error
    except errors.RepositoryNotFoundError as error:
        raise ScanUsageError(
            f"hf:{repo}: no such data set on the Hub, or a private one: see its name, or log in "
            "with `hf auth login`"
        ) from error
    except ScanUsageError:
        raise
    except Exception as error:  # HTTP libraries, the file system, offline mode: each its own
        what = " ".join(str(error).split())[:300]
        raise ScanError(f"hf:{repo}: cannot be had from the Hub: {what}") from error
    files = sorted(Path(found, folder).glob("*.parquet"))
    if not files:
        raise ScanError(f"hf:{repo}: {folder} is not in the cache, and the Hub is out of reach")
    return files


@contextmanager
def _retries_told(repo: str) -> Iterator[None]:
    """A line for each retry of the Hub's client, in place of its two with an address of the API."""
    failed = "no answer"

    def told(record: logging.LogRecord) -> bool:
        nonlocal failed
        said = record.getMessage()
        if "[Retry " in said:
            record.msg, record.args = f"hf:{repo}: the Hub: {failed}. {said}", None
        elif " thrown while " in said:
            failed = said.partition(" thrown while ")[0].strip("'")
            return False  # where it is the last, the error says it
        return True

    log = logging.getLogger("huggingface_hub.utils._http")
    log.addFilter(told)
    try:
        yield
    finally:
        log.removeFilter(told)


def _listed(hub: Any, errors: Any, repo: str, at: dict[str, str]) -> list[str] | None:
    """The files of the data set; None where the Hub is out of reach, and the cache may do."""
    try:
        return list(hub.list_repo_files(repo, **at))
    except (errors.RevisionNotFoundError, errors.RepositoryNotFoundError):
        raise
    except Exception as error:  # what the download says of it, if it fails too, is shown
        logger.info("hf:%s: not listed: %s", repo, error)
        return None


def _no_split(repo: str, config: str, split: str, there: Iterable[str]) -> str:
    folders = sorted({name.rpartition("/")[0] for name in there if name.endswith(".parquet")})
    if f"{config}/partial-{split}" in folders:
        return _download(repo, f"the Hub has only the first part of {split!r} as Parquet")
    known = ", ".join(folder.removeprefix("default/") for folder in folders)
    return (
        f"hf:{repo}: no {config}/{split} there (there are: {known or 'none'}): name one after ':'"
    )


def _download(repo: str, why: str) -> str:
    return (
        f"hf:{repo}: {why}: download its files with `hf download {repo} --repo-type dataset "
        "--local-dir DIR`, and scan DIR"
    )
