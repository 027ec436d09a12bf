"""API keys of `guardrail serve`: made once, stored as hashes, compared in constant time.

A key is 256 random bits, so that a plain SHA-256 of it can be stored: there is nothing to guess
that a slow hash would slow down. Standard library only; knows no HTTP.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

__all__ = [
    "HASH",
    "LONGEST_NAME",
    "NAME",
    "find_key",
    "hash_key",
    "is_name",
    "key_entry",
    "new_key",
]

HASH = r"sha256:[0-9a-f]{64}"
NAME = r"[^\x00-\x1f\x7f]+"  # no control characters
LONGEST_NAME = 200


class Hashed(Protocol):
    """Anything that holds a key's hash, and perhaps its last day."""

    @property
    def hash(self) -> str: ...

    @property
    def expires(self) -> datetime.date | None: ...


KeyT = TypeVar("KeyT", bound=Hashed)


def new_key() -> str:
    """A fresh key. It is nowhere but in the value that is returned."""
    return f"gr-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """What is stored of a key: `sha256:` and 64 hex digits."""
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"


def is_name(text: str) -> bool:
    """Whether a config file may name a key, a policy or a model so; not blank, and writable."""
    if not text.strip() or len(text) > LONGEST_NAME or re.search("[\ud800-\udfff]", text):
        return False
    return re.fullmatch(NAME, text) is not None


def find_key(token: str, keys: Iterable[KeyT], today: datetime.date) -> KeyT | None:
    """The entry of `token` that has not expired, or None. It takes as long whichever it is: every
    entry is compared, and none compares byte by byte."""
    wanted = hash_key(token)
    found = None
    for key in keys:
        if hmac.compare_digest(wanted, key.hash):
            found = key
    if found is not None and found.expires is not None and found.expires < today:
        return None
    return found


def key_entry(
    name: str,
    hashed: str,
    *,
    policy: str | None = None,
    policies: Sequence[str] = (),
    models: Sequence[str] = (),
    expires: datetime.date | None = None,
) -> str:
    """The `[[keys]]` table of a config file, as TOML."""
    lines = ["[[keys]]", f"name = {_toml(name)}", f"hash = {_toml(hashed)}"]
    if policy is not None:
        lines.append(f"policy = {_toml(policy)}")
    if policies:
        lines.append(f"policies = [{', '.join(map(_toml, policies))}]")
    if models:
        lines.append(f"models = [{', '.join(map(_toml, models))}]")
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    # A JSON string is a TOML basic string, DEL aside.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
