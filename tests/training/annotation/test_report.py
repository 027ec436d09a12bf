"""Statistics of a store, on labels whose agreement is known by construction."""

from __future__ import annotations

import json

import pytest

from training.annotation.ai import Answer, Question, save_answers
from training.annotation.labels import PairLabel, Record, SafetyLabel, Settings
from training.annotation.queue import Queue
from training.annotation.report import compare, markdown, statistics

SAFE = SafetyLabel(True)
MINOR = SafetyLabel(False, 1, ("Insulting Behavior",))
GRAVE = SafetyLabel(False, 3, ("Violence", "Drugs"))


def add(queue: Queue, *records: Record) -> None:
    queue.store.add(records, name="rows", digest="rows")


def fill(queue: Queue, said: dict[str, list[SafetyLabel]], machine: list[SafetyLabel]) -> None:
    count = len(machine)
    add(queue, *(Record(f"p{n}", ("r",), (None,)) for n in range(count)))
    given = [
        (Question(n + 1, "item", f"p{n}", ("r",)), Answer(label, {"cost": 0.5}))
        for n, label in enumerate(machine)
    ]
    save_answers(queue.store, "ai:m", "ai", given)
    for name, labels in said.items():
        for n, label in enumerate(labels, 1):
            queue.save(name, n, label)


def test_people_who_say_the_same_agree_perfectly(queue: Queue) -> None:
    labels = [SAFE, MINOR, GRAVE, SAFE, GRAVE]
    fill(queue, {"ann": labels, "cat": labels}, labels)
    found = statistics(queue.store.labels())
    alpha = found["people"]["alpha"]
    assert alpha["severity"]["alpha"] == alpha["safe"]["alpha"] == alpha["Violence"]["alpha"] == 1
    assert alpha["severity"]["n"] == 5
    assert found["people"]["fleiss"] == {"raters": 2, "n": 5, "kappa": 1.0}
    assert found["people"]["cohen"][0]["severity_kappa"] == 1
    assert found["machines"]["ai:m"]["severity_kappa"] == 1
    assert found["annotators"]["ai:m"]["cost"] == pytest.approx(2.5)


def test_a_machine_is_held_against_people_per_category_and_severity(queue: Queue) -> None:
    fill(queue, {"ann": [GRAVE, MINOR, SAFE, SAFE]}, [GRAVE, GRAVE, MINOR, SAFE])
    row = statistics(queue.store.labels())["machines"]["ai:m"]
    assert row["n"] == 4
    assert row["severity_equal"] == 0.5
    assert row["confusion"] == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    violence = row["categories"]["Violence"]
    assert (violence["precision"], violence["recall"]) == (0.5, 1.0)
    assert row["categories"]["Insulting Behavior"]["recall"] == 0.0


def test_a_label_that_lacks_a_severity_counts_for_safe_alone() -> None:
    row = compare([(SafetyLabel(False), GRAVE), (SAFE, SAFE)])
    assert row["safe_kappa"] == 1
    assert (row["n"], row["n_severity"], row["n_categories"]) == (2, 1, 1)
    assert sum(map(sum, row["confusion"])) == 1


def test_anchoring_is_the_difference_between_the_groups_of_the_coin(queue: Queue) -> None:
    queue.store.set_settings(Settings(suggestions="experiment"))
    add(queue, *(Record(f"p{n}", ("r",), (None,)) for n in range(60)))
    given = [(Question(n, "item", "", ("r",)), Answer(GRAVE)) for n in range(1, 61)]
    save_answers(queue.store, "ai:m", "ai", given)
    # A person who thinks all is safe, and follows whatever is shown.
    while task := queue.claim("ann"):
        label = SAFE
        if task.condition == "after_click":
            suggestion = queue.reveal("ann", task.id, {"safe": True})
            assert suggestion is not None
            label = suggestion.label
        queue.save("ann", task.id, label)
    row = statistics(queue.store.labels())["anchoring"]
    assert row["n_blind"] + row["n_shown"] == 60
    assert (row["blind"], row["shown"], row["effect"]) == (0, 1, 1)
    assert 0.8 < row["low"] < 1
    assert (row["toward"], row["away"]) == (row["n_shown"], 0)


def test_someone_who_always_chooses_the_left_is_seen(queue: Queue) -> None:
    add(queue, *(Record(f"p{n}", ("a", "b"), (SAFE, SAFE)) for n in range(20)))
    while task := queue.claim("ann", kind="pair"):
        queue.save("ann", task.id, PairLabel(task.choice("left"), "tie"))
    while task := queue.claim("cat", kind="pair"):
        queue.save("cat", task.id, PairLabel(0, 1))
    sides = statistics(queue.store.labels())["sides"]
    assert sides["more_helpful"]["n"] == 40
    assert sides["more_helpful"]["left"] > 0.55
    own = [s for s in queue.store.labels("pair") if s.annotator == "ann"]
    assert statistics(own)["sides"]["more_helpful"] == {"n": 20, "left": 1.0}


def test_an_empty_store_has_statistics_too(queue: Queue) -> None:
    found = statistics([])
    json.dumps(found, allow_nan=False)
    assert "not measured" in markdown(found)


def test_the_report_is_a_table_for_people_and_json_without_nan(queue: Queue) -> None:
    fill(queue, {"ann": [GRAVE, SAFE, MINOR], "cat": [GRAVE, MINOR, MINOR]}, [SAFE, SAFE, MINOR])
    found = statistics(queue.store.labels())
    json.dumps(found, allow_nan=False)
    text = markdown(found)
    assert "| severity | 3 |" in text
    assert "| ann, cat | 3 |" in text
    assert "## People (rows) and ai:m (columns)" in text
