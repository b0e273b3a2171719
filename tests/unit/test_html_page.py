"""Pages: what is shown is text, one script and one style are allowed, a missing value is an error."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from cogvlm_ft.html_page import HtmlPage, both

EVIL = "<script>alert(1)</script>{{ missing }}\"'&\udce9"


@pytest.fixture
def page(tmp_path: Path) -> HtmlPage:
    blocks = '{% block main %}<p title="{{ text }}">{{ both(text, "安全") }}</p>{% endblock %}'
    (tmp_path / "page.html").write_text('{% extends "html_page.html" %}' + blocks)
    (tmp_path / "page.css").write_text("p { margin: 0; }")
    (tmp_path / "page.js").write_text("page.byId('theme');")
    return HtmlPage(tmp_path)


def test_values_are_escaped(page: HtmlPage) -> None:
    for html in (page.render_file(text=EVIL), page.render_served(text=EVIL)):
        assert html.count("<script") == html.count("</script>") == 1
        assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;{{ missing }}&#34;&#39;&amp;\\udce9") == 2


def test_a_file_allows_its_own_script_and_style_only(page: HtmlPage) -> None:
    html = page.render_file(text="")
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)[0]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[0]
        assert f"{tag}-src 'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'" in policy
    assert not re.search(r'(?:src|href)="', html)


def test_a_served_page_links_to_its_style_and_script(page: HtmlPage) -> None:
    html = page.render_served(text="")
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,", "page.css", "page.js"]
    assert page.style.endswith("p { margin: 0; }") and page.script.endswith("page.byId('theme');")


def test_a_missing_value_is_an_error(page: HtmlPage) -> None:
    with pytest.raises(UndefinedError, match="text"):
        page.render_file()


def test_equal_texts_have_no_language() -> None:
    assert both("IoU", "IoU") == "IoU" and both("<", "<") == "&lt;"
    assert both("a", "<b>") == '<span lang="en">a</span><span lang="zh">&lt;b&gt;</span>'
