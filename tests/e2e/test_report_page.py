"""The pages of a run in a real browser: they can be read and used in both languages, on a phone and on a desk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import LOOKS, PHONE, check_buttons, is_too_wide, needs_browser, opened
from report_run import STEPS, write_run

from cogvlm_ft.colours import TARGET_COLOURS, rgb
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset
from cogvlm_ft.data.plan import SamplePlan
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer
from cogvlm_ft.report.preview.inputs import NUM_SHOWN, render_preview
from cogvlm_ft.report.report import write_report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages"), needs_browser]

LOOK = """() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = (selector) => all(selector).filter((element) => element.checkVisibility());
  const texts = shown(".chart text");
  return {
    boxes: [shown(".photo rect.truth").length, shown(".photo rect.answer").length],
    strokes: [...new Set(shown(".photo rect.truth").map((rect) => getComputedStyle(rect).stroke))],
    photos: [...document.querySelectorAll(".photo image")].map((image) => image.getBBox().width),
    charts: shown(".chart").length,
    lines: [...document.querySelectorAll(".chart polyline")].map((line) => line.getTotalLength()),
    least_text_px: Math.min(...texts.map((text) => text.getBoundingClientRect().height)),
    cut: texts.filter((text) => text.getBBox().x < 0).length,
    overflowing: all(".photo .label").filter((label) => {
      const [tag, text] = [label.querySelector("rect").getBBox(), label.querySelector("text").getBBox()];
      return text.x + text.width > tag.x + tag.width;
    }).map((label) => label.textContent),
    links: all(".jump a").filter((link) => all(link.getAttribute("href")).length).length,
    height: document.documentElement.scrollHeight,
  };
}"""


@pytest.fixture(scope="module")
def report(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chinese and English questions, photos, curves and suspicious samples."""
    folder = tmp_path_factory.mktemp("page") / "run"
    write_run(folder, shards)
    val, train = (ShardReader(load_index(shards, split)) for split in ("val", "train"))
    last = folder / "evaluations" / f"step-{max(STEPS):08d}"
    return write_report(last, val, run_folder=folder, train_reader=train)


@pytest.mark.parametrize(("size", "scheme", "language"), LOOKS)
def test_it_can_be_read_and_used(
    size: tuple[int, int], scheme: str, language: str, browser: Any, report: Path, tmp_path: Path
) -> None:
    with opened(browser, report.as_uri(), size, scheme, language) as page:
        check_buttons(page, language, scheme)
        assert not is_too_wide(page)
        folded = page.evaluate(LOOK)
        if size == PHONE:
            assert folded["height"] < 10_000 and folded["charts"] == 0
            page.click('.jump a[href="#curves"]')
            assert page.evaluate(LOOK)["charts"] == 7, "a link opens its section"
        page.evaluate("document.querySelectorAll('details').forEach((section) => { section.open = true; })")
        seen = page.evaluate(LOOK)
        assert min(seen["boxes"]) >= 4 and len(seen["photos"]) >= 8 and min(seen["photos"]) > 0
        assert seen["charts"] == 10 and min(seen["lines"]) > 0 and seen["links"] == 8
        assert seen["least_text_px"] >= 10 and seen["cut"] == 0
        assert seen["overflowing"] == [], "a label is as wide as its text"
        assert set(seen["strokes"]) <= {"rgb({}, {}, {})".format(*rgb(colour)) for colour in TARGET_COLOURS}
        assert len(seen["strokes"]) > 1, "one colour for each target"
        assert not is_too_wide(page)
        page.uncheck("#answer")
        assert page.evaluate(LOOK)["boxes"] == [seen["boxes"][0], 0]
        page.check("#answer")
        check_tables(page)
        check_large(page)
        page.screenshot(path=tmp_path / "page.png", full_page=True)


def check_tables(page: Any) -> None:
    """Sort the phrases by a number and by name, and look for one of them."""
    column = "rows => rows.map(row => row.cells[1].textContent)"
    rows, heading = page.locator("#phrase-table tbody tr"), page.locator("#phrase-table th").nth(1)
    for upwards in (False, True):
        heading.click()
        numbers = [float(text) for text in rows.evaluate_all(column)]
        assert numbers == sorted(numbers, reverse=not upwards) and len(set(numbers)) > 1
    first = rows.nth(0).locator("td").nth(0).inner_text()
    page.fill("[data-filters=phrase-table]", first.upper())
    shown = page.locator("#phrase-table tbody tr:visible td:first-child").all_inner_texts()
    assert first in shown and len(shown) < len(numbers) and all(first.lower() in text.lower() for text in shown)
    scroll = page.locator("#phrase-table .scroll")
    is_wide = scroll.evaluate("area => area.scrollWidth > area.clientWidth + 1")
    assert page.locator("#phrase-table .hint").is_visible() == is_wide, "a table that is cut says so"


def check_large(page: Any) -> None:
    """Enlarge a photo; point at a chart and read its values."""
    photo = page.locator(".photo").first
    width = photo.bounding_box()["width"]
    photo.click()
    assert page.locator("dialog.zoomed svg").bounding_box()["width"] >= width
    assert page.locator("dialog.zoomed figcaption").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog.zoomed").is_visible()
    page.locator("#curves .chart").first.hover()
    shown = [float(text.split()[-1]) for text in page.locator(".tip p").all_inner_texts()]
    assert len(shown) >= 4 and all(0 <= value <= 4 for value in shown)
    assert shown[0] in (0, 2, 4), "the nearest evaluation"


@pytest.fixture(scope="module")
def preview(shards: Path, tokenizer: CogVLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CogVLMConfig(vocab_size=len(tokenizer), vision_config={"image_size": 224, "num_positions": 257})
    reader = ShardReader(load_index(shards, "train"))
    dataset = GroundingDataset(reader, load_wording("box"), tokenizer, config, 0, 4096)
    path = tmp_path_factory.mktemp("preview") / "preview.html"
    path.write_text(render_preview(dataset, SamplePlan(33, 6, 0), 0, "a run"), encoding="utf-8")
    return path


@pytest.mark.parametrize(("size", "scheme", "language"), LOOKS)
def test_the_first_inputs_can_be_seen(
    size: tuple[int, int], scheme: str, language: str, browser: Any, preview: Path
) -> None:
    with opened(browser, preview.as_uri(), size, scheme, language) as page:
        check_buttons(page, language, scheme)
        seen = page.evaluate(LOOK)
        assert len(seen["photos"]) >= NUM_SHOWN and min(seen["photos"]) > 0 and seen["boxes"][0] >= NUM_SHOWN
        assert page.locator("dt:visible").count() > NUM_SHOWN and seen["height"] < 10_000 and not is_too_wide(page)
        page.locator(".photo").first.click()
        assert page.locator("dialog.zoomed figcaption dt").first.is_visible()
