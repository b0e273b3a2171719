"""One browser for the tests of all pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import CHROMIUM


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Start Chromium once for all pages; the files that use it are in one group of pytest-xdist."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()
