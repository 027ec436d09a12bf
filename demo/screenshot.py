"""Pictures of the running demo page, for the README and to look at while working on it.

python -m demo.screenshot docs/demo.png [--url http://127.0.0.1:7860] [--dark] [--width 1280]
    [--tab inspect]

Needs a Chromium on the machine; the page must be served already (`make run`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Error, Page, sync_playwright

__all__ = ["CHROMIUM_ARGS", "find_chromium", "main"]

# No calls of the browser's own, so that every request seen is the page's; a sandbox needs
# privileges that a container lacks.
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.screenshot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=860)
    parser.add_argument("--tab", choices=("chat", "inspect"), default="chat")
    args = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("screenshot: no Chromium found: install one, with apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        page = browser.new_page(
            viewport={"width": args.width, "height": args.height},
            color_scheme="dark" if args.dark else "light",
        )
        try:
            page.goto(args.url)
        except Error:
            sys.exit(f"screenshot: no page at {args.url}: start it, with make run, or give --url")
        (_chat if args.tab == "chat" else _inspect)(page)
        page.wait_for_timeout(600)  # bars glide to their length
        page.screenshot(path=args.file, full_page=args.width < 700)
        browser.close()


def _chat(page: Page) -> None:
    for example in ("Dinner idea", "Data leak"):
        page.get_by_role("button", name=example).click()
        page.wait_for_selector("#g-output:has-text('judged before')")
        page.wait_for_selector("#g-input .g-badge", timeout=60_000)


def _inspect(page: Page) -> None:
    page.get_by_role("tab", name="Inspect").click()
    page.get_by_role("button", name="privacy, answered").click()
    page.wait_for_selector("#g-report .g-presets")


if __name__ == "__main__":
    main()
