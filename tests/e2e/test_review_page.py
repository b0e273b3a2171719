"""The page of a review in a real browser: it looks right, its buttons work, and the file it offers is one we apply."""

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

from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.decisions import load_decisions
from cogvlm_ft.shards.review import review
from cogvlm_ft.shards.reviewing.sources import annotated_items

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

EVIL = "<script>document.title = 'taken over'</script>"

# Runs before the page's own script, to catch its mistakes and the file that it offers.
WATCH = """
window.seen = { errors: [], files: [] };
window.Blob = class extends Blob {
  constructor(parts, options) {
    super(parts, options);
    seen.files.push(parts.join(""));
  }
};
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => seen.errors.push("policy: " + event.violatedDirective));
"""

# What a person does; the answers go into the DOM. All of it happens before the browser thinks that the page is loaded.
USE = """
function use() {
  const shown = (element) => getComputedStyle(element).display !== "none";
  const press = (figure, decision) => figure.querySelector(`[data-decision="${decision}"]`).click();
  const figures = (kind) => [...document.querySelectorAll(`figure[data-kind="${kind}"]`)];
  const result = {};

  const spans = () => ["en", "zh"].map((language) => shown(document.querySelector(`h1 [lang="${language}"]`)));
  result.first = spans();
  document.getElementById("language").click();
  result.second = spans();
  const ground = () => getComputedStyle(document.body).backgroundColor;
  const before = ground();
  document.getElementById("theme").click();
  result.theme_changes = before !== ground();

  document.querySelector('[data-filter="inverted_box"]').click();
  result.sections = [...document.querySelectorAll(".kind")].filter(shown).map((section) => section.dataset.kind);
  document.querySelector('[data-filter=""]').click();

  result.bar_before = shown(document.getElementById("decisions"));
  press(figures("inverted_box")[0], "drop");
  press(figures("under_one_patch")[0], "accept");
  press(figures("under_one_patch")[0], "accept");
  press(figures("box_outside_image")[0], "edit");
  const editor = document.querySelector(".editor");
  result.fields = [...editor.querySelectorAll("label")].filter(shown).map((label) => label.dataset.field);
  const boxes = editor.querySelector("[name=boxes]");
  result.prefilled = boxes.value;
  boxes.value = "[[9, 9, 1, 1]]";
  editor.requestSubmit();
  result.mistake = shown(editor.querySelector(".mistake"));
  boxes.value = "[[1, 2, 30, 40]]";
  editor.requestSubmit();
  press(figures("wrong_language")[0], "edit");
  const words = document.querySelector(".editor");
  words.querySelector("[name=phrase]").value = "a cat";
  words.querySelector("[name=language]").value = "en";
  words.requestSubmit();
  press(figures("same_photo")[1], "drop");
  result.count = document.getElementById("count").textContent;
  result.bar_after = shown(document.getElementById("decisions"));
  document.getElementById("download").click();
  result.file = seen.files[0];
  result.kept = Object.keys(localStorage).length;

  document.getElementById("clear").click();
  const section = (kind) => document.querySelector(`.kind[data-kind="${kind}"]`);
  const whole = (kind, decision) => section(kind).querySelector(`[data-all="${decision}"]`).click();
  const chosen = (figure) => [...figure.querySelectorAll('[aria-pressed="true"]')];
  const pressed = (figure) => chosen(figure).map((button) => button.dataset.decision);
  whole("under_one_patch", "drop");
  whole("same_photo", "drop");
  result.bulk_pressed = [...figures("under_one_patch"), ...figures("same_photo")].map(pressed);
  press(figures("under_one_patch")[0], "accept");
  result.bulk_count = document.getElementById("count").textContent;
  document.getElementById("download").click();
  result.bulk_file = seen.files[1];

  const gallery = (name) => document.getElementById(`gallery-${name}`);
  document.querySelector('[data-gallery="smallest"]').click();
  result.galleries = ["random", "smallest"].map((name) => shown(gallery(name)));
  gallery("smallest").querySelector(".open").click();
  const large = document.getElementById("large");
  result.large = [large.open, large.querySelectorAll("svg").length, large.querySelector("p").textContent];
  large.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  result.next = large.querySelector("p").textContent;
  large.click();
  result.closed = !large.open;
  result.images = [...document.images].map((image) => image.naturalWidth);
  result.too_wide = document.documentElement.scrollWidth > innerWidth;
  return result;
}
addEventListener("load", () => {
  let result = {};
  try { result = use(); } catch (error) { seen.errors.push(String(error)); }
  const output = document.createElement("pre");
  output.id = "result";
  output.textContent = JSON.stringify({ ...result, errors: seen.errors });
  document.body.append(output);
});
"""


