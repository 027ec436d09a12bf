"""Turns, leases, undo, adjudication, on a real store: also with several processes and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.annotation.labels import (
    AnnotationError,
    PairLabel,
    Record,
    SafetyLabel,
    Settings,
    Task,
)
from training.annotation.queue import Queue
from training.annotation.rows import ensure
from training.annotation.store import Store

ROOT = Path(__file__).parents[3]
SAFE = SafetyLabel(True)
CRUEL = SafetyLabel(False, 2, ("Animal Abuse",))


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def make(
    folder: Path, items: int = 0, pairs: int = 0, people: str = "ann bob", **changes: object
) -> tuple[Queue, Clock]:
    clock = Clock()
    store = Store(folder / "store.db", create=True, clock=clock)
    store.set_settings(replace(Settings(overlap_share=0.0), **changes))  # type: ignore[arg-type]
    for name in people.split():
        store.add_person(name, adjudicates=name == "bob")
    records = [Record(f"p{n}", (f"r{n}",), (None,)) for n in range(items)]
    records += [Record(f"q{n}", (f"a{n}", f"b{n}"), (SAFE, CRUEL)) for n in range(pairs)]
    store.add(records, name="rows", digest="1")
    return Queue(store), clock


def drain(queue: Queue, name: str, label: SafetyLabel = SAFE) -> list[int]:
    done = []
    while task := queue.claim(name, kind="item"):
        queue.save(name, task.id, label)
        done.append(task.id)
    return done


def must(task: Task | None) -> Task:
    assert task is not None
    return task


# --- turns ---------------------------------------------------------------------------------------


def test_two_annotators_never_hold_the_same_item(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=3)
    assert must(queue.claim("ann")).id != must(queue.claim("bob")).id


def test_two_browsers_of_one_person_hold_different_items(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=2)
    first = must(queue.claim("ann", session="a"))
    assert must(queue.claim("ann", session="b")).id != first.id
    assert must(queue.claim("ann", session="a")).id == first.id  # a reloaded page


def test_an_item_comes_back_when_its_lease_runs_out(tmp_path: Path) -> None:
    queue, clock = make(tmp_path, items=1)
    task = must(queue.claim("ann"))
    assert queue.claim("bob") is None
    clock.now += queue.settings.lease_seconds + 1
    assert must(queue.claim("bob")).id == task.id
    queue.save("bob", task.id, SAFE)
    queue.save("ann", task.id, CRUEL)  # too late, and not thrown away
    assert Counter(s.annotator for s in queue.store.labels()) == {"ann": 1, "bob": 1}


def test_a_renewed_lease_does_not_run_out(tmp_path: Path) -> None:
    queue, clock = make(tmp_path, items=1)
    task = must(queue.claim("ann"))
    clock.now += 800
    queue.renew("ann", task.id)
    clock.now += 800
    assert queue.claim("bob") is None


def test_one_who_leaves_gives_the_item_back(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1)
    queue.claim("ann")
    queue.release("ann")
    assert queue.claim("bob") is not None


@settings(max_examples=8)
@given(share=st.sampled_from([0.0, 0.3, 1.0]), labels=st.integers(1, 3))
def test_every_item_gets_as_many_people_as_it_wants(
    tmp_path_factory: pytest.TempPathFactory, share: float, labels: int
) -> None:
    folder = tmp_path_factory.mktemp("queue")
    queue, _ = make(folder, items=12, people="a b c d", overlap_share=share, overlap_labels=labels)
    for name in "abcd":
        drain(queue, name)
    counts = Counter(s.task_id for s in queue.store.labels())
    assert len(counts) == 12
    assert set(counts.values()) <= {1, labels}
    if share in (0.0, 1.0):
        assert set(counts.values()) == {labels if share else 1}


def test_a_skipped_item_goes_to_others_and_does_not_come_back(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1)
    task = must(queue.claim("ann"))
    queue.skip("ann", task.id, reason="not English")
    assert queue.claim("ann") is None
    assert queue.progress("ann").skipped == 1
    assert must(queue.claim("bob")).id == task.id


def test_undo_brings_the_last_answer_back_then_the_one_before(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=2)
    first = must(queue.claim("ann"))
    queue.save("ann", first.id, CRUEL)
    second = must(queue.claim("ann"))
    queue.skip("ann", second.id)
    again = must(queue.undo("ann"))
    assert (again.id, again.answer) == (second.id, None)
    again = must(queue.undo("ann"))
    assert (again.id, again.answer) == (first.id, CRUEL)
    assert queue.undo("ann") is None
    assert queue.store.labels() == []
    queue.save("ann", first.id, SAFE)
    assert [s.value for s in queue.store.labels()] == [SAFE]


def test_undo_takes_back_nothing_that_came_from_a_file(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=2)
    first = must(queue.claim("ann"))
    queue.save("ann", first.id, SAFE)
    queue.store.add([Record("p9", ("r9",), (CRUEL,))], name="f", digest="2", person="ann")
    assert must(queue.undo("ann")).id == first.id
    assert queue.undo("ann") is None


def test_the_seconds_of_a_label_begin_when_its_task_is_shown(tmp_path: Path) -> None:
    for session, away, took in (("one", 30, 40), ("one", 86_400, 10), ("two", 86_400, 10)):
        folder = tmp_path / f"{session}-{away}"
        folder.mkdir()
        queue, clock = make(folder, items=1)
        must(queue.claim("ann", session="one"))
        clock.now += away
        task = must(queue.claim("ann", session=session))
        clock.now += 10
        queue.save("ann", task.id, SAFE, session=session)
        assert queue.store.labels()[0].seconds == took


def test_undo_takes_back_nothing_of_others(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1)
    queue.save("bob", must(queue.claim("bob")).id, SAFE)
    assert queue.undo("ann") is None
    assert len(queue.store.labels()) == 1


def test_an_incomplete_answer_is_refused_in_one_line(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1, pairs=1)
    item, pair = must(queue.claim("ann", kind="item")), must(queue.claim("bob", kind="pair"))
    for task, label in [
        (item, SafetyLabel(False, 2, ())),
        (item, SafetyLabel(False, None, ("Drugs",))),
        (item, PairLabel(0, 1)),
        (pair, PairLabel(more_helpful=0)),
        (pair, PairLabel(single=1)),
        (pair, SAFE),
    ]:
        with pytest.raises(AnnotationError):
            queue.save("ann", task.id, label)
    assert all(s.role == "import" for s in queue.store.labels())


def test_a_stranger_cannot_label(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1)
    with pytest.raises(AnnotationError, match="no such annotator"):
        queue.claim("eve")


def test_only_name_and_key_together_sign_in(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db", create=True)
    key = store.add_person("ann")
    assert store.sign_in("ann", key) is not None
    assert store.sign_in("ann", key + "x") is None
    assert store.sign_in("bob", key) is None
    assert store.sign_in("bob", "") is None
    fresh = store.new_key("ann")
    assert store.sign_in("ann", key) is None
    assert store.sign_in("ann", fresh) is not None
    assert key.encode() not in (tmp_path / "store.db").read_bytes()


# --- pairs ---------------------------------------------------------------------------------------


def test_sides_are_mixed_but_stay_put_for_one_person_and_answers_are_in_stored_order(
    tmp_path: Path,
) -> None:
    queue, _ = make(tmp_path, pairs=40)
    orders = []
    while task := queue.claim("ann", kind="pair"):
        assert must(queue.claim("ann")).order == task.order
        left = task.responses.index(task.shown[0])
        assert task.choice("left") == left
        assert task.choice("right") == 1 - left
        orders.append(task.order)
        queue.save("ann", task.id, PairLabel(task.choice("left"), "tie"))
    assert 8 < orders.count((0, 1)) < 32
    pairs = queue.store.labels("pair")
    assert all(isinstance(s.value, PairLabel) for s in pairs)
    assert all(s.value.more_helpful == s.position for s in pairs)  # type: ignore[union-attr]


def test_a_pair_waits_for_the_safety_of_both_answers_and_shows_it(tmp_path: Path) -> None:
    queue, _ = make(tmp_path)
    queue.store.add([Record("p", ("a", "b"), (None, None))], name="x", digest="2")
    assert queue.claim("ann", kind="pair") is None
    drain(queue, "ann", CRUEL)
    task = must(queue.claim("ann"))
    assert (task.kind, task.safety) == ("pair", (CRUEL, CRUEL))


# --- suggestions ---------------------------------------------------------------------------------


def suggest(queue: Queue, task_id: int, label: SafetyLabel) -> None:
    import json

    with queue.store.write() as db:
        ensure(db, "moderator:m", "moderator", 0)
        db.execute(
            "INSERT INTO labels (task_id, annotator, value, created) VALUES (?, ?, ?, 0)",
            (task_id, "moderator:m", json.dumps(label.to_json())),
        )


def test_a_suggestion_is_shown_only_after_a_first_click_which_is_kept(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1, suggestions="after_click")
    task = must(queue.claim("ann"))
    suggest(queue, task.id, CRUEL)
    with pytest.raises(AnnotationError, match="answer first"):
        queue.reveal("ann", task.id, {})
    suggestion = queue.reveal("ann", task.id, {"safe": True})
    assert suggestion is not None
    assert suggestion.label == CRUEL
    queue.reveal("ann", task.id, {"safe": False})  # what counts is the first click
    queue.save("ann", task.id, CRUEL)
    (label,) = queue.store.labels("item", task.id)[1:]
    assert (label.revealed, label.first, label.suggested) == (True, {"safe": True}, CRUEL)


def test_a_blind_item_shows_no_suggestion(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=1, suggestions="blind")
    task = must(queue.claim("ann"))
    suggest(queue, task.id, CRUEL)
    with pytest.raises(AnnotationError, match="blind"):
        queue.reveal("ann", task.id, {"safe": True})


def test_the_experiment_makes_about_half_of_the_items_blind(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=60, suggestions="experiment")
    drain(queue, "ann")
    blind = sum(s.condition == "blind" for s in queue.store.labels())
    assert 15 < blind < 45


# --- adjudication --------------------------------------------------------------------------------


def test_a_disagreement_is_settled_by_an_adjudicator(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=2, people="ann bob cat", overlap_share=1.0)
    drain(queue, "ann", CRUEL)
    first = must(queue.claim("cat"))
    queue.save("cat", first.id, SAFE)
    queue.save("cat", must(queue.claim("cat")).id, CRUEL)
    assert queue.progress("bob").disputed == 1
    with pytest.raises(AnnotationError, match="no adjudicator"):
        queue.claim_disputed("ann")
    dispute = queue.claim_disputed("bob")
    assert dispute is not None
    task, said = dispute
    assert (task.id, task.adjudicating) == (first.id, True)
    assert [s.value for s in said] == [CRUEL, SAFE]
    queue.adjudicate("bob", task.id, CRUEL, note="plain cruelty")
    assert queue.claim_disputed("bob") is None
    assert queue.progress("bob").disputed == 0
    again = must(queue.undo("bob"))
    assert (again.adjudicating, again.answer) == (True, CRUEL)
    assert queue.progress("bob").disputed == 1


def test_two_adjudicators_get_different_disputes(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=2, people="ann cat bob", overlap_share=1.0)
    queue.store.add_person("dan", adjudicates=True)
    drain(queue, "ann", CRUEL)
    drain(queue, "cat", SAFE)
    first, second = queue.claim_disputed("bob"), queue.claim_disputed("dan")
    assert first is not None
    assert second is not None
    assert first[0].id != second[0].id


# --- care ----------------------------------------------------------------------------------------


def test_a_break_is_suggested_after_long_work_and_after_much_harm(tmp_path: Path) -> None:
    queue, clock = make(tmp_path, items=80, break_harmful=5)
    for n in range(50):
        clock.now += 60
        queue.save("ann", must(queue.claim("ann")).id, SAFE if n % 3 else CRUEL)
    assert "without a break" in (queue.progress("ann").rest or "")
    queue.had_break("ann")
    assert queue.progress("ann").rest is None
    for _ in range(5):
        clock.now += 1
        queue.save("ann", must(queue.claim("ann")).id, CRUEL)
    assert "in a row" in (queue.progress("ann").rest or "")
    clock.now += 600  # a pause is a break
    assert queue.progress("ann").rest is None


# --- many at once --------------------------------------------------------------------------------

WORKER = """
import sys
from training.annotation.labels import SafetyLabel
from training.annotation.queue import Queue
from training.annotation.store import Store
queue = Queue(Store(sys.argv[1]))
print("ready", flush=True)
while task := queue.claim(sys.argv[2], session=sys.argv[3]):
    queue.save(sys.argv[2], task.id, SafetyLabel(True), session=sys.argv[3])
    print(task.id, flush=True)
