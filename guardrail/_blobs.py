"""Encodings of text that language models read as easily as they obey it: base64 and the like."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator

__all__ = ["BYTE", "CODE", "decoded"]

_ENTITY = r"&#[xX]?[0-9A-Fa-f]{2,6};"
# Patterns: a byte in hex, a character of base64.
BYTE = r"(?:%|\\x|\\u00|0x)?[0-9A-Fa-f]{2}"
CODE = r"[A-Za-z0-9+/_\-]"
_BLOB = re.compile(
    rf"(?P<entities>{_ENTITY}(?:[ ]?{_ENTITY}){{3,}})"
    r"|(?P<bits>\b[01]{8}(?:[ ]?[01]{8}){3,}\b)"
    rf"|(?P<hex>(?<![0-9A-Za-z]){BYTE}(?:(?:[ :]|, ?)?{BYTE}){{7,}})"
    r"|(?P<codes>\b[0-9]{2,3}(?:[ ,]{1,2}[0-9]{2,3}){7,}\b)"
    rf"|(?P<base64>(?:{CODE}{{40,}}\r?\n)+{CODE}+={{0,6}}|{CODE}{{16,}}={{0,6}})"
)


def decoded(text: str) -> Iterator[tuple[int, int, str]]:
    """Blobs of `text` that are text, or such a blob again: start, end, and what they say."""
    for match in _BLOB.finditer(text):
        blob, kind = match[0], match.lastgroup or ""
        # The line after a blob may be none of it.
        for part in filter(None, (blob, blob.rpartition("\n")[0])):
            if (said := _read(part, kind)) is not None:
                yield match.start(), match.start() + len(part), said
                break


def _read(blob: str, kind: str) -> str | None:
    for read in _READERS[kind]:
        try:
            plain = read(blob).decode()
        except ValueError:
            continue
        if _is_text(plain) or any(True for _ in decoded(plain)):
            return plain
    return None


def _is_text(plain: str) -> bool:
    """Words with blanks between; what identifiers and digests decode to by chance is not."""
    usual = sum(char.isalpha() or char.isspace() for char in plain)
    return len(plain) >= 6 and " " in plain.strip() and usual >= 0.8 * len(plain)


def _base64(blob: str) -> bytes:
    joined = re.sub(r"[\r\n=]", "", blob).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(_padded(joined, 4, (1,)))


def _padded(code: str, group: int, partial: tuple[int, ...]) -> str:
    """Padding to whole groups, without what a stream may have cut: a last group of a length that
    is `partial` ends within a byte."""
    while len(code) % group in partial:
        code = code[:-1]
    return code + "=" * (-len(code) % group)


def _base32(blob: str) -> bytes:
    joined = re.sub(r"[\r\n=]", "", blob)
    return base64.b32decode(_padded(joined, 8, (1, 3, 6)))


def _hex(blob: str) -> bytes:
    return bytes.fromhex("".join(re.findall(r"[0-9A-Fa-f]{2}", re.sub(r"0x|\\u00", "", blob))))


def _bits(blob: str) -> bytes:
    digits = blob.replace(" ", "")
    return bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8))


def _codes(blob: str) -> bytes:
    return bytes(map(int, re.findall("[0-9]+", blob)))


_READERS: dict[str, tuple[Callable[[str], bytes], ...]] = {
    "entities": (lambda blob: html.unescape(re.sub(r"; ", ";", blob)).encode(),),
    "bits": (_bits,),
    "hex": (_hex, _codes),
    "codes": (_codes,),
    "base64": (_base64, _base32),
}
