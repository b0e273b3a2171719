"""One way to make a safe HTML page in two languages: jinja2 with autoescape, one style, one script, a policy.

A page is a folder with page.html, which extends html_page.html and fills its blocks, and with page.css and page.js.
Shared by all pages: html_page.html, html_page.css and html_page.js beside this file.
"""

from __future__ import annotations

import base64
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cogvlm_ft.colours import style_sheet

_WIDE = "ᄀ"  # characters from here on are about as wide as high
_SHARED = Path(__file__).parent
_NO_NAVIGATION = "base-uri 'none'; form-action 'none'"

SERVED_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self';"
    f" {_NO_NAVIGATION}; frame-ancestors 'none'"
)
"""The Content-Security-Policy header of a page that is served."""


@cache
def load_page(folder: Path) -> HtmlPage:
    """Return the page in `folder`; its template is compiled once per process."""
    return HtmlPage(folder)


class HtmlPage:
    """The page in `folder`. style, script: those of all pages, then its own."""

    def __init__(self, folder: Path) -> None:
        loader = FileSystemLoader([folder, _SHARED])
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["both"] = both
        self._template = environment.get_template("page.html")
        style, self.script = (
            _read(_SHARED / f"html_page.{kind}") + _read(folder / f"page.{kind}") for kind in ("css", "js")
        )
        self.style = style_sheet() + style

    def render_file(self, **values: Any) -> str:
        """Return one file that needs no other. Values are escaped, and its policy lets only its own script run."""
        sources = f"style-src {_hash_source(self.style)}; script-src {_hash_source(self.script)}"
        policy = f"default-src 'none'; img-src data:; {sources}; {_NO_NAVIGATION}"
        inlined = {"policy": policy, "style": self.style, "script": self.script}
        return self._render({name: Markup(text) for name, text in inlined.items()}, values)

    def render_served(self, **values: Any) -> str:
        """Return the page for a server that offers `style` as page.css, `script` as page.js, and `SERVED_POLICY`."""
        return self._render(None, values)

    def _render(self, inlined: dict[str, Markup] | None, values: dict[str, Any]) -> str:
        """Fill in the template. Characters that UTF-8 cannot encode become escapes."""
        page = self._template.render(inlined=inlined, **values)
        return page.encode("utf-8", "backslashreplace").decode()


def text_width(text: str) -> float:
    """Return at least how wide a bold text is in the fonts of browsers, in units of the font size."""
    return sum(1.0 if char >= _WIDE or char in "mwMW@%" else 0.66 for char in text)


def both(en: object, zh: object) -> Markup:
    """Return a text in both languages, escaped; the page shows one of them."""
    if en == zh:
        return Markup.escape(en)
    return Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(en, zh)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
