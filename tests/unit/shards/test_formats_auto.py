"""--format auto: exactly one format fits, or the message says what is there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from format_files import write_json, write_lines

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import FORMATS, recognise_format

DATA = Path(__file__).parents[3].parent / "shared" / "data"

BOX = [1, 2, 30, 40]
TALK = {"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]}
COCO_LISTS: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX}],
    "categories": [{"id": 1, "name": "dog"}],
}


def refcoco(path: Path) -> Path:
    write_json(path / "instances.json", COCO_LISTS)
    (path / "refs(unc).p").write_bytes(pickle.dumps([]))
    return path


def mdetr(path: Path) -> Path:
    image = {"id": 1, "file_name": "a.jpg", "caption": "dog", "tokens_negative": [[0, 3]]}
    return write_json(path / "finetune_refcoco_val.json", {**COCO_LISTS, "images": [image]})


def odvg(path: Path) -> Path:
    line = {"filename": "a.jpg", "detection": {"instances": [{"bbox": BOX, "category": "dog"}]}}
    return write_lines(path / "od.jsonl", [line])


def cogvlm_sft(path: Path) -> Path:
    (path / "images").mkdir()
    write_json(path / "labels_zh" / "a.json", TALK)
    return path


def swift(path: Path) -> Path:
    return write_lines(path / "train.jsonl", [{"images": ["a.jpg"], "messages": TALK["conversations"]}])


def array_of_conversations(path: Path) -> Path:
    return write_json(path / "train.json", [{"image": "a.jpg", "conversations": [{"from": "human", "value": "?"}]}])


def jsonl(path: Path) -> Path:
    return write_lines(path / "x.jsonl", [{"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": [BOX]}]}])


def pairs(path: Path) -> Path:
    return write_lines(path / "x.jsonl", [{"Image": "a.jpg", "Prompt": "?", "Label": "."}])


@pytest.mark.parametrize(
    ("write", "name", "what"),
    [
        (refcoco, "refcoco", "RefCOCO's refs(unc).p"),
        (mdetr, "mdetr", 'a JSON object with captions and "tokens_positive"'),
        (odvg, "odvg", 'ODVG lines with "filename" and "detection"'),
        (cogvlm_sft, "cogvlm-sft", "conversation folders x/labels_zh"),
        (swift, "swift", 'ms-swift / Qwen conversations in "messages"'),
        (array_of_conversations, "swift", 'ms-swift / Qwen conversations in "conversations"'),
        (jsonl, "jsonl", 'JSON lines with "image" and "targets" or "turns"'),
        (pairs, "jsonl", 'JSON lines with "Prompt" and "Label"'),
    ],
)
def test_each_format_is_recognised_alone(tmp_path: Path, write: Any, name: str, what: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    assert recognise_format(write(folder)) == (name, what)


REAL = {
    "voc_raccoon/annotations": "voc",
    "voc_raccoon": "voc",
    "voc_raccoon/data/raccoon_labels.csv": "csv",
    "coco128_train/object_detection/labels": "yolo",
    "small_targets_aerial_cars": "yolo",
    "labelme_examples/examples/tutorial": "labelme",
    "labelme_examples/examples/instance_segmentation": "labelme",
    "coco128_train/coco_json/instances_train2017.json": "coco",
    "refexp_toloka/train_sample.csv": "csv",
    "xlabel_phrases/assets/ODVG/od.json": "odvg",
    "xlabel_phrases/assets/annotations/coco_detection.json": "coco",
    "xlabel_phrases/examples/description/tagging/sources/shape-level": "labelme",
    "chinese_document_xfund": "labelme",
}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
@pytest.mark.parametrize(("path", "name"), REAL.items())
def test_real_sets(path: str, name: str) -> None:
    found, what = recognise_format(DATA / path)
    assert found == name and what


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("labelme_examples/examples/bbox_detection", r"several formats: .*\(--format voc\); .*\(--format labelme\)"),
        ("coco128_train/panoptic_segmentation/annotations", r"no known format: found 1 x \.json, 0 folders"),
        ("refexp_annotations_only/talk2car/val_commands.json", "no known format: .* begin with .*commands"),
    ],
)
def test_real_sets_of_several_formats_and_of_none(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        recognise_format(DATA / path)


def test_what_is_of_no_format_is_described(tmp_path: Path) -> None:
    names = ", ".join(FORMATS)
    (tmp_path / "a.foo").write_text("x")
    (tmp_path / "b.foo").write_text("x")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=f"is of no known format: found 2 x .foo, 1 folders. Choose --format {names}"):
        recognise_format(tmp_path)
    with pytest.raises(DataError, match=r"no known format: found 1 bytes that begin with b'x'. Choose --format"):
        recognise_format(tmp_path / "a.foo")
    with pytest.raises(DataError, match="no file or folder"):
        recognise_format(tmp_path / "gone")


def test_two_formats_in_one_folder_are_a_choice_for_the_user(tmp_path: Path) -> None:
    refcoco(tmp_path)
    cogvlm_sft(tmp_path)
    with pytest.raises(
        DataError, match=r"fits several formats: found RefCOCO.*\(--format refcoco\); conv.*-sft\). Choose one"
    ):
        recognise_format(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 5000, b"\xff\xfe{\0}\0", b"{" * 5000, b"[" * 5000, b"[{}]", b"{}\n[]\n7\n", b'{"a":' * 3000],
)
def test_garbage_is_of_no_format(tmp_path: Path, content: bytes) -> None:
    for name in ("x.json", "x.jsonl", "x.csv", "x.xml", "x.txt"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match="is of no known format"):
            recognise_format(path)
