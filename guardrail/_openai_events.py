"""The event stream of a response under a guard, sans-IO.

Texts of messages pass gates; every other item is withheld until it is whole and judged. The events
keep their order and are numbered anew, and what the closing events repeat is what was released.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openai.types.responses import (
    Response,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseIncompleteEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseRefusalDeltaEvent,
    ResponseRefusalDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)

from guardrail._judging import Gate
from guardrail._openai_flow import (
    END,
    Api,
    Ask,
    Flow,
    Give,
    bare,
    is_opaque,
    judge_data,
    known,
    named,
    of_upstream,
    strings,
)
from guardrail._openai_responses import (
    TEXTLESS,
    empty_response,
    incomplete,
    judge_annotations,
    judge_item,
    judge_response,
    noted,
    read_request,
    refused_item,
    refused_response,
    with_text,
)
from guardrail.conversation import Close, Pull
from guardrail.verdict import Verdict

__all__ = ["RESPONSES"]

_BEGIN = {"response.created", "response.queued", "response.in_progress"}
_END = {"response.completed", "response.incomplete", "response.failed"}
_INDICES = ("output_index", "content_index", "summary_index")
_COUNTS = {*_INDICES, "sequence_number"}
_FIELDS = {"output_text": "text", "refusal": "refusal"}


@of_upstream
def _stream(ask: Ask) -> Flow:
    stream = _Stream(ask)
    while (event := (yield Pull())) is not END:
        yield from stream.take(event)
        if stream.stopped:
            yield Close()
            return
    yield from stream.broken_off()


class _Stream:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._number: int | None = None
        self._response: Response | None = None
        self._messages: dict[int, Any] = {}  # the open messages, by output index
        self._gates: dict[tuple[int, int], Gate] = {}
        self._parts: dict[tuple[int, int], Any] = {}
        self._held: dict[int, list[Any]] = {}  # events of items that are not whole yet
        self._done: dict[int, Any] = {}
        self._worst: Verdict | None = None
        self.stopped = False

    def take(self, event: Any) -> Flow:
        if self._number is None:
            self._number = getattr(event, "sequence_number", 0) or 0
        at = bare("output_index", getattr(event, "output_index", None))
        if getattr(getattr(event, "item", None), "type", None) in TEXTLESS:
            event = named(event)
        if event.type in _BEGIN:
            self._response = named(event.response, output=[])
            yield self._give(named(event, response=noted(self._response, self._ask, None)))
        elif event.type in _END:
            yield from self._end(event)
        elif event.type == "error":  # the API speaks, not the model
            yield self._give(known(event))
        elif at is None:  # an event of a kind that is not known: not judged, not given out
            return
        elif event.type == "response.output_item.added" and event.item.type == "message":
            self._messages[at] = named(event.item, content=[])
            yield self._give(named(event, item=self._messages[at]))
        elif at in self._messages:
            yield from self._message(at, event)
        elif event.type == "response.output_item.done" and event.item.type == "message":
            self._held.pop(at, None)  # of a message that was never announced: it is whole now
            self._messages[at] = event.item
            yield from self._whole_message(at, event)
        elif at not in self._done:
            self._held.setdefault(at, []).append(event)
            if event.type == "response.output_item.done":
                yield from self._item(at, event)

    def broken_off(self) -> Flow:
        """The upstream ended: where it did so without a last event, the open texts go out."""
        for key, gate in self._gates.items():
            if not gate.ended and not self.stopped:
                yield from self._push(key, None)

    # --- messages ---

    def _message(self, at: int, event: Any) -> Flow:
        key = (at, bare("content_index", getattr(event, "content_index", 0)))
        match event.type:
            case "response.content_part.added" if event.part.type in _FIELDS:
                self._parts[key] = with_text(event.part, "")
                yield self._give(named(event, part=self._parts[key]))
            case "response.output_text.delta" | "response.refusal.delta":
                yield from self._push(key, event.delta)
            case "response.output_text.done":
                yield from self._flush(key, event, "text")
            case "response.refusal.done":
                yield from self._flush(key, event, "refusal")
            case "response.content_part.done" if event.part.type in _FIELDS:
                yield from self._flush(key, event, "part")
            case "response.output_item.done":
                yield from self._whole_message(at, event)

    def _push(self, key: tuple[int, int], text: str | None) -> Flow:
        gate = self._gates.setdefault(key, Gate(self._ask.prompt, self._ask.rules.stream))
        released = yield from gate.push(text)
        if released:
            yield self._give(self._delta(key, released))
        if gate.ended and gate.verdict is not None:
            self._see(gate.verdict)
            if gate.stopped:
                yield from self._refuse(gate.verdict)

    def _delta(self, key: tuple[int, int], text: str) -> Any:
        where: dict[str, Any] = {
            "item_id": self._messages[key[0]].id,
            "output_index": key[0],
            "content_index": key[1],
        }
        return _delta(getattr(self._parts.get(key), "type", "output_text"), text, where)

    def _flush(self, key: tuple[int, int], event: Any, field: str) -> Flow:
        """The end of a text: judged as a whole, and repeated as it was released."""
        part = event.part if field == "part" else None
        if key not in self._gates:  # a server that sends no deltas
            text = getattr(part, _FIELDS[part.type]) if part is not None else getattr(event, field)
            if part is not None and not text:
                yield self._give(named(event, part=with_text(part, "")))
                return
            yield from self._push(key, text)
        if not self.stopped:
            yield from self._push(key, None)
        if self.stopped:
            return
        text = self._gates[key].text
        if part is not None:
            self._parts[key] = yield from judge_annotations(self._ask, with_text(part, text))
            yield self._give(named(event, part=self._parts[key]))
        elif field == "text":
            yield self._give(named(event, text=text, logprobs=[]))
        else:
            yield self._give(named(event, refusal=text))

    def _whole_message(self, at: int, event: Any) -> Flow:
        content = []
        for i, part in enumerate(event.item.content or []):
            gate = self._gates.get((at, i))
            if gate is not None and not gate.ended:
                yield from self._push((at, i), None)
                if self.stopped:
                    return
            if gate is not None and part.type in _FIELDS:
                content.append(
                    (yield from judge_annotations(self._ask, with_text(part, gate.text)))
                )
                continue
            judged, verdict = yield from judge_item(self._ask, named(event.item, content=[part]))
            if judged is None:
                yield from self._refuse(verdict)
                return
            content += judged.content
            self._see(verdict)
        del self._messages[at]
        self._done[at] = named(event.item, content=content)
        yield self._give(named(event, item=self._done[at]))

    # --- everything else ---

    def _item(self, at: int, event: Any) -> Flow:
        held = self._held.pop(at)
        judged, verdict = yield from judge_item(self._ask, event.item)
        if judged is not None and (other := _others(held, event.item)):
            verdict = yield from judge_data(self._ask, other)
            judged = judged if verdict.delivers else None
        if judged is None:
            yield from self._refuse(verdict)
            return
        self._see(verdict)
        self._done[at] = judged
        for one in held:
            padding = {"obfuscation": None} if hasattr(one, "obfuscation") else {}
            yield self._give(one.model_copy(update=padding))

    # --- ends ---

    def _end(self, event: Any) -> Flow:
        output = []
        for i, item in enumerate(event.response.output or []):
            if i not in self._done:
                judged, verdict = yield from judge_item(self._ask, item)
                if judged is None:
                    yield from self._refuse(verdict)
                    return
                self._see(verdict)
                self._done[i] = judged
            output.append(self._done[i])
        response = noted(
            event.response.model_copy(update={"output": output}), self._ask, self._worst
        )
        yield self._give(named(event, response=response))

    def _refuse(self, verdict: Verdict | None) -> Flow:
        """Close what is open as it was released, then a message with the refusal, then the end."""
        assert verdict is not None
        self._see(verdict)
        self.stopped = True
        text = self._ask.refusal(verdict)
        for at, message in self._messages.items():
            content = [
                with_text(part, self._gates[key].text if key in self._gates else "")
                for key, part in sorted(self._parts.items(), key=lambda found: found[0])
                if key[0] == at
            ]
            self._done[at] = known(message, content=content, status="incomplete")
            yield self._give(_item_done(at, self._done[at]))
        if any(gate.text for gate in self._gates.values()) and not self._ask.structured:
            text = f"\n\n{text}"
        at = max([*self._done, *self._held, -1]) + 1
        for event in _refusal_events(self._ask, at, text):
            yield self._give(event)
            if isinstance(event, ResponseOutputItemDoneEvent):
                self._done[at] = event.item
        response = self._response or empty_response(self._ask)
        response = incomplete(response, [self._done[i] for i in sorted(self._done)])
        yield self._give(
            ResponseIncompleteEvent.construct(
                type="response.incomplete",
                response=noted(response, self._ask, self._worst),
            )
        )

    def _see(self, verdict: Verdict | None) -> None:
        if verdict and (self._worst is None or verdict.action > self._worst.action):
            self._worst = verdict

    def _give(self, event: Any) -> Give:
        number, self._number = self._number or 0, (self._number or 0) + 1
        return Give(event.model_copy(update={"sequence_number": number}))


def _others(events: Iterable[Any], item: Any) -> list[str]:
    """The texts in the events of an item that do not stand in the item itself, deltas joined."""
    seen = "\n".join(strings(item.model_dump(mode="json", warnings=False)))
    spelled: dict[tuple[Any, ...], str] = {}
    found: list[str] = []
    for event in events:
        data = event.model_dump(mode="json", exclude_none=True, warnings=False)
        kind = (data["type"], *[data.get(name, 0) for name in _INDICES])
        if isinstance(data.get("delta"), str):
            delta = data.pop("delta")
            spelled[kind] = spelled.get(kind, "") + delta
        for name, value in data.items():
            # Padding is no word of anyone, and not handed on.
            if name != "obfuscation" and not is_opaque(name, value):
                found += [] if name in _COUNTS and isinstance(value, int) else strings(value)
    for text in spelled.values():
        found += strings(text)
    return [text for text in found if text not in seen]


def _delta(kind: str, text: str, where: dict[str, Any]) -> Any:
    """The event of a piece of a content part of this kind."""
    if kind == "refusal":
        return ResponseRefusalDeltaEvent.construct(
            type="response.refusal.delta", delta=text, **where
        )
    return ResponseTextDeltaEvent.construct(
        type="response.output_text.delta", delta=text, logprobs=[], **where
    )


def _item_done(at: int, item: Any) -> ResponseOutputItemDoneEvent:
    return ResponseOutputItemDoneEvent.construct(
        type="response.output_item.done", output_index=at, item=item
    )


def _refusal_events(ask: Ask, at: int, text: str) -> Iterable[Any]:
    item = refused_item(text, structured=ask.structured)
    [part] = item.content
    where: dict[str, Any] = {"item_id": item.id, "output_index": at, "content_index": 0}
    yield ResponseOutputItemAddedEvent.construct(
        type="response.output_item.added",
        output_index=at,
        item=known(item, content=[], status="in_progress"),
    )
    yield ResponseContentPartAddedEvent.construct(
        type="response.content_part.added", part=with_text(part, ""), **where
    )
    yield _delta(part.type, text, where)
    if part.type == "refusal":
        yield ResponseRefusalDoneEvent.construct(
            type="response.refusal.done", refusal=text, **where
        )
    else:
        yield ResponseTextDoneEvent.construct(
            type="response.output_text.done", text=text, logprobs=[], **where
        )
    yield ResponseContentPartDoneEvent.construct(
        type="response.content_part.done", part=part, **where
    )
    yield _item_done(at, item)


def _refused_stream(ask: Ask) -> Iterable[Any]:
    response = refused_response(ask, ask.verdict)
    begun = known(response, output=[], status="in_progress", incomplete_details=None)
    events = [
        ResponseCreatedEvent.construct(type="response.created", response=begun),
        *_refusal_events(ask, 0, response.output_text),
    ]
    output = [e.item for e in events if isinstance(e, ResponseOutputItemDoneEvent)]
    last = response.model_copy(update={"output": output})
    events.append(ResponseIncompleteEvent.construct(type="response.incomplete", response=last))
    for number, event in enumerate(events):
        yield event.model_copy(update={"sequence_number": number})


def _refused(ask: Ask) -> Response:
    return refused_response(ask, ask.verdict)


RESPONSES = Api(Response, read_request, judge_response, _stream, _refused, _refused_stream)
