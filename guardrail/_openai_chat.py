"""Chat completions of the `openai` package under a guard, sans-IO: whole, and in chunks.

Every choice is judged alone. In a stream, string fields pass gates; all else that a delta holds
(tool calls above all) is withheld until the choice ends.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from guardrail import _logprobs
from guardrail._judging import Gate, Judging, judge_text
from guardrail._names import plain_name
from guardrail._openai_flow import (
    ALTERNATIVES,
    END,
    Api,
    Ask,
    Flow,
    Give,
    UnfitError,
    bare,
    is_opaque,
    judge_data,
    judge_messages,
    list_of,
    named,
    of_upstream,
)
from guardrail.chat_model import finish_reason
from guardrail.conversation import Close, Pull, Rules
from guardrail.verdict import Verdict

__all__ = ["CHAT"]


def _read(body: Mapping[str, Any], rules: Rules) -> Judging[Ask]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise ValueError("messages must be a list of chat messages")
    if body.get("stream") and body.get("logprobs"):
        raise UnfitError(
            "logprobs",
            "logprobs spell out text before it is judged: ask for them without stream=True",
        )
    if body.get("top_logprobs"):
        raise UnfitError("top_logprobs", ALTERNATIVES)
    n, stream_options = body.get("n"), body.get("stream_options")
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise UnfitError("n", "n must be a whole number, 1 or more")
    if not isinstance(stream_options, Mapping | None):
        raise UnfitError("stream_options", "stream_options must be a dict")
    if "audio" in list_of(body, "modalities"):
        raise UnfitError("modalities", "only text can be judged: leave 'audio' out of modalities")
    turns, prompt, verdict, ok = yield from judge_messages(messages, rules)
    return Ask({**body, "messages": turns}, prompt, verdict, ok, rules)


# --- whole ---------------------------------------------------------------------------------------


@of_upstream
def _judge(ask: Ask, completion: ChatCompletion) -> Judging[ChatCompletion]:
    choices: list[Choice] = []
    for choice in completion.choices or []:
        choices += [(yield from _choice(ask, choice))]
    judged: ChatCompletion = named(completion, choices=choices, guardrail=ask.note)
    return judged


def _choice(ask: Ask, choice: Choice) -> Judging[Choice]:
    texts, rest = _split(choice.message)
    changed: dict[str, str] = {}
    verdicts: list[Verdict] = []
    for name, text in texts.items():
        released, verdict = yield from judge_text(ask.prompt, text, ask.rules.stream)
        verdicts.append(verdict)
        if released is None:
            return _refused_choice(ask, choice.index, verdict)
        if released != text:
            changed[name] = released
    if rest:
        verdict = yield from _judge_rest(ask, rest)
        verdicts.append(verdict)
        if not verdict.delivers:
            return _refused_choice(ask, choice.index, verdict)
    update: dict[str, Any] = {"role": bare("role", choice.message.role) or "assistant", **changed}
    if changed:  # annotations point into the text as it was
        update["annotations"] = None
    message = choice.message.model_copy(update=update)
    update = {"message": message, "guardrail": _strongest(verdicts)}
    if choice.logprobs:
        update["logprobs"] = _judged_logprobs(choice.logprobs, {**texts, **changed})
    judged: Choice = named(choice, finish_reason=finish_reason(choice.finish_reason), **update)
    return judged


def _judged_logprobs(logprobs: Any, texts: Mapping[str, str]) -> ChoiceLogprobs | None:
    """Those of the texts that go out; None where none are."""
    data = logprobs.to_dict(mode="python") if isinstance(logprobs, ChoiceLogprobs) else {}
    content = _logprobs.of_text(data.get("content"), texts.get("content", ""))
    refusal = _logprobs.of_text(data.get("refusal"), texts.get("refusal", ""))
    found: dict[str, Any] = {"content": content, "refusal": refusal}
    return ChoiceLogprobs.construct(**found) if content or refusal else None


def _refused_choice(ask: Ask, index: int, verdict: Verdict) -> Choice:
    message = ChatCompletionMessage(role="assistant", content=ask.refusal(verdict))
    choice = Choice(index=index, message=message, finish_reason="content_filter")
    return choice.model_copy(update={"guardrail": verdict.to_json()})


def _split(message: ChatCompletionMessage | ChoiceDelta) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts of a message or a delta, and all else in it, as JSON data."""
    data = message.model_dump(mode="json", exclude_none=True, warnings=False)
    data.pop("role", None)
    texts = {n: value for n, value in data.items() if isinstance(value, str) and plain_name(n)}
    return texts, {name: value for name, value in data.items() if name not in texts and value}


