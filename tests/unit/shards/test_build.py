"""What a build writes: readable by WebDataset, the same bytes every time, also after a kill."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from photo_builds import Build, image_bytes, run_build
from PIL import Image

from cogvlm_ft import __version__
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.build import BuildSettings, build, main
from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.negatives import NegativeSettings
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.decisions import part_ids
from cogvlm_ft.shards.packing.verify import VERIFY

ROOT = Path(__file__).parents[3]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def dog(image: str, box: tuple[int, int, int, int] = (1, 2, 20, 15)) -> dict[str, Any]:
    return {"image": image, "targets": [{"phrase": "dog", "boxes": [list(box)]}]}


def test_webdataset_reads_images_untouched_and_records_in_full(photos: Path, tmp_path: Path) -> None:
    (photos / "sub.dir").mkdir()
    (photos / "sub.dir" / "f.g.PNG").write_bytes(image_bytes(image_format="PNG"))
    lines = [
        {
            "image": "a.jpg",
            "targets": [
                {"phrase": "一只狗", "boxes": [[1, 2, 20, 15], [3.5, 4, 30, 29]], "description": "黑色的狗"},
                {"phrase": "cat", "boxes_xyxy": []},
            ],
            "turns": [{"prompt": "Where is it?", "answer": "左边 [[001,002,003,004]]"}],
        },
        {"image": "sub.dir/f.g.PNG", "turns": [{"prompt": "p", "answer": "q"}]},
        {**dog("b.jpg"), "key": "my-b"},
    ]
    annotations = write_lines(tmp_path / "x.jsonl", lines)
    out = tmp_path / "out"
    build(BuildSettings("jsonl", photos, annotations, val_fraction=0.0, samples_per_shard=2), out, num_workers=1)

    urls = [str(out / "train-000000.tar"), str(out / "train-000001.tar")]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    png_key = next(key for key in samples if key.startswith("sub_dir_f_g-"))
    assert set(samples) == {"a", "my-b", png_key}
    assert samples["a"]["jpg"] == (photos / "a.jpg").read_bytes()
    assert samples[png_key]["png"] == (photos / "sub.dir" / "f.g.PNG").read_bytes()
    assert json.loads(samples["a"]["json"]) == {
        "key": "a",
        "image_size_px": [40, 30],
        "source": "x.jsonl:1",
        "targets": [
            {
                "phrase": "一只狗",
                "language": "zh",
                "boxes_xyxy": [[1, 2, 20, 15], [3.5, 4, 30, 29]],
                "description": "黑色的狗",
            },
            {"phrase": "cat", "language": "en", "boxes_xyxy": [], "description": None},
        ],
        "turns": [{"prompt": "Where is it?", "answer": "左边 [[001,002,003,004]]"}],
    }
    assert "一只狗".encode() in samples["a"]["json"]

    card = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])  # read by `datasets`
    assert card["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "train-*.tar"}]},
    ]

    split = json.loads((out / "index.json").read_bytes())["splits"]["train"]
    counts = {name: split[name] for name in ("num_samples", "num_targets", "num_boxes", "num_absent", "num_turns")}
    assert counts == {"num_samples": 3, "num_targets": 3, "num_boxes": 3, "num_absent": 1, "num_turns": 2}
    assert [shard["num_samples"] for shard in split["shards"]] == [2, 1]


def test_offsets_lead_to_the_same_samples(photos: Path, tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog(f"{name}.jpg") for name in "abcde"])
    out = tmp_path / "out"
    settings = BuildSettings("jsonl", photos, annotations, val_fraction=0.0, samples_per_shard=2)
    build(settings, out, num_workers=1)
    index = load_index(out, "train")
    assert sorted(index.key(i) for i in range(len(index))) == list("abcde")
    for i in range(len(index)):
        path = index.shard_paths[index.shard_number[i]]
        start, size = int(index.image_offset[i]), int(index.image_num_bytes[i])
        assert path.read_bytes()[start : start + size] == (photos / f"{index.key(i)}.jpg").read_bytes()
        assert ShardReader(index).read(i).record.targets[0].boxes_xyxy == ((1.0, 2.0, 20.0, 15.0),)


def test_same_bytes_for_any_number_of_workers_and_any_order_of_files(photos: Path, tmp_path: Path) -> None:
    lines = [dog(f"{name}.jpg") for name in "abcde"] + [dog("missing.jpg"), dog("a.jpg")]
    annotations = write_lines(tmp_path / "x.jsonl", lines)
    settings = BuildSettings("jsonl", photos, annotations, val_fraction=0.4, samples_per_shard=2)
    for num_workers in (1, 2):
        build(settings, tmp_path / f"out{num_workers}", num_workers=num_workers)
    assert folder_bytes(tmp_path / "out1") == folder_bytes(tmp_path / "out2")
    assert {path.name for path in (tmp_path / "out1").glob("*.tar")} >= {"train-000001.tar", "val-000000.tar"}


def test_val_holds_its_share_of_the_images_and_no_image_of_train(build_jsonl: Build, photos: Path) -> None:
    lines = []
    for i in range(20):
        (photos / f"{i}.jpg").write_bytes(image_bytes(seed=i))
        lines += [{**dog(f"{i}.jpg"), "key": f"{i}-{part}"} for part in range(3)]
    found = build_jsonl(lines, val_fraction=0.25)
    assert found["index"]["splits"]["val"]["num_samples"] == 15
    assert found["index"]["splits"]["train"]["num_samples"] == 45
    out = photos.parent / "out"
    sides = {
        split: {load_index(out, split).key(i).split("-")[0] for i in range(len(load_index(out, split)))}
        for split in ("train", "val")
    }
    assert not sides["train"] & sides["val"] and len(sides["val"]) == 5


def test_another_seed_makes_another_split(photos: Path, tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog(f"{name}.jpg") for name in "abcde"])
    keys = []
    for seed in range(4):
        out = tmp_path / f"seed{seed}"
        build(BuildSettings("jsonl", photos, annotations, val_fraction=0.4, seed=seed), out, num_workers=1)
        index = load_index(out, "val")
        keys.append(sorted(index.key(i) for i in range(len(index))))
    assert len({tuple(each) for each in keys}) > 1 and all(len(each) == 2 for each in keys)


@pytest.mark.slow
def test_a_killed_build_goes_on_and_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    (photos / "big.jpg").write_bytes(image_bytes(800, 600))
    lines = [{**dog("big.jpg"), "key": f"k{i:03d}"} for i in range(300)]
    annotations = write_lines(tmp_path / "x.jsonl", lines)
    arguments = ["--format", "jsonl", "--images", str(photos), "--annotations", str(annotations)]
    arguments += ["--samples-per-shard", "2", "--val-fraction", "0", "--workers", "2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = (
        f"import sys; from cogvlm_ft.shards.build import main; sys.exit(main({[*arguments, '--out', str(killed)]!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("train-*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "index.json").exists(), "the build was over before the kill"
    with pytest.raises(DataError, match="unfinished build"):
        load_index(killed, "train")
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("train-*.json")}

    assert main([*arguments, "--out", str(killed)]) == 0
    assert main([*arguments, "--out", str(whole)]) == 0
    assert folder_bytes(killed) == folder_bytes(whole)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())


def test_a_build_killed_while_it_reads_the_annotations(photos: Path, tmp_path: Path) -> None:
    """It sleeps in its second row."""
    annotations, out = write_lines(tmp_path / "x.jsonl", [dog(f"{name}.jpg") for name in "abcde"]), tmp_path / "out"
    arguments = ["--format", "jsonl", "--images", str(photos), "--annotations", str(annotations), "--out", str(out)]
    code = f"""
