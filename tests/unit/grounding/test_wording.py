from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.boxes import bins_from_box, parse_boxes
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.grounding.turns import build_turns
from cogvlm_ft.grounding.wording import WORDING_FILE, LanguageWording, Wording, load_wording, save_wording

DOG = Target("一只狗", "zh", ((86, 540, 400, 760),))
CATS = Target("the cats", "en", ((500, 500, 600, 600), (0, 0, 100, 100)))
NOTHING = Target("the bird", "en", ())
SIZE = (1000, 1000)

GOOD = {"zh": {"prompts": ["{phrase}在哪里?"], "answers": ["{boxes}"], "not_found": "未找到指定目标"}}


def turns_of(targets: list[Target], wording: Wording, *, seed: int = 0, epoch: int = 0, key: str = "k") -> list[Turn]:
    return build_turns(targets, SIZE, wording, seed=seed, epoch=epoch, key=key)


@pytest.mark.parametrize("name", ["box", "description"])
def test_built_in_wordings_have_variety_in_both_languages(name: str) -> None:
    wording = load_wording(name)
    assert wording.name == name
    assert wording.not_found_sentences == ("未找到指定目标", "The specified target was not found.")
    for language in ("zh", "en"):
        prompts = wording.languages[language].prompts
        assert len(set(prompts)) == len(prompts) >= 6
        assert sum("[[x0,y0,x1,y1]]" in prompt for prompt in prompts) == 2


def test_answers_of_the_built_in_wordings() -> None:
    assert [turn.answer for turn in turns_of([DOG], load_wording("box"))] == ["[[086,540,400,760]]"]
    description = load_wording("description")
    assert turns_of([DOG], description)[0].answer == "图片中存在一只狗,所在区域为[[086,540,400,760]]"
    described = replace(DOG, description="一只趴着的黄狗")
    assert turns_of([described], description)[0].answer == "图片中存在一只趴着的黄狗,所在区域为[[086,540,400,760]]"


def test_a_turn_asks_for_its_own_target_and_keeps_the_order_of_boxes() -> None:
    (turn,) = turns_of([CATS], load_wording("box"))
    assert "the cats" in turn.prompt
    assert turn.answer == "[[500,500,600,600;000,000,100,100]]"
    assert turn.target is CATS


def test_an_absent_thing_is_answered_in_the_language_of_the_question() -> None:
    answers = {
        turn.answer for turn in turns_of([NOTHING, replace(NOTHING, language="zh")], load_wording("description"))
    }
    assert answers == {"未找到指定目标", "The specified target was not found."}


def test_turns_depend_on_seed_epoch_and_key_only() -> None:
    wording = load_wording("box")
    targets = [DOG, CATS, NOTHING, replace(DOG, phrase="另一只狗")]
    first = turns_of(targets, wording, seed=3, epoch=1, key="a")
    assert first == turns_of(targets, wording, seed=3, epoch=1, key="a")
    others = [(4, 1, "a"), (3, 2, "a"), (3, 1, "b")]
    assert all(first != turns_of(targets, wording, seed=s, epoch=e, key=k) for s, e, k in others)


def test_the_choice_stays_the_same_in_every_version() -> None:
    """A change here changes the training data of every resumed run."""
    (turn,) = turns_of([DOG], load_wording("box"), seed=1, epoch=2, key="scene-000003")
    assert turn.prompt == "指出一只狗所在的区域。"


def test_over_the_epochs_every_prompt_and_order_is_used() -> None:
    wording = load_wording("box")
    prompts, orders = set(), set()
    for epoch in range(200):
        turns = turns_of([DOG, CATS, NOTHING], wording, epoch=epoch)
        orders.add(tuple(turn.target.phrase for turn in turns if turn.target))
        prompts |= {turn.prompt for turn in turns if turn.target is DOG}
    assert len(orders) == 6
    assert len(prompts) == len(wording.languages["zh"].prompts)


def test_every_answer_reads_back_as_its_boxes() -> None:
    for name in ("box", "description"):
        for turn in turns_of([DOG, CATS], load_wording(name)):
            assert turn.target is not None
            assert parse_boxes(turn.answer) == [bins_from_box(box, SIZE) for box in turn.target.boxes_xyxy]


def test_braces_in_a_phrase_stay_as_they_are() -> None:
    wording = Wording("t", {"zh": LanguageWording(("找{phrase}",), ("{phrase}x{count}: {description} {boxes}",), "无")})
    tricky = replace(DOG, phrase="{boxes}{0}{phrase.__class__}{", description="}{count}")
    (turn,) = turns_of([tricky], wording)
    assert turn.prompt == "找{boxes}{0}{phrase.__class__}{"
    assert turn.answer == "{boxes}{0}{phrase.__class__}{x1: }{count} [[086,540,400,760]]"


