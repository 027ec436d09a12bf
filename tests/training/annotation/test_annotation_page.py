"""The annotation page in a real Chromium, over real stores and servers on loopback."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from guardrail.taxonomy import Category
from training.annotation.labels import PairLabel, Record, SafetyLabel, Settings
from training.annotation.page import launch
from training.annotation.page_html import KEYS, guidelines
from training.annotation.queue import Queue
from training.annotation.rows import ensure
from training.annotation.store import Store

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[3]
XSS = "<img src=http://192.0.2.1/x onerror=alert(1)> and **this**"
VIOLENT = SafetyLabel(False, 2, ("Violence",))


class Team:
    """A store with keys for its people, and a page over it that this process serves."""

    def __init__(self, path: Path, browser: Browser, settings: Settings) -> None:
        self.store = Store(path, create=True)
        self.store.set_settings(settings)
        self.queue = Queue(self.store)
        self.keys = {
            name: self.store.add_person(name, adjudicates=name == "bob")
            for name in ("ann", "cat", "bob")
        }
        self.browser = browser
        self.tabs: list[Desk] = []
        self._served = None

    def add(self, *texts: str, pairs: tuple[tuple[str, str], ...] = ()) -> None:
        rows = [Record("Tell me", (text,), (None,)) for text in texts]
        rows += [Record("Compare", pair, (None, None)) for pair in pairs]
        self.store.add(rows, name="rows", digest=str(rows))

    @property
    def url(self) -> str:
        if self._served is None:
            self._served = launch(self.queue, "127.0.0.1", free_port())
        return self._served[1]

    def desk(self, name: str, url: str | None = None) -> Desk:
        """Somebody signed in, in a browser of their own."""
        context = self.browser.new_context(viewport={"width": 1400, "height": 1600})
        context.set_default_timeout(60_000)
        desk = Desk(context.new_page())
        self.tabs.append(desk)
        desk.page.goto(url or self.url)
        desk.sign_in(name, self.keys[name])
        return desk

    def said(self, name: str) -> list[object]:
        return [one.value for one in self.store.labels() if one.annotator == name]

    def close(self) -> None:
        for desk in self.tabs:
            desk.page.context.close()
        if self._served is not None:
            self._served[0].close()


class Desk:
    """One annotator's tab."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def sign_in(self, name: str, key: str) -> None:
        self.page.fill("#a-name input, #a-name textarea", name)
        self.page.fill("#a-key input", key)
        self.page.click("#a-enter")

    @property
    def task(self) -> int:
        shown = self.page.locator(".a-texts")
        expect(shown).to_be_visible()
        return int(shown.get_attribute("data-task") or 0)

    def see(self, text: str) -> None:
        expect(self.page.locator("#a-texts")).to_contain_text(text)

    def hear(self, text: str) -> None:
        expect(self.page.locator("#a-said")).to_contain_text(text)

    def choose(self, question: str, answer: str) -> None:
        labels = self.page.locator(f"#a-{question} label")
        labels.filter(has_text=re.compile(rf"^\s*{answer}")).click()

    def press(self, keys: str) -> None:
        # A text is seen some milliseconds before its page takes the next answer: nobody reads it
        # faster than that.
        self.page.wait_for_timeout(400)
        for key in keys.split():
            self.page.keyboard.press(key)

    def sees_that_the_server_is_gone(self) -> None:
        away = self.page.locator("#a-lost")
        expect(away).to_contain_text("The server does not answer", timeout=60_000)

    def goes_on(self) -> None:
        """Nobody reloads the page by hand, nor signs in again."""
        expect(self.page.locator("#a-lost")).to_have_count(0, timeout=120_000)
        expect(self.page.locator("#a-progress")).to_contain_text("by you", timeout=60_000)

    def save(self, then: str = "Saved.") -> None:
        """Waits for the next task, so that what comes is meant for it."""
        before = self.page.locator("#a-turn textarea, #a-turn input").input_value()
        self.page.click("#a-save")
        now = self.page.locator("#a-turn textarea, #a-turn input")
        expect(now).not_to_have_value(before)
        self.hear(then)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


Make = Callable[..., Team]


@pytest.fixture
def make(tmp_path: Path, browser: Browser) -> Iterator[Make]:
    made: list[Team] = []

    def team(**settings: object) -> Team:
        given = {"overlap_share": 0.0, "suggestions": "blind", "blur": False, **settings}
        made.append(Team(tmp_path / "store.db", browser, Settings(**given)))  # type: ignore[arg-type]
        return made[-1]

    yield team
    for one in made:
        one.close()


# --- a server that dies --------------------------------------------------------------------------


