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
whole text once more at its end: linear in its length. What is masked is judged again, and masked
again where that finds more, a few times at most; a passage that is delivered, yet is not clearly
harmless, is judged sentence by sentence: amid harmless ones a harmful sentence looks milder than it
is. A passage that is stopped for nothing but that the model
cannot read it (a foreign quote, a key in hex) waits for what follows, for what can be read is a
matter of shares.

What it cannot do: a phrase that turns harmful with its last word has had its first words released
by then, when they ended a passage. Passages end after a sentence or a word, never inside a word
that is shorter than a passage. Harm longer than `context` characters, no part of which is harmful
alone, is seen only when the whole answer is judged, at its end.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

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
    second_look: the probability of being unsafe from which the sentences of a passage are judged
        one by one as well; 1 is hardly ever, 0 always.
    """

    first: int = 1
    growth: float = 2.5
    longest: int = 600
    context: int = 350
    mask: str = "[redacted]"
    second_look: float = 0.2

    def __post_init__(self) -> None:
        for name in ("first", "longest", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number of characters, not {value!r}")
        for name in ("growth", "second_look"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not 1 <= self.first <= self.longest:
            raise ValueError(f"need 1 <= first <= longest, not {self.first} and {self.longest}")
        if not self.growth >= 1:
            raise ValueError(f"growth must be 1 or more, not {self.growth}")
        if self.context < 0:
            raise ValueError(f"context must be 0 or more, not {self.context}")
        if not 0 <= self.second_look <= 1:
            raise ValueError(f"second_look must be from 0 to 1, not {self.second_look}")
        # An empty mask would join what stood on both sides of a passage into something unjudged.
        if not isinstance(self.mask, str) or not self.mask.strip():
            raise ValueError(f"mask must be a text with a visible character, not {self.mask!r}")

    def gathered(self) -> StreamConfig:
        """For an answer that is not streamed: all of it is gathered, and judged once."""
        return replace(self, first=sys.maxsize, longest=sys.maxsize)


_SENTENCE = re.compile(r"[.!?…][\"')\]]*\s|\n")
_SPACE = re.compile(r"\s")
_SENTENCE_CHARS = 40  # at least, to be judged alone: "1." says nothing
_WORD = 32  # characters; of longer words nobody reads the beginning first
_PATIENCE = 4  # passages, of the longest: as much of what cannot be read is gathered
MASKINGS = 3  # of one text: what was masked can show more that harms
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
        patience = float(_PATIENCE * config.longest)
        if released is None and _only_unreadable(verdict) and hop < patience:
            hop = min(2.0 * max(hop, len(text) - done), patience)  # doubled: each try reads it all
            continue
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
    first = verdict = yield from _looked(before, new, config)
    left, behind = new, before
    for _ in range(MASKINGS):
        if verdict.delivers:
            return left, first
        if verdict.action is not Action.REDACT or not verdict.passages:
            return None, verdict
        masked = mask_passages(behind + left, verdict.passages, config.mask, skip=len(behind))
        if (masked, shown) == (left, behind):
            break
        left, behind = masked, shown
        verdict = yield from _looked(behind, left, config)
    if verdict.delivers:
        return left, first
    if verdict.action is not Action.REDACT or not verdict.passages or not shown:
        return None, verdict
    # What harms is out already, and `new` makes it harm: there is nothing else to withhold.
    left = config.mask if new.strip() and not shown.endswith(config.mask) else ""
    verdict = yield from _verdict(shown + left)
    out = verdict.action <= Action.REDACT and not verdict.degraded
    return (left, first) if out else (None, verdict)


def _looked(
    before: str, new: str, config: StreamConfig
) -> Generator[Event, str | Verdict | None, Verdict]:
    """The verdict on `before + new`, or on a sentence of `new` that is not delivered alone."""
    verdict = yield from _verdict(before + new)
    if not verdict.delivers:
        return verdict
    return (yield from _closer_look(before, new, verdict, config)) or verdict


def _closer_look(
    before: str, new: str, verdict: Verdict, config: StreamConfig
) -> Generator[Event, str | Verdict | None, Verdict | None]:
    """The strongest verdict on a sentence of `new` that is not delivered alone, as if it were on
    `before + new`; None where there is none, or no need to look."""
    if verdict.assessment is None or verdict.assessment.unsafe_probability < config.second_look:
        return None
    found: list[Verdict] = []
    for start, end in _sentences(new):
        if new[start:end].strip() and end - start < len(before + new):
            alone = yield from _verdict(new[start:end])
            if not alone.delivers and not _only_unreadable(alone):
                found.append(_moved(alone, len(before) + start))
    if not found:
        return None
    worst = max(found, key=lambda v: v.action.rank)
    if worst.assessment is None:
        return worst
    passages = tuple(p for v in found for p in v.passages)
    return replace(worst, assessment=replace(worst.assessment, passages=passages))


def _only_unreadable(verdict: Verdict) -> bool:
    """Nothing is held against the text but that the model cannot read it."""
    seen = verdict.assessment
    return bool(seen and seen.unreadable and not verdict.reasons and not verdict.degraded)


def _moved(verdict: Verdict, by: int) -> Verdict:
    """A verdict on `text[by:]` as one on `text`."""
    if verdict.assessment is None:
        return verdict
    passages = tuple(replace(p, start=p.start + by, end=p.end + by) for p in verdict.passages)
    return replace(verdict, assessment=replace(verdict.assessment, passages=passages))


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of `text` lie, short ones with the next, the rest with the last."""
    edges = [0]
    for match in _SENTENCE.finditer(text):
        if match.end() - edges[-1] >= _SENTENCE_CHARS:
            edges.append(match.end())
    if len(edges) == 1 or len(text) - edges[-1] >= _SENTENCE_CHARS:
        edges.append(len(text))
    else:
        edges[-1] = len(text)
    return list(pairwise(edges))


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
        start = max(passage.start, at)
        end = start + len(text[start : passage.end].rstrip())  # what follows keeps its distance
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