def test_a_description_with_its_own_boxes_is_refused() -> None:
    with pytest.raises(DataError, match=r"sample k.*does not read back"):
        turns_of([replace(DOG, description="狗[[001,002,003,004]]")], load_wording("description"))


def test_a_missing_language_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has zh, but sample k has a target in 'en'"):
        turns_of([CATS], write_and_load(tmp_path, GOOD))


def write_and_load(folder: Path, content: object) -> Wording:
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return load_wording(path)


def test_a_file_of_the_user(tmp_path: Path) -> None:
    wording = write_and_load(tmp_path, GOOD)
    wanted = LanguageWording(("{phrase}在哪里?",), ("{boxes}",), "未找到指定目标")
    assert replace(wording.languages["zh"], more="") == wanted
    assert (wording.style, wording.max_boxes, wording.max_targets, wording.box_order) == ("refer", 50, 5, "file")
    assert load_wording(str(tmp_path / "my.yaml")) == wording


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["在哪里?"]}, r"zh.prompts, text 1.*has no \{phrase\}"),
        ({"prompts": ["{phrase}{box}?"]}, "unknown placeholder or a single brace"),
        ({"prompts": ["{phrase}{boxes}"]}, "unknown placeholder or a single brace"),
        ({"prompts": ["{phrase}{"]}, "unknown placeholder or a single brace"),
        ({"prompts": ["{phrase}?", "{{phrase}}?"]}, r"zh.prompts, text 2.*has no \{phrase\}"),
        ({"prompts": []}, "at least one text"),
        ({"prompts": "{phrase}在哪里?"}, "; expected a list"),
        ({"prompts": [{"phrase": None}]}, "In YAML, quote a text"),
        ({"answers": ["在这里"]}, r"zh.answers, text 1.*has no \{boxes\}"),
        ({"answers": ["{boxes}{boxes}"]}, "once and no other"),
        ({"answers": ["[[x0,y0,x1,y1]] {boxes}"]}, "once and no other"),
        ({"answers": ["[{boxes}"]}, "once and no other"),
        ({"answers": ["{boxes} [["]}, "once and no other"),
        ({"answers": ["[{more}{boxes}"]}, "once and no other"),
        (
            {"answers": ["{boxes}", "[{boxes}]"]},
            r"text 2: .* becomes '\[\[\[012.*reads back as no boxes; expected \[\(12, ",
        ),
        ({"more": "{count} of {all}"}, r"zh.more: .*placeholders except \{count\}, \{shown\}"),
        ({"more": " "}, "zh.more: found ' '; expected a sentence"),
        ({"lines": ["{boxes}"]}, r"zh \(style refer\): unknown key lines"),
        ({"not_found": "[[000,000,000,000]]"}, "plain sentence"),
        ({"not_found": "没有{phrase}"}, "plain sentence"),
        ({"not_found": " "}, "expected a sentence"),
        ({"not_found": None}, "expected a sentence"),
        ({"answer": ["{boxes}"]}, "unknown key answer"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_and_load(tmp_path, {"zh": GOOD["zh"] | change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fr": GOOD["zh"]}, "unknown key fr"),
        ({"zh": {"prompts": ["{phrase}"], "answers": ["{boxes}"]}}, "not_found missing"),
        ({"zh": []}, "expected the keys"),
        ({"style": "steps"}, "; expected also zh and/or en"),
        (
            GOOD | {"style": "step"},
            r"style: found 'step'; expected one of refer, detect, describe, steps, conversation",
        ),
        (GOOD | {"style": ["refer"]}, "style: found"),
        (GOOD | {"max_boxes": 0}, "max_boxes: found 0; expected an integer of at least 1"),
        (GOOD | {"max_targets": True}, "max_targets: found True"),
        (GOOD | {"box_order": "random"}, "box_order: found 'random'; expected one of file, left_to_right, large_first"),
        (GOOD | {"style": "steps"}, "zh: lines missing; expected prompts, lines, answers, not_found for style steps"),
        ({"mix": []}, "mix: found .*; expected a list"),
        ({"mix": ["box"], "zh": GOOD["zh"]}, "unknown key zh; expected one of mix, max_boxes"),
        ({"mix": ["box", "boxes"]}, "wording boxes: neither built in"),
        ({"mix": ["mixed"]}, r"my.yaml, mix 1 \(mixed\): this is a mix itself"),
        ({"mix": [7]}, r"my.yaml, mix 1: found 7"),
        ({"mix": [{"wording": "box", "weight": 0}]}, "mix 1.weight: found 0; expected a number above 0"),
        ({"mix": [{"wording": "box", "weight": float("inf")}]}, "mix 1.weight: found inf"),
        ({"mix": [{"wording": "box", "wieght": 2}]}, "unknown key wieght; expected one of wording, weight"),
        (
            {"mix": ["box", GOOD]},
            r"mix 1 \(box\) has zh, en, .*mix 2 has zh; expected the same languages in all parts of a mix",
        ),
        ([], "expected the keys"),
    ],
)
def test_mistakes_in_the_frame_of_a_file_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_and_load(tmp_path, content)


def test_a_file_that_does_not_exist_or_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither built in \(box, conversation, .*, steps\) nor"):
        load_wording("boxes")
    for spoiled in (b"zh: [\xff", b"zh: 2020-99-99", b"[" * 500):
        (tmp_path / "bad.yaml").write_bytes(spoiled)
        with pytest.raises(ConfigError, match="not readable as YAML"):
            load_wording(tmp_path / "bad.yaml")


STEPS = {
    "style": "steps",
    "en": {
        "prompts": ["Find {phrases}; where one is missing say {not_found}"],
        "lines": ["{number}. {phrase} ({count}): {boxes}"],
        "answers": ["{count} found: {phrases}\n{lines}{more}\nend"],
        "not_found": "none",
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lines": ["{phrase}"]}, r"en.lines, text 1.*has no \{boxes\}"),
        ({"lines": ["{boxes}", "{boxes} and [["]}, r"en.lines, text 2.*once and no other double brackets"),
        ({"lines": ["{phrases} {boxes}"]}, r"\{phrases\}; expected only \{boxes\}, \{count\}"),
        ({"answers": ["{count} found"]}, r"en.answers, text 1.*has no \{lines\}"),
        ({"answers": ["[{lines}"], "lines": ["{boxes}"]}, r"Use \{lines\} once"),
        ({"answers": ["{lines}{boxes}"]}, r"\{boxes\}; expected only \{count\}, \{lines\}"),
        ({"prompts": ["What about {phrase}?"]}, r"\{phrase\}; expected only \{not_found\}, \{phrases\}"),
        ({"prompts": [" "]}, "en.prompts, text 1: found an empty text"),
    ],
)
def test_mistakes_in_a_step_wise_file_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    assert write_and_load(tmp_path, STEPS).languages["en"].lines == ("{number}. {phrase} ({count}): {boxes}",)
    with pytest.raises(ConfigError, match=message):
        write_and_load(tmp_path, STEPS | {"en": STEPS["en"] | change})  # type: ignore[operator]


def test_a_mix_of_names_paths_and_wordings_written_out(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    write_and_load(tmp_path / "own", STEPS)
    inline = {
        "style": "detect",
        "max_boxes": 3,
        "en": {"prompts": ["{phrase}?"], "answers": ["{boxes}"], "not_found": "no"},
    }
    content = {"mix": ["own/my.yaml", {"wording": inline, "weight": 2.5}], "box_order": "large_first"}
    wording = write_and_load(tmp_path, content)
    assert [(part.style, part.weight, part.max_boxes, part.box_order) for part in wording.mix] == [
        ("steps", 1.0, 50, "large_first"),
        ("detect", 2.5, 3, "large_first"),
    ]
    assert wording.not_found_sentences == ("none", "no")


def test_the_built_in_mix_holds_every_style() -> None:
    wording = load_wording("mixed")
    assert {part.style for part in wording.mix} == {"refer", "detect", "describe", "steps", "conversation"}
    assert wording.not_found_sentences == ("未找到指定目标", "The specified target was not found.")


def test_some_built_in_questions_say_what_to_answer_when_a_thing_is_absent() -> None:
    for name in ("referring", "detection", "steps", "conversation"):
        for language in load_wording(name).languages.values():
            share = sum("{not_found}" in prompt for prompt in language.prompts) / len(language.prompts)
            assert 0.1 < share < 0.5
            assert len(set(language.prompts)) == len(language.prompts) >= 5


@pytest.mark.parametrize("name", ["box", "conversation", "description", "detection", "mixed", "region", "steps"])
def test_a_saved_wording_is_the_same_without_its_files(name: str, tmp_path: Path) -> None:
    wording = load_wording(name)
    save_wording(wording, tmp_path / WORDING_FILE)
    found = load_wording(tmp_path / WORDING_FILE)
    assert without_names(found) == without_names(wording) and found.name == name


def without_names(wording: Wording) -> Wording:
    return replace(wording, name="", mix=tuple(without_names(part) for part in wording.mix))


def test_limits_and_weights_of_a_mix_are_saved(tmp_path: Path) -> None:
    content = "max_boxes: 7\nbox_order: large_first\nmix: [{wording: steps, weight: 0.5}, box]\n"
    (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
    wording = load_wording(tmp_path / "mine.yaml")
    save_wording(wording, tmp_path / WORDING_FILE)
    found = load_wording(tmp_path / WORDING_FILE)
    assert without_names(found) == without_names(wording) and found.name == "mine.yaml"
    assert {part.max_boxes for part in wording.mix} == {7}
