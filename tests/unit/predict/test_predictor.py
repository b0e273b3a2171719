"""Asking a model that knows its answers: boxes, confidences, steps, second looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_folder import write_run
from taught_model import (
    CAT,
    DOG,
    DOG_BOX,
    FOUND,
    MANY_BOXES,
    MAX_NEW_TOKENS,
    NOBODY,
    NOT_FOUND,
    SMALL_BOX,
    STEPS,
    WHAT,
    WHERE_MANY,
    WHERE_SMALL,
    WHO,
    teach,
)

from cogvlm_ft.checkpoints.choice import TILES_FILE, save_kept_boxes
from cogvlm_ft.data.frames import photo_frame
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.export.export import export_checkpoint
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer, load_model
from cogvlm_ft.predict.files import answer_questions, question_of, reply_fields
from cogvlm_ft.predict.predictor import (
    Asking,
    FoundBox,
    Predictor,
    Reply,
    _take_second,
    choose_wording,
    draw_replies,
    load_predictor,
)
from cogvlm_ft.predict.steps import conversation_turns, read_phrases, target_turns
from cogvlm_ft.tile_settings import TilesConfig

pytestmark = pytest.mark.slow  # some seconds of training before the first test


@pytest.fixture(scope="module")
def folder(tokenizer: CogVLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(tokenizer, tmp_path_factory.mktemp("taught"))


def predictor(folder: Path, **asking: object) -> Predictor:
    return load_predictor(folder, Asking(max_new_tokens=MAX_NEW_TOKENS, **asking))  # type: ignore[arg-type]


def photo(width: int = 200, height: int = 100) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def test_boxes_are_in_pixels_of_each_photo_and_have_a_confidence(folder: Path) -> None:
    rows = predictor(folder).ask([photo(), photo(400, 300)], [[WHERE_SMALL, WHO], [WHERE_MANY]])
    small, who, many = rows[0][0], rows[0][1], rows[1][0]
    assert (small.text, who.text, many.text) == (SMALL_BOX, NOBODY, MANY_BOXES)
    [box] = small.boxes or ()
    assert box.xyxy == pytest.approx((100.1, 50.05, 108.1, 54.05))
    assert box.confidence is not None and 0.8 < box.confidence <= 1
    assert who.boxes is None and not who.not_found
    assert [b.xyxy for b in many.boxes or ()] == [
        pytest.approx((0.2, 0.15, 200.2, 150.15)),
        pytest.approx((240.2, 180.15, 256.2, 192.15)),
    ]


def test_readings_and_letterbox(folder: Path) -> None:
    [[lower]] = predictor(folder, reading="official").ask([photo()], [[WHERE_SMALL]])
    assert lower.boxes and lower.boxes[0].xyxy == (100, 50, 108, 54)
    [[framed]] = predictor(folder, resize="letterbox").ask([photo()], [[WHERE_SMALL]])  # a square of 200, 48 px above
    assert framed.boxes and framed.boxes[0].xyxy == pytest.approx((100.1, 52.1, 108.1, 60.1))


def test_a_conversation_tells_the_model_what_it_replied(folder: Path) -> None:
    asked = predictor(folder, wording="conversation")
    turns = target_turns([DOG, CAT], asked.wording)
    assert [len(turn.history) for turn in turns] == [0, 1, 2]
    [first, *others], [lone] = asked.ask_turns([photo(), photo()], [turns, [Turn(WHO, "")]])
    assert first.text == FOUND and lone.text == NOBODY
    by_phrase = {turn.target.phrase: reply for turn, reply in zip(turns[1:], others, strict=True) if turn.target}
    assert by_phrase[DOG].text == DOG_BOX and [b.phrase for b in by_phrase[DOG].boxes or ()] == [DOG]
    assert by_phrase[CAT].text == NOT_FOUND and by_phrase[CAT].not_found and by_phrase[CAT].boxes == ()
    assert (by_phrase[CAT].not_found_prob or 0) > 0.5 > (by_phrase[DOG].not_found_prob or 0)


def test_a_question_of_ones_own_is_followed_by_one_for_each_thing_it_named(folder: Path) -> None:
    asked = predictor(folder, wording="conversation")
    turns, nothing = conversation_turns(asked, [photo(), photo()], [WHAT, WHO])
    assert turns[0].prompt == WHAT and len(turns) == 3
    assert [turn.prompt for turn in nothing] == [WHO]
    [replies] = asked.ask_turns([photo()], [turns])
    assert replies[0].text == FOUND and sorted(reply.text for reply in replies[1:]) == sorted([DOG_BOX, NOT_FOUND])
    with pytest.raises(ConfigError, match="style refer"):
        conversation_turns(predictor(folder), [photo()], [WHAT])


def test_questions_of_every_kind_in_one_batch(folder: Path) -> None:
    asked = predictor(folder, wording="conversation")
    steps, plain = question_of(WHAT), question_of(WHO)
    in_steps = [replace(question, in_steps=True) for question in (steps, plain)]
    rows = [[plain, in_steps[0]], [in_steps[1], question_of(targets=[DOG, CAT]), question_of(WHERE_SMALL)]]
    found = answer_questions(asked, [photo(), photo()], rows)
    texts = [[[reply.text for reply in part] for part in row] for row in found]
    assert [[len(part) for part in row] for row in texts] == [[1, 3], [1, 3, 1]]
    assert texts[0][0] == texts[1][0] == [NOBODY] and texts[1][2] == [SMALL_BOX]
    assert texts[0][1] == texts[1][1] and sorted(texts[0][1]) == sorted([FOUND, DOG_BOX, NOT_FOUND])


def test_step_wise_answers_name_the_box_of_each_line(folder: Path) -> None:
    asked = predictor(folder, wording="steps")
    [[reply]] = asked.ask_turns([photo()], [target_turns([DOG, CAT], asked.wording)])
    assert reply.text == STEPS and not reply.not_found
    assert [(box.phrase, box.xyxy) for box in reply.boxes or ()] == [(DOG, pytest.approx((20.1, 20.05, 60.1, 40.05)))]


def test_targets_are_asked_for_in_the_order_given() -> None:
    phrases = ["dog", "cat", "bird", "cow", "car"]
    for wording in ("box", "conversation"):
        turns = target_turns(phrases, load_wording(wording))
        assert [turn.target.phrase for turn in turns if turn.target and turn.target.phrase in phrases] == phrases
    [steps] = target_turns(phrases, load_wording("steps"))
    assert ", ".join(phrases) in steps.prompt


def test_a_checkpoint_and_a_run_are_asked_in_the_words_of_their_training(
    folder: Path, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    model = load_model(folder)
    settings = {"model.path": "gone", "data.shards": "gone", "output_dir": "gone", "data.wording": "conversation"}
    checkpoint = write_run(tmp_path / "run", model.config, tokenizer, model.named_parameters(), settings)
    [[expected]] = predictor(folder).ask([photo()], [[WHERE_SMALL]])
    for path in (checkpoint, tmp_path / "run"):
        asked = predictor(path)
        assert asked.weights == checkpoint and asked.wording == load_wording("conversation")
        assert asked.ask([photo()], [[WHERE_SMALL]])[0][0].text == expected.text
    assert predictor(checkpoint, wording="steps").wording.name == "steps"
    export_checkpoint(checkpoint, tmp_path / "exported", torch.float32)
    assert predictor(tmp_path / "exported").wording == load_wording("conversation")
    assert predictor(folder).wording.name == "box", "not known"
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"--model .*expected a model folder, a checkpoint such as"):
            predictor(wrong)


@pytest.mark.parametrize(
    ("trained", "in_steps", "chosen"),
    [
        ("region", False, "region"),
        ("steps", True, "steps"),
        ("box", True, "conversation"),
        (None, True, "conversation"),
    ],
)
def test_which_wording_is_asked_in(trained: str | None, in_steps: bool, chosen: str) -> None:
    known = load_wording(trained) if trained else None
    assert choose_wording(Asking(in_steps=in_steps), known).name == chosen
    assert choose_wording(Asking(in_steps=in_steps, wording="detection"), known).name == "detection"


def test_a_cut_answer_is_reported_with_the_boxes_that_it_closed(folder: Path) -> None:
    asked = load_predictor(folder, Asking(max_new_tokens=24))
    [[reply]] = asked.ask([photo()], [[WHERE_MANY]])
    assert reply.truncated and reply.text != MANY_BOXES and len(reply.boxes or ()) == 1
    [[whole]] = load_predictor(folder, Asking()).ask([photo()], [[WHERE_MANY]])
    assert not whole.truncated and whole.text == MANY_BOXES


def test_phrases_are_read_back_from_first_answers() -> None:
    wording = load_wording("conversation")
    assert read_phrases("共找到3处：红色的车、狗。", wording) == ["红色的车", "狗"]
    assert read_phrases("Found 2: a dog, the left cat. ", wording) == ["a dog", "the left cat"]
    assert read_phrases("Found some", wording) == read_phrases(NOT_FOUND, wording) == []


def test_wordings_that_ask_about_boxes_are_refused() -> None:
    with pytest.raises(ConfigError, match="asks about boxes"):
        target_turns([DOG], load_wording("region"))


def test_a_second_look_is_the_question_about_that_part_of_the_photo(folder: Path) -> None:
    """Small boxes only; the part cut out by hand, asked as a photo of its own, has the same answer, moved."""
    picture = photo(800, 400)
    [[plain]] = predictor(folder).ask([picture], [[WHERE_MANY]])
    [[reply]] = predictor(folder, zoom_patches=2).ask([picture], [[WHERE_MANY]])
    large, small = reply.boxes or ()
    assert reply.text == plain.text and plain.boxes
    assert (large, large.zoomed) == (plain.boxes[0], False)
    # the first look: (480.4, 240.2, 512.4, 256.2), 0.1 patches; half of the photo is the 4 patches that are wanted
    cut = picture.crop((296, 148, 696, 348))
    [[alone]] = predictor(folder).ask([cut], [[WHERE_MANY]])
    moved = [(x0 + 296, y0 + 148, x1 + 296, y1 + 148) for x0, y0, x1, y1 in (box.xyxy for box in alone.boxes or ())]
    nearest = min(moved, key=lambda box: abs((box[0] + box[2]) / 2 - 496.4))
    assert small.zoomed and small.xyxy == pytest.approx(nearest) and small.xyxy != plain.boxes[1].xyxy
    assert small.confidence == pytest.approx((alone.boxes or ())[moved.index(nearest)].confidence, abs=1e-4)


def test_tiles_are_asked_as_photos_of_their_own_and_their_boxes_merged(folder: Path) -> None:
    """The model answers the same about every part; boxes of tiles that overlap are one."""
    picture = photo(800, 400)
    tiles = TilesConfig(side_px=500, overlap=0.2)
    [[plain, first]] = predictor(folder).ask([picture], [[WHERE_MANY, "the left dog?"]])
    [[reply, placed]] = predictor(folder, tiles=tiles).ask([picture], [[WHERE_MANY, "the left dog?"]])
    assert placed.text == first.text, "a question that names a place is asked about the whole photo"
    assert placed.num_duplicates == 0 and places(placed) == places(first)
    alone = []
    for x0 in (0, 300):
        [[part]] = predictor(folder).ask([picture.crop((x0, 0, x0 + 500, 400))], [[WHERE_MANY]])
        alone += [(a + x0, b, c + x0, d) for a, b, c, d in (box.xyxy for box in part.boxes or ())]
    given = len(alone) + len(plain.boxes or ())
    assert (reply.num_looks, placed.num_looks) == (3, 1)
    assert reply_fields(reply)["looks"] == 3 and "looks" not in reply_fields(placed)
    assert reply.boxes and len(reply.boxes) + reply.num_duplicates == given
    assert reply.num_duplicates or {box.xyxy for box in reply.boxes} >= set(alone)
    [[large]] = predictor(folder, tiles=TilesConfig(side_px=800)).ask([picture], [[WHERE_MANY]])
    assert large.text == plain.text and places(large) == places(plain)
    strict = predictor(folder, tiles=tiles, min_confidence=1.0)
    [[none, placed]] = strict.ask([picture], [[WHERE_MANY, "the left dog?"]])
    assert none.not_found and none.text in strict.wording.not_found_sentences and none.boxes == ()
    assert none.num_removed == len(reply.boxes) and placed.text == first.text, "only answers about tiles lose boxes"
    save_kept_boxes(KeptBoxes(0.1, only_best=True), folder)
    [[best]] = predictor(folder, tiles=tiles).ask([picture], [[WHERE_MANY]])
    assert places(best) == places(reply)[:1] and best.num_removed == len(reply.boxes) - 1
    assert predictor(folder, tiles=tiles, min_confidence=0.0).kept == KeptBoxes(), "the option replaces the choice"
    (folder / TILES_FILE).write_text('{"min_confidence": 7}')
    with pytest.raises(CheckpointError, match="expected 0 to 1"):
        predictor(folder, tiles=tiles)
    (folder / TILES_FILE).unlink()


def places(reply: Reply) -> list[tuple[float, ...]]:
    return [box.xyxy for box in reply.boxes or ()]


def test_no_second_look_without_a_gain(folder: Path) -> None:
    """A long thin box has few patches, and yet the part around it is the whole photo."""
    asked, frame = predictor(folder, zoom_patches=16), photo_frame((800, 400), "squash")
    assert asked._closer(frame, (0, 100, 700, 110)) is None
    assert asked._closer(frame, (500, 100, 400, 110)) is None, "an inverted box"
    near_edge = asked._closer(frame, (790, 0, 800, 8))
    assert near_edge is not None and near_edge.window_px == (400, 0, 800, 200)


@pytest.mark.parametrize(
    "second, taken",
    [
        ([(12, 12, 22, 22)], (12, 12, 22, 22)),
        ([(40, 40, 50, 50), (13, 13, 20, 20)], (13, 13, 20, 20)),
        ([(200, 200, 210, 210)], None),  # somewhere else
        ([(22, 10, 32, 20)], None),  # the other box of the answer
        ([], None),
        (None, None),
    ],
)
def test_which_box_of_a_second_look_is_taken(second: list | None, taken: tuple | None) -> None:
    first = Reply("q", "a", (FoundBox((10, 10, 20, 20), 0.5, DOG), FoundBox((22, 10, 32, 20), 0.9)), False, None)
    boxes = None if second is None else tuple(FoundBox(box, 0.7, DOG) for box in second)
    found = _take_second(first, 0, Reply("q", "b", boxes, False, None), (10, 10))
    assert found.boxes and found.boxes[1] == first.boxes[1]  # type: ignore[index]
    assert found.boxes[0] == (FoundBox(taken, 0.7, DOG, zoomed=True) if taken else first.boxes[0])  # type: ignore[index]


def test_grammar_holds_turns_about_boxes_and_not_how_a_conversation_begins(folder: Path) -> None:
    asked = predictor(folder, wording="conversation", decoding="grammar")
    [[first, *others]] = asked.ask_turns([photo()], [target_turns([DOG, CAT], asked.wording)])
    assert first.text == FOUND and all(reply.boxes or reply.not_found for reply in others)
    [[held]] = asked.ask([photo()], [[WHO]])
    assert held.text != NOBODY and (held.boxes or held.not_found)


def test_more_questions_than_fit_into_a_pass(folder: Path) -> None:
    prompts = [WHO, WHERE_SMALL] * 10
    [replies, [one]] = predictor(folder).ask([photo(), photo()], [prompts, [WHO]])
    assert [reply.text for reply in replies] == [NOBODY, SMALL_BOX] * 10 and one.text == NOBODY


def test_drawn_pictures_are_bounded() -> None:
    reply = Reply("q", "a", (FoundBox((0, 0, 2000, 1000), 0.5),), False, None)
    drawn = draw_replies(Image.new("RGB", (4000, 2000)), [reply])
    assert drawn.width == 1600 and drawn.height > 800
    assert drawn.getpixel((2, 700)) != drawn.getpixel((2, 300)), "the box ends at 400"
