"""The strings of an answer's data (a tool call's arguments, say), judged without I/O."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from guardrail.conversation import Check
from guardrail.stream import Judge, StreamConfig, stream_gate
from guardrail.verdict import Pair, Verdict

__all__ = ["judge_strings"]

_SENTENCE = 40  # characters; a shorter string is judged among its neighbours alone


def judge_strings(
    prompt: str, found: Sequence[str], config: StreamConfig
) -> Generator[Check, list[Verdict], Verdict]:
    """The strongest verdict on them all together, and on each that may hold a sentence: names of
    fields and harmless neighbours make harm look milder than it is, as they do in a text."""
    texts = dict.fromkeys(["\n".join(found), *(text for text in found if len(text) >= _SENTENCE)])
    worst: Verdict | None = None
    for text in texts:
        verdict = yield from _judge(prompt, text, config)
        if worst is None or _rank(verdict) > _rank(worst):
            worst = verdict
    assert worst is not None  # there is always one text
    return worst


def _rank(verdict: Verdict) -> tuple[int, bool]:
    return verdict.action.rank, verdict.degraded


def _judge(
    prompt: str, text: str, config: StreamConfig
) -> Generator[Check, list[Verdict], Verdict]:
    """The verdict on a text that is gathered, its sentences looked at where there is a doubt."""
    gate = stream_gate(config.gathered())
    next(gate)
    event = gate.send(text)
    answer: Verdict | None = None
    try:
        while True:
            if isinstance(event, Judge):
                [answer] = yield Check([Pair(prompt, event.text)])
            event = gate.send(answer)
            answer = None
    except StopIteration as end:
        verdict: Verdict = end.value
        return verdict
