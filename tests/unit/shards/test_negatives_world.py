"""Random photos of a small world whose truth is known: no absent target is ever true of its photo."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest

from cogvlm_ft.grounding.targets import Box, Target, Turn
from cogvlm_ft.shards.negatives import NegativeSettings, Vocabulary, choose_absent, load_lexicon
from cogvlm_ft.shards.packing.candidates import Candidate, Problem

SIZE_PX = (200, 100)
WORDS = load_lexicon(None)

# Names (English, Chinese) and the kinds of things they are true of.
NOUNS: dict[str, tuple[str, ...]] = {}
for kind, names in {
    "dog": "dog puppy corgi 狗 小狗 犬 labradoodle",  # no list knows the last one
    "cat": "cat kitten 猫 猫咪",
    "elephant": "elephant 大象",
    "giraffe": "giraffe 长颈鹿",
    "bus": "bus 公交车 公共汽车",
    "truck": "truck lorry 卡车 货车",
    "bicycle": "bicycle bike 自行车",
    "boat": "boat canoe 船 小船",
    "cup": "cup mug 杯子 马克杯",
    "vase": "vase 花瓶",
    "apple": "apple 苹果",
    "banana": "banana 香蕉",
    "pizza": "pizza 披萨",
    "umbrella": "umbrella parasol 伞 雨伞",
    "laptop": "laptop 笔记本电脑",
    "sofa": "sofa couch 沙发",
    "toothbrush": "toothbrush 牙刷",
    "kite": "kite 风筝",
    "man": "man 男人",
    "woman": "woman 女人",
    "tree": "tree 树",
}.items():
    NOUNS |= {name: (kind,) for name in names.split()}
NOUNS |= dict.fromkeys(["person", "人"], ("man", "woman"))
NOUNS |= dict.fromkeys(["animal", "动物"], ("dog", "cat", "elephant", "giraffe"))
NOUNS |= dict.fromkeys(["pet", "宠物"], ("dog", "cat"))
NOUNS |= dict.fromkeys(["vehicle", "车"], ("bus", "truck", "bicycle", "boat"))
NOUNS |= dict.fromkeys(["food", "食物"], ("apple", "banana", "pizza"))
NOUNS |= dict.fromkeys(["fruit", "水果"], ("apple", "banana"))
KINDS = sorted({kind for kinds in NOUNS.values() for kind in kinds})
COMMON = ("man", "woman", "tree")

COLOURS = {"red": "红", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫", "black": "黑", "white": "白"}
SIDES = {"left": "左边", "right": "右边"}
NUMBERS = {
    2: ("two", "两"),
    3: ("three", "三"),
    4: ("four", "四"),
    5: ("five", "五"),
    6: ("six", "六"),
    7: ("seven", "七"),
    8: ("eight", "八"),
    9: ("nine", "九"),
}


class Thing(NamedTuple):
    kind: str
    colour: str
    side: str
    box: Box


class Photo(NamedTuple):
    candidates: list[Candidate]
    things: list[Thing]

    def each(self) -> list[tuple[Candidate, list[Candidate]]]:
        """Every candidate with the others."""
        return [(one, [other for other in self.candidates if other is not one]) for one in self.candidates]


class Said(NamedTuple):
    """A phrase taken apart. It is true of a photo that holds `number` such things."""

    kinds: tuple[str, ...]
    colour: str | None = None
    side: str | None = None
    number: int = 1

    def fits(self, thing: Thing) -> bool:
        good_colour, good_side = self.colour in (None, thing.colour), self.side in (None, thing.side)
        return thing.kind in self.kinds and good_colour and good_side

    def is_true(self, things: Sequence[Thing]) -> bool:
        return sum(map(self.fits, things)) >= self.number


def is_chinese(word: str) -> bool:
    return not word.isascii()


def wordings(noun: str, said: Said) -> list[str]:
    """Every way in which this world puts it."""
    if is_chinese(noun):
        colours = [f"{COLOURS[said.colour]}色的", f"{COLOURS[said.colour]}色"] if said.colour else [""]
        sides = [f"{SIDES[said.side]}的"] if said.side else [""]
        numbers = [f"{NUMBERS[said.number][1]}个", f"{said.number}个"] if said.number > 1 else ["", "一个"]
        return [f"{number}{side}{colour}{noun}" for number in numbers for side in sides for colour in colours]
    nouns = [f"{noun}{'es' if noun == 'bus' else 's'}", noun.upper()] if said.number > 1 else [noun, noun.title()]
    texts = [f"{said.colour} {text}" if said.colour else text for text in nouns]
    if said.side:
        texts = [f"{said.side} {text}" for text in texts] + [f"{text} on the {said.side}" for text in texts]
    starts = [f"{NUMBERS[said.number][0]} ", f"the {said.number} "] if said.number > 1 else ["", "the ", "a "]
    return [start + text for start in starts for text in texts]


def everything_said() -> dict[str, Said]:
    said: dict[str, Said] = {}
    for noun, kinds in NOUNS.items():
        for colour in (None, *COLOURS):
            for side in (None, *SIDES):
                for number in (1, *NUMBERS):
                    meaning = Said(kinds, colour, side, number)
                    said |= dict.fromkeys(wordings(noun, meaning), meaning)
    return said


SAID = everything_said()


def make_things(rng: random.Random) -> list[Thing]:
    """Some of them alike but for one property."""
    things: list[Thing] = []
    for _ in range(rng.randint(1, 5)):
        kind = rng.choice(things).kind if things and rng.random() < 0.4 else rng.choice(KINDS)
        colour = rng.choice(things).colour if things and rng.random() < 0.4 else rng.choice(list(COLOURS))
        side = rng.choice(list(SIDES))
        x0 = rng.uniform(0, 80) + (100 if side == "right" else 0)
        things.append(Thing(kind, colour, side, (x0, 10.0, x0 + 15, 40.0)))
    return things


def describe(rng: random.Random, thing: Thing, things: Sequence[Thing]) -> Target:
    """A phrase that is true of the thing; with a number, of all things it fits."""
    noun = rng.choice([noun for noun, kinds in NOUNS.items() if thing.kind in kinds])
    colour = thing.colour if rng.random() < 0.5 else None
    side = thing.side if rng.random() < 0.3 else None
    said = Said(NOUNS[noun], colour, side)
    boxes: tuple[Box, ...] = (thing.box,)
    fitting = [other for other in things if said.fits(other)]
    if len(fitting) > 1 and rng.random() < 0.6:
        said, boxes = said._replace(number=len(fitting)), tuple(other.box for other in fitting)
    return Target(rng.choice(wordings(noun, said)), "zh" if is_chinese(noun) else "en", boxes)


def referring_photo(rng: random.Random, number: int) -> Photo:
    """Most things have a phrase, others are spoken of elsewhere; of what is commonplace nothing may be said."""
    things = make_things(rng)
    targets: list[Target] = []
    turns: list[Turn] = []
    described: list[str] = []
    elsewhere: list[Target] = []
    for thing in things:
        target, place = describe(rng, thing, things), rng.random()
        if not targets or place < 0.7:
            targets.append(target)
        elif place < 0.8:
            described.append(f"next to it we see {target.phrase}, or so")
        elif place < 0.9:
            turns.append(Turn(f"Where is {target.phrase}?", "[[000,000,100,100]]"))
        elif thing.kind not in COMMON:
            elsewhere.append(target)
    if described:
        targets[0] = replace(targets[0], description="; ".join(described))
    image = f"{number}.jpg"
    candidates = [Candidate(image, None, "x", tuple(targets), tuple(turns), SIZE_PX)]
    if elsewhere:
        candidates.append(Candidate(image, f"{number} again", "x", tuple(elsewhere), (), SIZE_PX))
    return Photo(candidates, things)


def detection_photo(name_of: Callable[[random.Random, Thing], str]) -> Callable[[random.Random, int], Photo]:
    """Every thing has its class; some are only a crowd."""

    def make(rng: random.Random, number: int) -> Photo:
        things = make_things(rng)
        boxes: dict[str, list[Box]] = {}
        crowds = []
        for thing in things:
            name = name_of(rng, thing)
            if boxes and rng.random() < 0.1:
                crowds.append(Problem("box", "crowd", f"{name!r}: a region around a crowd, not one object", "x"))
            else:
                boxes.setdefault(name, []).append(thing.box)
        targets = [Target(name, "zh" if is_chinese(name) else "en", tuple(row)) for name, row in boxes.items()]
        return Photo(
            [Candidate(f"{number}.jpg", None, "x", tuple(targets), (), SIZE_PX, problems=tuple(crowds))], things
        )

    return make


CLASS_NAMES = {
    kind: [noun for noun, kinds in NOUNS.items() if kinds == (kind,) and noun != "labradoodle"] for kind in KINDS
}
WORLDS = {
    "referring": (False, referring_photo),
    "classes": (True, detection_photo(lambda rng, thing: CLASS_NAMES[thing.kind][0])),
    "classes in two languages": (True, detection_photo(lambda rng, thing: rng.choice(CLASS_NAMES[thing.kind]))),
    "classes with colours": (True, detection_photo(lambda rng, thing: f"{thing.colour} {CLASS_NAMES[thing.kind][0]}")),
    "classes with sides": (
        True,
        detection_photo(lambda rng, thing: f"{SIDES[thing.side]}的{CLASS_NAMES[thing.kind][-1]}"),
    ),
}


def make_photos(world: str, count: int) -> list[Photo]:
    rng = random.Random(world)
    return [WORLDS[world][1](rng, number) for number in range(count)]


def gather(photos: Sequence[Photo], *, exhaustive: bool) -> Vocabulary:
    vocabulary = Vocabulary(WORDS, exhaustive=exhaustive)
    for photo in photos:
        for candidate, others in photo.each():
            vocabulary.add(candidate, others)
    return vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_nothing_that_is_there_is_called_absent(world: str) -> None:
    photos = make_photos(world, 2000)
    vocabulary = gather(photos, exhaustive=WORLDS[world][0])
    settings, counts = NegativeSettings(share=0.7), Counter[str]()
    for photo in photos:
        for candidate, others in photo.each():
            for target in choose_absent(candidate, vocabulary, settings, counts, others):
                assert not target.boxes_xyxy
                assert not SAID[target.phrase].is_true(photo.things), (target.phrase, photo)
    assert counts.total() - counts["missed"] > 7000
    if world in ("referring", "classes with colours", "classes with sides"):
        assert counts["attribute"] > 1000


def test_the_world_is_hard() -> None:
    """Phrases that the photo does not have word for word are true of it again and again."""
    photos = make_photos("referring", 500)
    phrases = sorted({target.phrase for photo in photos for target in photo.candidates[0].targets})
    rng = random.Random(0)
    num_wrong = 0
    for photo in photos:
        mentioned = {target.phrase for candidate in photo.candidates for target in candidate.targets}
        drawn = rng.choice([phrase for phrase in phrases if phrase not in mentioned])
        num_wrong += SAID[drawn].is_true(photo.things)
    assert num_wrong > 15


def test_words_in_no_list_are_never_trusted() -> None:
    """Not as an absent target, and not to say what a photo shows."""
    photos = make_photos("referring", 2000)
    vocabulary = gather(photos, exhaustive=False)
    unknown = dict(vocabulary.unknown_words())
    assert set(unknown) == {"labradoodle"} and unknown["labradoodle"] > 3
    assert not any(
        "labradoodle" in phrase.casefold() for rows in vocabulary.to_json()["phrases"].values() for phrase, _ in rows
    )
    alone = [photo.candidates for photo in photos if len(photo.candidates[0].targets) == 1]
    alone = [row for row in alone if "labradoodle" in row[0].targets[0].phrase.casefold()]
    for first, *others in alone:
        assert not choose_absent(first, vocabulary, NegativeSettings(share=0.7), Counter(), others)
    assert alone
