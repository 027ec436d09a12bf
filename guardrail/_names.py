"""What an API says in one word, a name or an identifier, and what may be a text. Pure."""

from __future__ import annotations

import re

__all__ = ["is_base64", "is_identifier", "is_token", "plain_name"]

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{,63}")
_TOKEN = re.compile("[A-Za-z0-9][A-Za-z0-9_.:/@+=-]{,127}")
_BASE64 = re.compile("[A-Za-z0-9+/_=-]*")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:/@+=|~\\-]*")  # names, ids, paths of models, base64


def plain_name(said: object) -> str | None:
    """A name that an API gives to something, None where it is not one short word."""
    return said if isinstance(said, str) and _NAME.fullmatch(said) else None


def is_token(value: object) -> bool:
    """Whether it is an identifier, a model's name or a number: nothing that is a text."""
    if isinstance(value, str):
        return not value or _TOKEN.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)


def is_base64(value: object) -> bool:
    """Whether it may be a ciphertext of any length, which only the provider reads."""
    return isinstance(value, str) and _BASE64.fullmatch(value) is not None


def is_identifier(said: str, limit: int | None = 128) -> bool:
    """Whether it is one word of at most `limit` characters in the wider alphabet of OpenAI's APIs:
    a model's name, an id, a ciphertext; the empty string is one."""
    return (limit is None or len(said) <= limit) and _IDENTIFIER.fullmatch(said) is not None