import sys, time
from cogvlm_ft.shards.build import main
from cogvlm_ft.shards.formats import rows
real = rows.parse_object
def parse_object(data):
    if b"b.jpg" in data:
        print("second row", flush=True)
        time.sleep(600)
    return real(data)
rows.parse_object = parse_object
sys.exit(main({arguments!r}))"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"second row\n"
        process.kill()
    assert [path.name for path in out.iterdir()] == [".staging.sqlite"]
    assert main(arguments) == 0
    assert main([*arguments[:-1], str(tmp_path / "whole")]) == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("name", ["jsonl", "coco", "csv", "cvat", "auto"])
def test_annotations_that_are_no_file_end_at_once(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        arguments = ["--format", name, "--images", str(photos), "--annotations", str(path)]
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"--annotations {path}: found a named pipe, device or socket; expected" in error
        assert "Save its content to a file first" in error


def test_damaged_and_missing_shards_are_written_again(photos: Path, tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog(f"{name}.jpg") for name in "abcde"])
    out = tmp_path / "out"
    settings = BuildSettings("jsonl", photos, annotations, val_fraction=0.0, samples_per_shard=1)
    build(settings, out, num_workers=1)
    before = folder_bytes(out)
    (out / "train-000000.tar").write_bytes(b"cut")
    (out / "train-000001.json").write_bytes(b"{")
    (out / "train-000002.tar").unlink()
    (out / "train-000003.json").unlink()
    build(settings, out, num_workers=1)
    assert folder_bytes(out) == before


