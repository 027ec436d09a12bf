"""Responses of the `openai` package under a guard, sans-IO: how a request is read, and whole ones.

`_openai_events` does the streams.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from openai.types.responses import (
    Response,
    ResponseOutputMessage,
    ResponseOutputRefusal,
    ResponseOutputText,
)

from guardrail import _logprobs
from guardrail._judging import Judging, judge_text
from guardrail._openai_flow import (
    ALTERNATIVES,
    Ask,
    UnfitError,
    judge_data,
    judge_messages,
    known,
    list_of,
    named,
    of_upstream,
)
from guardrail.chat_model import Message
from guardrail.conversation import Rules
from guardrail.verdict import Verdict

__all__ = [
    "TEXTLESS",
    "judge_annotations",
    "judge_item",
    "judge_response",
    "read_request",
    "refused_item",
    "refused_response",
]

# Read as text, all strings in them. What is not here (images, and what comes in years to come)
# cannot be judged, and follows the policy's `on_error`.
READABLE = {
    "additional_tools",
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "computer_call",
    "custom_tool_call",
    "custom_tool_call_output",
    "file_search_call",
    "function_call",
    "function_call_output",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "reasoning",
    "shell_call",
    "shell_call_output",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
}
# What in them cannot be: a drawing of the code interpreter, a picture or a file of a tool.
UNREADABLE = {
    "audio",
    "computer_screenshot",
    "image",
    "image_url",
    "input_audio",
    "input_file",
    "input_image",
    "input_video",
    "output_audio",
    "output_image",
    "video",
}
# No text that a caller could read.
TEXTLESS = {"compaction", "item_reference"}
# Of a response: what is judged, what the caller wrote, and what the API says of an error.
_NOT_NAMES = {
    "error",
    "instructions",
    "metadata",
    "output",
    "prompt",
    "prompt_cache_key",
    "safety_identifier",
    "text",
    "tools",
    "user",
}
# What a request may hold beside messages: none of it is a user's text.
NOT_USER_TEXT = READABLE | TEXTLESS | {"computer_call_output"}


def read_request(body: Mapping[str, Any], rules: Rules) -> Judging[Ask]:
    if body.get("prompt"):
        raise ValueError("a stored prompt cannot be judged: pass its text as input")
    spelled = "message.output_text.logprobs" in list_of(body, "include")
    if body.get("stream") and spelled:
        raise ValueError(
            "logprobs spell out text before it is judged: ask for them without stream=True"
        )
    if body.get("top_logprobs"):
        raise UnfitError("top_logprobs", ALTERNATIVES)
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    if not isinstance(items, list):
        raise ValueError("input must be a text or a list of items")
    messages = [_message(i, item) for i, item in enumerate(items)]
    turns, prompt, verdict, ok = yield from judge_messages(messages, rules)
    sent: Any = [
        item if turn is message else {**item, "content": turn["content"]}
        for item, message, turn in zip(items, messages, turns, strict=True)
    ]
    if isinstance(given, str):
        sent = sent[0]["content"]
    return Ask({**body, "input": sent} if given else body, prompt, verdict, ok, rules)


def _message(at: int, item: Any) -> Message:
    """An input item as a chat message."""
    if not isinstance(item, Mapping):
        raise ValueError(f"input item {at} must be a dict")
    kind = item.get("type", "message")
    if kind != "message":
        if not isinstance(kind, str) or kind not in NOT_USER_TEXT:
            raise ValueError(f"input item {at} is of type {kind!r}, which cannot be judged")
        return {"role": "tool", "content": None}
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return {"role": item.get("role"), "content": content}


def _part(part: Any) -> Any:
    """A part as the conversation knows it: what a model said before is a text like another."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("output_text", "refusal"):
        return {"type": "text", "text": part.get("text", part.get("refusal"))}
    return part


@of_upstream
def judge_response(ask: Ask, response: Response) -> Judging[Response]:
    """The response as it may go out; its `guardrail_output` is the strongest verdict."""
    output = []
    worst: Verdict | None = None
    for item in response.output or []:
        released, verdict = yield from judge_item(ask, item)
        if released is None:
            return refused_response(ask, verdict, response)
        output.append(released)
        worst = max((v for v in (worst, verdict) if v), key=lambda v: v.action.rank, default=None)
    return noted(response.model_copy(update={"output": output}), ask, worst)


