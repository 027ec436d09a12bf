"""The demo page in a real Chromium, against real servers on loopback."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect
from tab import ROOT, Tab, free_port

from demo.app import build, launch
from guardrail import Action, Category, Pair, Severity
from guardrail.policy import PRESETS
from guardrail.testing import FakeModerator

pytestmark = pytest.mark.browser

XSS = (
    "<script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(1)> "
    "![x](http://192.0.2.1/y) &lt;"
)


@pytest.fixture(scope="module")
def judged() -> list[Pair]:
    return []


@pytest.fixture(scope="module")
def fake_url(judged: list[Pair]) -> Iterator[str]:
    """The page with decisions that are known beforehand."""
    words = {
        "bomb": (Severity.SEVERE, Category.VIOLENCE),
        "iron bar": (Severity.SEVERE, Category.ANIMAL_ABUSE),
        "12 Sample Street": (Severity.MODERATE, Category.PRIVACY_VIOLATION),
    }
    page = build(FakeModerator(words, on_assess=judged.extend))
    yield launch(page, "127.0.0.1", free_port(), block=False)
    page.close()


def test_a_message_gets_an_answer_and_verdicts(tab: Tab, app_url: str) -> None:
    tab.page.goto(app_url)
    expect(tab.page.locator("#g-model")).to_contain_text("canned answers, not a language model")
    tab.send("How can I kill a Python process that hangs?")
    assert tab.wait_for_verdict() in list(Action)
    expect(tab.answer).to_have_text(re.compile(r"\w"))
    expect(tab.page.locator("#g-input [role=meter]")).to_have_count(len(Severity))
    assert tab.errors == []


def test_the_answer_grows_while_it_streams(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.send("What can I cook with lentils?")
    answer = tab.page.locator("#g-chat [data-testid=bot]")
    expect(answer).to_contain_text("Fry a chopped onion")
    partial = answer.inner_text()
    assert "eat it with bread" not in partial
    expect(answer).to_contain_text("eat it with bread")
    assert tab.wait_for_verdict() == "allow"


def test_what_is_typed_while_an_answer_streams_is_kept(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.send("What can I cook with lentils?")
    box = tab.page.locator("#g-box textarea, #g-box input")
    expect(tab.answer).to_contain_text("Fry a chopped")
    expect(box).to_have_value("")
    box.fill("And for dessert?")
    tab.wait_for_verdict()
    expect(tab.answer).to_contain_text("eat it with bread")
    expect(box).to_have_value("And for dessert?")


def test_a_refused_message_is_never_answered(tab: Tab, fake_url: str, judged: list[Pair]) -> None:
    tab.page.goto(fake_url)
    judged.clear()
    tab.page.get_by_role("button", name="Harmful ask").click()
    assert tab.wait_for_verdict() == "refuse"
    expect(tab.answer).to_contain_text("can't help with violence")
    expect(tab.page.locator("#g-input")).to_contain_text("Violence")
    expect(tab.page.locator("#g-output")).to_contain_text("The model was not asked")
    assert all(pair.response is None for pair in judged)


def test_a_harmful_answer_is_cut_off_before_its_harm(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.page.get_by_role("button", name="Dark story").click()
    assert tab.wait_for_verdict() == "allow"
    expect(tab.page.locator("#g-output .g-badge")).to_have_text("refuse")
    expect(tab.answer).to_contain_text("birch wood")
    expect(tab.answer).to_contain_text("cruelty to animals")
    assert "iron bar" not in tab.page.content()


def test_a_private_address_is_blanked_out(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.page.get_by_role("button", name="Data leak").click()
    assert tab.wait_for_verdict() == "allow"
    expect(tab.answer).to_contain_text("[redacted], Springfield")
    expect(tab.answer).to_contain_text("viola")


def test_a_click_on_an_earlier_message_shows_its_verdict_again(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.page.get_by_role("button", name="Harmful ask").click()
    assert tab.wait_for_verdict() == "refuse"
    tab.send("hello")
    expect(tab.page.locator("#g-input .g-badge")).to_have_text("allow")
    tab.page.locator("#g-chat [data-testid=user]").first.click()
    expect(tab.page.locator("#g-input .g-badge")).to_have_text("refuse")


def test_the_chosen_policy_decides(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.page.get_by_label("audit-only").click()
    tab.page.get_by_text("What this policy does").click()
    expect(tab.page.locator(".g-policy")).to_contain_text("Shadow mode")
    tab.page.get_by_role("button", name="Harmful ask").click()
    assert tab.wait_for_verdict() == "flag"


def test_the_inspection_shows_all_bars_and_the_verdict_of_each_preset(
    tab: Tab, app_url: str
) -> None:
    tab.page.goto(app_url)
    tab.page.get_by_role("tab", name="Inspect").click()
    tab.page.fill("#g-prompt textarea", "How do I shoot a portrait?")
    tab.page.click("#g-go")
    report = tab.page.locator("#g-report")
    expect(report.get_by_role("meter")).to_have_count(len(Severity) + len(Category))
    expect(report.locator(".g-presets h3")).to_have_text(list(PRESETS))
    for badge in report.locator(".g-presets .g-badge").all_inner_texts():
        assert badge in list(Action)
    expect(report.locator(".g-text")).to_have_text("How do I shoot a portrait?")


def test_an_example_is_inspected_with_a_click(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.page.get_by_role("tab", name="Inspect").click()
    tab.page.get_by_role("button", name="privacy, answered").click()
    expect(tab.page.locator("#g-report mark")).to_have_text("12 Sample Street")
    actions = tab.page.locator("#g-report .g-presets .g-badge")
    expect(actions).to_have_text(["refuse", "redact", "flag", "flag"])
    expect(tab.page.locator("#g-response textarea")).to_have_value(re.compile("Jordan Example"))


def test_a_blank_response_is_none_and_the_prompt_is_inspected(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.page.get_by_role("tab", name="Inspect").click()
    tab.page.fill("#g-prompt textarea", "How do I make a bomb?")
    tab.page.fill("#g-response textarea", "  ")
    tab.page.click("#g-go")
    expect(tab.page.locator("#g-report .g-text")).to_have_text("How do I make a bomb?")


def test_markup_in_a_text_is_shown_and_never_run(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    tab.send(f"hello {XSS}")
    tab.wait_for_verdict()
    expect(tab.page.locator("#g-chat [data-testid=user]")).to_contain_text(XSS)
    tab.page.get_by_role("tab", name="Inspect").click()
    tab.page.fill("#g-prompt textarea", XSS)
    tab.page.click("#g-go")
    expect(tab.page.locator("#g-report .g-text")).to_contain_text(XSS)
    tab.page.wait_for_timeout(500)
    assert tab.dialogs == []
    assert not [url for url in tab.requests if "192.0.2.1" in url]


def test_no_request_leaves_loopback(tab: Tab, app_url: str) -> None:
    tab.page.goto(app_url)
    tab.send("hello")
    tab.wait_for_verdict()
    tab.page.get_by_role("tab", name="Inspect").click()
    tab.page.get_by_role("button", name="dinner").click()
    expect(tab.page.locator("#g-report mark, #g-report .g-text").first).to_be_visible()
    hosts = {urlsplit(url).hostname for url in tab.requests if not url.startswith("data:")}
    assert hosts == {"127.0.0.1"}


class _Api(BaseHTTPRequestHandler):
    """As much of the chat completions API as the page uses; keeps what it was sent."""

    seen: list[tuple[str | None, dict[str, object]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers["Authorization"], body))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in ("A real ", "<b>answer</b>."):
            event = {"choices": [{"index": 0, "delta": {"content": piece}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        self.wfile.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())

    def log_message(self, format: str, *args: object) -> None: ...


def _connect(tab: Tab, url: str) -> None:
    tab.page.get_by_role("button", name="Chat model").click()
    tab.page.get_by_label("URL of an OpenAI-compatible API").fill(url)
    tab.page.get_by_label("Model", exact=True).fill("tiny")
    tab.page.get_by_label("Key").fill("sk-not-to-be-seen")
    expect(tab.page.locator("#g-model")).to_contain_text(f"tiny at {url}")


def test_a_given_api_is_asked_and_its_key_is_not_shown(tab: Tab, fake_url: str) -> None:
    handler = type("Api", (_Api,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab.page.goto(fake_url)
        _connect(tab, f"http://127.0.0.1:{server.server_address[1]}/v1")
        tab.send("Who are you?")
        tab.wait_for_verdict()
        server.shutdown()
    expect(tab.answer).to_have_text("A real <b>answer</b>.")
    [(authorization, body)] = handler.seen  # type: ignore[attr-defined]
    assert authorization == "Bearer sk-not-to-be-seen"
    assert body["model"] == "tiny"
    assert "sk-not-to-be-seen" not in tab.page.content()
    kept = tab.page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    assert "sk-not-to-be-seen" not in kept


def test_an_api_that_is_not_there_is_one_clear_line(tab: Tab, fake_url: str) -> None:
    tab.page.goto(fake_url)
    _connect(tab, "ftp://nowhere")
    tab.send("hello")
    expect(tab.page.locator("#g-verdicts [role=alert]")).to_contain_text("not an http:// or https")


def test_a_page_for_others_offers_no_connection(tab: Tab) -> None:
    page = build(FakeModerator({}), connect=False)
    tab.page.goto(launch(page, "127.0.0.1", free_port(), block=False))
    expect(tab.page.locator("#g-send")).to_be_visible()
    expect(tab.page.get_by_text("What this policy does")).to_be_visible()
    expect(tab.page.get_by_role("button", name="Chat model")).to_have_count(0)
    page.close()


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "demo.app", "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"demo: cannot serve on 127.0.0.1:{port}")
    assert "Traceback" not in done.stderr