def test_other_settings_need_overwrite(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write_lines(tmp_path / "train-lines.json", [dog(f"{name}.jpg") for name in "abcde"])
    arguments = ["--format", "jsonl", "--images", str(photos), "--annotations", str(annotations), "--workers", "1"]
    arguments += ["--out", str(tmp_path)]
    assert main([*arguments, "--samples-per-shard", "1"]) == 0
    assert main([*arguments, "--samples-per-shard", "5"]) == 2
    assert "samples_per_shard: found 1; expected 5" in capsys.readouterr().err
    assert main([*arguments, "--samples-per-shard", "5", "--overwrite"]) == 0
    assert not (tmp_path / "train-000001.tar").exists()
    assert annotations.exists()  # --overwrite deletes what a build writes, and nothing else


def test_changed_annotations_need_overwrite(photos: Path, tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg")])
    build(BuildSettings("jsonl", photos, annotations), tmp_path / "out", num_workers=1)
    write_lines(annotations, [dog("b.jpg")])
    with pytest.raises(DataError, match="annotations_sha256"):
        build(BuildSettings("jsonl", photos, annotations), tmp_path / "out", num_workers=1)


def test_the_format_is_found_out_and_said(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write_lines(photos / "x.jsonl", [dog(f"{name}.jpg") for name in "abcde"])
    assert main(["--annotations", str(annotations), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{annotations}: reading --format jsonl: JSON lines")
    assert json.loads((tmp_path / "out" / "index.json").read_bytes())["build"]["format"] == "jsonl"


def test_cut_off_images_are_found_either_way_and_the_way_is_part_of_the_build(photos: Path, tmp_path: Path) -> None:
    (photos / "b.jpg").write_bytes((photos / "a.jpg").read_bytes()[:-40])
    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg"), dog("b.jpg")])
    for verify in VERIFY:
        found = run_build("jsonl", annotations, photos, tmp_path / verify, verify=verify)
        assert set(found["records"]) == {"a"} and found["index"]["rejected"] == {"broken_image": 1}
    assert (tmp_path / "structure/train-000000.tar").read_bytes() == (tmp_path / "decode/train-000000.tar").read_bytes()
    with pytest.raises(DataError, match="verify: found 'structure'; expected 'decode'"):
        run_build("jsonl", annotations, photos, tmp_path / "structure", verify="decode")


def test_a_format_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0\1\2" * 50)
    for path in (tmp_path / "x.bin", tmp_path / "nowhere"):
        assert main(["--annotations", str(path), "--out", str(tmp_path / "out")]) == 2
        assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_decisions_are_applied_and_part_of_the_build(photos: Path, tmp_path: Path) -> None:
    lines = [dog("a.jpg"), {**dog("b.jpg"), "targets": [*dog("b.jpg")["targets"], {"phrase": "cat", "boxes": []}]}]
    annotations = write_lines(tmp_path / "x.jsonl", lines)
    first, second = FORMATS["jsonl"].read(annotations, photos)
    assert isinstance(first, Candidate) and isinstance(second, Candidate)
    rows = [
        {"id": part_ids(first).sample, "decision": "drop"},
        {"id": part_ids(second).targets[0], "decision": "edit", "phrase": "wolf"},
        {"id": "box-0123456789abcdef", "decision": "drop"},
    ]
    decisions = tmp_path / "decisions.json"
    decisions.write_text(json.dumps({"decisions": rows}))
    found = run_build("jsonl", annotations, photos, tmp_path / "out", decisions=decisions)
    assert [target["phrase"] for target in found["records"]["b"]["targets"]] == ["wolf", "cat"]
    assert set(found["records"]) == {"b"}
    assert [row["reason"] for row in found["rejected"]] == ["dropped_by_review", "decision_fits_nothing"]
    with pytest.raises(DataError, match="annotations_sha256"):
        run_build("jsonl", annotations, photos, tmp_path / "out")


def zoo(photos: Path, tmp_path: Path) -> Path:
    """COCO: every photo shows two animals; one photo is there twice, the second time with a third animal."""
    names = ["dog", "cat", "horse", "zebra", "bear"]
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{'abcdea'[i]}.jpg"} for i in range(6)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": (i + step) % 5, "bbox": [1, 2, 20, 15]} for i in range(5) for step in (0, 1)
        ]
        + [{"image_id": 5, "category_id": 2, "bbox": [3, 3, 9, 9]}],
    }
    annotations = tmp_path / "zoo.json"
    annotations.write_text(json.dumps(content))
    return annotations


def test_absent_targets_are_added_by_any_number_of_workers(photos: Path, tmp_path: Path) -> None:
    annotations = zoo(photos, tmp_path)
    negatives = NegativeSettings(share=0.5)
    settings = BuildSettings("coco", photos, annotations, val_fraction=0.2, samples_per_shard=2, negatives=negatives)
    for num_workers in (1, 2):
        build(settings, tmp_path / f"out{num_workers}", num_workers=num_workers)
    assert folder_bytes(tmp_path / "out1") == folder_bytes(tmp_path / "out2")
    index = json.loads((tmp_path / "out1" / "index.json").read_bytes())
    num_absent = sum(split["num_absent"] for split in index["splits"].values())
    assert num_absent == sum(index["negatives"]["added"].values()) > 4

    present = {"a": {"dog", "cat", "horse"}, "b": {"cat", "horse"}, "c": {"horse", "zebra"}}  # horse: a lost duplicate
    for split in ("train", "val"):
        reader = ShardReader(load_index(tmp_path / "out1", split))
        for i in range(len(reader)):
            record = reader.read(i).record
            absent = {target.phrase for target in record.targets if not target.boxes_xyxy}
            shown = {target.phrase for target in record.targets if target.boxes_xyxy}
            assert not absent & (shown | present.get(record.key, set()))
    with pytest.raises(DataError, match=r"negatives: found .*; expected None"):
        build(replace(settings, negatives=None), tmp_path / "out1", num_workers=1)


def test_a_share_that_cannot_be(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = zoo(photos, tmp_path)
    arguments = ["--format", "coco", "--images", str(photos), "--annotations", str(annotations), "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--negatives", "1.5"]) == 2
    assert "--negatives: found 1.5" in capsys.readouterr().err
    assert (
        main([*arguments, "--out", str(tmp_path / "out"), "--negatives", "0.3", "--negative-kinds", "attribute"]) == 0
    )
    assert "absent targets: " in capsys.readouterr().out


def test_large_photos_are_made_smaller_with_their_boxes(photos: Path, tmp_path: Path) -> None:
    (photos / "large.png").write_bytes(image_bytes(400, 200, image_format="PNG"))
    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg"), dog("large.png", (40, 20, 400, 200))])
    found = run_build("jsonl", annotations, photos, tmp_path / "out", max_side=100)
    assert found["records"]["large"]["image_size_px"] == [100, 50]
    assert found["records"]["large"]["targets"][0]["boxes_xyxy"] == [[10, 5, 100, 50]]
    reader = ShardReader(load_index(tmp_path / "out", "train"))
    samples = {sample.record.key: sample for sample in map(reader.read, range(2))}
    assert samples["large"].image.size == (100, 50) and samples["a"].image.size == (40, 30)
    assert (photos / "a.jpg").read_bytes() in (tmp_path / "out" / "train-000000.tar").read_bytes()
    with pytest.raises(DataError, match="max_side: found 100; expected None"):
        run_build("jsonl", annotations, photos, tmp_path / "out")


@pytest.mark.parametrize(("mode", "upright"), [("auto", True), ("auto", False), ("apply", True), ("ignore", False)])
def test_photos_are_turned_with_their_boxes_or_taken_as_stored(
    photos: Path, tmp_path: Path, mode: str, upright: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos / "a.jpg").save(photos / "turned.jpg", exif=exif)  # 40 x 30 as stored
    box = (2, 3, 29, 39) if upright else (2, 3, 39, 29)
    annotations = write_lines(tmp_path / "x.jsonl", [dog("b.jpg"), dog("turned.jpg", box)])
    found = run_build("jsonl", annotations, photos, tmp_path / "out", exif=mode)
    assert not found["rejected"]
    assert found["index"]["build"]["exif"] == {"mode": mode, "applied": upright}
    sizes = {key: record["image_size_px"] for key, record in found["records"].items()}
    assert sizes == {"b": [40, 30], "turned": [30, 40] if upright else [40, 30]}
    reader = ShardReader(load_index(tmp_path / "out", "train"))
    samples = {sample.record.key: sample for sample in map(reader.read, range(2))}
    assert samples["turned"].image.size == ((30, 40) if upright else (40, 30))
    assert samples["turned"].record.targets[0].boxes_xyxy == (box,)


def test_annotations_that_are_wrong_leave_the_old_shards(photos: Path, tmp_path: Path) -> None:
    annotations, out = write_lines(tmp_path / "x.jsonl", [dog("a.jpg")]), tmp_path / "out"
    build(BuildSettings("jsonl", photos, annotations, val_fraction=0.0), out, num_workers=1)
    before = folder_bytes(out)
    annotations.write_text("no JSON")
    with pytest.raises(DataError, match="none of its 1 lines"):
        build(BuildSettings("jsonl", photos, annotations), out, num_workers=1, overwrite=True)
    assert folder_bytes(out) == before


def test_foreign_shards_are_left_alone(photos: Path, tmp_path: Path) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg")])
    (tmp_path / "train-000000.tar").write_bytes(b"somebody's data")
    with pytest.raises(DataError, match="Choose another --out"):
        build(BuildSettings("jsonl", photos, annotations), tmp_path, num_workers=1)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"somebody's data"


def test_summary_counts_and_shows_examples(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg"), dog("gone.jpg"), dog("gone2.jpg"), dog("b.jpg")])
    arguments = ["--format", "jsonl", "--images", str(photos), "--annotations", str(annotations), "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--val-fraction", "0"]) == 0
    printed = capsys.readouterr().out
    assert "rejected: 2" in printed and "2 missing_image" in printed and "no file 'gone" in printed
    assert str(tmp_path / "out") in printed


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"val_fraction": 1.1}, "--val-fraction"), ({"samples_per_shard": 0}, "--samples-per-shard")],
)
def test_settings_out_of_range(photos: Path, tmp_path: Path, setting: dict[str, Any], words: str) -> None:
    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg")])
    with pytest.raises(DataError, match=words):
        build(BuildSettings("jsonl", photos, annotations, **setting), tmp_path / "out", num_workers=1)


