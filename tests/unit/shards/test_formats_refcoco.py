"""RefCOCO as published, and the reader of its pickle: plain values or a refusal."""

from __future__ import annotations

import builtins
import collections
import copyreg
import datetime
import io
import os
import pickle
import random
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_files import CASES, build_case
from format_files import Reading, read_all, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import plain_pickle
from cogvlm_ft.shards.formats.plain_pickle import load_plain_pickle
from cogvlm_ft.shards.formats.refcoco import read_refcoco, recognise_refcoco

REFS: list[dict[str, Any]] = [
    {
        "sent_ids": [0, 1],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "ref_id": 0,
        "image_id": 581857,
        "split": "train",
        "sentences": [
            {"tokens": ["navy", "blue", "shirt"], "raw": "navy blue shirt", "sent_id": 0, "sent": "navy blue shirt"},
            {"tokens": ["woman"], "raw": "Woman!", "sent_id": 1, "sent": "woman"},
        ],
        "category_id": 1,
    },
    {
        "sent_ids": [2],
        "file_name": "COCO_train2014_000000000009_3.jpg",
        "ann_id": 7,
        "ref_id": 1,
        "image_id": 9,
        "split": "testA",
        "sentences": [{"tokens": ["caf\xe9"], "raw": "caf\xe9", "sent_id": 2, "sent": "caf\xe9 crème"}],
        "category_id": 47,
    },
    {
        "sent_ids": [3],
        "file_name": "COCO_train2014_000000581857_17.jpg",
        "ann_id": 12,
        "ref_id": 2,
        "image_id": 581857,
        "split": "train",
        "sentences": [{"tokens": ["man"], "raw": "man", "sent_id": 3, "sent": "man"}],
        "category_id": 1,
    },
]
INSTANCES: dict[str, Any] = {
    "info": {"description": "This is dev 1.0 version of the 2014 MS COCO dataset."},
    "images": [
        {"file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640, "id": 581857, "license": 1},
        {"file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640, "id": 9, "license": 3},
    ],
    "annotations": [
        {"id": 1719310, "image_id": 581857, "category_id": 1, "bbox": [103.93, 299.99, 134.22, 177.42], "iscrowd": 0},
        {"id": 12, "image_id": 581857, "category_id": 1, "bbox": [0, 1, 100, 200], "iscrowd": 0},
        {"id": 7, "image_id": 9, "category_id": 47, "bbox": [5, 6, 7, 8], "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
}


def write(tmp_path: Path, refs: bytes, name: str = "refs(unc).p", instances: Any = INSTANCES) -> Path:
    folder = tmp_path / "refcoco"
    write_json(folder / "instances.json", instances)
    (folder / name).write_bytes(refs)
    return folder


def read(tmp_path: Path, refs: Any, instances: Any = INSTANCES) -> Reading:
    return read_all(read_refcoco, write(tmp_path, pickle.dumps(refs, 2), instances=instances))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["refs(unc).p", "refs(google).p", "refs(umd).p"])
def test_every_sentence_becomes_a_target(tmp_path: Path, protocol: int, name: str) -> None:
    folder = write(tmp_path, pickle.dumps(REFS, protocol), name)
    for path in (folder, folder / name):
        found = read_all(read_refcoco, path)
        assert not found.problems
        assert [candidate.split for candidate in found.candidates] == ["train", "test"]
        assert found.boxes == {
            "COCO_train2014_000000581857.jpg": {
                "navy blue shirt": ((103.93, 299.99, 103.93 + 134.22, 299.99 + 177.42),),
                "woman": ((103.93, 299.99, 103.93 + 134.22, 299.99 + 177.42),),
                "man": ((0, 1, 100, 201),),
            },
            "COCO_train2014_000000000009.jpg": {"caf\xe9 crème": ((5, 6, 12, 14),)},
        }
        assert [candidate.stated_size_px for candidate in found.candidates] == [(640, 427), (640, 480)]
        assert found.candidates[0].source == f"{name}[0]"
        assert recognise_refcoco(path) == f"RefCOCO's {name}"


def test_a_photo_whose_refs_are_in_two_splits_is_in_one(tmp_path: Path) -> None:
    found = read(tmp_path, [REFS[0], {**REFS[1], "split": "unused"}, {**REFS[2], "split": "val"}])
    assert [candidate.split for candidate in found.candidates] == ["val", None]
    assert [problem.reason for problem in found.problems] == ["moved_to_val"]


def test_strings_and_numbers_of_python_2(tmp_path: Path) -> None:
    """Written by hand as Python 2 writes str, unicode, long and bool; bytes that are no UTF-8 are Latin-1."""
    text = b"(lp0\nS'caf\\xc3\\xa9'\np1\naS'caf\\xe9'\np2\naVcaf\\u00e9\np3\nag1\na"
    text += b"I01\naL581857L\naF0.5\na(dp4\nS'a\\'b'\nNsa."
    binary = b"\x80\x02]q\x00(U\x05caf\xc3\xa9q\x01U\x04caf\xe9q\x02X\x05\x00\x00\x00caf\xc3\xa9h\x01"
    binary += b"\x88\x8a\x03\xe1\xe0\x08G" + struct.pack(">d", 0.5) + b"}q\x03T\x03\x00\x00\x00a'bNse."
    path = tmp_path / "x.p"
    for data in (text, binary):
        path.write_bytes(data)
        assert load_plain_pickle(path) == ["café", "café", "café", "café", True, 581857, 0.5, {"a'b": None}]


@pytest.mark.parametrize("seed", range(20))
def test_reads_what_python_writes(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def value(depth: int) -> Any:
        kinds = [
            lambda: draw.choice(
                [None, True, False, -(2**60), 2**31, 300, -1, 7, 0.1, "", "狗", "x" * 300, "\ud800", "a\nb\\u"]
            ),
            lambda: [value(depth + 1) for _ in range(draw.randrange(5))],
            lambda: tuple(value(depth + 1) for _ in range(draw.randrange(5))),
            lambda: {f"k{i}": value(depth + 1) for i in range(draw.randrange(5))},
        ]
        return draw.choice(kinds if depth < 6 else kinds[:1])()

    written = [value(0) for _ in range(5)]
    written.append(written[0])
    for protocol in range(6):
        path = tmp_path / "x.p"
        path.write_bytes(pickle.dumps(written, protocol))
        assert load_plain_pickle(path) == written


class Evil:
    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return self._call


class Instance:
    pass


class Persistent(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return "secret" if isinstance(obj, Instance) else None


def persistent(protocol: int) -> bytes:
    buffer = io.BytesIO()
    Persistent(buffer, protocol).dump([Instance()])
    return buffer.getvalue()


EVIL_OBJECTS = [
    Evil(os.system, ("touch evil",)),
    Evil(builtins.eval, ("open('evil', 'w')",)),
    Evil(builtins.exec, ("open('evil', 'w')",)),
    Evil(getattr, ("x", "upper")),
    Evil(builtins.open, ("evil", "w")),
    Evil(bytearray, (b"x" * 10,)),
    Instance(),
    os.system,
    collections.OrderedDict(a=1),
    datetime.date(2020, 1, 1),
    np.float64(1.5),
    np.zeros(3),
    {1, 2},
    frozenset({1}),
    b"raw",
    bytearray(b"raw"),
    1 + 2j,
    slice(1),
    Ellipsis,
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("evil", EVIL_OBJECTS, ids=lambda evil: type(evil).__name__)
def test_objects_are_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path, pickle.dumps([*REFS, {"sentences": evil}], protocol))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is refused: .*expected a pickle of plain lists"):
        read_all(read_refcoco, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["refcoco"]


def test_the_extension_registry_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's reader takes a registered function from its cache without asking find_class."""
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "system", 250)
    try:
        data = pickle.dumps(Evil(os.system, ("touch evil",)), 2)
        assert b"\x82\xfa" in data
        pickle.loads(data)
        assert (tmp_path / "evil").exists()
        (tmp_path / "evil").unlink()
        for code in (b"\x82\xfa", b"\x83\xfa\0", b"\x84\xfa\0\0\0"):
            with pytest.raises(DataError, match=r"instruction EXT[124] "):
                read_all(read_refcoco, write(tmp_path, b"\x80\x02" + code + b"U\x0atouch evil\x85R."))
        assert not (tmp_path / "evil").exists()
    finally:
        copyreg.remove_extension("posix", "system", 250)


def bomb(levels: int) -> Any:
    value: Any = ["x"]
    for _ in range(levels):
        value = [value] * 10
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (persistent(0), "instruction PERSID "),
        (persistent(2), "instruction BINPERSID "),
        (b"cos\nsystem\n(S'touch evil'\ntR.", "instruction GLOBAL "),
        (b"(S'touch evil'\nios\nsystem\n.", "instruction INST "),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch evil\x85R.", "instruction STACK_GLOBAL "),
        (b"\x80\x02(cos\nsystem\nU\x01xo.", "instruction GLOBAL "),
        (b"(U\x01xU\x01yo.", "instruction OBJ "),
        (b"U\x01x(tR.", "instruction REDUCE "),
        (b"]}b.", "instruction BUILD "),
        (b")\x81.", "instruction NEWOBJ "),
        (b"))}\x92.", "instruction NEWOBJ_EX "),
        (b"C\x01a.", "instruction SHORT_BINBYTES "),
        (b"\x8f(K\x01\x90.", "instruction EMPTY_SET "),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER "),
        (b"\xff.", "plain values do not need it"),
        (pickle.dumps(bomb(18)), "over and over"),
        (pickle.dumps(bomb(5), 0), "over and over"),
        (pickle.dumps(endless()), "nested more than"),
        (pickle.dumps({"a": endless()}, 0), "nested more than"),
        (b"]" + b"q\x00h\x00h\x00\x86" * 50 + b".", "over and over|nested|takes a value"),
        (b"(" * 100_000 + b"l" * 100_000 + b".", "nested more than"),
        (b"(" * 100_000, "ends without STOP"),
        (b")" + b"\x85" * 100_000 + b".", "nested more than"),
        (b"\x80\x02}K\x01K\x01s.", "dict key"),
        (b"}(U\x01aK\x01K\x02K\x02u.", "dict key"),
        (b"(K\x01K\x01d.", "dict key"),
        (b"K\x01q\x00}h\x00K\x01s.", "dict key"),
        (b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.", "dict key"),
        (b"}](sN.", "takes a value"),
        (b"X\xff\xff\xff\xffabc.", "expected 4294967295 bytes"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "expected 9223372036854775807 bytes"),
        (b"Nr\xff\xff\xff\xff0j\xff\xff\xff\x7f.", "memo position 4294967295"),
        (b"Nr\x02\x00\x00\x000j\xff\xff\xff\x7f.", "never stored"),
        (b"Np-1\n.", "memo position -1"),
        (b"I" + b"9" * 100_000 + b"\n.", "limit|bits"),
        (b"\x8b\x00\x00\x00\x10" + b"\x01" * 100 + b".", "not enough data"),
        (b"\x8b\x40\x00\x00\x00" + b"\x01" * 64 + b".", "bits"),
        (b"Np" + b"9" * 30 + b"\n.", "memo position 9{30}"),
        (b"S'abc\n.", "string missing trailing quote|quote"),
        (b"S'\\x1'\n.", "is refused"),
        (b"Iabc\n.", "is refused"),
        (b"X\x01\x00\x00\x00\xff.", "is refused"),
        (b".", "takes a value"),
        (b"0.", "takes a value"),
        (b"NNNt.", "without MARK"),
        (b"N(Na.", "takes a value|has no attribute"),
        (b"", "ends without STOP"),
        (b'{"refs": []}', "plain values do not need it"),
        (b"\x00" * 1000, "plain values do not need it"),
    ],
)
def test_pickles_that_are_evil_endless_or_broken(tmp_path: Path, monkeypatch: Any, data: bytes, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        read_all(read_refcoco, write(tmp_path, data))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("part", [b"N", b"]", b"}", b"(l", b")", b"K\1", b"X\4\0\0\0\xf0\x9f\x90\xb6", b"U\1\xe9"])
def test_memory_is_bounded_however_small_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: bytes
) -> None:
    """The estimate is above what the values and the check of them really take."""
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"(" + part * 6_000 + b"l.")
    monkeypatch.setattr(plain_pickle, "MAX_MEMORY_BYTES", 2**30)
    tracemalloc.start()
    assert len(plain_pickle.load_plain_pickle(path)) == 6_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    monkeypatch.setattr(plain_pickle, "MAX_MEMORY_BYTES", peak)
    with pytest.raises(DataError, match="need more than"):
        plain_pickle.load_plain_pickle(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, b"")
    with (folder / "refs(unc).p").open("wb") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(DataError, match="536870913 bytes; expected at most 536870912"):
        read_all(read_refcoco, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_damaged_pickles_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = bytearray(pickle.dumps(REFS, seed % 6))
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(data))
        kind = draw.randrange(3)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + draw.randrange(1, 50)]
        else:
            data[at:at] = draw.randbytes(draw.randrange(1, 10))
    folder = write(tmp_path, bytes(data))
    try:
        found = read_all(read_refcoco, folder)
    except DataError as error:
        assert "refs(unc).p" in str(error)
    else:
        assert found.candidates or found.problems


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({"ann_id": 5}, [("target", "unknown_ann_id")] * 2),
        ({"ann_id": [8]}, [("target", "unknown_ann_id")] * 2),
        ({"image_id": 5}, [("target", "unknown_image_id")] * 2),
        ({"image_id": None}, [("target", "unknown_image_id")] * 2),
        ({"file_name": "COCO_train2014_000000000009_16.jpg"}, [("target", "other_image")] * 2),
        ({"ann_id": 7}, [("target", "other_image")] * 2),  # a box of another photo
        ({"sentences": []}, [("target", "bad_field")]),
        ({"sentences": "woman"}, [("target", "bad_field")]),
        ({"sentences": ["woman", {"sent": "woman"}]}, [("target", "bad_field")]),
        ({"sentences": [{"sent": " "}, {"sent": 3}, {}]}, [("target", "empty_phrase")] + [("target", "bad_field")] * 2),
        ({"sentences": [{"sent": "\ud800"}]}, [("target", "not_utf8")]),
    ],
)
def test_a_bad_ref_is_lost_alone(tmp_path: Path, change: dict[str, Any], problems: Any) -> None:
    found = read(tmp_path, [{**REFS[0], **change}, *REFS[1:], "no ref"])
    assert sorted(found.reasons) == sorted([*problems, ("target", "unknown_image_id")])
    assert found.boxes["COCO_train2014_000000581857.jpg"]["man"] and len(found.candidates) == 2
    assert all("refs(unc).p[" in problem.source for problem in found.problems)


