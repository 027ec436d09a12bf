"""Rows and head of an audit log as bytes: how they are sealed and checked. Pure, no files.

A row is one line of JSON that ends in its own hash: HMAC-SHA256, under a key, of every byte before
`,"hash"`. Among them is `prev`, the hash of the row before, so each hash stands for the whole log
up to its row. The head is a small sealed note of how far the chain has got.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["HEAD_BYTES", "Key", "Link", "Row", "read_head", "seal", "unseal", "write_head"]

HEAD_BYTES = 256  # fixed, so that the head is overwritten in place within one disk sector
_ROW_END = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n\Z')
_HASH = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Key:
    """Two keys made from one secret: one seals the chain, one hides texts behind digests."""

    chain: bytes
    text: bytes

    @classmethod
    def of(cls, secret: bytes) -> Key:
        """Raises ValueError for a secret of fewer than 16 bytes."""
        if len(secret) < 16:
            raise ValueError(f"an audit key has at least 16 bytes, this one has {len(secret)}")
        return cls(_mac(secret, b"guardrail audit: chain"), _mac(secret, b"guardrail audit: text"))

    @property
    def id(self) -> str:
        """Tells keys apart, and tells nothing of the key."""
        return _mac(self.chain, b"id").hex()[:16]

    def digest(self, text: str) -> str:
        """HMAC-SHA256 of a text: equal for equal texts, and not to be guessed without the key."""
        return _mac(self.text, text.encode("utf-8", "surrogatepass")).hex()

    def start(self) -> Link:
        """Where every chain under this key begins: no rows yet."""
        return Link(0, _mac(self.chain, b"start").hex())


@dataclass(frozen=True, slots=True)
class Link:
    """How far a chain has got: the number of its last row, and that row's hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Link:
        """From `seq:hash`, as `str` writes it. Raises ValueError."""
        seq, _, found = text.strip().partition(":")
        if not (seq.isascii() and seq.isdigit() and _HASH.match(found)):
            raise ValueError(f"{text!r} is no head: it reads SEQ:HASH, as `audit verify` prints it")
        return cls(int(seq), found)


@dataclass(frozen=True, slots=True)
class Row:
    """A row whose hash fits its bytes. data: all that was written, `seq`, `prev`, `hash` too."""

    link: Link
    prev: str
    data: Mapping[str, Any]


def seal(key: Key, last: Link, content: Mapping[str, Any]) -> tuple[bytes, Link]:
    """The next row of a chain, as a line, and where the chain stands then."""
    row = {"seq": last.seq + 1, **content, "prev": last.hash}
    body = _json(row)[:-1]
    found = _mac(key.chain, body).hex()
    return body + b',"hash":"' + found.encode() + b'"}\n', Link(last.seq + 1, found)


def unseal(key: Key, line: bytes) -> Row:
    """The row in a line, newline included. Raises ValueError, whose text says what is wrong."""
    end = _ROW_END.search(line)
    data = read_row(line)
    if end is None or data is None:
        raise ValueError("not a row of an audit log")
    if not hmac.compare_digest(_mac(key.chain, line[: end.start()]).hex(), end[1].decode()):
        raise ValueError(f"row {data['seq']} was edited: its hash does not fit what it says")
    return Row(Link(data["seq"], data["hash"]), data["prev"], data)


def read_row(line: bytes) -> dict[str, Any] | None:
    """What a line says, its hash not checked; None where it is no row."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or type(data.get("seq")) is not int:
        return None
    return data if all(isinstance(data.get(k), str) for k in ("prev", "hash")) else None


def write_head(key: Key, link: Link) -> bytes:
    """The head, as HEAD_BYTES bytes."""
    note = {"seq": link.seq, "hash": link.hash, "key": key.id, "mac": _head_mac(key, link)}
    return _json(note).ljust(HEAD_BYTES - 1) + b"\n"


def read_head(key: Key, data: bytes) -> Link:
    """The link a head notes. Raises ValueError, whose text says what is wrong."""
    try:
        note = json.loads(data)
        link = Link(note["seq"], note["hash"])
        found, made_with = note["mac"], note["key"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("the head is damaged") from None
    if made_with != key.id:
        raise ValueError(f"the head was sealed with another key ({made_with}, not {key.id})")
    if write_head(key, link) != data or not hmac.compare_digest(found, _head_mac(key, link)):
        raise ValueError("the head was edited: its seal does not fit")
    return link


def _head_mac(key: Key, link: Link) -> str:
    return _mac(key.chain, f"head {link.seq} {link.hash}".encode()).hex()


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)


def _json(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: JSON can say it, UTF-8 cannot
        return json.dumps(value, separators=(",", ":")).encode("ascii")
