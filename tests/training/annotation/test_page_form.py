"""What a tab keeps and sends comes back as the answer that it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrail.taxonomy import Category
from training.annotation.labels import AnnotationError, Label, PairLabel, SafetyLabel, Task
from training.annotation.page_form import (
    draft_of,
    empty_form,
    form_of,
    label_of,
    read_draft,
    shown,
    turn_of,
)

CHOICES = st.sampled_from([0, 1, "tie", None])
NAMES = st.lists(st.sampled_from([c.value for c in Category]), min_size=1, unique=True)
LABELS: st.SearchStrategy[Label] = st.one_of(
    st.just(SafetyLabel(True)),
    st.builds(SafetyLabel, st.just(False), st.integers(1, 3), NAMES.map(tuple)),
    st.builds(PairLabel, CHOICES, CHOICES, CHOICES),
)


def task_of(label: Label, order: tuple[int, ...]) -> Task:
    if isinstance(label, SafetyLabel):
        return Task(1, "item", "p", ("r",), (0,), "blind")
    return Task(2, "pair", "p", ("a", "b"), order, "blind")


@given(LABELS, st.sampled_from([(0, 1), (1, 0)]), st.booleans())
def test_an_answer_comes_back_out_of_the_form_whichever_side_it_stood_on(
    label: Label, order: tuple[int, ...], adjudicating: bool
) -> None:
    task = replace(task_of(label, order), answer=label, adjudicating=adjudicating)
    turn, form = read_draft(draft_of(turn_of(task), form_of(task)))
    assert turn == turn_of(task)
    assert shown(turn).adjudicating == adjudicating
    assert label_of(shown(turn), form) == label


@pytest.mark.parametrize(
    "draft", [None, "", "{}", '{"turn": "[]", "form": [1]}', '{"turn": 1, "form": null}']
)
def test_what_is_no_draft_of_this_page_leaves_the_form_empty(draft: str | None) -> None:
    assert read_draft(draft) == ("", empty_form())


def test_a_text_that_was_called_safe_after_all_keeps_no_severity() -> None:
    form: list[Any] = ["Safe", 2, ["Drugs"], None, None, None, "a note"]
    _, kept = read_draft(json.dumps({"turn": "[1]", "form": form}))
    assert kept == ["Safe", None, [], None, None, None, "a note"]


def test_a_form_without_an_answer_says_what_is_missing() -> None:
    task = task_of(SafetyLabel(True), (0,))
    with pytest.raises(AnnotationError, match="whether the text is safe"):
        label_of(task, empty_form())
    with pytest.raises(AnnotationError, match="no task is open"):
        shown("")
