"""The words in what an answer holds beside its text: content blocks, tool calls, extras. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from pydantic import BaseModel

from guardrail._json_text import parsed
from guardrail._names import is_base64, is_token, plain_name

__all__ = ["ahead_of_text", "not_words", "other_blocks", "words"]

# Kinds of content blocks that hold words and nothing else; another kind cannot be judged.
_WORD_BLOCKS = {
    "citation", "code_execution_tool_result", "code_interpreter_call", "custom_tool_call",
    "file_search_call", "function_call", "input_json_delta", "invalid_tool_call", "mcp_call",
    "mcp_list_tools", "mcp_tool_result", "mcp_tool_use", "reasoning", "redacted_thinking",
    "refusal", "server_tool_call", "server_tool_call_chunk", "server_tool_result",
    "server_tool_use", "text", "thinking", "tool_call", "tool_call_chunk", "tool_use",
    "web_search_call", "web_search_tool_result",
}  # fmt: skip
_TOKENS = {"call_id", "id", "index", "status", "tool_call_id", "tool_use_id", "type"}
_SEALED = {"encrypted_content", "encrypted_index", "signature"}  # only the provider reads them
_MODEL_MADE = {"args", "arguments", "input"}  # in these, every name and value is the model's
# Names that providers use in `additional_kwargs`; any other name there may be a text.
_API_NAMES = {
    "arguments", "function", "function_call", "id", "index", "name", "parsed",
    "reasoning_content", "refusal", "tool_calls", "type",
}  # fmt: skip


def other_blocks(message: AIMessage) -> list[Any]:
    """The content blocks without their text; a text block stays where it holds more than that."""
    blocks: list[Any] = []
    for block in message.content if isinstance(message.content, list) else []:
        if isinstance(block, str):
            continue
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            blocks.append(block)
        elif any(_holds_more(key, block[key]) for key in block.keys() - {"type", "text"}):
            blocks.append({**block, "text": ""})
    return blocks


def ahead_of_text(message: AIMessage) -> list[Any]:
    """Those of `other_blocks` that come before any text; all where no text comes."""
    content = message.content if isinstance(message.content, list) else []
    return list(takewhile(lambda b: isinstance(b, dict) and b.get("type") != "text", content))


def _holds_more(key: object, value: object) -> bool:
    if key in ("index", "id"):
        return not is_token(value)
    return bool(value) or plain_name(key) is None


def not_words(held: Sequence[AIMessageChunk]) -> str | None:
    """Why something in an answer cannot be judged: an image, a sound, a kind not known."""
    kinds = {str(b.get("type")) for c in held for b in other_blocks(c)} - _WORD_BLOCKS
    kinds |= {"audio"} if any(c.additional_kwargs.get("audio") for c in held) else set()
    if not kinds:
        return None
    kind = plain_name(min(kinds)) or "unknown"  # the verdict goes out: it quotes no text
    return f"only text can be judged, and the answer holds a part of type {kind!r}"


def words(held: AIMessageChunk) -> list[str]:
    """Everything in words that a message without text holds. Calls are read from the parsed form:
    a word may hide behind JSON's escapes."""
    said: list[str] = []
    for call in held.tool_call_chunks:
        said += [call["name"] or "", *_made(call["args"] or "")]
        said += [] if is_token(call["id"]) else [str(call["id"])]
    rest: list[str] = []
    for block in other_blocks(held):
        rest += _in_block(block, block.get("type"))
    rest += _made(held.additional_kwargs, _API_NAMES)
    again = set(said)  # a call may stand in the blocks and the extras too
    return [text for text in [*(text for text in rest if text not in again), *said] if text]


def _made(value: object, known: Collection[str] = ()) -> Iterator[str]:
    """Every string in what a model made, those in JSON read, with the numbers of its objects and
    their names, but those that are `known`."""
    match value:
        case str():
            inner = parsed(value)
            yield from [value] if inner is None else _made(inner)
        case BaseModel():
            yield from _made(value.model_dump(mode="json"), known)
        case Mapping():
            for key, item in value.items():
                if key not in known:
                    yield str(key)
                yield from _made(item, () if key in _MODEL_MADE else known)
        case list() | tuple():
            for item in value:
                yield from _made(item, known)
        case int() | float() if not isinstance(value, bool):
            yield str(value)


def _in_block(value: object, kind: object) -> Iterator[str]:
    """Every string in a content block of this kind but identifiers and sealed data; the names and
    numbers only of what a model made."""
    match value:
        case str():
            inner = parsed(value)
            yield from [value] if inner is None else _made(inner)
        case BaseModel():
            yield from _in_block(value.model_dump(mode="json"), kind)
        case Mapping():
            for key, item in value.items():
                if plain_name(key) is None:
                    yield str(key)
                if key in _MODEL_MADE:
                    yield from _made(item)
                elif not _no_words(key, item, kind):
                    yield from _in_block(item, kind)
        case list() | tuple():
            for item in value:
                yield from _in_block(item, kind)


def _no_words(key: object, item: object, kind: object) -> bool:
    if key in _SEALED or (kind == "redacted_thinking" and key == "data"):
        return is_base64(item)
    return key in _TOKENS and is_token(item)