def judge_item(ask: Ask, item: Any) -> Judging[tuple[Any | None, Verdict | None]]:
    """An output item as it may go out, or None, and the verdict; None when it holds no text."""
    kind = getattr(item, "type", None)
    if kind in TEXTLESS:
        return named(item), None
    if kind == "message":
        return (yield from _judge_message(ask, item))
    if kind not in READABLE:
        verdict = ask.unjudged(kind)
    else:
        data = item.model_dump(mode="json", exclude_none=True, warnings=False)
        inner = next(iter(_kinds(data) & UNREADABLE), None)
        if inner is None:
            verdict = yield from judge_data(ask, data)
        else:
            verdict = ask.unjudged(inner, f" in an output item of type {kind!r}")
    return (item if verdict.delivers else None), verdict


def _kinds(value: Any) -> set[str]:
    """The types of all parts of JSON data."""
    if isinstance(value, list):
        return set().union(*map(_kinds, value))
    if not isinstance(value, Mapping):
        return set()
    said = value.get("type")
    return {said if isinstance(said, str) else ""}.union(*map(_kinds, value.values()))


def _judge_message(ask: Ask, item: Any) -> Judging[tuple[Any | None, Verdict | None]]:
    content = []
    worst: Verdict | None = None
    for part in item.content or []:
        field = {"output_text": "text", "refusal": "refusal"}.get(part.type)
        if field is None:
            verdict = ask.unjudged(part.type)
            released = part if verdict.delivers else None
        else:
            text, verdict = yield from judge_text(
                ask.prompt, getattr(part, field), ask.rules.stream
            )
            released = None
            if text is not None:
                released = yield from judge_annotations(ask, with_text(part, text))
        if released is None:
            return None, verdict
        content.append(released)
        worst = max((v for v in (worst, verdict) if v), key=lambda v: v.action.rank)
    return named(item, content=content), worst


def with_text(part: Any, text: str) -> Any:
    """A content part that holds `text`; what pointed into another text is left out."""
    if part.type == "refusal":
        return known(part, refusal=text)
    update: dict[str, Any] = {} if text and part.text == text else {"annotations": []}
    if part.logprobs:
        found: Any = _logprobs.of_text([getattr(t, "__dict__", t) for t in part.logprobs], text)
        update["logprobs"] = ResponseOutputText.construct(logprobs=found).logprobs
    return known(part, text=text, **update)


def judge_annotations(ask: Ask, part: Any) -> Judging[Any]:
    """The part, without its annotations where their words (titles, names of files) may not go out:
    the text does not need them."""
    if not getattr(part, "annotations", None):
        return part
    found = part.model_dump(mode="json", exclude_none=True, warnings=False)["annotations"]
    verdict = yield from judge_data(ask, found)
    return part if verdict.delivers else known(part, annotations=[])


def refused_item(text: str, *, structured: bool = False) -> ResponseOutputMessage:
    part: Any = ResponseOutputText(type="output_text", text=text, annotations=[])
    if structured:
        part = ResponseOutputRefusal(type="refusal", refusal=text)
    return ResponseOutputMessage(
        id=f"msg_guardrail_{uuid.uuid4().hex}",
        type="message",
        role="assistant",
        status="incomplete",
        content=[part],
    )


def refused_response(
    ask: Ask, verdict: Verdict | None, response: Response | None = None
) -> Response:
    """`response`, or one that was never made, with a refusal as its whole output."""
    assert verdict is not None
    item = refused_item(ask.refusal(verdict))
    output = verdict if response is not None else None
    return noted(incomplete(response or empty_response(ask), [item]), ask, output)


def incomplete(response: Response, output: list[Any]) -> Response:
    details: Any = {"reason": "content_filter"}
    built = Response.construct(incomplete_details=details).incomplete_details
    return response.model_copy(
        update={"output": output, "status": "incomplete", "incomplete_details": built}
    )


def empty_response(ask: Ask) -> Response:
    return Response(
        id=f"resp_guardrail_{uuid.uuid4().hex}",
        object="response",
        created_at=time.time(),
        model=str(ask.body.get("model", "")),
        output=[],
        parallel_tool_calls=bool(ask.body.get("parallel_tool_calls", True)),
        tool_choice="auto",
        tools=[],
        status="in_progress",
    )


def noted(response: Response, ask: Ask, output: Verdict | None) -> Response:
    found = output.to_json() if output else None
    kept = {name: getattr(response, name) for name in response.model_fields_set & _NOT_NAMES}
    judged: Response = named(response, **kept, guardrail=ask.note, guardrail_output=found)
    return judged
