"""Pages in a real browser: Debian's Chromium, with no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mergetune.results.run_dir import RunDir

playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[test]' has Playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="pip install '.[test]' has axe-core"
)
_CHROMIUM = shutil.which("chromium")
NEEDS_CHROMIUM = pytest.mark.skipif(
    _CHROMIUM is None and os.environ.get("CHROMIUM") != "required",
    reason="there is no chromium: apt-get install chromium",
)
LOOKS: tuple[dict[str, Any], ...] = (
    {},
    {"color_scheme": "dark"},
    {"viewport": {"width": 390, "height": 844}},
)  # light, dark, a phone


@contextmanager
def started() -> Iterator[Any]:
    """Start the browser."""
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def violations(page: Any) -> list[tuple[str, str]]:
    """Return what axe-core finds: the rules broken, and the first element of each."""
    found = axe.Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in found]


class Opened:
    """A page that was opened, and all that went wrong or out of it."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.wrong: list[str] = []
        self._address = ""
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith("data:") and url.partition("#")[0] != self._address:
            self.wrong.append(url)

    def open(self, file: Path, fragment: str = "") -> Any:
        """Open a page."""
        self._address = file.as_uri()
        self.page.goto(self._address + fragment)
        return self.page

    def open_report(self, run: RunDir, fragment: str = "") -> Any:
        """Open a run's report, and in it the items that a candidate won and lost."""
        page = self.open(run.path / "report" / "index.html", fragment)
        if not page.evaluate("document.getElementById('won-and-lost').open"):
            page.click("#won-and-lost summary")
        page.wait_for_selector("#items article")
        return page
