from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo import render
from guardrail import (
    Action,
    Assessment,
    Category,
    Direction,
    Guard,
    Passage,
    Policy,
    Severity,
    Verdict,
)
from guardrail.policy import PRESETS
from guardrail.testing import FakeModerator

XSS = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><b>"
FAKE = FakeModerator({"knife": (Severity.SEVERE, Category.VIOLENCE)})


class Reader(HTMLParser):
    """The tags and the text that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def judged(text: str) -> list[Verdict]:
    return [Guard(FAKE, name).check(text) for name in PRESETS]


@given(st.text())
def test_no_text_becomes_markup_in_the_inspection(text: str) -> None:
    plain = Reader(render.inspection("x", judged("x")))
    seen = Reader(render.inspection(text + XSS, judged(text + XSS)))
    assert seen.tags == plain.tags
    assert "alert(1)" in seen.text


def test_the_inspected_text_is_shown_as_it_is() -> None:
    text = f"a knife & {XSS}\n  and a knife"
    assert text in Reader(render.inspection(text, judged(text))).text


@pytest.mark.parametrize("show", [render.note, render.model_line])
def test_lines_with_foreign_words_are_escaped(show: Callable[[str], str]) -> None:
    html = show(XSS)
    assert not {"script", "img"} & Reader(html).tags
    assert XSS in Reader(html).text


def test_the_error_of_a_failed_check_is_shown_and_escaped() -> None:
    verdict = Policy.load("balanced").fail(Direction.INPUT, XSS)
    for html in (render.card("Your message", verdict), render.inspection("text", [verdict])):
        assert "script" not in Reader(html).tags
        assert XSS in Reader(html).text


def test_a_card_shows_action_severities_category_and_policy() -> None:
    verdict = Guard(FAKE).check("a knife")
    text = Reader(render.card("Your message", verdict)).text
    for word in ("refuse", "none", "minor", "moderate", "severe", "Violence", "balanced@1", " ms"):
        assert word in text


def test_the_inspection_ranks_all_categories_and_marks_the_passage() -> None:
    html = render.inspection("a knife", judged("a knife"))
    names = re.findall(r'role="meter" aria-label="([^"]+)"', html)[len(Severity) :]
    assert names[0] == "Violence"
    assert sorted(names) == sorted(c.value for c in Category)
    assert ">knife</mark>" in html
    assert [Reader(html).text.count(a) for a in ("refuse", "flag")] == [3, 1]


@pytest.mark.parametrize("name", PRESETS)
def test_a_policy_grid_shows_every_cell(name: str) -> None:
    policy = Policy.load(name)
    html = render.policy_grid(policy)
    rows = sum(1 + len(policy.rules(d).categories) for d in Direction)
    assert html.count("g-badge") == rows * 3 + 2
    assert policy.description in Reader(html).text


def test_a_grid_cell_that_a_policy_does_not_name_is_allow() -> None:
    html = render.policy_grid(Policy("bare", on_error=Action.REFUSE, unreadable=Action.FLAG))
    assert Reader(html).text.count("allow") == 6


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1)))


@given(st.text(max_size=40), spans)
def test_split_passages_keep_the_text_whatever_they_are(
    text: str, given_spans: list[tuple[int, int, float]]
) -> None:
    n = len(text)
    passages = [Passage(min(a, b, n), min(max(a, b), n), p) for a, b, p in given_spans]
    pieces = render.split_passages(text, passages)
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece for piece, _ in pieces)
    marked = {i for p in passages for i in range(p.start, p.end)}
    at = 0
    for piece, probability in pieces:
        for i in range(at, at + len(piece)):
            assert (probability is not None) == (i in marked)
        at += len(piece)


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(0.0, "0%"), (0.001, "&lt;1%"), (0.5, "50%"), (0.999, "&gt;99%"), (1.0, "100%")],
)
def test_percents_do_not_round_doubt_away(probability: float, shown: str) -> None:
    spread = dict(zip(Severity, (probability, 1 - probability, 0.0, 0.0), strict=True))
    seen = Assessment(Direction.INPUT, spread, dict.fromkeys(Category, 0.0))
    html = render.card("x", Policy.load("balanced").decide(seen))
    first = html.split('class="g-number"')[1].split("\n")[0]
    assert first == f">{shown}</span>"
