"""What tests of several files share: a patient clock, a real Chromium, a moderator that is held."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from guardrail._onnx import NO_TELEMETRY

if TYPE_CHECKING:
    from batching_kit import Held
    from playwright.sync_api import Browser

# Some tests import onnxruntime before the package does, which turns this off for its users.
os.environ.setdefault(NO_TELEMETRY, "1")

# What a busy machine does to the clock is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


# Not for the session: while Playwright is there, its event loop runs in the main thread, and no
# other test could run one of its own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    from demo.screenshot import CHROMIUM_ARGS, find_chromium

    # A busy machine may take longer than Playwright's 5 s to draw a page.
    expect.set_options(timeout=60_000)
    chromium = find_chromium()
    if chromium is None:
        missing = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        yield running
        running.close()


@pytest.fixture
def held() -> Iterator[Held]:
    """A moderator that waits to be let; let at the end, or a batcher would wait for it."""
    from batching_kit import Held

    moderator = Held()
    yield moderator
    moderator.let()
