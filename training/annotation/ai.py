"""Machines as annotators: any OpenAI-compatible endpoint, or a local moderator, on the same queue.

Their labels carry their name, and go beside people's, never in place of them. Every label is saved
as it comes: a run that is stopped goes on where it was, and asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from guardrail.moderator import Moderator
from guardrail.policy import LEVELS, Policy
from guardrail.verdict import Pair
from training.annotation.labels import Kind, Label, Role, SafetyLabel
from training.annotation.rows import ensure
from training.annotation.rules import WANTED
from training.annotation.store import Store

RUBRIC = Path(__file__).with_name("rubric.md")


@dataclass(frozen=True, slots=True)
class Question:
    """What a machine is asked: a text, or (`kind` pair) two answers, in the order shown."""

    task: int
    kind: Kind
    prompt: str
    responses: tuple[str | None, ...]
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """detail: probabilities, tokens, cost, reason: kept beside the label."""

    label: Label
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is no answer. detail: tokens and cost, which were spent all the same."""

    problem: str
    detail: Mapping[str, Any] = field(default_factory=dict)


class Machine(Protocol):
    """An annotator that is no person."""

    name: str
    role: Role
    kinds: tuple[Kind, ...]
    batch: int
    """How many questions are best asked in one call."""

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failed]:
        """An answer each, or why there is none. Thread-safe. May raise GuardrailError, which ends
        the run: nothing more would be answered."""
        ...


@dataclass
class Tally:
    """What a run has done so far."""

    labelled: int = 0
    failed: int = 0
    total: int = 0
    tokens: int = 0
    cost: float = 0.0
    problems: list[str] = field(default_factory=list)


def annotate(
    store: Store,
    machine: Machine,
    *,
    kind: Kind | None = None,
    everything: bool = False,
    limit: int | None = None,
    workers: int = 4,
    max_cost: float | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Label what is queued and what this machine has not labelled yet.

    everything: also texts that came with a label and are not queued. max_cost: stop asking when so
    much is spent (answers under way are still taken). progress: called after each answer.
    """
    questions = pending(store, machine, kind=kind, everything=everything)[:limit]
    tally = Tally(total=len(questions))
    progress(tally)
    size = machine.batch
    chunks = iter([questions[n : n + size] for n in range(0, len(questions), size)])
    running: dict[Future[list[Answer | Failed]], Sequence[Question]] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                if max_cost is None or tally.cost < max_cost:
                    for chunk in islice(chunks, workers - len(running)):
                        running[pool.submit(machine.answer, chunk)] = chunk
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    _take(store, machine, running.pop(future), future.result(), tally)
                    progress(tally)
        finally:  # an answer that was waited for is paid for, whatever became of another
            pool.shutdown(wait=True, cancel_futures=True)
            for future, chunk in running.items():
                if not future.cancelled() and future.exception() is None:
                    _take(store, machine, chunk, future.result(), tally)
    return tally


def pending(
    store: Store, machine: Machine, *, kind: Kind | None = None, everything: bool = False
) -> list[Question]:
    """What is to be asked, in the order of the queue."""
    settings = store.settings()
    with store.read() as db:
        rows = db.execute(
            "SELECT *, (SELECT response FROM tasks a WHERE a.id = t.item_0) AS response_0,"
            " (SELECT response FROM tasks b WHERE b.id = t.item_1) AS response_1 FROM tasks t"
            f" WHERE (:everything OR {WANTED} > 0) AND NOT EXISTS (SELECT 1 FROM labels l"
            "  WHERE l.task_id = t.id AND l.annotator = :machine AND l.ended IS NULL)"
            " ORDER BY kind, priority DESC, id",
            {
                "everything": everything,
                "share": settings.overlap_share,
                "overlap": settings.overlap_labels,
                "machine": machine.name,
            },
        ).fetchall()
    asked = [row for row in rows if row["kind"] in machine.kinds and kind in (None, row["kind"])]
    return [_question(row, machine.name) for row in asked]


def _question(row: Mapping[str, Any], machine: str) -> Question:
    if row["kind"] == "item":
        return Question(row["id"], "item", row["prompt"], (row["response"],))
    # Models prefer a side: each pair is shown one way or the other, always the same.
    coin = hashlib.sha256(f"{machine} {row['id']}".encode()).digest()[0] & 1
    responses = (row["response_0"], row["response_1"])
    shown = responses[::-1] if coin else responses
    return Question(row["id"], "pair", row["prompt"], shown, swapped=bool(coin))


def _take(
    store: Store,
    machine: Machine,
    questions: Sequence[Question],
    answers: Sequence[Answer | Failed],
    tally: Tally,
) -> None:
    given = [
        (question, answer)
        for question, answer in zip(questions, answers, strict=True)
        if isinstance(answer, Answer)
    ]
    save_answers(store, machine.name, machine.role, given)
    for question, answer in zip(questions, answers, strict=True):
        tally.tokens += int(answer.detail.get("tokens", 0))
        tally.cost += float(answer.detail.get("cost", 0))
        if isinstance(answer, Failed):
            tally.failed += 1
            tally.problems.append(f"task {question.task}: {answer.problem}")
        else:
            tally.labelled += 1


def save_answers(
    store: Store, name: str, role: Role, given: Iterable[tuple[Question, Answer]]
) -> None:
    """Keep a machine's labels, in one transaction; an earlier one of its stops counting."""
    with store.write() as db:
        now = store.clock()
        ensure(db, name, role, now)
        for question, answer in given:
            db.execute(
                "UPDATE labels SET ended = ? WHERE task_id = ? AND annotator = ? AND ended IS NULL",
                (now, question.task, name),
            )
            position = int(question.swapped) if question.kind == "pair" else None
            db.execute(
                "INSERT INTO labels (task_id, annotator, value, position, detail, created)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    question.task,
                    name,
                    json.dumps(answer.label.to_json()),
                    position,
                    json.dumps(dict(answer.detail)),
                    now,
                ),
            )


# --- the local moderator -------------------------------------------------------------------------


class ModeratorMachine:
    """A moderator's decisions, by its own thresholds; its probabilities go beside them.

    Labels texts only: which of two answers helps more is not what a moderator sees.
    """

    role: Role = "moderator"
    kinds: tuple[Kind, ...] = ("item",)
    batch = 32

    def __init__(self, moderator: Moderator) -> None:
        self.name = f"moderator:{moderator.id}"
        self._moderator = moderator
        self._policy = Policy.load("balanced")

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failed]:
        return [
            Answer(*found)
            for found in self.judge([Pair(q.prompt, q.responses[0]) for q in questions])
        ]

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[SafetyLabel, dict[str, Any]]]:
        for seen in self._moderator.assess(pairs):
            verdict = self._policy.decide(seen, self._moderator.thresholds.get(seen.direction))
            names = tuple(reason.category.value for reason in verdict.reasons)
            label = (
                SafetyLabel(False, int(verdict.severity), names)
                if verdict.severity > 0
                else SafetyLabel(True)
            )
            yield (
                label,
                {
                    "severity": [round(seen.at_least(level), 4) for level in LEVELS],
                    "categories": {c.value: round(p, 4) for c, p in seen.categories.items()},
                },
            )
