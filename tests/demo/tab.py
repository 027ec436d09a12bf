"""What the tests of the page share: a tab that records what it did, and a free port."""

from __future__ import annotations

import socket
from pathlib import Path

from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


class Tab:
    """A browser tab, what it asked the network for, and the alerts and errors it showed."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def send(self, message: str) -> None:
        self.page.fill("#g-box textarea, #g-box input", message)
        self.page.click("#g-send")

    def wait_for_verdict(self) -> str:
        """The action on the last message, once its turn has ended."""
        badge = self.page.locator("#g-input .g-badge")
        badge.wait_for(timeout=60_000)
        return badge.inner_text()

    @property
    def answer(self) -> Locator:
        """The one answer in the chat; `expect` it, for it may be drawn after its verdict."""
        return self.page.locator("#g-chat [data-testid=bot]")
