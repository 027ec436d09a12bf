"""A text that comes in parts, and the strings of an answer's data (a tool call's arguments, say),
as the stream gate judges them. No I/O: each yields what is to be checked, and is sent verdicts."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from guardrail.conversation import Check
from guardrail.stream import Judge, Need, Release, Stop, StreamConfig, stream_gate
from guardrail.verdict import Pair, Verdict

__all__ = ["Gate", "Judging", "judge_strings", "judge_text"]

T = TypeVar("T")
Judging = Generator[Check, list[Verdict], T]
_SENTENCE = 40  # characters; a shorter string is judged among its neighbours alone


class Gate:
    """The stream gate of one text. `text` is what was released, `verdict` the last decision."""

    def __init__(self, prompt: str, config: StreamConfig) -> None:
        self._prompt = prompt
        self._gate = stream_gate(config)
        self._event = next(self._gate)
        self.text = ""
        self.verdict: Verdict | None = None
        self.stopped = False
        self.ended = False

    def push(self, delta: str | None) -> Judging[str]:
        """What may go out now that `delta`, or the end (None), has come. Nothing after a stop."""
        if self.ended:
            return ""
        released = ""
        answer: str | Verdict | None = delta
        try:
            self._event = self._gate.send(answer)
            while not isinstance(self._event, Need):
                answer = None
                match self._event:
                    case Judge(text):
                        [answer] = yield Check([Pair(self._prompt, text)])
                    case Release(text):
                        released += text
                    case Stop():
                        self.stopped = True
                self._event = self._gate.send(answer)
        except StopIteration as end:
            self.verdict = end.value
            self.ended = True
        self.text += released
        return released


def judge_text(prompt: str, text: str, config: StreamConfig) -> Judging[tuple[str | None, Verdict]]:
    """The text as it may go out, redacted where it has to be, or None; and the verdict. Its
    sentences are looked at where there is a doubt."""
    gate = Gate(prompt, config.gathered())
    yield from gate.push(text)
    yield from gate.push(None)
    assert gate.verdict is not None  # a gate that has ended has decided
    return None if gate.stopped else gate.text, gate.verdict


def judge_strings(prompt: str, found: Sequence[str], config: StreamConfig) -> Judging[Verdict]:
    """The strongest verdict on them all together, and on each that may hold a sentence: names of
    fields and harmless neighbours make harm look milder than it is, as they do in a text."""
    texts = dict.fromkeys(["\n".join(found), *(text for text in found if len(text) >= _SENTENCE)])
    worst: Verdict | None = None
    for text in texts:
        _, verdict = yield from judge_text(prompt, text, config)
        if worst is None or _rank(verdict) > _rank(worst):
            worst = verdict
    assert worst is not None  # there is always one text
    return worst


def _rank(verdict: Verdict) -> tuple[int, bool]:
    return verdict.action.rank, verdict.degraded
