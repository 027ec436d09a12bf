"""The files that a command reads and those it writes: none may be two of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["beside", "mix_up", "no_place"]


def beside(path: Path, suffix: str) -> Path:
    """A file named like this one; unlike `with_name`, of a path without a name too."""
    return path.parent / f"{path.name}{suffix}"


def no_place(path: Path, *, replaced: bool = True) -> str | None:
    """Why no file can be written there, in a line; None where one may.

    replaced: the file takes the place of what is there; a device would be lost to all programs.
    """
    if os.path.isdir(path):
        return f"{path}: is a folder: name a file in it"
    if replaced and os.path.exists(path) and not os.path.isfile(path):
        return f"{path}: is a device or a pipe: name a file"
    if not os.path.isdir(path.parent):
        return f"{path.parent}: no such folder: make it first"
    return None


def mix_up(read: Mapping[str, Iterable[Path]], written: Mapping[str, Iterable[Path]]) -> str | None:
    """Which file that is written also belongs to something else, in a line; None where none does.
    Files are the same whatever links or names lead to them. Both are by what the files are for."""
    owners: dict[object, str] = {}
    for role, paths in read.items():
        for path in paths:
            owners.update(dict.fromkeys(_marks(path), role))
    for role, paths in written.items():
        for path in paths:
            for mark in _marks(path):
                if (owner := owners.setdefault(mark, role)) != role:
                    return (
                        f"{path}: cannot be {role}, since it belongs to {owner}: give {role} a "
                        "file of its own"
                    )
    return None


def _marks(path: Path) -> Iterator[object]:
    yield os.path.realpath(path)
    try:
        found = os.stat(path)
    except OSError:
        return  # not there yet
    yield found.st_dev, found.st_ino
