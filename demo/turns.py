"""The chat of the page without the page: turns, and a guarded model that answers one.

Imports no Gradio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from guardrail import ChatResult, Guard, GuardedChat, GuardrailError
from guardrail.upstream import OpenAICompatible

from . import responder

__all__ = ["Connection", "Turn", "answer", "transcript"]


@dataclass(frozen=True, slots=True)
class Connection:
    """The chat model behind the guard: an OpenAI-compatible API, or else what is here."""

    url: str = ""
    model: str = ""
    key: str = ""

    def __repr__(self) -> str:
        return f"Connection({self.url!r}, {self.model!r})"  # no key in logs and tracebacks

    @property
    def name(self) -> str:
        """What the page calls it."""
        if self.url:
            return f"{self.model or 'model'} at {self.url}"
        policy = responder.local_policy()
        return f"{policy.manifest.id}, on this machine" if policy else responder.NAME

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The model, as `GuardedChat` takes it. Raises GuardrailError."""
        if not self.url:
            yield responder.local_policy() or responder.ScriptedResponder()
        else:
            with OpenAICompatible(self.url, model=self.model, api_key=self.key or None) as model:
                yield model


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its answer, as far as it was released; `result` once the answer has ended."""

    prompt: str
    answer: str = ""
    result: ChatResult | None = None
    error: str = ""


def answer(
    prompt: str, before: Sequence[Turn], guard: Guard, connection: Connection
) -> Iterator[Turn]:
    """The turn, again and again as its answer grows; raises nothing of guardrail's own."""
    turn = Turn(prompt)
    yield turn
    try:
        with (
            connection.open() as model,
            GuardedChat(model, guard).stream(_messages(before, prompt)) as stream,
        ):
            for delta in stream:
                turn = replace(turn, answer=turn.answer + delta)
                yield turn
            yield replace(turn, result=stream.result)
    except GuardrailError as error:
        yield replace(turn, error=str(error))


def _messages(before: Sequence[Turn], prompt: str) -> list[dict[str, str]]:
    """What the model gets to see: withheld turns are forgotten, so that one refused message does
    not weigh on the rest of the chat."""
    messages = []
    for turn in before:
        if turn.result is not None and not turn.result.blocked:
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": turn.answer})
    return [*messages, {"role": "user", "content": prompt}]


def transcript(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as the messages of a `gr.Chatbot`: two for each turn.

    Escaped, for a Chatbot takes its texts as HTML even where it renders no Markdown.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages.append({"role": "user", "content": escape(turn.prompt)})
        ended = "(no answer)" if turn.result or turn.error else "…"
        messages.append({"role": "assistant", "content": escape(turn.answer) or ended})
    return messages