def chromium(profile: Path, page: Path, *options: object) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *map(str, options), page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def write_photo(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(60, 200, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a review of a few flawed lines, photos included."""
    folder = tmp_path_factory.mktemp("review")
    for seed, name in enumerate("abcde"):
        write_photo(folder / f"{name}.jpg", seed)
    (folder / "copy of a.jpg").write_bytes((folder / "a.jpg").read_bytes())
    good = {"phrase": "狗", "boxes": [[40, 30, 200, 180]]}
    lines = [
        {"image": "a.jpg", "targets": [good]},
        {"image": "copy of a.jpg", "targets": [good]},
        {"image": "b.jpg", "targets": [{"phrase": EVIL, "boxes": [[200, 30, 40, 180]]}]},
        {"image": "c.jpg", "targets": [{"phrase": "dog", "boxes": [[100, 100, 420, 200]]}]},
        {"image": "d.jpg", "targets": [{"phrase": "dog", "boxes": [[100, 100, 104, 104]]}, good]},
        {"image": "e.jpg", "targets": [{"phrase": "dog", "language": "zh", "boxes": [[40, 30, 200, 180]]}]},
    ]
    annotations = folder / "lines.jsonl"
    annotations.write_text("\n".join(json.dumps(line) for line in lines))
    review(annotated_items("jsonl", annotations, folder), "lines.jsonl", folder / "out")
    return folder


def with_scripts(page: str) -> str:
    """The same page with two scripts around its own, and with leave to run them."""
    hashes = (base64.b64encode(sha256(script.encode()).digest()).decode() for script in (WATCH, USE))
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    page = page.replace("script-src ", f"script-src {allowed} ", 1)
    page = page.replace("<style>", f"<script>{WATCH}</script><style>", 1)
    return page.replace("</body>", f"<script>{USE}</script></body>")


def test_it_works_in_a_browser(reviewed: Path, tmp_path: Path) -> None:
    page = tmp_path / "review.html"
    page.write_text(with_scripts((reviewed / "out" / "review.html").read_text(encoding="utf-8")), encoding="utf-8")
    dom = chromium(tmp_path / "profile", page, "--dump-dom", "--window-size=1280,900", "--lang=en")
    match = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert match, dom[-2000:]
    result = json.loads(html.unescape(match[1]))
    assert result["errors"] == []
    assert sorted(result["first"]) == sorted(result["second"]) == [False, True]
    assert result["first"] != result["second"]
    assert result["theme_changes"]
    assert result["sections"] == ["inverted_box"]
    assert (result["bar_before"], result["bar_after"]) == (False, True)
    assert result["fields"] == ["boxes"]
    assert result["prefilled"] == "[[100.0, 100.0, 420.0, 200.0]]"
    assert result["mistake"]
    assert result["count"] == "4"
    assert result["kept"] >= 1
    assert len(result["images"]) >= 6 and min(result["images"]) > 0
    assert not result["too_wide"]
    assert "taken over" not in re.findall(r"<title>(.*?)</title>", dom)[0]

    assert result["galleries"] == [False, True]
    assert result["large"] == [True, 2, "d.jpg"] and result["next"] != "d.jpg" and result["closed"]
    assert result["bulk_pressed"] == [["drop"], [], ["drop"]]  # of the copies the first stays
    assert result["bulk_count"] == "2"
    (tmp_path / "bulk.json").write_text(result["bulk_file"], encoding="utf-8")
    assert len(load_decisions(tmp_path / "bulk.json")) == 2
    rows = json.loads(result["bulk_file"])["decisions"]
    assert {(row["kind"], row["decision"]) for row in rows} == {("under_one_patch", "accept"), ("same_photo", "drop")}

    (tmp_path / "review_decisions.json").write_text(result["file"], encoding="utf-8")
    decisions = load_decisions(tmp_path / "review_decisions.json")
    kept = {}
    for part in FORMATS["jsonl"].read(reviewed / "lines.jsonl", reviewed):
        assert isinstance(part, Candidate)
        candidate, _ = decisions.apply(part)
        kept[part.image] = candidate and [(t.phrase, t.language, t.boxes_xyxy) for t in candidate.targets]
    assert decisions.unmet() == []
    dog, box = ("狗", "zh", ((40.0, 30.0, 200.0, 180.0),)), (100.0, 100.0, 104.0, 104.0)
    assert kept == {
        "a.jpg": [dog],
        "copy of a.jpg": None,
        "b.jpg": None,
        "c.jpg": [("dog", "en", ((1.0, 2.0, 30.0, 40.0),))],
        "d.jpg": [("dog", "en", (box,)), dog],
        "e.jpg": [("a cat", "en", dog[2])],
    }


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_screenshots(width: int, dark: bool, reviewed: Path, tmp_path: Path) -> None:
    """Something is drawn, in the colours that the system asks for."""
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    page = reviewed / "out" / "review.html"
    chromium(tmp_path / "profile", page, f"--screenshot={shot}", f"--window-size={width},2400", *scheme)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape[0] == 2400
    ground = np.bincount(pixels.ravel()).argmax()
    assert ground < 60 if dark else ground > 200
    assert len(np.unique(pixels)) > 50