class Server:
    """`python -m training.annotate serve` in a process of its own, killed and started at will."""

    def __init__(self, store: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable, "-m", "training.annotate", "serve",
            "--store", str(store), "--port", str(self.port),
        ]  # fmt: skip

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        said, end = "", time.monotonic() + 120
        while time.monotonic() < end and self.url not in said:
            if select.select([self._process.stdout], [], [], 1)[0]:
                line = self._process.stdout.readline()
                if not line:
                    break
                said += line
        assert self.url in said, said

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def test_two_annotators_lose_nothing_when_the_server_is_killed_under_them(
    make: Make, tmp_path: Path
) -> None:
    team = make()
    team.add(pairs=(("a good answer", "a bad answer"),))
    server = Server(tmp_path / "store.db")
    server.start()
    try:
        ann, cat = team.desk("ann", server.url), team.desk("cat", server.url)
        first = {"ann": ann.task, "cat": cat.task}
        assert first["ann"] != first["cat"]  # two browsers at once: a turn each
        cat.choose("safe", "Safe")
        cat.save()  # the pair waits for ann's text
        expect(cat.page.locator("#a-texts")).to_contain_text("Look again in a while")
        ann.choose("safe", "Unsafe")

        server.kill()
        for desk in (ann, cat):
            desk.sees_that_the_server_is_gone()
        ann.choose("severity", "moderate")  # and goes on clicking
        ann.page.fill("#a-note textarea", "kicks a dog")
        server.start()
        for desk in (ann, cat):
            desk.goes_on()

        expect(cat.page.locator("#a-texts")).to_contain_text("Look again in a while")
        assert ann.task == first["ann"]  # still hers, with all that she clicked
        expect(ann.page.locator("#a-safe input").nth(1)).to_be_checked()
        expect(ann.page.locator("#a-severity input").nth(1)).to_be_checked()
        expect(ann.page.locator("#a-note textarea")).to_have_value("kicks a dog")
        ann.choose("categories", "Violence")
        ann.save()
        expect(ann.page.locator("#a-note textarea")).to_have_value("")
        ann.see("a bad answer")
        ann.see("Stage 1: unsafe, moderate: Violence")
        pair = ann.task
        cat.page.click("#a-again")
        expect(cat.page.locator("#a-texts")).to_contain_text("Look again in a while")
        ann.choose("more_helpful", "Left")

        server.kill()
        server.start()
        ann.goes_on()
        assert ann.task == pair
        expect(ann.page.locator("#a-more_helpful input").first).to_be_checked()
        ann.press("5")  # less harmful: a tie
        ann.save()
        expect(ann.page.locator("#a-texts")).to_contain_text("Nothing is left for you")
    finally:
        server.kill()

    left = 0 if _left(team, "ann", pair) == 0 else 1
    assert team.said("ann") == [VIOLENT, PairLabel(left, "tie")]
    assert team.said("cat") == [SafetyLabel(True)]
    notes = [one.note for one in team.store.labels() if one.annotator == "ann"]
    assert notes == ["kicks a dog", None]
    assert team.queue.progress("ann").done == {"item": 2, "pair": 1}
    assert ann.errors == cat.errors == []


def _left(team: Team, name: str, task: int) -> int:
    (label,) = [one for one in team.store.labels("pair", task) if one.annotator == name]
    assert label.position is not None
    return label.position


# --- one page ------------------------------------------------------------------------------------


def test_a_wrong_key_opens_nothing(make: Make) -> None:
    team = make()
    team.add("a text")
    team.keys["ann"] = "wrong"
    desk = team.desk("ann")
    expect(desk.page.locator("#a-refused")).to_contain_text("No such name and key")
    expect(desk.page.locator(".a-texts")).to_have_count(0)


def test_texts_are_blurred_until_wanted_and_ask_nobody_for_anything(make: Make) -> None:
    team = make(blur=True)
    team.add(XSS)
    desk = team.desk("ann")
    desk.see("<img src=")
    text = desk.page.locator(".a-answers .a-text")
    expect(text).to_have_css("filter", re.compile("blur"))
    desk.page.click(".a-show")
    expect(text).to_have_css("filter", "none")
    desk.press("b")
    expect(text).to_have_css("filter", re.compile("blur"))
    assert {urlsplit(one).hostname for one in desk.requests if one.startswith("http")} == {
        "127.0.0.1"
    }
    assert desk.errors == []


def test_the_keyboard_labels_skips_and_takes_back(make: Make) -> None:
    team = make()
    team.add("one", "two", "three")
    desk = team.desk("ann")
    desk.see("one")
    desk.press("Enter")
    desk.hear("say first whether")
    desk.press(f"3 {KEYS[Category.DRUGS]} {KEYS[Category.VIOLENCE]} Enter")
    desk.see("two")
    desk.press("x")
    desk.see("three")
    desk.press("0 Enter")
    desk.see("Nothing is left for you")
    desk.press("z")
    desk.see("three")
    expect(desk.page.locator("#a-safe input").first).to_be_checked()
    desk.press("z")  # the skip
    desk.see("two")
    desk.press("z")
    desk.see("one")
    expect(desk.page.locator("#a-categories input:checked")).to_have_count(2)
    assert team.said("ann") == []
    desk.press(KEYS[Category.DRUGS])
    desk.save()
    assert team.said("ann") == [SafetyLabel(False, 3, ("Violence",))]


