"""Asking a tiny model about a real shard set, in one process."""

from __future__ import annotations

import io
import json
import tarfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.evaluate import evaluate as evaluation
from cogvlm_ft.evaluate import generate as generation
from cogvlm_ft.evaluate.evaluate import Evaluation, evaluate, save_evaluation
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.evaluate.questions import truth_boxes
from cogvlm_ft.grounding.metrics import score_answer
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, preprocess_image
from cogvlm_ft.runtime.distributed import device
from cogvlm_ft.settings import EvaluateConfig

NUM_PHOTOS = 9  # the split "val" of the fixture `shards`
SEED = 4
SETTINGS = EvaluateConfig(max_samples=None, batch_size=3, max_new_tokens=4, num_pictures=2)
NOT_FOUND = load_wording("box").not_found_sentences


@pytest.fixture
def model(tiny_model: CogVLMForCausalLM) -> CogVLMForCausalLM:
    return tiny_model.to(device())


def reader_of(shards: Path) -> ShardReader:
    return ShardReader(load_index(shards, "val"))


def write_tar(folder: Path, records: dict[str, dict[str, Any] | None]) -> Path:
    """One shard with a 40 x 20 photo per key; None spoils it."""
    photo = io.BytesIO()
    Image.new("RGB", (40, 20), (180, 40, 60)).save(photo, "PNG")
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "val-0.tar", "w", errors="surrogateescape") as tar:
        for key, record in records.items():
            image = photo.getvalue() if record else b"no image"
            for name, data in ((f"{key}.png", image), (f"{key}.json", json.dumps(record or {}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def run(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, wording: str = "box", **settings: Any
) -> Evaluation:
    chosen = replace(SETTINGS, **settings)
    return evaluate(model, tokenizer, reader_of(shards), load_wording(wording), chosen, seed=SEED)


def test_every_turn_of_every_photo_once_in_the_order_of_the_data(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path
) -> None:
    found = run(model, tokenizer, shards)
    reader, wanted = reader_of(shards), []
    for i in range(NUM_PHOTOS):
        record = reader.read(i).record
        turns = turns_of(record, load_wording("box"), seed=SEED, epoch=0)
        wanted += [(record.key, number, turn.prompt, turn.answer) for number, turn in enumerate(turns)]
    assert len(wanted) > 2 * NUM_PHOTOS
    assert [(each.key, each.turn, each.prompt, each.truth) for each in found.predictions] == wanted
    assert [shown.key for shown in found.shown] == [reader.index.key(0), reader.index.key(1)]
    assert [each for shown in found.shown for each in shown.predictions] == [
        each for each in found.predictions if each.key in (reader.index.key(0), reader.index.key(1))
    ]


def test_metrics_of_all_photos(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path) -> None:
    found = run(model, tokenizer, shards)
    truths = [each.truth_boxes_xyxy for each in found.predictions]
    assert found.metrics.keys() >= {
        *("mean_iou", "acc@0.5", "acc@0.75", "false_not_found", "not_found_acc", "unreadable", "text_exact"),
        *("num_present", "num_absent", "num_text", "num_images", "num_bad"),
        *("num_unscored", "num_cut_boxes"),
        *("ap", "grec_f1_iou", "not_found_threshold", "chrf", "mean_iou/language=zh", "acc@0.5/template=refer"),
    }
    for name in ("num_present", "num_absent", "num_text"):  # every turn has one language and one template
        for group in ("language", "template"):
            parts = [value for key, value in found.metrics.items() if key.startswith(f"{name}/{group}=")]
            assert sum(parts) == found.metrics[name]
    assert found.metrics["num_images"] == NUM_PHOTOS
    assert found.metrics["num_bad"] == 0
    assert found.metrics["num_present"] == sum(bool(truth) for truth in truths) > 0
    assert found.metrics["num_absent"] == sum(truth == [] for truth in truths) > 0
    assert found.metrics["num_text"] == sum(truth is None for truth in truths) > 0
    for each in found.predictions:
        assert each.score == score_answer(each.answer, each.truth_boxes_xyxy, (56, 56), NOT_FOUND, each.truth)


def test_answers_are_the_model_s(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path) -> None:
    found = run(model, tokenizer, shards)
    reader = reader_of(shards)
    model.eval()
    for i in (0, NUM_PHOTOS - 1):
        pixels = preprocess_image(reader.read(i).image, 56)[None].to(device())
        mine = [each for each in found.predictions if each.key == reader.index.key(i)]
        with torch.no_grad():
            wanted = generate_answers(model, tokenizer, pixels, [[each.prompt for each in mine]], 4)[0]
        assert [each.answer for each in mine] == [answer.text for answer in wanted]


@pytest.mark.parametrize("batch_size", [1, NUM_PHOTOS, 50])
def test_the_batch_size_changes_nothing(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, batch_size: int
) -> None:
    found, wanted = run(model, tokenizer, shards, batch_size=batch_size), run(model, tokenizer, shards)
    assert found.predictions == wanted.predictions
    assert found.metrics == wanted.metrics


@pytest.mark.parametrize(("max_samples", "num_images"), [(1, 1), (4, 4), (100, NUM_PHOTOS), (None, NUM_PHOTOS)])
def test_the_first_max_samples_photos(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, max_samples: int | None, num_images: int
) -> None:
    found = run(model, tokenizer, shards, max_samples=max_samples)
    assert found.metrics["num_images"] == num_images
    wanted = [reader_of(shards).index.key(i) for i in range(num_images)]
    assert list(dict.fromkeys(each.key for each in found.predictions)) == wanted


def test_the_model_goes_on_in_the_mode_it_was_in(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path
) -> None:
    for mode in (True, False):
        model.train(mode)
        run(model, tokenizer, shards, max_samples=1)
        assert model.training is mode
        assert all(parameter.grad is None for parameter in model.parameters())


TURN = {"turns": [{"prompt": "what is it?", "answer": "a red field"}]}


def test_a_spoiled_photo_is_counted_and_the_others_asked(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    found = run(model, tokenizer, write_tar(tmp_path, {"a": TURN, "b": None, "c": TURN}), batch_size=1)
    assert [each.key for each in found.predictions] == ["a", "c"]
    assert (found.metrics["num_images"], found.metrics["num_bad"], found.metrics["num_text"]) == (2, 1, 2)
    assert [shown.key for shown in found.shown] == ["a", "c"]


def test_nothing_but_spoiled_photos(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    found = run(model, tokenizer, write_tar(tmp_path, {"a": None, "b": None}))
    assert found.predictions == found.shown == []
    assert (found.metrics["num_images"], found.metrics["num_bad"]) == (0, 2)


def test_a_photo_whose_turns_cannot_be_written_is_counted_and_the_others_asked(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    """As in training, where it is a bad sample: its phrase holds double brackets."""
    unusable = {"targets": [{"phrase": "a sign with [[1,2,3,4]]", "boxes_xyxy": [[1, 2, 30, 15]]}]}
    shards = write_tar(tmp_path, {"a": TURN, "b": unusable, "c": TURN})
    found = run(model, tokenizer, shards, wording="description")
    assert [each.key for each in found.predictions] == ["a", "c"]
    assert (found.metrics["num_images"], found.metrics["num_bad"]) == (2, 1)


def test_the_true_text_scores_1(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    """The truth of the second run is what the model said in the first."""
    shards = write_tar(tmp_path / "first", {"a": TURN})
    first = run(model, tokenizer, shards)
    assert first.metrics["text_exact"] == 0
    assert first.predictions[0].answer.strip()
    said = {"turns": [{"prompt": "what is it?", "answer": first.predictions[0].answer}, TURN["turns"][0]]}
    second = run(model, tokenizer, write_tar(tmp_path / "second", {"a": said}))
    assert second.metrics["text_exact"] == 0.5
    assert "mean_iou" not in second.metrics


def test_saved_files(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path) -> None:
    found = run(model, tokenizer, shards)
    for _ in range(2):  # a resumed run writes them again
        save_evaluation(found, tmp_path / "step-1")
    folder = tmp_path / "step-1"
    written = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert written == {**found.metrics, "about": found.about}
    assert json.loads((folder / "curves.json").read_text(encoding="utf-8")) == found.curves
    assert found.curves["not_found"] and all(len(point) == 3 for point in found.curves["not_found"])
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, wanted in zip(lines, found.predictions, strict=True):
        assert line["image_size_px"] == [56, 56]
        truth = wanted.truth_boxes_xyxy
        assert line["truth_boxes_xyxy"] == (None if truth is None else [list(box) for box in truth])
        for name in ("key", "turn", "prompt", "answer", "truth", "boxes_xyxy"):
            assert line[name] == getattr(wanted, name)
        assert line["score"]["iou"] == wanted.score.iou
    pictures = sorted((folder / "pictures").iterdir())
    assert [picture.name for picture in pictures] == [f"{i:02d}-{shown.key}.png" for i, shown in enumerate(found.shown)]
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) >= 56


def test_an_image_that_cannot_be_read_again_is_only_not_drawn(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is read on rank 0 alone, while the others wait."""

    class Failing(ShardReader):
        def read(self, index: int) -> Any:
            if any(frame.name == "_shown" for frame in traceback.extract_stack()) and index == 0:
                raise OSError(5, "Input/output error", "val-0.tar")
            return super().read(index)

    reader = Failing(load_index(shards, "val"))
    found = evaluate(model, tokenizer, reader, load_wording("box"), replace(SETTINGS, max_samples=3), seed=SEED)
    assert found.metrics["num_images"] == 3 and len(found.shown) == 1
    assert "an image of the evaluation cannot be drawn: [Errno 5] Input/output error: 'val-0.tar'" in caplog.text


def test_results_say_what_was_asked_and_how(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path) -> None:
    reader, about = reader_of(shards), {"checkpoint_sha256": "0" * 64}
    first = evaluate(model, tokenizer, reader, load_wording("box"), SETTINGS, seed=SEED, about=about).about
    assert first["data_sha256"] == reader.index.data_sha256 and first["split"] == "val"
    assert (first["wording"], first["protocol"], first["image_size"], first["num_patches"]) == ("box", "ours", 56, 16)
    assert first["checkpoint_sha256"] == "0" * 64
    other = evaluate(model, tokenizer, reader, load_wording("box"), SETTINGS, seed=SEED + 1, about=about).about
    assert {name for name in first if first[name] != other[name]} == {"seed", "questions_sha256"}


def test_protocols_read_and_score_the_same_answers_in_their_own_way(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    shards = write_tar(tmp_path, {"a": {"targets": [DOG, CATS, BIRD]}})
    ours = run(model, tokenizer, shards)
    theirs = run(model, tokenizer, shards, protocol="qwen_vl")
    assert [each.answer for each in theirs.predictions] == [each.answer for each in ours.predictions]
    assert theirs.about["protocol"] == "qwen_vl"
    assert (ours.metrics["num_present"], ours.metrics["num_unscored"]) == (2, 0)
    assert (theirs.metrics["num_present"], theirs.metrics["num_unscored"]) == (1, 1)  # two cats: not asked there
    assert "ap" in ours.metrics and "ap" not in theirs.metrics and "grec_f1_iou" not in theirs.metrics


DOG = {"phrase": "dog", "boxes_xyxy": [[1, 2, 30, 15]], "description": "a brown dog"}
CATS = {"phrase": "cat", "boxes_xyxy": [[1, 2, 3, 4], [5, 6, 7, 8]]}
BIRD = {"phrase": "bird", "boxes_xyxy": []}


def test_descriptions_are_kept_and_not_scored(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    shards = write_tar(tmp_path / "shards", {"a": {"targets": [DOG, CATS, BIRD]}})
    found = run(model, tokenizer, shards, wording="region")
    assert {each.truth for each in found.predictions} == {"a brown dog", "cat"}
    assert [each.score for each in found.predictions] == [None, None]
    assert found.metrics["num_unscored"] == 2
    assert found.metrics["num_present"] == found.metrics["num_absent"] == found.metrics["num_text"] == 0
    assert "unreadable" not in found.metrics and "mean_iou" not in found.metrics
    save_evaluation(found, tmp_path / "out")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["score"] for line in lines] == [None, None]
    assert all(json.loads(line)["answer"] is not None for line in lines)


def test_the_lines_of_a_step_wise_answer_are_scored_together(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    found = run(model, tokenizer, write_tar(tmp_path, {"a": {"targets": [DOG, CATS, BIRD]}}), wording="steps")
    (prediction,) = found.predictions
    assert sorted(prediction.truth_boxes_xyxy or ()) == [(1, 2, 3, 4), (1, 2, 30, 15), (5, 6, 7, 8)]
    assert (found.metrics["num_present"], found.metrics["num_absent"], found.metrics["num_unscored"]) == (1, 0, 0)


def test_later_turns_of_a_conversation_are_asked_after_the_true_earlier_ones(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path
) -> None:
    model.config.template_version = "chat"
    shards = write_tar(tmp_path, {"a": {"targets": [DOG, CATS, BIRD]}})
    found = run(model, tokenizer, shards, wording="conversation")
    turns = found.predictions
    assert [len(each.history) for each in turns] == [0, 1, 2, 3]
    assert turns[3].history == tuple((each.prompt, each.truth) for each in turns[:3])
    assert (found.metrics["num_present"], found.metrics["num_absent"], found.metrics["num_unscored"]) == (2, 1, 1)
    pixels = preprocess_image(reader_of(shards).read(0).image, 56)[None].to(device())
    model.eval()
    with torch.no_grad():
        [[alone]] = generate_answers(model, tokenizer, pixels, [[turns[3].prompt]], 4, [[turns[3].history]])
    assert alone.text == turns[3].answer


def test_boxes_that_are_cut_are_counted(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    many = {"phrase": "dot", "boxes_xyxy": [[i / 2, 1, i / 2 + 3, 9] for i in range(60)]}
    found = run(model, tokenizer, write_tar(tmp_path, {"a": {"targets": [many, DOG]}}))
    assert sorted(each.num_cut_boxes for each in found.predictions) == [0, 10]
    assert found.metrics["num_cut_boxes"] == 10


def test_turns_in_chunks_and_images_apart_where_memory_is_short(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(model, tokenizer, shards)
    num_passes: list[int] = []
    monkeypatch.setattr(evaluation, "free_bytes", lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_decode", lambda *args, **named: num_passes.append(1) or decode(*args, **named))
        found = run(model, tokenizer, shards)
    assert found.predictions == expected.predictions and found.metrics == expected.metrics
    assert len(num_passes) == len(found.predictions), "one turn of one image in each"


decode = generation._decode
CROWD = {"phrase": "dot", "boxes_xyxy": [[i % 30, i // 30 * 9, i % 30 + 9, i // 30 * 9 + 8] for i in range(50)]}


def answer_truly(monkeypatch: pytest.MonkeyPatch, tokenizer: CogVLMTokenizer, shards: Path) -> None:
    """Let the model answer as it was taught, as far as the limit of new tokens lets it."""
    reader = reader_of(shards)
    records = [reader.read(i).record for i in range(len(reader))]
    turns = [turn for record in records for turn in turns_of(record, load_wording("box"), seed=SEED, epoch=0)]
    truths = {turn.prompt: turn.answer for turn in turns}

    def answer(prompt: str, limit: int) -> Answer:
        ids = [*tokenizer.encode(truths[prompt]), tokenizer.eos_token_id]
        kept = tuple(ids[:limit])
        return Answer(tokenizer.decode(kept), kept, (), (), None, truncated=len(ids) > limit)

    def answers(_model: Any, _tokenizer: Any, _pixels: Any, prompts: Any, limit: int, *_: Any, **__: Any) -> Any:
        return [[answer(prompt, limit) for prompt in row] for row in prompts]

    monkeypatch.setattr(evaluation, "generate_answers", answers)


def test_a_perfect_model_is_perfect_on_crowded_targets(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model.config.max_position_embeddings = 2048
    shards = write_tar(tmp_path, {"a": {"targets": [CROWD]}, "b": {"targets": [DOG]}, "c": {"targets": [BIRD]}})
    answer_truly(monkeypatch, tokenizer, shards)
    found = run(model, tokenizer, shards, max_new_tokens=None)
    assert found.metrics["recall@0.5"] == found.metrics["not_found_acc"] == 1
    assert found.metrics["truncated"] == found.metrics["unreadable"] == 0
    longest = max(len(tokenizer.encode(each.truth)) + 1 for each in found.predictions)
    assert longest > 800 and found.about["max_new_tokens"] == longest + longest // 4
    assert not caplog.records
    cut = run(model, tokenizer, shards, max_new_tokens=128)
    crowd = next(each for each in cut.predictions if each.phrase == "dot")
    assert crowd.truncated and len(crowd.boxes_xyxy or ()) == (128 - 2) // 16, "the boxes that the answer closed"
    assert cut.metrics["truncated"] == pytest.approx(1 / 3) and cut.metrics["precision@0.5"] == 1
    assert (
        "evaluate.max_new_tokens allows 128 new tokens: the true answers about 1 of 3 images have more" in caplog.text
    )
    model.config.max_position_embeddings = 300
    assert run(model, tokenizer, shards, max_new_tokens=None).about["max_new_tokens"] < 300
    assert "max_position_embeddings of the model leaves" in caplog.text


@pytest.mark.parametrize("key", ["holiday/beach", "caf\udce9"], ids=["folder", "latin-1 bytes"])
def test_keys_of_foreign_shards_can_be_saved(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path, key: str
) -> None:
    found = run(model, tokenizer, write_tar(tmp_path / "shards", {key: TURN, "plain": TURN}))
    printable = key.encode("utf-8", "backslashreplace").decode()  # bytes that are no UTF-8 are written as escapes
    assert [each.key for each in found.predictions] == [printable, "plain"]
    save_evaluation(found, tmp_path / "out")
    assert len((tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines()) == 2
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [
        pytest.param(Turn("?", "[[000,500,999,999]]"), [(0.1, 100.1, 199.9, 199.9)], id="box"),
        pytest.param(
            Turn("?", "图片中存在一只狗,所在区域为[[000,000,100,100;500,500,600,600]]"),
            [(0.1, 0.1, 20.1, 20.1), (100.1, 100.1, 120.1, 120.1)],
            id="two boxes in a sentence",
        ),
        pytest.param(Turn("?", " 未找到指定目标\n"), [], id="not found"),
        pytest.param(Turn("?", "The specified target was not found."), [], id="not found, English"),
        pytest.param(Turn("?", "a red circle"), None, id="plain text"),
        pytest.param(Turn("?", "see [[figure 1]]"), None, id="brackets without a box"),
        pytest.param(
            Turn("?", "[[000,000,000,000]]", Target("dog", "en", ((1.5, 2.0, 3.0, 4.0),))),
            [(1.5, 2.0, 3.0, 4.0)],
            id="target: exact pixels",
        ),
        pytest.param(Turn("?", "未找到指定目标", Target("狗", "zh", ())), [], id="target: absent"),
    ],
)
def test_truth_boxes(turn: Turn, wanted: list[tuple[float, ...]] | None) -> None:
    found = truth_boxes(turn, (200, 200), NOT_FOUND)
    if wanted is None:
        assert found is None
    else:
        assert found is not None
        assert len(found) == len(wanted)
        for box, wanted_box in zip(found, wanted, strict=True):
            assert box == pytest.approx(wanted_box)
