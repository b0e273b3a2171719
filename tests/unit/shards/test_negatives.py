"""Absent targets: what may be called absent, how many there are, and that it always comes out the same."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.negatives import (
    KINDS,
    NegativeSettings,
    Vocabulary,
    choose_absent,
    load_lexicon,
    negatives_report,
)
from cogvlm_ft.shards.negatives.meaning import read_meaning
from cogvlm_ft.shards.negatives.photo import read_photo
from cogvlm_ft.shards.negatives.swaps import swapped_phrases
from cogvlm_ft.shards.negatives.vocabulary import BoundedCounts
from cogvlm_ft.shards.packing.candidates import Candidate, Problem

WORDS = load_lexicon(None)
LEFT, RIGHT, WIDE = (0.0, 0.0, 20.0, 20.0), (70.0, 0.0, 90.0, 20.0), (40.0, 0.0, 90.0, 20.0)


def target(phrase: str, *boxes: Any, description: str | None = None) -> Target:
    return Target(phrase, "en" if phrase.isascii() else "zh", boxes or (LEFT,), description)


def photo_of(*phrases: str | Target, **fields: Any) -> Candidate:
    targets = tuple(target(part, (i, 0, i + 9, 9)) if isinstance(part, str) else part for i, part in enumerate(phrases))
    return Candidate(**{"image": "a.jpg", "key": None, "source": "x", "targets": targets, **fields})


def may_be_absent(phrase: str, candidate: Candidate, *others: Candidate, exhaustive: bool = False) -> bool:
    photo = read_photo(candidate, others, exhaustive, WORDS)
    return not isinstance(photo, str) and not photo.may_show(read_meaning(phrase, WORDS), WORDS)


def swaps_of(candidate: Candidate, *, exhaustive: bool = False) -> set[str]:
    photo = read_photo(candidate, (), exhaustive, WORDS)
    return set() if isinstance(photo, str) else {each.phrase for each in swapped_phrases(candidate, photo, WORDS)}


@pytest.mark.parametrize(
    ("there", "phrase"),
    [
        # the same, written otherwise
        ("dog", "Dog"),
        ("dog", "the dogs"),
        ("dog", "a dog."),
        ("dog", "ＤＯＧ"),
        ("wine glass", "wineglass"),
        ("hot dog", "Hot-dogs"),
        ("laptop", "lap top"),
        ("the man's dog", "dog"),
        ("knife", "knives"),
        ("buses", "bus"),
        ("狗", "一只狗"),
        ("小狗", "狗。"),
        ("红色的苹果", "红色苹果"),
        # another name, another language
        ("sofa", "couch"),
        ("tv", "television"),
        ("狗", "dog"),
        ("puppy", "小狗"),
        ("公交车", "a red bus"),
        ("手机", "cell phone"),
        # kinds
        ("dog", "animal"),
        ("animal", "dog"),
        ("a small animal", "棕色的狗"),
        ("vehicle", "the truck"),
        ("车", "自行车"),
        ("卡车", "车辆"),
        ("fruit", "banana"),
        ("teddy", "bear"),
        # more or less said of it
        ("red cup", "cup"),
        ("cup", "red cup"),
        ("dog", "a brown dog"),
        ("the brown dog", "black dog"),
        ("杯子", "左边的杯子"),
        ("两只狗", "三只狗"),
        ("a giraffe next to the elephant", "elephant"),
        ("elephant", "giraffe next to the elephant"),
        ("桌子上的披萨", "披萨"),
        # slips and parts of words
        ("girrafe on left and zebra", "giraffe"),
        ("hotdog", "dog"),
        # met together, or taken for each other
        ("cup", "bottle"),
        ("bus", "traffic light"),
        ("猫", "沙发"),
        ("zebra", "giraffe"),
        # not understood on one side or the other
        ("dog", "azulejo"),
        ("azulejo", "dog"),
        ("left one", "dog"),
        ("the thing on the left", "dog"),
        ("什么东西", "狗"),
        ("where can we cook meals", "dog"),
        ("next to the sofa", "elephant"),
    ],
)
def test_what_may_be_there_is_not_called_absent(there: str, phrase: str) -> None:
    assert not may_be_absent(phrase, photo_of(there))


@pytest.mark.parametrize(
    ("there", "phrase"),
    [
        ("dog", "banana"),
        ("the brown dog on the left", "a yellow bus"),
        ("dog", "香蕉"),
        ("红色的公交车", "大象"),
        ("热狗", "自行车"),
        ("左边的杯子", "一只长颈鹿"),
    ],
)
def test_what_is_not_there_can_be_called_absent(there: str, phrase: str) -> None:
    assert may_be_absent(phrase, photo_of(there))


def test_whatever_is_said_of_the_photo_counts() -> None:
    bus = target("bus")
    assert may_be_absent("banana", photo_of(bus))
    assert not may_be_absent("banana", photo_of(target("bus", description="bus that carries many Bananas")))
    assert not may_be_absent("香蕉", photo_of(bus, turns=(Turn("Is there a banana?", "No."),)))
    assert not may_be_absent("香蕉", photo_of(bus, turns=(Turn("图里有什么?", "一辆车和几根香蕉"),)))
    assert not may_be_absent("banana", photo_of(bus, turns=(Turn("And?", "A bus.", history=(("What?", "banannas"),)),)))
    assert not may_be_absent("a banana", photo_of(bus, Target("banana", "en", ())))
    assert not may_be_absent("banana", photo_of(bus), photo_of("two bananas"))


def test_one_clear_phrase_speaks_for_its_box() -> None:
    assert not may_be_absent("banana", photo_of(target("left one", LEFT), target("dog", RIGHT)))
    assert may_be_absent("banana", photo_of(target("left one", LEFT), target("dog", LEFT)))


def test_a_photo_that_lost_something_gets_nothing() -> None:
    lost = Problem("target", "bad_field", "phrase is 7; expected a string", "x")
    for exhaustive in (False, True):
        assert not may_be_absent("banana", photo_of("dog", problems=(lost,)), exhaustive=exhaustive)
        assert not may_be_absent("banana", photo_of("dog"), photo_of("cat", problems=(lost,)), exhaustive=exhaustive)


def test_a_crowd_is_in_the_picture() -> None:
    crowd = Problem("box", "crowd", "'banana': a region around a crowd, not one object", "x")
    candidate = photo_of("dog", problems=(crowd,))
    assert not may_be_absent("banana", candidate, exhaustive=True)
    assert not may_be_absent("fruit", candidate, exhaustive=True)
    assert may_be_absent("truck", candidate, exhaustive=True)


@pytest.mark.parametrize(
    ("there", "phrase", "absent"),
    [
        ("cup", "bottle", False),  # a cup may be called a bottle by another annotator
        ("cup", "fork", True),  # all of each class is annotated: what is met together need not be there
        ("person", "car", True),
        ("轴箱", "弹簧", True),
        ("轴箱", "轴箱弹簧", False),
        ("前车门", "后车门", False),
        ("axle box", "coupler", True),
        ("axle box", "axle box cover", False),
        ("front bogie", "rear bogie", False),
        ("axle box", "弹簧", False),  # they may be one thing in two languages
        ("raccoon", "浣熊", False),
        ("other", "dog", False),  # it may be anything
        ("red_helmet", "helmet", False),
        ("worker", "man", False),
        ("车", "警车", False),
    ],
)
def test_classes_of_a_data_set_that_annotates_all_of_them(there: str, phrase: str, absent: bool) -> None:
    assert may_be_absent(phrase, photo_of(there), exhaustive=True) == absent


FAR_FROM_RED = {"yellow", "green", "blue", "black", "white"}


@pytest.mark.parametrize(
    ("there", "phrases"),
    [
        ("red cup", {f"{colour} cup" for colour in FAR_FROM_RED}),
        ("The RED cup", {f"The {colour.title()} cup" for colour in FAR_FROM_RED}),
        ("红色的杯子", {"黄色的杯子", "绿色的杯子", "蓝色的杯子", "黑色的杯子", "白色的杯子"}),
        ("一辆红自行车", {"一辆黄自行车", "一辆绿自行车", "一辆蓝自行车", "一辆黑自行车", "一辆白自行车"}),
        (
            "an orange umbrella",
            {"a green umbrella", "a blue umbrella", "a purple umbrella", "a black umbrella", "a white umbrella"},
        ),
        ("grey elephant", {"red elephant", "yellow elephant", "purple elephant"}),
        ("cup", set()),
        ("red and white cup", set()),
        ("dark red cup", set()),
        ("dog with a red ball", set()),
        ("red wine", set()),
        ("white wine glass", set()),
        ("red shirt", set()),  # commonplace
        ("black man", set()),
        ("red azulejo", set()),
        ("黄瓜", set()),
        ("左边红色的杯子", set()),
    ],
)
def test_colours(there: str, phrases: set[str]) -> None:
    assert swaps_of(photo_of(there)) == phrases


@pytest.mark.parametrize(
    ("others", "phrases"),
    [
        (["dog"], {"yellow", "green", "blue", "black", "white"}),
        (["blue dog"], {"yellow", "green", "blue", "black", "white"}),
        (["cup"], set()),
        (["mug"], set()),
        (["马克杯"], set()),
        (["cup on the table"], set()),
        (["blue cup"], {"yellow", "white"}),  # purple and black may be called blue
        (["蓝色的杯子"], {"yellow", "white"}),
        (["blue cup", "green mug"], {"white"}),
        (["blue and white cup"], set()),
    ],
)
def test_colours_beside_others_of_the_kind(others: list[str], phrases: set[str]) -> None:
    candidate = photo_of("red cup", *others)
    found = {phrase.removesuffix(" cup") for phrase in swaps_of(candidate, exhaustive=True) if phrase.endswith(" cup")}
    assert found == phrases
    if any("cup" in other or "mug" in other or "杯" in other for other in others):
        assert not swaps_of(candidate), "where not everything is annotated, there may be yet another one"


def test_two_phrases_for_one_box_do_not_contradict_each_other() -> None:
    assert swaps_of(photo_of(target("red cup", LEFT), target("the cup", LEFT))) == {f"{c} cup" for c in FAR_FROM_RED}
    assert not swaps_of(photo_of(target("red cup", LEFT), target("the cup", LEFT), target("cup", RIGHT)))
    assert not swaps_of(photo_of(target("red cup", LEFT, description="the cup beside the blue one")))


@pytest.mark.parametrize(
    ("there", "num_boxes", "phrases"),
    [
        ("两只狗", 2, {"三只狗", "四只狗", "五只狗"}),
        ("two dogs", 2, {"three dogs", "four dogs", "five dogs"}),
        ("3只狗", 3, {"4只狗", "5只狗", "6只狗"}),
        ("the 8 dogs", 8, {"the 9 dogs"}),
        ("two dogs", 1, set()),  # one box around both, or one that is missing
        ("两只狗", 3, set()),
        ("第二只狗", 1, set()),
        ("一只狗", 1, set()),
        ("a dog", 1, set()),
        ("two dogs on the sofa", 2, set()),
        ("two men", 2, set()),  # commonplace: there may be more
    ],
)
def test_numbers_go_up(there: str, num_boxes: int, phrases: set[str]) -> None:
    boxes = [(i * 10.0, 0.0, i * 10 + 9.0, 9.0) for i in range(num_boxes)]
    assert swaps_of(photo_of(target(there, *boxes))) == phrases
    assert not swaps_of(photo_of(target(there, *boxes), "puppy"))


@pytest.mark.parametrize(
    ("there", "box", "phrases"),
    [
        ("left cup", LEFT, {"right cup"}),
        ("the cup on the left", LEFT, {"the cup on the right"}),
        ("左边的杯子", LEFT, {"右边的杯子"}),
        ("右侧的杯子", RIGHT, {"左侧的杯子"}),
        ("top cup", LEFT, {"bottom cup"}),
        ("left cup", RIGHT, set()),  # not the left of the picture
        ("right cup", WIDE, set()),  # a part of it is on the left
        ("cup left of the dog", LEFT, set()),
        ("top left cup", LEFT, set()),
        ("左上角的杯子", LEFT, set()),
    ],
)
def test_sides(there: str, box: Any, phrases: set[str]) -> None:
    whole = photo_of(target(there, box), stated_size_px=(100, 100))
    assert swaps_of(whole, exhaustive=True) == phrases
    assert not swaps_of(whole), "where not everything is annotated, the other side may hold one"
    assert not swaps_of(photo_of(target(there, box)), exhaustive=True), "of unknown size"
    assert not swaps_of(photo_of(target(there, box), target("mug", WIDE), stated_size_px=(100, 100)), exhaustive=True)


def test_sides_in_other_units() -> None:
    for units, box in (("unit", (0.0, 0.0, 0.4, 1.0)), ("thousandths", (0.0, 0.0, 400.0, 999.0))):
        assert swaps_of(photo_of(target("left cup", box), units=units), exhaustive=True) == {"right cup"}


def referring_set(count: int) -> list[Candidate]:
    """Photos with one to nine things of one of six kinds, in one or two languages."""
    rng = random.Random(0)
    names = [
        ["elephant", "大象"],
        ["bus", "公交车"],
        ["pizza", "披萨"],
        ["umbrella", "伞"],
        ["toothbrush", "牙刷"],
        ["kite", "风筝"],
    ]
    said = (
        ["big {}", "small {}", "{} in front", "the {}", "red {}"],
        ["大的{}", "小的{}", "前面的{}", "这{}", "红色的{}"],
    )

    def phrase(i: int) -> str:
        language = rng.randrange(2)
        return rng.choice(said[language]).format(names[i % 6][language])

    return [photo_of(*(phrase(i) for _ in range(rng.choice((1, 1, 2, 9)))), image=f"{i}.jpg") for i in range(count)]


def gather(candidates: Sequence[Candidate], *, exhaustive: bool = False) -> Vocabulary:
    vocabulary = Vocabulary(WORDS, exhaustive=exhaustive)
    for candidate in candidates:
        vocabulary.add(candidate)
    return vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("exhaustive", [False, True])
def test_the_share_is_reached(share: float, exhaustive: bool) -> None:
    candidates = referring_set(1200)
    vocabulary, settings, counts = (
        gather(candidates, exhaustive=exhaustive),
        NegativeSettings(share=share),
        Counter[str](),
    )
    targets = [
        target for each in candidates for target in (*each.targets, *choose_absent(each, vocabulary, settings, counts))
    ]
    reached = sum(not target.boxes_xyxy for target in targets) / len(targets)
    assert reached == pytest.approx(share, abs=0.02)
    report = negatives_report(vocabulary, settings, counts)
    assert report["share_reached"] == pytest.approx(reached, abs=1e-4) and report["missed"] == 0
    assert sum(report["added"].values()) == sum(not target.boxes_xyxy for target in targets)
    assert report["added"]["phrase" if exhaustive else "class"] == 0 < report["added"]["attribute"]


def test_absent_targets_of_the_user_and_photos_that_take_none_are_made_up_for() -> None:
    classes = ["bus", "banana", "kite", "fork", "laptop", "bed", "boat"]
    absent, broken = Target("zebra", "en", ()), Problem("box", "bad_field", "?", "x")
    candidates = [
        photo_of("dog", classes[i % 7], *[absent] * (i % 5 == 0), image=f"{i}.jpg", problems=(broken,) * (i % 2))
        for i in range(1500)
    ]
    vocabulary, settings = gather(candidates, exhaustive=True), NegativeSettings(share=0.3)
    targets = [
        target
        for each in candidates
        for target in (*each.targets, *choose_absent(each, vocabulary, settings, Counter()))
    ]
    assert sum(not target.boxes_xyxy for target in targets) / len(targets) == pytest.approx(0.3, abs=0.02)
    assert not any(choose_absent(each, vocabulary, settings, Counter()) for each in candidates if each.problems)


def test_what_cannot_be_reached_is_said() -> None:
    candidates = [photo_of("raccoon", image=f"{i}.jpg") for i in range(50)] + [photo_of("where to sit?", image="q.jpg")]
    vocabulary, settings, counts = gather(candidates), NegativeSettings(share=0.5), Counter[str]()
    assert not any(choose_absent(candidate, vocabulary, settings, counts) for candidate in candidates)
    report = negatives_report(vocabulary, settings, counts)
    assert report["share_reached"] == 0 and report["missed"] > 40 and not any(report["added"].values())
    assert report["photos_not_understood"] == report["phrases_not_understood"] == 1
    assert report["unknown_words"] == {"sit": 1}


def test_kinds_are_weighed_and_none_is_made_with_weight_0() -> None:
    candidates = [photo_of("red bus", image=f"{i}.jpg") for i in range(300)] + [photo_of("banana", image="b.jpg")] * 30

    def made(**kinds: float) -> Counter[str]:
        counts: Counter[str] = Counter()
        vocabulary = gather(candidates)
        for candidate in candidates:
            choose_absent(candidate, vocabulary, NegativeSettings(share=0.5, kinds=kinds), counts)
        return counts

    assert made(phrase=1)["attribute"] == 0 < made(phrase=1)["phrase"]
    assert made(attribute=1)["phrase"] == 0 < made(attribute=1)["attribute"]
    weighed = made(phrase=1, attribute=3)
    assert weighed["attribute"] > 2 * weighed["phrase"] > 0
    assert set(+made(**{"class": 1})) == {"missed"}


def test_the_language_does_not_tell_what_is_absent() -> None:
    candidates = referring_set(600)
    vocabulary = gather(candidates)
    for candidate in candidates:
        languages = {target.language for target in candidate.targets}
        for absent in choose_absent(candidate, vocabulary, NegativeSettings(share=0.6), Counter()):
            assert absent.language in languages and (absent.language == "en") == absent.phrase.isascii()


def test_nothing_twice_in_a_photo() -> None:
    candidates = referring_set(300)
    vocabulary = gather(candidates)
    for candidate in candidates:
        found = [t.phrase for t in choose_absent(candidate, vocabulary, NegativeSettings(share=0.9), Counter())]
        assert len(set(found)) == len(found)


def test_order_workers_and_a_restart_make_no_difference() -> None:
    candidates = referring_set(300)
    settings = NegativeSettings(share=0.4, seed=3)
    vocabulary, reversed_vocabulary = gather(candidates), gather(candidates[::-1])
    stored = json.dumps(vocabulary.to_json(), ensure_ascii=False)
    assert stored == json.dumps(reversed_vocabulary.to_json(), ensure_ascii=False)
    again = Vocabulary.from_json(json.loads(stored), load_lexicon(None))
    assert json.dumps(again.to_json(), ensure_ascii=False) == stored
    first = {each.image: choose_absent(each, vocabulary, settings, Counter()) for each in candidates}
    assert first == {each.image: choose_absent(each, again, settings, Counter()) for each in reversed(candidates)}
    other_seed = NegativeSettings(share=0.4, seed=4)
    assert first != {each.image: choose_absent(each, vocabulary, other_seed, Counter()) for each in candidates}


def test_none_are_added_by_default() -> None:
    candidates = referring_set(20)
    vocabulary, settings = gather(candidates), NegativeSettings()
    assert not any(choose_absent(each, vocabulary, settings, Counter()) for each in candidates)


def test_counts_in_bounded_memory_do_not_depend_on_the_order() -> None:
    rng = random.Random(5)
    texts = [str(rng.randrange(3000)) for _ in range(20_000)]
    few, same, all_counts = BoundedCounts(100), BoundedCounts(100), Counter(texts)
    for text in texts:
        few.add(text)
    for text in sorted(texts):
        same.add(text)
    assert few.items() == same.items() and len(few.items()) == 100
    assert all(all_counts[text] == count for text, count in few.items())


@pytest.mark.parametrize(
    ("phrase", "exhaustive"),
    [
        ("no helmet", True),
        ("未戴安全帽", True),
        ("others", True),
        ("_background_", True),
        ("7", False),
        ("red", True),
        ("the thing", False),
        ("person", False),
        ("which dog is sleeping?", False),
        ("a dog " * 20, True),
    ],
)
def test_phrases_that_are_never_used(phrase: str, exhaustive: bool) -> None:
    vocabulary = gather([photo_of(phrase)], exhaustive=exhaustive)
    assert not vocabulary.to_json()["phrases"]


def test_words_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.yaml"
    path.write_text(
        "synonyms:\n  - [dog, azulejo, 汪汪]\n  - [coupler, 车钩]\n  - [police dog]\n"
        "parents:\n  rolling stock: [train, bogie]\ntogether:\n  - [coupler, train]\n",
        encoding="utf-8",
    )
    words = load_lexicon(path)

    def absent(there: str, phrase: str) -> bool:
        photo = read_photo(photo_of(there), (), False, words)
        return not isinstance(photo, str) and not photo.may_show(read_meaning(phrase, words), words)

    assert not absent("狗", "azulejo") and not absent("小狗", "汪汪") and not absent("dog", "police dogs")
    assert (
        not absent("Rolling stock", "火车") and not absent("two bogies", "rolling-stock") and not absent("火车", "车钩")
    )
    assert absent("车钩", "banana") and absent("banana", "a red coupler")
    assert not may_be_absent("banana", photo_of("车钩")), "unknown without the file"
    signatures = [NegativeSettings(synonyms=file).signature() for file in (None, path)]
    assert signatures[0] != signatures[1] and json.dumps(signatures)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        "[dog, cat]",
        "synonyms: dog",
        "synonyms: [dog, cat]",
        "synonyms: [[on, switch]]",
        "synonyms: [['...', dog]]",
        "synonym: [[dog, cat]]",
        "parents: {dog: cat}",
        "parents: [dog]",
        "commonplace: {dog: 1}",
        "synonyms: [[dog",
        "a: &a [*a]",
        "",
    ],
)
def test_a_bad_file_of_words(tmp_path: Path, content: str) -> None:
    path = tmp_path / "synonyms.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"synonyms\.yaml"):
        NegativeSettings(share=0.1, synonyms=path).check()


def test_a_missing_file_of_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: No such file"):
        NegativeSettings(synonyms=tmp_path / "none.yaml").check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": -0.1}, "found -0.1; expected 0"),
        ({"share": 1.0}, "expected 0"),
        ({"share": float("nan")}, "found nan; expected 0"),
        ({"kinds": {"colour": 1}}, "expected class, phrase, attribute"),
        ({"kinds": {"class": -1}}, "weights"),
        ({"kinds": {"class": float("nan")}}, "weights"),
        ({"kinds": dict.fromkeys(KINDS, 0)}, "not all of them 0"),
        ({"kinds": {}}, "not all of them 0"),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        NegativeSettings(**fields).check()