# What the servers of this API call a message's fields that hold no words, and the parts that do.
_NOT_WORDS = {"audio", "image", "images", "video", "videos"}
_WORD_PARTS = {"output_text", "reasoning", "reference", "refusal", "text", "thinking"}


def _judge_rest(ask: Ask, rest: Mapping[str, Any]) -> Judging[Verdict]:
    content = rest.get("content")
    parts = content if isinstance(content, list) else []
    kinds = {str(part.get("type", "text")) for part in parts if isinstance(part, Mapping)}
    if strange := sorted((_NOT_WORDS & rest.keys()) | (kinds - _WORD_PARTS)):
        return ask.unjudged(strange[0])
    return (yield from judge_data(ask, rest))


def _strongest(verdicts: Iterable[Verdict]) -> dict[str, Any] | None:
    worst = max(verdicts, key=lambda v: (v.action.rank, v.degraded), default=None)
    return worst.to_json() if worst else None


# --- streamed ------------------------------------------------------------------------------------


def _refusal_delta(ask: Ask, text: str) -> ChoiceDelta:
    return ChoiceDelta(refusal=text) if ask.structured else ChoiceDelta(content=text)


class _Part:
    """One choice of a stream: a gate for each text field, and what is withheld of it."""

    def __init__(self, ask: Ask, index: int) -> None:
        self._ask = ask
        self.index = index
        self._gates: dict[str, Gate] = {}
        self._held: list[ChoiceDelta] = []
        self._verdict: Verdict | None = None
        self._begun = False
        self.ended = False
        self.refused = False

    def take(self, chunk: ChatCompletionChunk, choice: ChunkChoice) -> Flow:
        """A delta of this choice. What comes after its end is dropped, unjudged as it is."""
        if self.ended:
            return
        delta = choice.delta
        if delta is not None:
            if delta.role and not self._begun:
                self._begun = True
                content = None if delta.content is None else ""
                yield self._give(chunk, ChoiceDelta(role=delta.role, content=content))
            texts, rest = _split(delta)
            for name, text in texts.items():
                if name not in self._gates:
                    self._gates[name] = Gate(self._ask.prompt, self._ask.rules.stream)
                yield from self._push(chunk, name, text)
            if rest:
                self._held.append(delta.model_copy(update=dict.fromkeys(["role", *texts])))
        if choice.finish_reason:
            yield from self.end(chunk, finish_reason(choice.finish_reason))

    def end(self, chunk: ChatCompletionChunk, finish: str | None) -> Flow:
        """The end of this choice; `finish` is None where the stream ended without a word."""
        for name in self._gates:
            yield from self._push(chunk, name, None)
        if self.ended:
            return
        if self._held:
            rest = _joined(_split(delta)[1] for delta in self._held)
            verdict = yield from _judge_rest(self._ask, rest)
            if not verdict.delivers:
                yield from self._refuse(chunk, verdict)
                return
            for delta in self._held:
                yield self._give(chunk, delta)
            self._verdict = verdict
        self.ended = True
        if finish:
            gates = [gate.verdict for gate in self._gates.values()]
            yield self._last(chunk, finish, _strongest(v for v in [*gates, self._verdict] if v))

    def _push(self, chunk: ChatCompletionChunk, name: str, text: str | None) -> Flow:
        if self.ended:
            return
        gate = self._gates[name]
        released = yield from gate.push(text)
        if released:
            yield self._give(chunk, ChoiceDelta().model_copy(update={name: released}))
        if gate.stopped and gate.verdict is not None:
            yield from self._refuse(chunk, gate.verdict)

    def _refuse(self, chunk: ChatCompletionChunk, verdict: Verdict) -> Flow:
        self.ended = self.refused = True
        content = self._gates.get("content")
        follows = content and content.text and not self._ask.structured
        text = ("\n\n" if follows else "") + self._ask.refusal(verdict)
        yield self._give(chunk, _refusal_delta(self._ask, text))
        yield self._last(chunk, "content_filter", verdict.to_json())

    def _last(self, chunk: ChatCompletionChunk, finish: str, note: Any) -> Give:
        give = self._give(chunk, ChoiceDelta(), finish, note)
        return Give(give.item.model_copy(update={"guardrail": self._ask.note}))

    def _give(
        self,
        chunk: ChatCompletionChunk,
        delta: ChoiceDelta,
        finish: str | None = None,
        note: Any = None,
    ) -> Give:
        choice = ChunkChoice.construct(
            index=self.index, delta=delta, finish_reason=finish, logprobs=None
        )
        if note is not None:
            choice = choice.model_copy(update={"guardrail": note})
        return Give(named(chunk, choices=[choice], usage=None))


