"""Chat messages as people send them: which roles there are, and what of a message is text. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from guardrail.chat_model import Message

__all__ = ["message_text", "not_text", "read_messages"]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read_messages(messages: str | Sequence[Message]) -> list[Message]:
    """Chat messages from a text (one user turn) or a list. Raises ValueError on anything else."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Iterable):
        raise ValueError(f"messages must be a text or a list, not {type(messages).__name__}")
    found = list(messages)
    for i, message in enumerate(found):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} must be a dict with a 'role' and a 'content'")
        if message["role"] not in _ROLES:  # a server might take it for the user's
            raise ValueError(
                f"message {i} has the unknown role {message['role']!r}: use one of "
                f"{', '.join(_ROLES)}"
            )
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(f"message {i}: 'content' must be a text or a list of parts")
    if not any(message["role"] == "user" for message in found):
        raise ValueError("the messages hold no user message: there is nothing to answer")
    return found


def message_text(message: Message) -> str:
    """The text of a message, its text parts joined by line breaks."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content if _is_text(part))


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") in ("text", "input_text")
        and isinstance(part.get("text"), str)
    )


def not_text(messages: Sequence[Message]) -> str | None:
    """The first part, of any message, that is not a text; None where all are."""
    for i, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if not _is_text(part):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                return f"message {i} holds a part of type {kind!r}"
    return None