"""


def worker(path: Path, name: str, session: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), name, session],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_killed_processes_lose_nothing_that_was_saved_and_every_item_is_done(
    tmp_path: Path,
) -> None:
    queue, clock = make(tmp_path, items=150, people="ann bob", lease_seconds=1.0)
    clock.now = time.time()
    doomed = [worker(queue.store.path, "ann", "1"), worker(queue.store.path, "bob", "1")]
    acknowledged: list[int] = []
    for process in doomed:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() != "ready":
                acknowledged.append(int(line))
            if len(acknowledged) % 20 == 19:
                break
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [int(x) for x in process.stdout.read().split() if x != "ready"]
        process.stdout.close()
        process.wait()
    saved = {s.task_id for s in queue.store.labels()}
    assert set(acknowledged) <= saved
    time.sleep(1.1)  # the leases of the dead run out
    heirs = [worker(queue.store.path, name, "2") for name in ("ann", "bob")]
    for process in heirs:
        process.communicate(timeout=120)
        assert process.returncode == 0
    counts = Counter(s.task_id for s in queue.store.labels())
    assert len(counts) == 150
    assert sum(counts.values()) <= 152  # at most what the dead held, done twice


def test_threads_share_the_items_without_giving_one_out_twice(tmp_path: Path) -> None:
    queue, _ = make(tmp_path, items=60, people="a b c d")
    done: dict[str, list[int]] = {}

    def work(name: str) -> None:
        done[name] = drain(queue, name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    together = [task for tasks in done.values() for task in tasks]
    assert len(together) == len(set(together)) == 60


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("no database at all, but long enough to look like a file " * 30)
    with pytest.raises(AnnotationError, match=r"notes\.db"):
        Store(path)
    with pytest.raises(AnnotationError, match="no such store"):
        Store(tmp_path / "missing.db")
