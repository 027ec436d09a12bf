"""One guarded answer, sans-IO: a generator yields what has to be done and is sent what came of it.

    Check(pairs)            judge them           -> one verdict each
    Open(messages, draw)    call the chat model  -> None
    Pull()                  its next piece       -> a Reply, or None at the end
    Close()                 drop the answer      -> None
    Rank(pairs)             score the answers    -> one float each, the best the largest
    Emit(text)              give to the caller   -> None

`guardrail.chat` runs it, sync and async. It opens nothing and knows no clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from guardrail._messages import message_text, not_text
from guardrail.chat_model import Message, Reply
from guardrail.errors import Blocked
from guardrail.policy import Policy
from guardrail.refusals import SAFETY_INSTRUCTION, refusal_text
from guardrail.stream import (
    MASKINGS,
    Judge,
    Need,
    Release,
    Stop,
    StreamConfig,
    mask_passages,
    stream_gate,
)
from guardrail.taxonomy import Direction
from guardrail.verdict import Action, Pair, Passage, Verdict

__all__ = [
    "MOST_VIEWS",
    "ChatResult",
    "Check",
    "Close",
    "Emit",
    "Open",
    "Pull",
    "Rank",
    "Rules",
    "Step",
    "asked",
    "conversation",
    "judge_input",
]


@dataclass(frozen=True, slots=True)
class ChatResult:
    """One guarded answer.

    text: what the caller got, refusal included.
    finish_reason: `stop`, `content_filter`, or what else the model said (`length`, ...).
    input_verdict, output_verdict: the decisions; the latter None when no answer was judged. A
        redacted text carries the verdict on the text as it was before.
    """

    text: str
    finish_reason: str
    input_verdict: Verdict
    output_verdict: Verdict | None = None

    @property
    def blocked(self) -> bool:
        """True when the answer, or its rest, was withheld: by the guard, or by the model's own
        filter."""
        return self.finish_reason == "content_filter"


@dataclass(frozen=True, slots=True)
class Check:
    pairs: list[Pair]


@dataclass(frozen=True, slots=True)
class Open:
    """draw: 0 for the first answer; a seeded model answers each draw anew."""

    messages: list[Message]
    draw: int = 0


@dataclass(frozen=True, slots=True)
class Pull:
    pass


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Rank:
    pairs: list[Pair]


@dataclass(frozen=True, slots=True)
class Emit:
    """draw: whose text it is, where that is not the last one opened."""

    text: str
    draw: int | None = None


Step = Check | Open | Pull | Close | Rank | Emit


@dataclass(frozen=True, slots=True)
class Rules:
    """How a conversation is guarded; see `GuardedChat` for what each means."""

    policy: Policy
    stream: StreamConfig
    on_block: Literal["refuse", "raise"] = "refuse"
    context_turns: int = 4
    regenerate_tries: int = 2
    best_of: bool = False
    every_role: bool = False  # of the input, judge what system, developer and tool messages say too


def conversation(messages: Sequence[Message], rules: Rules) -> Generator[Step, Any, ChatResult]:
    """The protocol of one answer to `messages`. May raise Blocked."""
    turns, seen, ok = yield from judge_input(list(messages), rules)
    if not ok:
        return (yield from _refuse(seen, rules, ChatResult("", "", seen)))
    prompt = asked(turns, rules.context_turns)
    yield Open(turns)
    text, finish, verdict, ok = yield from _output(prompt, rules)
    result = ChatResult(text, finish, seen, verdict)
    # What the caller has seen cannot be taken back: then there is nothing to answer anew.
    if not ok and verdict.action is Action.REGENERATE and not text:
        again = _best if rules.best_of else _again
        result, ok = yield from again(_instructed(turns), prompt, rules, result)
    if ok:
        return result
    assert result.output_verdict is not None  # there was an answer, and it was judged
    return (yield from _refuse(result.output_verdict, rules, result))


def _again(
    turns: list[Message], prompt: str, rules: Rules, result: ChatResult
) -> Generator[Step, Any, tuple[ChatResult, bool]]:
    """The first answer that goes out, or the last that did not; and whether it did."""
    for draw in range(1, rules.regenerate_tries + 1):
        yield Open(turns, draw)
        text, finish, verdict, ok = yield from _output(prompt, rules)
        result = ChatResult(text, finish, result.input_verdict, verdict)
        if ok or text or verdict.action is not Action.REGENERATE:
            return result, ok
    return result, False


def _best(
    turns: list[Message], prompt: str, rules: Rules, result: ChatResult
) -> Generator[Step, Any, tuple[ChatResult, bool]]:
    """Of as many answers as there are tries, the best of those that may go out; else the last."""
    whole = dataclasses.replace(rules, stream=rules.stream.gathered())
    kept: dict[int, ChatResult] = {}
    for draw in range(1, rules.regenerate_tries + 1):
        yield Open(turns, draw)
        text, finish, verdict, ok = yield from _unheard(_output(prompt, whole))
        if ok:
            kept[draw] = ChatResult(text, finish, result.input_verdict, verdict)
        else:
            result = ChatResult("", finish, result.input_verdict, verdict)
    if not kept:
        return result, False
    scores: Sequence[float] = yield Rank([Pair(prompt, one.text) for one in kept.values()])
    best = max(zip(scores, kept, strict=True), key=lambda scored: scored[0])[1]
    yield Emit(kept[best].text, best)
    return kept[best], True


def _unheard(
    output: Generator[Step, Any, tuple[str, str, Verdict, bool]],
) -> Generator[Step, Any, tuple[str, str, Verdict, bool]]:
    """`output`, without its words: they are in what it returns."""
    answer: Any = None
    while True:
        try:
            step = output.send(answer)
        except StopIteration as end:
            found: tuple[str, str, Verdict, bool] = end.value
            return found
        answer = None if isinstance(step, Emit) else (yield step)


def _refuse(verdict: Verdict, rules: Rules, result: ChatResult) -> Generator[Step, Any, ChatResult]:
    if rules.on_block == "raise":
        raise Blocked(verdict)
    refusal = refusal_text(verdict, rules.policy)
    if result.text:
        refusal = f"\n\n{refusal}"
    yield Emit(refusal)
    return dataclasses.replace(result, text=result.text + refusal, finish_reason="content_filter")


# --- output --------------------------------------------------------------------------------------


def _output(prompt: str, rules: Rules) -> Generator[Step, Any, tuple[str, str, Verdict, bool]]:
    """What was emitted of the open answer, its finish reason, its verdict, and whether it all
    went out."""
    gate = stream_gate(rules.stream)
    emitted: list[str] = []
    finish = "stop"
    stopped = False
    event = next(gate)
    while True:
        answer: str | Verdict | None = None
        match event:
            case Need():
                reply: Reply | None = yield Pull()
                if reply is not None:
                    answer = reply.text
                    finish = reply.finish_reason or finish
            case Judge(text):
                [answer] = yield Check([Pair(prompt, text)])
            case Release(text):
                yield Emit(text)
                emitted.append(text)
            case Stop():
                stopped = True
                yield Close()
        try:
            event = gate.send(answer)
        except StopIteration as end:
            return "".join(emitted), finish, end.value, not stopped


def _instructed(messages: list[Message]) -> list[Message]:
    """The messages with the safety instruction, after the system messages they begin with."""
    at = 0
    while at < len(messages) and messages[at]["role"] in ("system", "developer"):
        at += 1
    return [*messages[:at], {"role": "system", "content": SAFETY_INSTRUCTION}, *messages[at:]]


# --- input ---------------------------------------------------------------------------------------


def judge_input(
    messages: list[Message], rules: Rules
) -> Generator[Step, Any, tuple[list[Message], Verdict, bool]]:
    """The messages to send on, the verdict on them, and whether they may be sent."""
    views = _views(messages, rules.context_turns)
    verdicts: list[Verdict] = yield Check(_pairs(messages, views))
    for view in _others(messages) if rules.every_role else ():
        verdicts = [*verdicts, *(yield Check(_pairs(messages, [view])))]
        views.append(view)
    if (strange := not_text(messages)) is not None:
        why = f"only text can be judged, and {strange}"
        verdicts = [*verdicts, rules.policy.fail(Direction.INPUT, why)]
    first = verdict = _strongest(verdicts)
    for _ in range(MASKINGS):
        redacting = [v for v in verdicts if v.action is Action.REDACT]
        if verdict.action is not Action.REDACT or not all(v.passages for v in redacting):
            break
        messages = _masked(messages, views, verdicts, rules.stream.mask)
        verdicts = yield Check(_pairs(messages, views))
        verdict = _strongest(verdicts)
    ok = verdict.delivers
    return messages, first if ok else verdict, ok


def _strongest(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda v: (v.action.rank, v.degraded))


def _user_turns(messages: Sequence[Message], turns: int) -> list[int]:
    """The recent messages of the user; blank ones are no turns, where there are others."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return ([i for i in users if message_text(messages[i]).strip()] or users)[-turns:]


