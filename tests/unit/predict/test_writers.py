"""Predictions as files of labelling tools, read by pycocotools and by our own builder with the same boxes and names."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from predicted_boxes import BOXES, SIZES, Boxes, accept_all, line_of, questions_about, write_boxes, write_photos
from pycocotools.coco import COCO

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.launch.predict import TOOLS
from cogvlm_ft.launch.predict import main as predict
from cogvlm_ft.predict.files import Question
from cogvlm_ft.predict.writers.labelled import doubt_of
from cogvlm_ft.predict.writers.write import ORDER_FILE, WRITERS, check_questions, write_predictions
from cogvlm_ft.shards.build import main as build_shards
from cogvlm_ft.shards.formats import FORMATS, recognise_format
from cogvlm_ft.shards.packing.candidates import Candidate, box_in_pixels


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def expected_boxes(boxes: Boxes) -> dict[str, dict[str, list[Box]]]:
    found: dict[str, dict[str, list[Box]]] = {}
    for name, rows in boxes.items():
        for label, box, _ in rows:
            found.setdefault(name, {}).setdefault(label, []).append(box)
    return found


def assert_same(found: dict[str, dict[str, list[Box]]], expected: dict[str, dict[str, list[Box]]]) -> None:
    assert {name: sorted(labels) for name, labels in found.items()} == {
        name: sorted(labels) for name, labels in expected.items()
    }
    for name, labels in expected.items():
        for label, boxes in labels.items():
            np.testing.assert_allclose(found[name][label], boxes, atol=1)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_comes_back_builds_without_help(tool: str, photos: Path, tmp_path: Path) -> None:
    folder = write_boxes(tmp_path / "answers", tool, photos)
    accept_all(folder)
    out = tmp_path / "out"
    arguments = ["--annotations", folder, "--images", photos, "--out", out, "--val-fraction", 0, "--workers", 1]
    assert build_shards([str(argument) for argument in arguments]) == 0
    found: dict[str, dict[str, list[Box]]] = {}
    stems = {Path(name).stem.replace(" ", "_").replace(".", "_"): name for name in SIZES}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    record = json.load(file)
                    name = next(name for stem, name in stems.items() if stem in member.name)
                    found[name] = {target["phrase"]: target["boxes_xyxy"] for target in record["targets"]}
    assert_same(found, expected_boxes(BOXES))
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["reason"] == "no_targets" for row in rejected)


@st.composite
def many_boxes(draw: st.DrawFn) -> Boxes:
    labels = st.sampled_from(["dog", "狗", "a-b", "x y z", "no", "2", "l'été", "红色的车"])
    found: Boxes = {}
    for name, (width, height) in SIZES.items():
        for _ in range(draw(st.integers(0, 4))):
            x0, y0 = draw(st.integers(0, width - 4)), draw(st.integers(0, height - 4))
            x1, y1 = draw(st.integers(x0 + 3, width)), draw(st.integers(y0 + 3, height))
            box = (x0 + draw(st.integers(0, 99)) / 100, float(y0), float(x1), float(y1))
            found.setdefault(name, []).append((draw(labels), box, draw(st.integers(1, 99)) / 100))
    return found or {"a.jpg": [("dog", (1.0, 2.0, 80.0, 9.0), 0.5)]}


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_all_boxes_come_back(tool: str, photos: Path) -> None:
    @settings(max_examples=20, deadline=None, database=None)
    @given(many_boxes())
    def check(boxes: Boxes) -> None:
        with tempfile.TemporaryDirectory() as out:
            folder = write_boxes(Path(out), tool, photos, boxes)
            accept_all(folder)
            name, _ = recognise_format(folder)
            assert name == tool
            found: dict[str, dict[str, list[Box]]] = {}
            for part in FORMATS[name].read(folder, photos):
                if isinstance(part, Candidate):
                    assert all(problem.is_note for problem in part.problems)
                    for target in part.targets:
                        in_pixels = [box_in_pixels(box, part.units, SIZES[part.image]) for box in target.boxes_xyxy]
                        found.setdefault(part.image, {})[target.phrase] = in_pixels
            assert_same(found, expected_boxes(boxes))

    check()


def test_pycocotools_reads_coco(photos: Path, tmp_path: Path) -> None:
    folder = write_boxes(tmp_path, "coco", photos)
    coco = COCO(str(folder / "annotations" / "instances_default.json"))
    names = {number: category["name"] for number, category in coco.cats.items()}
    for number, image in coco.imgs.items():
        assert (image["width"], image["height"]) == SIZES[image["file_name"]]
        found = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        expected = BOXES[image["file_name"]]
        assert [names[each["category_id"]] for each in found] == [label for label, _, _ in expected]
        assert [each["score"] for each in found] == [confidence for _, _, confidence in expected]
        corners = [(x, y, x + width, y + height) for x, y, width, height in (each["bbox"] for each in found)]
        np.testing.assert_allclose(np.reshape(corners, (-1, 4)), np.reshape([box for _, box, _ in expected], (-1, 4)))
    assert len(coco.loadRes(list(coco.anns.values())).anns) == len(coco.anns)


def test_what_has_no_name_or_no_area_is_counted(photos: Path, tmp_path: Path) -> None:
    line = line_of("a.jpg", [("dog", (5.0, 5.0, 5.0, 9.0), 0.5), ("dog", (1.0, 2.0, 8.0, 9.0), 0.5)])
    unnamed = line_of("a.jpg", [("", (1.0, 2.0, 8.0, 9.0), 0.5)])
    del unnamed["answers"][0]["boxes"][0]["phrase"]
    failed = {"image": "sub/b.c.png", "error": "broken", "reason": "broken_image"}
    text = "".join(json.dumps(each) + "\n" for each in (line, unnamed, failed))
    (tmp_path / "predictions.jsonl").write_text(text)
    done = write_predictions(questions_about(photos, BOXES), tmp_path, "coco", doubtful_first=False)
    expected = "left out: 1 boxes without a name (ask for them with --targets), 1 boxes without an area"
    assert "coco: 1 boxes of 1 photos in" in done and done.endswith(expected)


@pytest.mark.parametrize(
    ("boxes", "not_found_prob", "doubt"),
    [
        ([0.9, 0.4, 0.8], 0.1, 0.6),
        ([0.9], 0.7, 0.7),
        ([None], None, 0.5),
        ([], 0.95, 0.05),
        ([], None, 0.5),
        (None, 0.1, 1.0),
    ],
)
def test_doubt(boxes: list[float | None] | None, not_found_prob: float | None, doubt: float) -> None:
    found = None if boxes is None else [{"confidence": confidence} for confidence in boxes]
    assert doubt_of({"boxes": found, "not_found_prob": not_found_prob}) == pytest.approx(doubt)


@pytest.mark.parametrize("tool", ["coco", "label-studio", "voc"])
def test_doubtful_photos_come_first(tool: str, photos: Path, tmp_path: Path) -> None:
    folder = write_boxes(tmp_path, tool, photos, doubtful_first=True)
    order = ["empty.png", "sub/狗 1.JPG", "a.jpg", "sub/b.c.png"]  # 0.9: sure that nothing is there, at 0.1
    assert (tmp_path / ORDER_FILE).read_text(encoding="utf-8").splitlines() == order
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["image"] for line in lines] == order
    if tool == "coco":
        content = json.loads((folder / "annotations" / "instances_default.json").read_text(encoding="utf-8"))
        assert [image["file_name"] for image in content["images"]] == order
    elif tool == "label-studio":
        tasks = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
        assert [task["predictions"][0]["score"] for task in tasks] == [0.1, 0.3, 0.55, 0.9]
    else:
        listed = (folder / "ImageSets" / "Main" / "default.txt").read_text(encoding="utf-8").splitlines()
        assert listed == ["empty", "sub/狗 1", "a", "sub/b.c"]


def test_questions_are_checked_before_anything_is_predicted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no box would have a name; expected targets\. Ask with --targets"):
        check_questions([Question(tmp_path / "a.jpg", "a.jpg", prompt="where?")], "voc")
    same = [Question(tmp_path / name, name, targets=("dog",)) for name in ("s/a.jpg", "s/a.png")]
    with pytest.raises(ConfigError, match=r"s/a\.jpg and s/a\.png would both be called s/a in the output\. Rename"):
        check_questions(same, "voc")
    check_questions(same, "coco")
    twice = [Question(tmp_path / "s" / name, name, targets=("dog",)) for name in ("a.jpg", "./a.jpg")]
    check_questions(twice, "voc")
    other = Question(tmp_path / "a.jpg", "../a.jpg", targets=("dog",))
    with pytest.raises(ConfigError, match="would both be called"):
        check_questions([twice[0], other], "coco")


def test_names_cannot_lead_out_of_the_folder(photos: Path, tmp_path: Path) -> None:
    names = ["../../outside.jpg", "/absolute/b.jpg"]
    answered = [line_of("a.jpg", BOXES["a.jpg"]) | {"image": name} for name in names]
    for tool in TOOLS:
        out = tmp_path / tool / "deep" / "out"
        out.mkdir(parents=True)
        (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answered))
        questions = [Question(photos / f"{i}.jpg", name, targets=("dog",)) for i, name in enumerate(names)]
        write_predictions(questions, out, tool, doubtful_first=True)
        assert {path for path in (tmp_path / tool).rglob("*") if path.is_file() and out not in path.parents} == set()


def test_the_program_writes_them(
    tiny_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(TOOLS) == set(WRITERS)
    few = ["--max-new-tokens", 40, "--decoding", "grammar", "--min-boxes", 1, "--no-pictures"]
    asked = ["--model", tiny_folder, "--image", photos, "--targets", "狗", "a cat", "--out", tmp_path / "out"]
    arguments = [*asked, *few, "--format", "coco", "--order", "doubtful"]
    assert predict([str(argument) for argument in arguments]) == 0
    assert "of 4 photos in" in capsys.readouterr().out
    coco = COCO(str(tmp_path / "out" / "coco" / "annotations" / "instances_default.json"))
    assert [category["name"] for category in coco.cats.values()] == ["狗", "a cat"]
    assert {image["file_name"] for image in coco.imgs.values()} == set(SIZES)
    one = ["--model", tiny_folder, "--image", photos / "a.jpg", "--prompt", "dog", "--format", "voc"]
    assert predict([str(argument) for argument in one]) == 2
    assert "Ask with --targets" in capsys.readouterr().err