def test_raw_words_stand_in_for_missing_ones(tmp_path: Path) -> None:
    found = read(
        tmp_path, [{**REFS[1], "sentences": [{"raw": "The Cup"}], "file_name": "COCO_train2014_000000000009.jpg"}]
    )
    assert list(found.boxes["COCO_train2014_000000000009.jpg"]) == ["The Cup"] and not found.problems


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("annotations", {"id": 7, "bbox": [1, 2, 3]}, "wrong_number_of_coordinates"),
        ("annotations", {"id": 7}, "bad_field"),
        ("images", {"id": 9, "file_name": None}, "bad_field"),
        ("images", {"id": 9, "file_name": "\ud800.jpg"}, "not_utf8"),
    ],
)
def test_bad_instances_cost_only_their_refs(tmp_path: Path, name: str, value: Any, reason: str) -> None:
    found = read(tmp_path, REFS, {**INSTANCES, name: [*INSTANCES[name], value, "nothing", {"id": []}]})
    assert found.reasons == [("target", reason)]
    assert len(found.boxes["COCO_train2014_000000581857.jpg"]) == 3


def test_wrong_folders_say_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path, pickle.dumps({"refs": []}))
    with pytest.raises(DataError, match="holds a dict; expected a list of refs"):
        read_all(read_refcoco, folder)
    (folder / "refs(google).p").write_bytes(pickle.dumps(REFS))
    with pytest.raises(DataError, match=r"has refs\(google\)\.p, refs\(unc\)\.p; expected one"):
        read_all(read_refcoco, folder)
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match=r"instances\.json cannot be read: No such file"):
        read_all(read_refcoco, folder / "refs(google).p")
    with pytest.raises(DataError, match="has none; expected one"):
        read_all(read_refcoco, tmp_path)
    assert recognise_refcoco(tmp_path) is None and recognise_refcoco(tmp_path / "x.json") is None