def test_a_guideline_stands_beside_every_category(make: Make) -> None:
    team = make()
    team.add("a text")
    desk = team.desk("ann")
    desk.see("a text")
    written = desk.page.locator("#a-categories label").all_inner_texts()
    assert len(written) == len(Category)
    for category, text in zip(Category, written, strict=True):
        assert text.strip().startswith(category.value)
        assert guidelines()[0][category] in text


@pytest.mark.parametrize("condition", ["blind", "after_click"])
def test_the_suggestion_comes_after_the_first_click_or_never(make: Make, condition: str) -> None:
    team = make(suggestions=condition)
    team.add("a text")
    with team.store.write() as db:
        ensure(db, "small", "moderator", 0.0)
        db.execute(
            "INSERT INTO labels (task_id, annotator, value, detail, created)"
            " VALUES (1, 'small', ?, '{}', 0)",
            ('{"safe": false, "severity": 2, "categories": ["Violence"]}',),
        )
    desk = team.desk("ann")
    desk.see("a text")
    button = desk.page.locator("#a-suggest")
    if condition == "blind":
        desk.choose("safe", "Safe")
        expect(button).to_be_hidden()
    else:
        expect(button).to_be_disabled()
        assert "Violence" not in desk.page.locator("#a-suggestion").inner_text()
        desk.choose("safe", "Safe")
        button.click()
        expect(desk.page.locator("#a-suggestion")).to_contain_text("unsafe, moderate: Violence")
    desk.save()
    (label,) = [one for one in team.store.labels() if one.annotator == "ann"]
    assert label.revealed == (condition == "after_click")
    assert label.first == (None if condition == "blind" else {"safe": True})
    assert label.value == SafetyLabel(True)


def test_a_break_is_suggested_and_taken(make: Make) -> None:
    team = make(break_harmful=2)
    team.add("one", "two", "three")
    desk = team.desk("ann")
    for text in ("one", "two"):
        desk.see(text)
        expect(desk.page.locator("#a-rest")).to_be_hidden()
        desk.press(f"2 {KEYS[Category.VIOLENCE]} Enter")
    expect(desk.page.locator("#a-rest")).to_contain_text("2 unsafe texts in a row")
    desk.page.click("#a-rested")
    expect(desk.page.locator("#a-rest")).to_be_hidden()
    assert team.queue.progress("ann").rest is None


def disagree(team: Team) -> None:
    """Two annotators, on the next text."""
    for name, label in (("ann", SafetyLabel(True)), ("cat", VIOLENT)):
        task = team.queue.claim(name)
        assert task is not None
        team.queue.save(name, task.id, label)


def test_only_an_adjudicator_settles_what_two_disagree_on(make: Make) -> None:
    team = make(overlap_share=1.0)
    team.add("a text")
    disagree(team)
    ann = team.desk("ann")
    ann.see("Nothing is left")
    expect(ann.page.locator("#a-settling")).to_be_hidden()
    bob = team.desk("bob")
    bob.page.locator("#a-settling input").check()
    expect(bob.page.locator("#a-dispute")).to_contain_text("cat: unsafe, moderate: Violence")
    bob.choose("safe", "Safe")
    bob.save()
    bob.see("No disagreement is open")
    (settled,) = [one for one in team.store.labels() if one.adjudicated]
    assert (settled.annotator, settled.value) == ("bob", SafetyLabel(True))


def test_two_tabs_of_one_person_never_show_the_same_text(make: Make) -> None:
    team = make()
    team.add("one", "two")
    left, right = team.desk("ann"), team.desk("ann")
    assert left.task != right.task
    left.page.click("#a-leave")
    expect(left.page.locator("#a-refused")).to_contain_text("Signed out")
    right.choose("safe", "Safe")
    right.save()
    right.see("one")  # given back by the tab that left


def test_a_reload_keeps_what_was_clicked_and_forgets_it_once_it_is_saved(make: Make) -> None:
    team = make(overlap_share=1.0)
    team.add("one", "two")
    disagree(team)
    bob = team.desk("bob")
    bob.see("two")
    bob.page.locator("#a-settling input").check()
    bob.see("one")
    bob.choose("safe", "Unsafe")
    bob.choose("severity", "severe")
    bob.choose("categories", "Drugs")
    bob.page.reload()
    bob.see("one")  # settling still
    expect(bob.page.locator("#a-settling input")).to_be_checked()
    expect(bob.page.locator("#a-categories input:checked")).to_have_count(1)
    bob.save()
    bob.page.reload()
    bob.see("two")
    expect(bob.page.locator("#a-safe input:checked")).to_have_count(0)
    (settled,) = [one for one in team.store.labels() if one.adjudicated]
    assert settled.value == SafetyLabel(False, 3, ("Drugs",))
    assert bob.errors == []
