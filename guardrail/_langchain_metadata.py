"""What goes out of an answer's metadata: numbers and names. Any text there was not judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from langchain_core.messages import AIMessage
from langchain_core.messages.ai import UsageMetadata

from guardrail import _logprobs
from guardrail._names import is_token, plain_name
from guardrail.chat_model import finish_reason

__all__ = ["safe_metadata", "safe_usage", "token"]

_REASONS = {"done_reason", "finish_reason", "stop_reason"}
_MODELS = {"model", "model_name"}  # `org/model:tag` is no plain name
_SAFE = (
    "created", "done", "done_reason", "finish_reason", "id", "model", "model_name",
    "model_provider", "object", "output_version", "service_tier", "status", "stop_reason",
    "system_fingerprint", "token_usage", "usage",
)  # fmt: skip
_COUNTS = ("input_tokens", "output_tokens", "total_tokens", "total_cost")
_DETAILS = ("input_token_details", "output_token_details")


def safe_metadata(said: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Of a `response_metadata`, what can quote nothing but the `text` that goes out."""
    found = {key: safe for key in _SAFE if (safe := _safe(key, said.get(key))) is not None}
    if "logprobs" in said:
        found["logprobs"] = _judged_logprobs(said["logprobs"], text)
    return found


def safe_usage(message: AIMessage) -> UsageMetadata | None:
    """The counts of its `usage_metadata`; None where it has none."""
    said: Mapping[str, Any] = cast(Any, message.usage_metadata) or {}
    found = {key: said[key] for key in _COUNTS if isinstance(said.get(key), int | float)}
    details = {key: _numbers(said[key]) for key in _DETAILS if isinstance(said.get(key), Mapping)}
    return cast(UsageMetadata, {**found, **details}) if found or details else None


def token(said: object) -> str | None:
    """An identifier as it is, None where it is a text."""
    return said if isinstance(said, str) and is_token(said) else None


def _safe(key: str, said: object) -> Any:
    if isinstance(said, int | float):
        return said
    if isinstance(said, Mapping):
        return _numbers(said)
    if key in _REASONS:
        return finish_reason(said)
    return token(said) if key in _MODELS else plain_name(said)


def _numbers(said: Mapping[Any, Any]) -> dict[str, Any]:
    """Its numbers, and those of the objects in it."""
    return {
        key: _numbers(value) if isinstance(value, Mapping) else value
        for key, value in said.items()
        if plain_name(key) and isinstance(value, int | float | Mapping)
    }


def _judged_logprobs(logprobs: object, text: str) -> dict[str, Any] | None:
    """Those of the text that goes out, in the shape of chat completions; None where none are."""
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    found = _logprobs.of_text(tokens, text)
    return None if found is None else {"content": found, "refusal": None}
