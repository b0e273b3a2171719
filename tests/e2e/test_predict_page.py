"""The web page of launch/predict.py --serve in a real browser: drop a photo, ask, see the answer and the boxes."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from browser import PHONE, WIDE, check_buttons, is_too_wide, needs_browser, opened
from PIL import Image
from ranks import REPOSITORY
from taught_model import DOG, DOG_BOX, FOUND, NOT_FOUND, SMALL_BOX, WHERE_SMALL, WHO, teach

from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.predict.bodies import MAX_UPLOAD_BYTES

STARTED = re.compile(r"(http://127\.0\.0\.1:\d+/)")
ASKED_WITHIN_MS = 60_000

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages")]


@pytest.fixture(scope="module")
def address(tokenizer: CogVLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the program, on a port that it found free; ended with Ctrl-C, which is no failure."""
    folder = teach(tokenizer, tmp_path_factory.mktemp("page") / "taught")
    (folder / "README.md").write_text("# taught\n\n| | |\n|---|---|\n| step, epoch | 12, 3 |\n", encoding="utf-8")
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
def test_a_person_asks(address: str, photo: Path, tmp_path: Path, browser: Any) -> None:
    from playwright.sync_api import expect

    with opened(browser, address, WIDE, "light", "en-US") as page:
        check_buttons(page, "en-US", "light")
        expect(page.locator("header .source")).to_contain_text("taught · step 12 · 112 px", use_inner_text=True)
        expect(page.locator("#send")).to_be_disabled()
        page.set_input_files("#photo", photo)
        page.fill("#asked", WHERE_SMALL)
        page.press("#asked", "Enter")
        expect(page.locator("#answers article p")).to_have_text(SMALL_BOX, timeout=ASKED_WITHIN_MS)
        expect(page.locator("#answers li")).to_contain_text("150.2, 300.3, 162.2, 324.3 px · confidence")
        natural = page.locator("#picture").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert natural[0] == 300 and natural[1] > 600, "upright, with its texts below"
        picture, answers = (page.locator(part).bounding_box() for part in ("#picture", "#answers"))
        assert answers["x"] >= picture["x"] + picture["width"], "beside each other"
        first = save_files(page)

        page.check("[value=targets]")
        page.fill("#asked", "狗，猫")
        page.click("#send")
        expect(page.locator("#answers article")).to_have_count(3, timeout=ASKED_WITHIN_MS)
        texts = page.locator("#answers article p:not(.notice)").all_inner_texts()
        assert texts[0] == FOUND and sorted(texts[1:]) == sorted([DOG_BOX, NOT_FOUND])
        expect(page.locator("#answers li")).to_contain_text(f"{DOG} · 30.1")
        notices = page.locator("#answers .notice:visible").all_inner_texts()
        assert len(notices) == 1 and "Not found:" in notices[0], "the first answer of a conversation has no boxes"
        page.screenshot(path=os.environ.get("PREDICT_SCREENSHOT", str(tmp_path / "page.png")), full_page=True)
        page.locator("#asked-before button").nth(1).click()
        expect(page.locator("#answers article p")).to_have_text(SMALL_BOX)
        assert save_files(page) == first, "an earlier question is shown again"

        page.set_viewport_size({"width": 360, "height": 700})
        assert not is_too_wide(page)
        (tmp_path / "broken.jpg").write_bytes(b"<script>no photo</script>")
        page.set_input_files("#photo", tmp_path / "broken.jpg")
        expect(page.locator("#result")).to_be_hidden()
        page.click("#send")
        expect(page.locator("#state.bad")).to_contain_text("broken_image", timeout=ASKED_WITHIN_MS)


@needs_browser
def test_it_fits_on_a_phone(address: str, photo: Path, browser: Any) -> None:
    from playwright.sync_api import expect

    with opened(browser, address, PHONE, "dark", "zh-CN") as page:
        check_buttons(page, "zh-CN", "dark")
        page.set_input_files("#photo", photo)
        page.fill("#asked", WHERE_SMALL)
        page.click("#send")
        expect(page.locator("#answers li")).to_contain_text("置信度", timeout=ASKED_WITHIN_MS)
        picture, answers = (page.locator(part).bounding_box() for part in ("#picture", "#answers"))
        assert answers["y"] >= picture["y"] + picture["height"] and not is_too_wide(page)
        page.fill("#asked", WHO)
        page.click("#send")
        expect(page.locator("#answers .notice.bad")).to_contain_text("无法从该回答中读出框", timeout=ASKED_WITHIN_MS)


def save_files(page: Any) -> dict[str, Any]:
    """Save the picture and the JSON; return the JSON."""
    saved = []
    for button in ("#save-picture", "#save-json"):
        with page.expect_download() as download:
            page.click(button)
        saved.append((download.value.suggested_filename, Path(download.value.path()).read_bytes()))
    (picture_name, picture), (json_name, text) = saved
    assert (picture_name, json_name) == ("一张照片-answer.jpg", "一张照片-answer.json")
    assert Image.open(io.BytesIO(picture)).size[0] == 300
    found: dict[str, Any] = json.loads(text)
    assert found["image"] == "一张照片.jpg" and found["image_size_px"] == [300, 600] and "picture" not in found
    return found


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