def test_json_that_is_deeply_nested_is_no_crash(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = {"a": deep}
    found = read(tmp_path, REFS, {**INSTANCES, "annotations": [{"id": 7, "bbox": deep}]})
    assert ("target", "bad_field") in found.reasons


def test_a_copy_of_the_refs_with_shared_lists_is_read(tmp_path: Path) -> None:
    shared = {**REFS[1], "sent_ids": REFS[1]["sentences"][0]["tokens"]}
    assert len(read(tmp_path, [shared, {**shared, "ref_id": 5}]).only.targets) == 2


def grefcoco(path: Path, refs: list[dict[str, Any]]) -> Path:
    boxes = [{"id": number, "image_id": 5, "bbox": [10 * number, 2, 20, number]} for number in (1, 2, 3)]
    images = [{"id": 5, "file_name": "a.jpg", "width": 100, "height": 80}]
    write_json(path / "instances.json", {"images": images, "annotations": boxes, "categories": []})
    write_json(path / "grefs(unc).json", [{"image_id": 5, "file_name": "a.jpg", **ref} for ref in refs])
    return path


def sentences(*texts: str) -> list[dict[str, Any]]:
    return [{"sent": text, "sent_id": i} for i, text in enumerate(texts)]


def test_33_grefcoco(tmp_path: Path, capsys: Any) -> None:
    found = build_case(CASES / "33-grefcoco/in", tmp_path, capsys)
    assert "gRefCOCO's grefs(unc).json" in found.printed and found.reasons == []
    (boxes,) = found.boxes.values()
    assert boxes == {"both dogs": ((1, 2, 21, 12), (50, 2, 70, 12)), "the cat": ()}


def test_grefcoco_never_makes_an_absent_target_of_a_lost_one(tmp_path: Path) -> None:
    refs = [
        {"ann_id": [1, 9], "no_target": False, "sentences": sentences("one box is unknown")},
        {"ann_id": [], "no_target": False, "sentences": sentences("no box")},
        {"ann_id": [], "sentences": sentences("no box, not said why")},
        {"ann_id": [1], "no_target": True, "sentences": sentences("both said")},
        {"ann_id": [-1], "no_target": False, "sentences": sentences("neither said")},
        {"ann_id": [-1, 1], "no_target": False, "sentences": sentences("mixed")},
        {"ann_id": [2], "no_target": False, "sentences": sentences("dog")},
        {"ann_id": [-1], "no_target": True, "sentences": sentences("dog", "cat")},
        {"ann_id": 3, "sentences": sentences("a number")},
    ]
    found = read_all(read_refcoco, grefcoco(tmp_path, refs), tmp_path)
    assert found.boxes == {"a.jpg": {"dog": ((20, 2, 40, 4),), "cat": (), "a number": ((30, 2, 50, 5),)}}
    assert len(found.problems) == 7 and {level for level, _ in found.reasons} == {"target"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from([1, 2, 3]), max_size=3, unique=True), min_size=1, max_size=6))
def test_grefcoco_with_any_number_of_boxes(ids: list[list[int]]) -> None:
    refs = [
        {"ann_id": numbers or [-1], "no_target": not numbers, "sentences": sentences(f"phrase {i}")}
        for i, numbers in enumerate(ids)
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = read_all(read_refcoco, grefcoco(Path(folder), refs), Path(folder))
    expected = {
        f"phrase {i}": tuple((10 * number, 2, 10 * number + 20, 2 + number) for number in numbers)
        for i, numbers in enumerate(ids)
    }
    assert found.boxes == {"a.jpg": expected} and not found.problems
