"""Words for labels: each language asks with its own, and the annotations stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from case_files import write_photo
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import Record, detect_language, record_from_json, record_to_json
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.turns import build_turns
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.shards.build import main
from cogvlm_ft.shards.packing.label_names import LabelNames, load_names

BOX = (1.0, 2.0, 30.0, 20.0)
CELLS = "RBC: [red blood cell, erythrocyte, 红细胞]\nWBC: [white blood cell, 白细胞]\nPlatelets: 血小板\n"


def names_of(tmp_path: Path, text: str) -> LabelNames:
    (tmp_path / "names.yaml").write_text(text, encoding="utf-8")
    return load_names(tmp_path / "names.yaml")


def asked(targets: tuple[Target, ...], num_epochs: int = 40) -> set[tuple[str, str]]:
    """(language, phrase) of every question in these epochs."""
    wording = load_wording("referring")
    turns = [
        turn
        for epoch in range(num_epochs)
        for turn in build_turns(targets, (100, 80), wording, seed=0, epoch=epoch, key="a")
    ]
    for turn in turns:
        assert turn.target is not None and turn.target.phrase in turn.prompt
        assert detect_language(turn.prompt) == turn.target.language
    return {(turn.target.language, turn.target.phrase) for turn in turns if turn.target}


def test_each_language_asks_with_its_words_and_uses_all_of_them(tmp_path: Path) -> None:
    named = names_of(tmp_path, CELLS).named([Target("RBC", "en", (BOX,)), Target("Platelets", "en", ())])
    assert [target.phrase for target in named] == ["RBC", "Platelets"]
    words = {("en", "red blood cell"), ("en", "erythrocyte"), ("zh", "红细胞")}
    assert asked(named) == words | {("zh", "血小板"), ("en", "Platelets")}


def test_targets_without_names_ask_as_before() -> None:
    wording = load_wording("referring")
    targets = (Target("狗", "zh", (BOX,)), Target("cat", "en", ()))
    turns = build_turns(targets, (100, 80), wording, seed=0, epoch=0, key="a")
    assert {turn.target.phrase for turn in turns if turn.target} == {"狗", "cat"}


def test_a_record_keeps_its_names(tmp_path: Path) -> None:
    named = names_of(tmp_path, CELLS).named([Target("WBC", "en", (BOX,))])
    record = Record("k", (100, 80), "s", named, ())
    assert record_from_json(record_to_json(record), "k").targets == named


def test_labels_with_the_same_words_are_one_target(tmp_path: Path) -> None:
    names = names_of(tmp_path, "sedan: [car, 汽车]\nsuv: [汽车, car]\n")
    (target,) = names.named([Target("sedan", "en", (BOX,)), Target("suv", "en", ((5.0, 5.0, 9.0, 9.0),))])
    assert len(target.boxes_xyxy) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RBC: [cell, 红细胞]\nWBC: [cell, 白细胞]\n", "'cell' is a word of 'RBC' and of 'WBC'"),
        ("RBC: [WBC]\nWBC:\n", "'WBC' is a word of 'RBC' and of 'WBC'"),
        ("RBC: [a]\nRBC: [b]\n", "'RBC' is there twice"),
        ("- RBC\n", "no labels"),
        ("RBC: {en: cell}\n", "'RBC' has"),
        ("RBC: ['[[0,0,1,1]]']\n", "'RBC' has"),
        ("RBC: [a\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_with_the_label(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DataError) as error:
        names_of(tmp_path, text)
    assert expected in str(error.value) and "--names" in str(error.value)


def test_a_label_that_is_the_word_of_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'cell' is a word of 'RBC' and a label of its own\. Add"):
        names_of(tmp_path, "RBC: [cell]\n").named([Target("cell", "en", (BOX,))])


def test_words_are_text_and_gbk_is_read(tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_bytes("no: [禁止标志]\n1: [one thing, 零件]\ndog:\ncat: []\n".encode("gbk"))
    names = load_names(tmp_path / "n.yaml")
    named = names.named([Target(label, "en", (BOX,)) for label in ("no", "1", "dog", "cat")])
    assert [target.names for target in named] == [
        (("zh", "禁止标志"), ("en", "no")),
        (("en", "one thing"), ("zh", "零件")),
        (),
        (),
    ]


def test_a_build_uses_the_names_for_present_and_absent_targets(tmp_path: Path) -> None:
    for i, label in enumerate(("RBC", "WBC", "RBC", "WBC", "rbc ")):
        write_photo(tmp_path / "in" / f"{i}.png", (60, 40), i)
        line = {"image": f"{i}.png", "targets": [{"phrase": label, "boxes": [[3, 4, 20, 30]]}]}
        with (tmp_path / "in" / "x.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    (tmp_path / "names.yaml").write_text(f"{CELLS}Platelet: [x]\n", encoding="utf-8")
    options = ["--names", str(tmp_path / "names.yaml"), "--negatives", "0.4", "--negative-kinds", "class"]
    arguments = ["--annotations", str(tmp_path / "in" / "x.jsonl"), "--out", str(tmp_path / "out"), *options]
    assert main([*arguments, "--val-fraction", "0", "--workers", "1"]) == 0
    reader = ShardReader(load_index(str(tmp_path / "out"), "train"))
    targets: list[Any] = [target for i in range(len(reader)) for target in reader.read(i).record.targets]
    reader.close()
    absent = [target for target in targets if not target.boxes_xyxy]
    assert absent and all(target.names for target in absent if target.phrase in ("RBC", "WBC"))
    notes = [json.loads(line) for line in (tmp_path / "out" / "notes.jsonl").read_bytes().splitlines()]
    unmet = [row["detail"] for row in notes if row["reason"] == "name_without_label"]
    assert len(unmet) == 2 and all("Platelet" in detail for detail in unmet)


WORDS = st.text(st.sampled_from("abc 狗猫"), min_size=1, max_size=5).map(str.strip).filter(bool)


@settings(max_examples=30, deadline=None)
@given(words=st.dictionaries(st.sampled_from(["L1", "L2", "L3", "标签"]), st.lists(WORDS, max_size=4), min_size=1))
def test_no_word_is_lost_and_no_question_mixes_languages(
    words: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("names") / "names.yaml"
    path.write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    targets = [Target(label, detect_language(label), (BOX,)) for label in words]
    try:
        named = load_names(path).named(targets)
    except DataError as error:
        assert "is a word of" in str(error)
        return
    assert sum(len(target.boxes_xyxy) for target in named) == len(words)
    for target in named:
        given_words = {" ".join(word.split()) for word in words[target.phrase]}
        assert given_words <= {word for _, word in target.names}
    asked(named, 3)
