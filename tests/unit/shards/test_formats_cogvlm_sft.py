"""Folders like CogVLM-SFT-311K."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from format_files import Reading, read_all, write_json
from photo_builds import image_bytes

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.cogvlm_sft import read_cogvlm_sft, recognise_cogvlm_sft


def says(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"conversations": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def caption(text: Any) -> dict[str, Any]:
    return {"captions": [{"role": "caption", "content": text}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "llava_instruction_multi_conversations_formate"
    (root / "images").mkdir(parents=True)
    for name in ("00000001.jpg", "00000002.JPG", "00000003.png"):
        (root / "images" / name).write_bytes(image_bytes())
    write_json(
        root / "labels_zh" / "00000001.json", says("图中有什么?", "一只狗。", "在哪里?", "在[[086,540,400,760]]")
    )
    write_json(root / "labels_en" / "00000001.json", says("What is there?", "A dog."))
    write_json(root / "labels_en" / "00000003.json", says("Why?", "**Because**."))
    return root


def texts(found: Reading) -> dict[str, list[tuple[str, str]]]:
    return {each.image: [(turn.prompt, turn.answer) for turn in each.turns] for each in found.candidates}


def test_conversations_are_used_as_they_stand_in_their_order(folder: Path) -> None:
    found = read_all(read_cogvlm_sft, folder, folder)
    assert texts(found) == {
        "images/00000001.jpg": [
            ("图中有什么?", "一只狗。"),
            ("在哪里?", "在[[086,540,400,760]]"),
            ("What is there?", "A dog."),
        ],
        "images/00000003.png": [("Why?", "**Because**.")],
    }
    assert [turn.history for turn in found.turns] == [(), (("图中有什么?", "一只狗。"),), (), ()]
    assert not found.problems
    assert found.candidates[0].source == f"{folder.name}/labels_zh/00000001.json"


def test_the_folders_may_be_named_in_several_ways(folder: Path) -> None:
    everything = texts(read_all(read_cogvlm_sft, folder, folder))
    inside = {name.removeprefix("images/"): said for name, said in everything.items()}
    outside = {f"{folder.name}/{name}": said for name, said in everything.items()}
    assert texts(read_all(read_cogvlm_sft, folder, folder / "images")) == inside
    assert texts(read_all(read_cogvlm_sft, folder.parent, folder.parent)) == outside
    english = read_all(read_cogvlm_sft, folder / "labels_en", folder / "images")
    assert texts(english) == {name: said[-1:] for name, said in inside.items()}
    (folder / "labels_en").rename(folder / "labels")
    assert texts(read_all(read_cogvlm_sft, folder, folder)) == everything
    moved = folder.parent / "photos"
    (folder / "images").rename(moved)
    assert texts(read_all(read_cogvlm_sft, folder, moved)) == inside


def test_captions_are_asked_for_in_their_language(folder: Path) -> None:
    write_json(folder / "labels_zh" / "00000002.json", caption("这张照片展示了一男一女。"))
    write_json(folder / "labels_en" / "00000002.json", caption("A beach scene."))
    assert texts(read_all(read_cogvlm_sft, folder, folder))["images/00000002.JPG"] == [
        ("描述这张图片。", "这张照片展示了一男一女。"),
        ("Describe this image.", "A beach scene."),
    ]


@pytest.mark.parametrize(
    ("label", "reasons"),
    [
        (says("a", "在**[[86,540,400,760]]**", "c", "d"), [("turn", "bad_box_text")]),
        (says("a", "在[86, 540, 400, 760]", "c", "d"), [("turn", "bad_box_text")]),
        (says("a", "", "c", "d"), [("turn", "bad_field")]),
        (says("c", "d", "e"), [("turn", "no_answer")]),
        (
            {"conversations": [{"role": "user", "content": "a"}, *says("c", "d")["conversations"]]},
            [("turn", "no_answer")],
        ),
        (
            {"conversations": [{"role": "assistant", "content": "a"}, *says("c", "d")["conversations"]]},
            [("turn", "bad_field")],
        ),
        (
            {"conversations": ["x", {"role": "tool", "content": "a"}, *says("c", "d")["conversations"]]},
            [("turn", "bad_field")] * 2,
        ),
        (
            {"conversations": [{"role": "user", "content": 7}, *says("c", "d")["conversations"]]},
            [("turn", "bad_field")],
        ),
    ],
)
def test_a_bad_message_is_lost_alone(folder: Path, label: Any, reasons: Any) -> None:
    write_json(folder / "labels_zh" / "00000002.json", label)
    found = read_all(read_cogvlm_sft, folder, folder)
    assert found.reasons == reasons and texts(found)["images/00000002.JPG"] == [("c", "d")]
    assert all("labels_zh/00000002.json" in problem.source for problem in found.problems)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"{", "bad_json"),
        (b"\xff\xfe{\0}\0", "bad_json"),
        (b"[]", "bad_field"),
        (b"{}", "bad_field"),
        (b'{"conversations": "x"}', "bad_field"),
        (b'{"captions": [{"role": "caption", "content": "\xff"}]}', "not_utf8"),
        (b'{"conversations": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep"),
    ],
)
def test_a_bad_file_costs_its_language_only(folder: Path, label: bytes, reason: str) -> None:
    (folder / "labels_zh" / "00000001.json").write_bytes(label)
    found = read_all(read_cogvlm_sft, folder, folder)
    reasons = ("bad_json", "bad_field") if reason == "too_deep" else (reason,)  # what can be parsed depends on Python
    assert found.reasons in [[("turn", each)] for each in reasons]
    assert texts(found)["images/00000001.jpg"] == [("What is there?", "A dog.")]


def test_nothing_is_read_outside_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = write_json(tmp_path / "secret.json", says("a", "secret"))
    (folder / "labels_zh" / "00000001.json").unlink()
    (folder / "labels_zh" / "00000001.json").symlink_to(outside)
    found = read_all(read_cogvlm_sft, folder, folder)
    assert found.reasons == [("turn", "path_outside_annotations")] and "secret" not in str(found.candidates)


def test_a_label_without_photo_is_kept_for_the_report(folder: Path) -> None:
    write_json(folder / "labels_zh" / "00000009.json", says("a", "b"))
    assert texts(read_all(read_cogvlm_sft, folder, folder))["00000009.jpg"] == [("a", "b")]


def test_no_labels_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder labels_zh/, labels_en/, labels/"):
        read_all(read_cogvlm_sft, tmp_path, tmp_path)
    (tmp_path / "labels_zh").mkdir()
    with pytest.raises(DataError, match=r"labels_zh without a \.json file"):
        read_all(read_cogvlm_sft, tmp_path, tmp_path)


def test_recognise(folder: Path, tmp_path: Path) -> None:
    name = folder.name
    assert recognise_cogvlm_sft(folder) == f"conversation folders {name}/labels_zh, {name}/labels_en"
    assert recognise_cogvlm_sft(folder.parent) == f"conversation folders {name}/labels_zh, {name}/labels_en"
    assert recognise_cogvlm_sft(folder / "labels_en") == f"conversation folders {name}/labels_en"
    assert recognise_cogvlm_sft(folder / "images") is None
    assert recognise_cogvlm_sft(folder / "labels_zh" / "00000001.json") is None
    empty = tmp_path / "empty"
    (empty / "labels").mkdir(parents=True)
    (empty / "labels" / "0001.txt").write_text("0 .5 .5 .1 .1")  # YOLO
    assert recognise_cogvlm_sft(empty) is None
    write_json(empty / "labels" / "0001.json", {"version": "5.0", "shapes": [], "imagePath": "0001.jpg"})  # labelme
    assert recognise_cogvlm_sft(empty) is None