_WHOLE = 40  # characters: a shorter message ("go on") asks for something that was named before


def asked(messages: Sequence[Message], turns: int) -> str:
    """What the answer answers: the last user message, with those before a short one."""
    prompt = ""
    for i in reversed(_user_turns(messages, turns)):
        prompt = "\n".join(filter(None, [message_text(messages[i]), prompt]))
        if len(prompt) >= _WHOLE:
            break
    return prompt


MOST_VIEWS = 3  # of one input, which are judged at once


def _views(messages: Sequence[Message], turns: int) -> list[list[int]]:
    """What is judged, as indices of messages: the last user message alone, and where there are
    several the recent turns together, and the user's of them: what is asked for in two halves
    is not seen where a long answer stands between."""
    every = _user_turns(messages, len(messages))
    users = every[-turns:]
    # What stands before the first of all may be an assistant's text that the model is to continue.
    start = users[0] if len(every) > turns else 0
    recent = [
        i for i in range(start, len(messages)) if messages[i]["role"] in ("user", "assistant")
    ]
    views: list[list[int]] = []
    for view in (users[-1:], recent, users):
        if view not in views:
            views.append(view)
    return views


def _others(messages: Sequence[Message]) -> list[list[int]]:
    """A view of each message, with words in it, of neither the user nor the assistant."""
    return [
        [i]
        for i, message in enumerate(messages)
        if message["role"] not in ("user", "assistant") and message_text(message).strip()
    ]


def _pairs(messages: Sequence[Message], views: Sequence[Sequence[int]]) -> list[Pair]:
    return [Pair("\n".join(message_text(messages[i]) for i in view)) for view in views]


def _masked(
    messages: Sequence[Message],
    views: Sequence[Sequence[int]],
    verdicts: Sequence[Verdict],
    mask: str,
) -> list[Message]:
    """The messages with the passages that were found in any view of them masked."""
    found: dict[int, list[Passage]] = {}
    for view, verdict in zip(views, verdicts, strict=False):  # a verdict on no view has none
        if verdict.action is not Action.REDACT:
            continue
        start = 0
        for i in view:
            size = len(message_text(messages[i]))
            found.setdefault(i, []).extend(
                Passage(max(0, p.start - start), min(size, p.end - start), p.probability)
                for p in verdict.passages
                if p.start < start + size and p.end > start
            )
            start += size + 1
    return [
        {**message, "content": mask_passages(message_text(message), found[i], mask)}
        if found.get(i)
        else message
        for i, message in enumerate(messages)
    ]
