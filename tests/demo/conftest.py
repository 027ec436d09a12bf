"""Tabs of a real Chromium, and real servers of the demo page on loopback."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from tab import ROOT, Tab, free_port

# The page answers from the script, a policy that was built here or not.
os.environ["GUARDRAIL_DEMO_POLICY"] = "none"


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    context = browser.new_context()
    context.set_default_timeout(30_000)
    yield Tab(context.new_page())
    context.close()


@pytest.fixture(scope="session")
def app_url() -> Iterator[str]:
    """The page as a user starts it, with the bundled model."""
    command = [sys.executable, "-m", "demo.app", "--port", str(free_port())]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield _url(process)
        finally:
            process.terminate()


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    end = time.monotonic() + 120
    said = ""
    while time.monotonic() < end:
        if select.select([process.stdout], [], [], 1)[0]:
            line = process.stdout.readline()
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                return found[0]
            if not line:
                break
    pytest.fail(f"the demo page did not start: {said}")
