"""Real photos and annotations of other people, when they are at hand."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from photo_builds import read_by_workers

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.shards.build import BuildSettings, build

DATA = Path(__file__).parents[3].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")


def rejected(out: Path) -> Counter[str]:
    return Counter(json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_bytes().splitlines())


def totals(out: Path, name: str) -> int:
    return sum(split[name] for split in json.loads((out / "index.json").read_bytes())["splits"].values())


def test_coco128(tmp_path: Path) -> None:
    root = DATA / "coco128_train"
    annotations = root / "coco_json" / "instances_train2017.json"
    build(BuildSettings("coco", root / "images" / "train2017", annotations), tmp_path, num_workers=1)
    assert rejected(tmp_path) == {"crowd": 10, "no_targets": 2}
    assert (totals(tmp_path, "num_samples"), totals(tmp_path, "num_boxes")) == (126, 929)

    content = json.loads(annotations.read_bytes())
    names = {category["id"]: category["name"] for category in content["categories"]}
    keys = {image["id"]: image["file_name"].removesuffix(".jpg") for image in content["images"]}
    expected: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            x, y, width, height = annotation["bbox"]
            box = (x, y, x + width, y + height)
            expected[keys[annotation["image_id"]]][names[annotation["category_id"]]].append(box)
    seen = 0
    for split, num_samples in (("train", 113), ("val", 13)):
        reader = ShardReader(load_index(tmp_path, split))
        assert len(reader) == num_samples
        for i in range(len(reader)):
            record = reader.read(i).record
            targets = expected[record.key]
            assert [target.phrase for target in record.targets] == list(targets)
            for target in record.targets:
                assert target.boxes_xyxy == tuple(pytest.approx(box, abs=1) for box in targets[target.phrase])
                seen += len(target.boxes_xyxy)
    assert seen == 929


def test_raccoons(tmp_path: Path) -> None:
    root = DATA / "voc_raccoon"
    boxes: dict[str, list[list[int]]] = defaultdict(list)
    with (root / "data" / "raccoon_labels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            boxes[row["filename"]].append([int(row[name]) for name in ("xmin", "ymin", "xmax", "ymax")])
    lines = [{"image": name, "targets": [{"phrase": "浣熊", "boxes": found}]} for name, found in boxes.items()]
    annotations = tmp_path / "raccoons.jsonl"
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "out"
    build(BuildSettings("jsonl", root / "images", annotations, samples_per_shard=50), out, num_workers=2)
    assert not rejected(out)
    assert (totals(out, "num_samples"), totals(out, "num_boxes")) == (200, 217)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = read_by_workers(out)
    assert len(urls) == 5 and len(samples) == 200
    for sample in samples:
        name = f"{sample['__key__']}.jpg"
        assert sample["jpg"] == (root / "images" / name).read_bytes()
        assert json.loads(sample["json"])["targets"][0]["boxes_xyxy"] == boxes[name]