@pytest.mark.parametrize("samples_per_shard", [1, 2, 5])
def test_webdataset_reads_every_sample_once_on_two_nodes_with_two_workers(
    photos: Path, tmp_path: Path, samples_per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{**dog("a.jpg"), "key": f"k{number}"} for number in range(9)]
    annotations = write_lines(tmp_path / "x.jsonl", lines)
    build(
        BuildSettings("jsonl", photos, annotations, samples_per_shard=samples_per_shard), tmp_path / "o", num_workers=1
    )
    urls = [str(path) for path in sorted((tmp_path / "o").glob("*.tar"))]
    monkeypatch.setenv("WORLD_SIZE", "2")
    read = []
    for node in range(2):
        monkeypatch.setenv("RANK", str(node))
        dataset = webdataset.WebDataset(
            urls, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        for sample in webdataset.WebLoader(dataset, batch_size=None, num_workers=2):
            assert set(sample) >= {"jpg", "json"}
            read.append(sample["__key__"])
    assert sorted(read) == [f"k{number}" for number in range(9)]


def test_a_shard_can_end_up_empty_without_a_gap_in_the_names(build_jsonl: Build, photos: Path) -> None:
    found = build_jsonl([dog("gone1.jpg"), dog("gone2.jpg"), dog("a.jpg")], samples_per_shard=1)
    shards = found["index"]["splits"]["train"]["shards"]
    assert [shard["path"] for shard in shards] == [f"train-00000{i}.tar" for i in range(3)]
    assert sorted(shard["num_samples"] for shard in shards) == [0, 0, 1]
    index = load_index(photos.parent / "out", "train")
    assert np.array_equal(index.keys, [b"a"])


def test_importing_the_build_loads_no_torch() -> None:
    code = "import sys, cogvlm_ft.shards.build; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("program", ["build", "review", "demo_scenes"])
def test_programs_have_a_version_and_examples(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = importlib.import_module(f"cogvlm_ft.shards.{program}").main
    for option, expected in (("--version", __version__), ("--help", f"  python shards/{program}.py --")):
        with pytest.raises(SystemExit) as caught:
            run([option])
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


def test_other_errors_than_a_mistake_of_the_user_have_exit_code_1(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    annotations = write_lines(tmp_path / "x.jsonl", [dog("a.jpg")])
    monkeypatch.setattr("cogvlm_ft.shards.build.build", fail)
    arguments = ["--annotations", str(annotations), "--images", str(photos), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_the_staging_file_of_a_former_version_is_deleted(photos: Path, tmp_path: Path) -> None:
    annotations, out = write_lines(tmp_path / "x.jsonl", [dog("a.jpg")]), tmp_path / "out"
    out.mkdir()
    (out / ".spool.sqlite").write_bytes(b"of a killed build")
    build(BuildSettings("jsonl", photos, annotations, val_fraction=0.0), out, num_workers=1)
    assert sorted(path.suffix for path in out.iterdir() if path.name.startswith(".")) == []
