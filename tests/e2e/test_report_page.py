"""The page of a run in a real browser: everything is drawn, in both languages, on a phone and on a desk."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_run import STEPS, write_run

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.report.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

# Runs before the page's own script, to catch its mistakes and whatever it asks of the network.
WATCH = """
window.mistakes = [];
addEventListener("error", (event) => mistakes.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => mistakes.push("policy: " + event.violatedDirective));
"""

# What a person does and sees; the answers go into the DOM.
USE = """
function use() {
  const shown = (element) => element.getBoundingClientRect().height > 0;
  const first = (selector) => document.querySelector(selector);
  const result = {};
  const spans = () => ["en", "zh"].map((language) => shown(first(`h1 [lang="${language}"]`)));
  result.first = spans();
  first("#language").click();
  result.second = spans();
  const ground = () => getComputedStyle(document.body).backgroundColor;
  const before = ground();
  first("#theme").click();
  result.theme_changes = before !== ground();

  const drawn = (selector) => [...document.querySelectorAll(selector)].filter(shown).length;
  result.boxes = [drawn(".photo rect.truth"), drawn(".photo rect.answer")];
  first("#answer").click();
  result.without_answers = [drawn(".photo rect.truth"), drawn(".photo rect.answer"), drawn(".photo rect.of-answer")];
  first("#answer").click();

  result.photos = [...document.querySelectorAll(".photo image")].map((image) => image.getBBox().width);
  result.charts = drawn(".chart");
  result.lines = [...document.querySelectorAll(".chart polyline")].map((line) => line.getTotalLength());
  const text = [...document.querySelectorAll(".chart text")].map((text) => text.getBoundingClientRect().height);
  result.least_text_px = Math.min(...text);
  result.cut = [...document.querySelectorAll(".chart text")].filter((text) => text.getBBox().x < 0).length;
  result.links = [...document.querySelectorAll(".jump a")].filter((a) => first(a.getAttribute("href"))).length;
  result.too_wide = document.documentElement.scrollWidth > innerWidth;
  result.requests = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length;
  return result;
}
addEventListener("load", () => {
  let result = {};
  try { result = use(); } catch (error) { mistakes.push(String(error)); }
  const output = document.createElement("pre");
  output.id = "result";
  output.textContent = JSON.stringify({ ...result, mistakes });
  document.body.append(output);
});
"""


def chromium(profile: Path, page: Path, *options: object) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *map(str, options), page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chinese and English questions, photos, curves and suspicious samples."""
    folder = tmp_path_factory.mktemp("page") / "run"
    write_run(folder, shards)
    val, train = (ShardReader(load_index(shards, split)) for split in ("val", "train"))
    last = folder / "evaluations" / f"step-{max(STEPS):08d}"
    return write_report(last, val, run_folder=folder, train_reader=train)


def with_scripts(page: str) -> str:
    """The same page with two scripts around its own, and with leave to run them."""
    hashes = (base64.b64encode(sha256(script.encode()).digest()).decode() for script in (WATCH, USE))
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    page = page.replace("script-src ", f"script-src {allowed} ", 1)
    page = page.replace("<style>", f"<script>{WATCH}</script><style>", 1)
    return page.replace("</body>", f"<script>{USE}</script></body>")


@pytest.mark.parametrize("width", [500, 1280])
def test_it_works_in_a_browser(width: int, page: Path, tmp_path: Path) -> None:
    """500 px is the narrowest window that a headless browser opens."""
    watched = tmp_path / "report.html"
    watched.write_text(with_scripts(page.read_text(encoding="utf-8")), encoding="utf-8")
    dom = chromium(tmp_path / "profile", watched, "--dump-dom", f"--window-size={width},900", "--lang=en")
    match = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert match, dom[-2000:]
    result = json.loads(html.unescape(match[1]))
    assert result["mistakes"] == []
    assert sorted(result["first"]) == sorted(result["second"]) == [False, True]
    assert result["first"] != result["second"]
    assert result["theme_changes"]
    assert min(result["boxes"]) >= 4
    assert result["without_answers"] == [result["boxes"][0], 0, 0]
    assert len(result["photos"]) >= 8 and min(result["photos"]) > 0
    assert result["charts"] == 10 and min(result["lines"]) > 0
    assert result["least_text_px"] >= 10 and result["cut"] == 0
    assert result["links"] == 6
    assert not result["too_wide"]
    assert result["requests"] == 0


@pytest.mark.parametrize(("width", "height", "dark"), [(500, 14000, False), (1280, 6000, False), (1280, 6000, True)])
def test_screenshots(width: int, height: int, dark: bool, page: Path, tmp_path: Path) -> None:
    """Something is drawn, in the colours that the system asks for; true and answered boxes are among it."""
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(tmp_path / "profile", page, f"--screenshot={shot}", f"--window-size={width},{height}", *scheme)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (height, width)
    ground = np.bincount(pixels.mean(axis=2).astype(int).ravel()).argmax()
    assert ground < 60 if dark else ground > 200
    for colour in ((0x12, 0xB8, 0x86), (0xFF, 0x6B, 0x35)):
        assert (abs(pixels - colour).max(axis=2) < 6).sum() > 200, colour
