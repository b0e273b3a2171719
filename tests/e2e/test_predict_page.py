"""The web page of launch/predict.py --serve in a real browser: drop a photo, ask, see the answer and the boxes."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image
from ranks import REPOSITORY
from taught_model import DOG, DOG_BOX, FOUND, NOT_FOUND, SMALL_BOX, WHERE_SMALL, teach

from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.predict.serve import MAX_UPLOAD_BYTES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STARTED = re.compile(r"(http://127\.0\.0\.1:\d+/)")
ASKED_WITHIN_MS = 60_000

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")

# Everything that the page may not do shows up here.
WATCH = """
window.mistakes = [];
addEventListener("error", (event) => mistakes.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => mistakes.push(event.violatedDirective));
"""


@pytest.fixture(scope="module")
def address(tokenizer: CogVLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the program, on a port that it found free; ended with Ctrl-C, which is no failure."""
    folder = teach(tokenizer, tmp_path_factory.mktemp("taught"))
    command = ["launch/predict.py", "--model", folder, "--serve", "--port", 0, "--steps", "--max-new-tokens", 64]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    program = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=environment
    )
    alarm = threading.Timer(120, program.kill)  # then its output ends, and so does the search for its address
    alarm.start()
    assert program.stdout is not None
    try:
        yield next(found[1] for line in program.stdout if (found := STARTED.search(line)))
    finally:
        alarm.cancel()
        program.send_signal(2)
        assert program.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored lying on its side: 300 x 600 as viewers show it."""
    path = tmp_path_factory.mktemp("photo") / "一张照片.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((600, 300)).convert("RGB").save(path, exif=exif)
    return path


def post(
    address: str, body: bytes, *, asked: str = WHERE_SMALL, mode: str = "prompt", **headers: str
) -> tuple[int, str]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    sent = {"Content-Type": "application/octet-stream"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.request("POST", "/ask?" + urlencode({"asked": asked, "mode": mode}), body, sent)
    response = connection.getresponse()
    return response.status, response.read().decode()


@needs_browser
def test_a_person_asks(address: str, photo: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    expect = sync_api.expect
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 1500})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.add_init_script(WATCH)
        page.goto(address)
        expect(page.locator("#send")).to_be_disabled()
        page.set_input_files("#photo", photo)
        page.fill("#asked", WHERE_SMALL)
        page.press("#asked", "Enter")
        expect(page.locator("#answers article p")).to_have_text(SMALL_BOX, timeout=ASKED_WITHIN_MS)
        expect(page.locator("#answers li")).to_contain_text("150.2, 300.3, 162.2, 324.3 px · confidence")
        natural = page.locator("#picture").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert natural[0] == 300 and natural[1] > 600, "upright, with its texts below"

        page.check("[value=targets]")
        page.fill("#asked", "狗，猫")
        page.click("#send")
        expect(page.locator("#answers article")).to_have_count(3, timeout=ASKED_WITHIN_MS)
        texts = page.locator("#answers article p").all_inner_texts()
        assert texts[0] == FOUND and sorted(texts[1:]) == sorted([DOG_BOX, NOT_FOUND])
        expect(page.locator("#answers li")).to_contain_text(f"{DOG} · 30.1")
        page.screenshot(path=os.environ.get("PREDICT_SCREENSHOT", str(tmp_path / "page.png")), full_page=True)

        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"
        (tmp_path / "broken.jpg").write_bytes(b"<script>no photo</script>")
        page.set_input_files("#photo", tmp_path / "broken.jpg")
        expect(page.locator("#result")).to_be_hidden()
        page.click("#send")
        expect(page.locator("#state.bad")).to_contain_text("broken_image", timeout=ASKED_WITHIN_MS)
        assert page.evaluate("mistakes") == []
        outside = [url for url in requests if not url.startswith((address, "blob:", "data:"))]
        assert not outside, "the page needs nothing from elsewhere"
        browser.close()


def test_what_is_refused(address: str, photo: Path) -> None:
    good = photo.read_bytes()
    assert post(address, good)[0] == 200
    assert post(address, good, Content_Type="text/plain")[0] == 415, "what a form of another page could send"
    assert post(address, good, Host="elsewhere.example")[0] == 400, "a name that is made to point here"
    assert post(address, good, asked=" ") == (400, '{"error":"an empty prompt"}')
    assert post(address, good, asked="x" * 5000)[0] == 400
    assert post(address, good, mode="shell")[0] == 400
    assert post(address, b"")[0] == 400
    assert post(address, bytes(MAX_UPLOAD_BYTES + 1))[0] == 413
    assert post(address, bytes(1000))[0] == 400
    assert post(address, good)[0] == 200, "it goes on"


def test_a_photo_of_too_many_pixels_is_refused(address: str, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    status, text = post(address, (tmp_path / "large.png").read_bytes())
    assert status == 400 and "too_many_pixels" in text


def test_a_page_of_another_origin_gets_no_answer(address: str) -> None:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("OPTIONS", "/ask", headers={"Origin": "https://elsewhere.example"})
    response = connection.getresponse()
    assert response.status == 405 and response.getheader("Access-Control-Allow-Origin") is None
