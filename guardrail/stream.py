"""The stream gate, sans-IO: deltas go in, "judge this" and "release this" come out.

One generator holds the whole protocol; sync and async drivers run the same one. It opens nothing
and imports only the verdict, so that it can be proved: no character is released before an
assessment of a text that contains it was decided as deliverable.

    gate = stream_gate()
    event = next(gate)                      # Need
    event = gate.send("some delta")         # after a Need: a delta, or None at the end
    event = gate.send(verdict)              # after a Judge
    event = gate.send(None)                 # after a Release or a Stop

Cost: each passage is judged once, with a bounded stretch of what was released before it, and the
whole text once more at its end: linear in its length. What is masked is judged a second time.

What it cannot do: a phrase that turns harmful with its last word has had its first words released
by then, when they ended a passage. Passages end after a sentence or a word, never inside a word
that is shorter than a passage. Harm longer than `context` characters, no part of which is harmful
alone, is seen only when the whole answer is judged, at its end.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from guardrail.verdict import Action, Passage, Verdict

__all__ = ["Judge", "Need", "Release", "Stop", "StreamConfig", "mask_passages", "stream_gate"]


@dataclass(frozen=True, slots=True)
class Need:
    """Send the next delta, or None at the end of the text."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Send the verdict on `text`."""

    text: str


@dataclass(frozen=True, slots=True)
class Release:
    """`text` may go to the caller. Send None."""

    text: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing more may go out; `verdict` says why. The gate ends after it."""

    verdict: Verdict


Event = Need | Judge | Release | Stop


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """How often a stream is judged; in characters. Raises ValueError on values that cannot work.

    first: the text that is gathered for the first passage; short, for a small time to first text.
    growth, longest: each further passage may gather `growth` times the one before, up to `longest`.
    context: how much of what was released is judged again with each passage, so that harm spread
        over a passage's edge is seen. No forbidden string up to this length gets out whole.
    mask: what a redacted passage is replaced by.
    """

    first: int = 1
    growth: float = 2.5
    longest: int = 600
    context: int = 350
    mask: str = "[redacted]"

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.longest:
            raise ValueError(f"need 1 <= first <= longest, not {self.first} and {self.longest}")
        if not self.growth >= 1:
            raise ValueError(f"growth must be 1 or more, not {self.growth}")
        if self.context < 0:
            raise ValueError(f"context must be 0 or more, not {self.context}")
        # An empty mask would join what stood on both sides of a passage into something unjudged.
        if not self.mask.strip():
            raise ValueError("mask must hold a visible character")

    def gathered(self) -> StreamConfig:
        """For an answer that is not streamed: all of it is gathered, and judged once."""
        return dataclasses.replace(self, first=sys.maxsize, longest=sys.maxsize)


_SENTENCE = re.compile(r"[.!?…][\"')\]]*\s|\n")
_SPACE = re.compile(r"\s")
_WORD = 32  # characters; of longer words nobody reads the beginning first
_Steps = Generator[Event, str | Verdict | None, tuple[str | None, Verdict]]


def stream_gate(
    config: StreamConfig | None = None,
) -> Generator[Event, str | Verdict | None, Verdict]:
    """The protocol of one answer. Sent a Verdict after each Judge, a delta or None after a Need.

    Returns the verdict that decided the answer: the one on its whole text, unless stopped before.
    """
    config = config or StreamConfig()
    text = ""  # everything that came in
    done = 0  # text[:done] was judged
    out = ""  # what was released of it
    hop = float(config.first)
    while (delta := (yield Need())) is not None:
        if not isinstance(delta, str):
            raise TypeError(f"the gate needs a delta, not {delta!r}")
        text += delta
        if len(text) - done < hop:
            continue
        end = _cut(text, done, int(hop))
        if end == done:
            continue
        context = out[max(0, len(out) - config.context) :]
        released, verdict = yield from _passage(context, text[done:end], context, config)
        if released is None:
            yield Stop(verdict)
            return verdict
        if released:
            yield Release(released)
        out += released
        done = end
        hop = min(hop * config.growth, float(config.longest))
    # The last passage is judged with the whole answer before it, so that the stream ends with the
    # decision that `check` gives.
    released, verdict = yield from _passage(text[:done], text[done:], out, config)
    if released is None:
        yield Stop(verdict)
    elif released:
        yield Release(released)
    return verdict


def _passage(before: str, new: str, shown: str, config: StreamConfig) -> _Steps:
    """Judge `before + new`; what of `new` may go out, or None for a stop.

    shown: what the caller saw of `before`, which stands before `new` once that is masked.
    """
    verdict = yield from _verdict(before + new)
    if verdict.delivers:
        return new, verdict
    if verdict.action is not Action.REDACT or not verdict.passages:
        return None, verdict
    masked = mask_passages(before + new, verdict.passages, config.mask, skip=len(before))
    again = yield from _verdict(shown + masked)
    return (masked, verdict) if again.action <= Action.REDACT else (None, again)


def _verdict(text: str) -> Generator[Event, str | Verdict | None, Verdict]:
    verdict = yield Judge(text)
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the gate needs a verdict, not {verdict!r}")
    return verdict


def mask_passages(text: str, passages: Iterable[Passage], mask: str, *, skip: int = 0) -> str:
    """`text[skip:]` with the passages replaced by `mask`, neighbours by a single one."""
    out: list[str] = []
    at = skip
    for passage in sorted(passages, key=lambda p: p.start):
        start, end = max(passage.start, at), max(passage.end, at)
        if end == start:
            continue
        between = text[at:start]
        if not (out and out[-1] == mask and not between.strip()):
            out += [between, mask]
        at = end
    return "".join([*out, text[at:]])


def _cut(text: str, done: int, hop: int) -> int:
    """Where the next passage ends: after the last sentence, or else word, of `text[done:]`; `done`
    while its only word may go on. A word longer than a passage and `_WORD` is cut."""
    for pattern, reach in ((_SENTENCE, hop // 2), (_SPACE, max(hop - 1, _WORD))):
        ends = [m.end() for m in pattern.finditer(text, max(done, len(text) - reach))]
        if ends:
            return ends[-1]
    return len(text) if len(text) - done > max(hop - 1, _WORD) else done
