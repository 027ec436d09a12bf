"""Texts from outside as people are shown them: none steers the terminal, or makes lines of its own.

Standard library only: the server's log says things so, too.
"""

from __future__ import annotations

__all__ = ["escaped", "printable"]


def escaped(text: str) -> str:
    """With line breaks, control and bidi characters written as escapes; spaces stay as they are."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def printable(text: str) -> str:
    """As `escaped`, with each run of white space as one space."""
    return escaped(" ".join(text.split()))
