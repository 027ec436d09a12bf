"""Whether a guard could log at a place: what the doctor and `serve --check` ask.

Writes nothing but a file that is gone again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from guardrail._audit_chain import Key, Link
from guardrail._audit_files import UNREADABLE, AuditError, Names, lock_if_there, open_key
from guardrail._audit_tail import sealed_head, tail

__all__ = ["UnusableLogError", "check_log"]


class UnusableLogError(AuditError):
    """A guard that logs there would fail. about: what is to blame, so that a cure can be named."""

    def __init__(self, message: str, about: Literal["place", "key", "log"]) -> None:
        super().__init__(message)
        self.about = about


def check_log(path: Path, key: Path | None) -> Link | None:
    """Where the chain of a log stands, None where none was begun. Looks at all that `AuditLog`
    fails on when it is made. Raises UnusableLogError."""
    try:
        names = Names.to_write(path.absolute())
        _check_place(names)
    except AuditError as error:
        raise UnusableLogError(str(error), "place") from None
    except OSError as error:
        why = error.strerror or error
        raise UnusableLogError(f"{path}: cannot be written: {why}", "place") from None
    begun = names.head.exists() or names.log.exists() or bool(names.full())
    secret = None
    if begun or key is not None or names.key.exists():
        try:
            secret = open_key(key, names)
        except AuditError as error:
            raise UnusableLogError(str(error), "key") from None
    return None if secret is None or not begun else _tail(names, secret)


def _check_place(names: Names) -> None:
    with tempfile.TemporaryFile(dir=names.log.parent):
        pass
    for file in (names.log, names.head, names.lock):
        if file.exists():
            os.close(os.open(file, os.O_WRONLY | os.O_APPEND))


def _tail(names: Names, key: Key) -> Link:
    try:
        with lock_if_there(names.lock):
            return tail(names, key, sealed_head(names, key))[0]
    except AuditError as error:
        raise UnusableLogError(str(error), "log") from None
    except UNREADABLE as error:
        why = getattr(error, "strerror", None) or error
        raise UnusableLogError(f"{names.log}: cannot be read: {why}", "log") from None
