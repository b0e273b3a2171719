"""preview.html shows the first inputs of the model: the same pixels, boxes and texts that are trained."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset
from cogvlm_ft.data.look import Look, build_look
from cogvlm_ft.data.plan import SamplePlan
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.stored_photo import Photo
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer
from cogvlm_ft.report.preview.inputs import NUM_SHOWN, first_items, render_preview, try_preview
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.settings import AugmentConfig

PLAN = SamplePlan(num_samples=33, global_batch_size=6, seed=3)
CHANNEL_MEAN, CHANNEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def dataset(shards: Path, tokenizer: CogVLMTokenizer) -> GroundingDataset:
    config = CogVLMConfig(vocab_size=len(tokenizer), vision_config={"image_size": 224, "num_positions": 257})
    augment = AugmentConfig(crop=1.0, min_crop=0.6, flip=0.5, brightness=0.3)
    reader = ShardReader(load_index(shards, "train"))
    return GroundingDataset(reader, load_wording("box"), tokenizer, config, 3, 4096, augment)


def figures_of(page: str) -> list[str]:
    return page.split("<figure")[1:]


def test_it_shows_what_is_trained(dataset: GroundingDataset) -> None:
    items = list(first_items(PLAN, 6))
    batches = [PLAN.global_batch(0, start).indices for start in (6, 12, 18)]
    assert [item.index for item in items] == np.concatenate(batches)[:NUM_SHOWN].tolist()
    figures = figures_of(render_preview(dataset, PLAN, 6, "a run"))
    assert len(figures) == NUM_SHOWN
    changed = 0
    for item, figure in zip(items, figures, strict=True):
        record = dataset.reader.read(item.index).record
        look = build_look(record, dataset.wording, dataset.augment, "squash", seed=3, epoch=0)
        for turn in look.turns[:6]:
            assert html.escape(turn.prompt, quote=False) in html.unescape(figure)
            assert turn.answer in html.unescape(figure)
        boxes = [b for t in look.turns[:6] for b in boxes_from_bins(parse_boxes(t.answer) or [], (224, 224)).tolist()]
        drawn = re.findall(r'<rect class="truth t\d" x="([\d.]+)" y="([\d.]+)"', figure)
        for x0, y0, *_ in boxes:
            assert (f"{x0:.1f}", f"{y0:.1f}") in drawn
        pixels = dataset[item].pixel_values.numpy().transpose(1, 2, 0) * CHANNEL_STD + CHANNEL_MEAN
        picture = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", figure)[0])))
        assert picture.size == (224, 224)
        assert abs(np.asarray(picture) / 255 - pixels).mean() < 0.03, "JPEG, but this image"
        changed += "crop" in figure or "flip" in figure
    assert changed > 2


def test_a_bad_sample_is_named_and_time_is_bounded(dataset: GroundingDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(i: int) -> None:
        raise BadSampleError("x<y", "short_read", "3 of 9 bytes")

    assert len(figures_of(render_preview(dataset, PLAN, 0, "a run", time_limit_s=-1))) == 0
    monkeypatch.setattr(dataset.reader, "read", read)
    page = render_preview(dataset, PLAN, 30, "a run")
    assert len(figures_of(page)) == 3 and "sample &#39;x&lt;y&#39;: short_read: 3 of 9 bytes" in page  # epoch's end


def test_a_damaged_tile_is_named(dataset: GroundingDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found where it is drawn; the other inputs are shown."""

    def draw(look: Look, photo: Photo, image_size: int) -> Image.Image:
        if photo.size == (40, 20):
            raise BadSampleError("x", "broken_image", "tile 3: cut off")
        return real(look, photo, image_size)

    real, read = Look.draw, dataset.reader.read
    small = replace(read(0), image=Image.new("RGB", (40, 20)))
    monkeypatch.setattr(Look, "draw", draw)
    monkeypatch.setattr(dataset.reader, "read", lambda i: small if i == int(PLAN.order(0)[1]) else read(i))
    page = render_preview(dataset, PLAN, 0, "a run")
    assert "broken_image: tile 3: cut off" in page and len(figures_of(page)) == NUM_SHOWN


def test_whatever_goes_wrong_training_starts(
    dataset: GroundingDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = SimpleNamespace(dataset=dataset, plan=PLAN, folder=RunFolder(tmp_path / "gone"))
    assert try_preview(run, 0) is None and "training starts without it" in caplog.text
    run = SimpleNamespace(dataset=dataset, plan=PLAN, folder=RunFolder(tmp_path))
    assert try_preview(run, 0) == tmp_path / "preview.html" and (tmp_path / "preview.html").is_file()
