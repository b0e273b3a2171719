"""Absent targets for annotations of other people, when they are at hand."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.formats.coco import read_coco
from cogvlm_ft.shards.negatives import NegativeSettings, Vocabulary, choose_absent, load_lexicon, negatives_report
from cogvlm_ft.shards.packing.candidates import Candidate

DATA = Path(__file__).parents[3].parent / "shared" / "data"
WORDS = load_lexicon(None)
BOX = (0.0, 0.0, 9.0, 9.0)

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")


def absent_of(
    candidates: Sequence[Candidate], settings: NegativeSettings, *, exhaustive: bool
) -> tuple[list[tuple[Candidate, str]], dict[str, object]]:
    """Every absent phrase with its photo, and the report."""
    vocabulary, counts = Vocabulary(WORDS, exhaustive=exhaustive), Counter[str]()
    for candidate in candidates:
        vocabulary.add(candidate)
    found = [(one, absent.phrase) for one in candidates for absent in choose_absent(one, vocabulary, settings, counts)]
    return found, negatives_report(vocabulary, settings, counts)


@needs_data
def test_no_class_that_is_annotated_in_coco128() -> None:
    path = DATA / "coco128_train" / "coco_json" / "instances_train2017.json"
    content = json.loads(path.read_bytes())
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    annotated: dict[str, set[str]] = defaultdict(set)
    for annotation in content["annotations"]:  # with the crowds
        annotated[files[annotation["image_id"]]].add(names[annotation["category_id"]])
    candidates = [part for part in read_coco(path, path.parent) if isinstance(part, Candidate)]
    for seed in range(20):
        found, report = absent_of(candidates, NegativeSettings(share=0.3, seed=seed), exhaustive=True)
        assert report["share_reached"] == pytest.approx(0.3, abs=0.04) and report["missed"] == 0
        for candidate, phrase in found:
            assert phrase in names.values() and phrase not in annotated[candidate.image]


def refcoco() -> list[Candidate]:
    """Several phrases per thing; the number of the thing is in the name of its mask and stands for its box."""
    content = json.loads((DATA / "refexp_annotations_only" / "refcoco_text" / "testB.json").read_bytes())
    targets: dict[str, list[Target]] = defaultdict(list)
    for item in content["items"]:
        thing = float(item["mask"].split("_")[-2])
        targets[item["image"]].append(Target(item["text"], "en", ((thing, 0.0, thing + 9, 9.0),)))
    return [Candidate(image, None, "x", tuple(found)) for image, found in targets.items()]


SAME = [
    {"plane", "airplane", "aircraft", "jet"},
    {"bike", "bicycle", "cycle", "motorcycle", "moto", "motorbike"},
    {"cat", "kitty", "kitten", "animal"},
    {"cow", "bull", "calf", "ox", "cattle", "animal"},
    {"sheep", "lamb", "goat", "animal"},
    {"elephant", "animal"},
    {"couch", "sofa", "chair", "loveseat"},
    {"tv", "screen", "monitor", "television", "computer", "laptop"},
    {"bear", "teddy", "pooh"},
    {"bus", "van", "truck", "car", "cab", "taxi", "vehicle"},
    {"cup", "glas", "mug", "bowl"},
    {"donut", "doughnut", "cake", "pastry", "dessert"},
    {"luggage", "suitcase", "bag"},
    {"boat", "ship", "sailboat"},
]


@pytest.mark.slow
@needs_data
def test_nothing_of_the_photo_in_refcoco() -> None:
    """Looked up without our lists: no class of COCO, under any name, is in an absent phrase and in the photo."""
    content = json.loads((DATA / "coco128_train" / "coco_json" / "instances_train2017.json").read_bytes())
    nouns = {word for category in content["categories"] for word in stems(category["name"])} - {"light", "hot", "stop"}
    nouns = nouns.union(*SAME)
    settings = NegativeSettings(share=0.3, kinds={"phrase": 1})
    found, report = absent_of(refcoco(), settings, exhaustive=False)
    assert len(found) > 1500 and report["share_reached"] == pytest.approx(0.3, abs=0.03)
    num_named = 0
    for candidate, phrase in found:
        said = {word for own in candidate.targets for word in stems(own.phrase)} & nouns
        asked = stems(phrase) & nouns
        assert not said & asked - {"orange"}, (phrase, candidate)  # the colour and the fruit
        assert not any(said & same and asked & same for same in SAME), (phrase, candidate)
        num_named += bool(asked)
    assert num_named > 1300


def stems(phrase: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall("[a-z]+", phrase.lower())}


@needs_data
def test_nothing_is_made_of_questions_that_no_list_understands() -> None:
    candidates = []
    for path in sorted((DATA / "refexp_toloka").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row["image"], row["question"]) for row in csv.DictReader(file)]
        candidates += [Candidate(image, None, "x", (Target(question, "en", (BOX,)),)) for image, question in rows]
    found, report = absent_of(candidates, NegativeSettings(share=0.3), exhaustive=False)
    assert len(candidates) == 2705 and not found
    assert report["photos_not_understood"] == 2705 and "use" in report["unknown_words"]  # type: ignore[operator]


@needs_data
def test_nothing_is_made_of_long_descriptions() -> None:
    lines = (DATA / "chinese_phrases_annotations_only" / "cap.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    rows = [json.loads(line) for line in lines]
    candidates = [Candidate(row["image"], None, "x", (Target(row["text"], "zh", (BOX,)),)) for row in rows]
    found, report = absent_of(candidates, NegativeSettings(share=0.3), exhaustive=False)
    assert not found and report["photos_not_understood"] == 300


def test_any_text_is_read() -> None:
    """Nothing raises, whatever is in a phrase, a description or the name of a file."""
    rng = random.Random(2)
    parts = [
        "狗",
        "dog",
        "red ",
        "红色的",
        "两只",
        "２",
        "\u0301",
        "\U0001f415",
        "\x00",
        "\n",
        "'s",
        "ﬁsh",
        "ß",
        "の",
        "\u3000",
        "%",
        "第",
    ]
    candidates = []
    for i in range(200):
        texts = ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(3)]
        targets = tuple(Target(text, rng.choice(("zh", "en")), (BOX,), text[::-1]) for text in texts)
        candidates.append(Candidate(f"{i}\udcff.jpg", None, "x", targets))
    for exhaustive in (True, False):
        absent_of(candidates, NegativeSettings(share=0.5), exhaustive=exhaustive)
