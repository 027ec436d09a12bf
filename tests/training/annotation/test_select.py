"""What is worth labelling next, texts from an audit log, and labels worth another look."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail import Category, Guard, Severity
from guardrail.audit import AuditLog
from guardrail.testing import FakeModerator
from training.annotation.ai import Answer, Question, save_answers
from training.annotation.labels import AnnotationError, Record, SafetyLabel
from training.annotation.queue import Queue
from training.annotation.select import (
    Weights,
    bring_forward,
    disagreement,
    import_audit,
    rarity,
    traffic,
    uncertainty,
)
from training.annotation.suspects import FEW, Suspect, find, requeue
from training.bag_of_words import out_of_fold

SAFE = SafetyLabel(True)
GRAVE = SafetyLabel(False, 3, ("Violence",))
CRUEL = SafetyLabel(False, 2, ("Animal Abuse",))


def add(queue: Queue, *records: Record) -> None:
    queue.store.add(records, name="rows", digest="rows")


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_every_part_of_a_score_is_a_share(chances: list[float]) -> None:
    falling = sorted(chances, reverse=True)
    assert 0 <= uncertainty(falling) <= 1 + 1e-9
    assert 0 <= rarity({"Drugs": chances[0]}, Counter()) <= 1
    assert 0 <= traffic(3, 7) <= 1


def test_doubt_is_greatest_where_all_severities_are_as_likely() -> None:
    assert uncertainty([0.75, 0.5, 0.25]) == pytest.approx(1)
    assert uncertainty([0, 0, 0]) == uncertainty([1, 1, 1]) == 0
    assert uncertainty([0.5, 0, 0]) == pytest.approx(math.log(2) / math.log(4))


def test_safe_against_unsafe_is_the_greatest_disagreement() -> None:
    assert disagreement([SAFE, GRAVE]) == 1
    assert disagreement([CRUEL, GRAVE]) == 0.5
    assert disagreement([GRAVE, GRAVE]) == disagreement([]) == 0


def test_a_category_is_rarer_the_fewer_labels_it_has() -> None:
    counts = Counter({"Drugs": 99})
    assert rarity({"Animal Abuse": 0.5}, counts) > rarity({"Drugs": 1.0}, counts)


def opinion(queue: Queue, task: int, at_least: list[float], **categories: float) -> None:
    detail = {"severity": at_least, "categories": categories}
    answer = Answer(SAFE if at_least[0] < 0.5 else GRAVE, detail)
    save_answers(
        queue.store, "moderator:m", "moderator", [(Question(task, "item", "", ("",)), answer)]
    )


def test_the_text_that_helps_most_comes_first(queue: Queue) -> None:
    add(queue, *(Record(f"p{n}", ("r",), (None,)) for n in range(4)))
    opinion(queue, 1, [0.01, 0, 0])
    opinion(queue, 2, [0.01, 0, 0])
    opinion(queue, 3, [0.75, 0.5, 0.25])
    opinion(queue, 4, [0.01, 0, 0])
    best = bring_forward(queue.store, 1)
    assert [one.task for one in best] == [3]
    assert best[0].why.startswith("uncertain")
    task = queue.claim("ann")
    assert task is not None
    assert task.id == 3


def test_texts_that_are_done_come_back_only_when_asked_for(queue: Queue) -> None:
    add(queue, Record("p", ("r",), (None,)))
    queue.save("ann", 1, GRAVE)
    queue.save("cat", 1, SAFE)
    assert bring_forward(queue.store, 5) == []
    assert queue.claim("bob") is None
    best = bring_forward(queue.store, 5, again=True)
    assert best[0].why.startswith("disagreeing")
    assert queue.claim("bob") is not None
    assert queue.claim("ann") is None  # one person more, not the same ones again


def test_a_weight_of_zero_leaves_a_part_out(queue: Queue) -> None:
    add(queue, Record("p", ("r",), (None,)))
    opinion(queue, 1, [0.75, 0.5, 0.25], Drugs=0.9)
    best = bring_forward(queue.store, 5, Weights(uncertain=0, disagreeing=0, rare=1, traffic=0))
    assert best[0].value == pytest.approx(0.9)
    assert bring_forward(queue.store, 5, Weights(0, 0, 0, 0)) == []


# --- audit ---------------------------------------------------------------------------------------


def test_only_texts_with_consent_are_taken_from_an_audit_log_and_counted(
    queue: Queue, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    words = {"bomb": (Severity.SEVERE, Category.VIOLENCE)}
    agreed = AuditLog(log, consent=lambda pair, verdict: "secret" not in pair.prompt)
    guard = Guard(FakeModerator(words), audit=agreed)
    for _ in range(3):
        guard.check("often asked", "a bomb")
    guard.check("asked once", "a cake")
    guard.check("a secret", "a bomb")
    found = import_audit(queue.store, log)
    assert (found.rows, found.consented, found.texts) == (5, 4, 2)
    assert set(queue.store.texts().values()) == {
        ("often asked", "a bomb"),
        ("asked once", "a cake"),
    }
    assert {s.value.severity for s in queue.store.labels("item")} == {0, 3}  # type: ignore[union-attr]
    best = bring_forward(queue.store, 2, Weights(uncertain=0, disagreeing=0, rare=0, traffic=1))
    assert [queue.store.texts()[one.task][0] for one in best] == ["often asked", "asked once"]
    assert best[0].value == 1
    assert import_audit(queue.store, log).texts == 0
    for _ in range(9):
        guard.check("asked once", "a cake")
    assert import_audit(queue.store, log).texts == 1
    best = bring_forward(queue.store, 1, Weights(uncertain=0, disagreeing=0, rare=0, traffic=1))
    assert queue.store.texts()[best[0].task][0] == "asked once"


def test_each_log_is_counted_apart_and_a_text_of_one_is_one_row(
    queue: Queue, tmp_path: Path
) -> None:
    logs = [tmp_path / name / "audit.jsonl" for name in "ab"]
    guards = []
    for log in logs:
        log.parent.mkdir()
        guards.append(Guard(FakeModerator({}), audit=AuditLog(log, consent=lambda *_: True)))
    for times in (3, 2):
        for _ in range(times):
            guards[0].check("hello")
        assert import_audit(queue.store, logs[0]).texts == 1
    for _ in range(4):
        guards[1].check("hello")
    assert import_audit(queue.store, logs[1]).texts == 1
    with queue.store.read() as db:
        rows = db.execute("SELECT extra FROM records ORDER BY id").fetchall()
    assert [json.loads(row["extra"])["requests"] for row in rows] == [5, 4]


def test_the_newest_moderator_is_heeded(queue: Queue) -> None:
    add(queue, Record("p", ("r",), (None,)), Record("q", ("r",), (None,)))
    unsure, sure = [0.75, 0.5, 0.25], [0.0, 0.0, 0.0]
    for name, seen in (("old", (unsure, sure)), ("new", (sure, unsure))):
        given = [
            (Question(task, "item", "", ("",)), Answer(SAFE, {"severity": at_least}))
            for task, at_least in enumerate(seen, 1)
        ]
        save_answers(queue.store, f"moderator:{name}", "moderator", given)
    assert [one.task for one in bring_forward(queue.store, 5)] == [2]


def test_a_suspected_error_keeps_its_place_before_all_others(queue: Queue) -> None:
    add(queue, *(Record(f"p{n}", ("r",), (None,)) for n in range(4)))
    for task in range(1, 5):
        opinion(queue, task, [0.75, 0.5, 0.25])
    requeue(queue.store, [Suspect(4, 0.5, "looks severe")])
    for again in (False, True):
        bring_forward(queue.store, 2, Weights(uncertain=50), again=again)
        task = queue.claim("ann")
        assert task is not None
        assert task.id == 4
        queue.release("ann")


def test_a_file_that_is_no_audit_log_is_refused_as_one(queue: Queue, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(AnnotationError, match=r"not an audit log.*leave out --audit"):
        import_audit(queue.store, tmp_path / "chats.jsonl")
    (tmp_path / "empty.jsonl").touch()  # a log that nothing was written to yet
    assert import_audit(queue.store, tmp_path / "empty.jsonl").rows == 0


# --- suspects ------------------------------------------------------------------------------------


def test_out_of_fold_probabilities_never_saw_the_prompt() -> None:
    # The label is the prompt's own: who saw the prompt knows it, who did not cannot.
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 40)
    texts = [(f"prompt{n}", f"word{k}") for n in range(40) for k in range(3)]
    labels = np.repeat(truth, 3)[:, None]
    chances = out_of_fold(texts, labels)[:, 0]
    right = ((chances > 0.5) == (labels[:, 0] == 1)).mean()
    assert right < 0.7


def test_planted_label_errors_are_found_and_asked_of_one_more_person(queue: Queue) -> None:
    rng = np.random.default_rng(0)
    mild, cruel = (
        ["tea", "cake", "rain", "song", "book"],
        ["kick", "beat", "hurt", "starve", "whip"],
    )
    records, wrong = [], {7, 40, 91}
    for n in range(120):
        words = cruel if n % 2 else mild
        text = " ".join(rng.choice(words, 6))
        label = CRUEL if (n % 2 == 1) != (n in wrong) else SAFE
        records.append(Record(f"number {n}", (text,), (label,), origin="human"))
    add(queue, *records)
    assert queue.claim("ann") is None  # they came with labels
    found = find(queue.store)
    assert {one.task - 1 for one in found[:3]} == wrong
    assert "looks" in found[0].why or "seems" in found[0].why
    assert requeue(queue.store, found[:3]) == 3
    asked = set()
    while task := queue.claim("ann"):
        asked.add(task.id - 1)
        queue.save("ann", task.id, SAFE)
    assert asked == wrong
    assert queue.claim("cat") is None


def test_a_category_that_few_texts_have_is_not_called_wrong_for_being_rare(queue: Queue) -> None:
    rows = [Record(f"number {n}", ("tea cake song",), (SAFE,), origin="human") for n in range(40)]
    rows += [
        Record(f"other {n}", ("kick beat hurt",), (CRUEL,), origin="human") for n in range(FEW - 1)
    ]
    add(queue, *rows)
    assert find(queue.store) == []


def test_a_store_without_labels_has_no_suspects(queue: Queue) -> None:
    add(queue, Record("p", ("r",), (None,)))
    with pytest.raises(AnnotationError, match="no complete labels"):
        find(queue.store)