@of_upstream
def _stream(ask: Ask) -> Flow:
    parts: dict[int, _Part] = {}
    last: ChatCompletionChunk | None = None
    wanted = ask.body.get("n") or 1
    while (chunk := (yield Pull())) is not END:
        last = chunk
        for choice in chunk.choices or []:
            if choice.index not in parts:
                parts[choice.index] = _Part(ask, bare("index", choice.index))
            yield from parts[choice.index].take(chunk, choice)
        if not chunk.choices or chunk.usage:
            yield Give(named(chunk, choices=[]))
        ended = [part for part in parts.values() if part.ended]
        if len(ended) >= wanted and any(part.refused for part in ended):
            yield Close()
            return
    for part in parts.values():
        if last is not None and not part.ended:
            yield from part.end(last, None)


def _joined(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Deltas merged into what they spell: strings are put together, lists by their `index`."""
    out: dict[str, Any] = {}
    for delta in deltas:
        for name, value in delta.items():
            out[name] = _merge(out.get(name), value)
    return out


def _again(name: str, old: Any, new: Any) -> Any:
    """`_merge` of a field; some servers repeat the id and the type of a call in each delta."""
    return new if old == new and is_opaque(name, new) else _merge(old, new)


def _merge(old: Any, new: Any) -> Any:
    if old is None:
        old = type(new)() if isinstance(new, dict | list) else None
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{name: _again(name, old.get(name), new[name]) for name in new}}
    if isinstance(old, list) and isinstance(new, list):
        merged: dict[int, Any] = dict(enumerate(old))
        for part in new:
            at = part.get("index") if isinstance(part, dict) else None
            if not isinstance(at, int):  # left out by some servers: a new call has an id
                new_call = not merged or not isinstance(part, dict) or "id" in part
                at = len(merged) if new_call else max(merged)
            merged[at] = _merge(merged.get(at), part)
        return list(merged.values())
    return new if old is None else [old, new]


# --- refused before it was asked -----------------------------------------------------------------


def _refused(ask: Ask) -> ChatCompletion:
    assert ask.verdict is not None
    completion = ChatCompletion(
        id=f"chatcmpl-guardrail-{uuid.uuid4().hex}",
        object="chat.completion",
        created=int(time.time()),
        model=str(ask.body.get("model", "")),
        choices=[_refused_choice(ask, i, ask.verdict) for i in range(ask.body.get("n") or 1)],
        usage=CompletionUsage(prompt_tokens=0, completion_tokens=0, total_tokens=0),
    )
    return completion.model_copy(update={"guardrail": ask.note})


def _refused_stream(ask: Ask) -> Iterable[ChatCompletionChunk]:
    whole = _refused(ask)
    chunk = ChatCompletionChunk(
        id=whole.id,
        object="chat.completion.chunk",
        created=whole.created,
        model=whole.model,
        choices=[],
    )
    for choice in whole.choices:
        part = _Part(ask, choice.index)
        delta = _refusal_delta(ask, choice.message.content or "")
        yield part._give(chunk, delta.model_copy(update={"role": "assistant"})).item
        yield part._last(chunk, "content_filter", ask.note).item
    if (ask.body.get("stream_options") or {}).get("include_usage"):
        yield chunk.model_copy(update={"usage": whole.usage})


CHAT = Api(ChatCompletion, _read, _judge, _stream, _refused, _refused_stream)
