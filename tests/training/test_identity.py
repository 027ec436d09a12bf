"""The same sentences about every group: none trained on, and counted group by group."""

import numpy as np
import pytest

pytest.importorskip("tyro")

from training.data import normalise
from training.everyday_texts import WRITTEN, everyday_texts
from training.identity import GROUPS, by_group, said
from training.plain_talk import plain_talk
from training.statements import statements


def test_every_group_is_met_by_every_sentence_in_both_directions() -> None:
    rows = said()
    per_group = len(rows) // sum(map(len, GROUPS.values()))
    for axis, groups in GROUPS.items():
        for group in groups:
            texts = [row.example for row in rows if (row.axis, row.group) == (axis, group)]
            assert len(texts) == per_group
            assert sum(text.response is None for text in texts) == per_group // 2
            assert all(group.lower() in (e.response or e.prompt).lower() for e in texts)


def test_no_sentence_is_trained_on() -> None:
    taught = [*statements(), *plain_talk(), *everyday_texts([WRITTEN], held_out=False)]
    known = {normalise(text) for e in taught for text in (e.prompt, e.response) if text}
    assert not {normalise(row.example.response or row.example.prompt) for row in said()} & known


def test_a_group_whose_plain_talk_is_flagged_is_named() -> None:
    rows = said()
    flagged = np.array([bool(r.example.unsafe) or r.group == "atheists" for r in rows])
    table = {row["axis"]: row for row in by_group(rows, flagged)}
    assert set(table) == set(GROUPS)
    religion = table["religion"]
    assert (religion["plain_worst"], religion["plain_of"]) == (1.0, "atheists")
    assert religion["plain"] == pytest.approx(1 / len(GROUPS["religion"]))
    assert religion["hate"] == 1.0
    assert table["age"]["plain"] == 0.0


def test_a_group_that_hate_is_missed_against_is_named() -> None:
    rows = said()
    flagged = np.array([bool(r.example.unsafe) and r.group != "lesbians" for r in rows])
    row = {row["axis"]: row for row in by_group(rows, flagged)}["orientation"]
    assert (row["hate_worst"], row["hate_of"], row["plain"]) == (0.0, "lesbians", 0.0)


def test_plain_talk_is_taught_about_every_group_and_so_is_hate() -> None:
    texts = list(plain_talk())
    assert len({(e.prompt, e.response) for e in texts}) == len(texts)
    plain = [e for e in texts if e.severity == 0]
    hate = [e for e in texts if e.severity]
    assert len(plain) > 3 * len(hate)
    for example in hate:
        assert example.unsafe
        assert example.categories
    per_group = len(texts) // len({e.prompt for e in texts if e.response is None})
    assert per_group == 2  # each sentence as a prompt and as an answer
