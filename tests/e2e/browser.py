"""How tests open a page in Chromium: as readers with a window, a colour scheme and a language."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
WIDE, PHONE = (1280, 900), (390, 844)
LOOKS = ((WIDE, "light", "en-US"), (PHONE, "dark", "zh-CN"))
"""Size, colour scheme and language of a reader; the page's own buttons lead to the other ones."""

# Runs before the page's own script, to catch its mistakes and whatever its policy refuses.
WATCH = """
window.mistakes = [];
addEventListener("error", (event) => mistakes.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => mistakes.push("policy: " + event.violatedDirective));
"""


@contextmanager
def opened(browser: Any, address: str, size: tuple[int, int], scheme: str, language: str) -> Iterator[Any]:
    """Open an address as a reader with this window, colour scheme and language; check at the end what went wrong."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, locale=language, accept_downloads=True
    )
    context.add_init_script(WATCH)
    page = context.new_page()
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url))
    page.goto(address)
    try:
        yield page
        assert page.evaluate("mistakes") == []
        known = (address, "blob:", "data:")
        assert [url for url in outside if not url.startswith(known)] == [], "the page needs nothing from elsewhere"
    finally:
        context.close()


def check_buttons(page: Any, language: str, scheme: str) -> None:
    """Check that the page opens in the reader's language and colours, and that its buttons change both."""

    def shown() -> list[bool]:
        texts = "all => ['en', 'zh'].map(name => all.some(each => each.lang === name && each.checkVisibility()))"
        return list(page.locator("main [lang]").evaluate_all(texts))

    def is_dark() -> bool:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in ground[4:-1].split(",")) < 200

    assert shown() == [language.startswith("en"), language.startswith("zh")]
    page.click("#language")
    assert shown() == [language.startswith("zh"), language.startswith("en")]
    page.click("#language")
    assert is_dark() == (scheme == "dark")
    page.click("#theme")
    assert is_dark() != (scheme == "dark")
    page.click("#theme")


def is_too_wide(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))
