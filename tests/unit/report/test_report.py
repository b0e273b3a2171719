"""The page of a run: it shows what the files say, needs nothing else, stays small, and never ends a training."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_run import HARD, STEPS, write_run

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.results import Results, ceiling_of, choose_answers, find_evaluation, load_report, load_results
from cogvlm_ft.grounding.metrics import AnswerScore
from cogvlm_ft.grounding.phrases import NOTHING, find_confusions
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.launch.report import main
from cogvlm_ft.report.figures import curve_panels, evaluation_panels
from cogvlm_ft.report.gallery import choose, read_predictions, save_gallery
from cogvlm_ft.report.report import REPORT_FILE, try_report, write_report
from cogvlm_ft.report.scores import ceilings_of, phrase_table, tables_of, tiles_of
from cogvlm_ft.report.thumbnails import MAX_BOXES, DrawnBox, Photos, Thumbnails, zoom_region
from cogvlm_ft.run_folder import RunFolder

LAST = f"evaluations/step-{max(STEPS):08d}"
BOX: Box = (10.0, 10.0, 30.0, 30.0)
BOXES = [DrawnBox((900, 700, 920, 710), "truth", 2, "<b>"), *[DrawnBox(BOX, "answer", 2)] * 500]


def reader_of(shards: Path, split: str = "val") -> ShardReader:
    return ShardReader(load_index(shards, split))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "mine"
    write_run(folder, shards)
    return folder


@pytest.fixture(scope="module")
def page(finished: Path, shards: Path) -> str:
    readers = {"train_reader": reader_of(shards, "train"), "run_folder": finished}
    path = write_report(finished / LAST, reader_of(shards), **readers)
    assert path == finished / REPORT_FILE
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All tags with their attributes, and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def section(page: str, name: str) -> str:
    return page[page.index(f'<section id="{name}">') :].partition("</section>")[0]


def test_the_page_needs_nothing_else_and_is_small(page: str, finished: Path) -> None:
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe", "object"), tag
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,")), (tag, attributes)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert len(page.encode()) < 5_000_000
    assert (finished / LAST / REPORT_FILE).read_text(encoding="utf-8") == page


def test_every_part_is_there_and_says_what_the_files_say(page: str, finished: Path) -> None:
    results = load_results(finished / LAST)
    former = load_results(finished / "evaluations/step-00000020")
    overview = section(page, "overview")
    assert f"<b>{results.metrics['mean_iou']:.3f}</b>" in overview
    assert f"{results.metrics['mean_iou'] - former.metrics['mean_iou']:+.3f}" in overview
    assert f"of {ceilings_of(results)['']:.3f} possible" in overview
    curves = section(page, "curves")
    assert curves.count('class="chart"') == 7
    assert len(re.findall(r'<polyline points="([^"]*)"', curves)[-1].split()) == max(STEPS)  # photos per second
    assert 'data-logs="y"' in curves and page.index('id="gallery"') < page.index('id="curves"')
    groups = section(page, "groups")
    for group in ("language=zh", "template=refer", "targets=1"):
        assert f"<td>{results.metrics[f'acc@0.5/{group}']:.3f}</td>" in groups
    assert section(page, "charts").count('class="chart"') == 3
    assert f"<title>{finished.name} · report</title>" in page
    about = section(page, "about")
    assert str(results.about["data_sha256"]) in about and "c0ffee" in about and "output_dir:" in about
    assert "secret" not in page


def test_photos_are_shown_with_their_boxes(page: str, finished: Path) -> None:
    now, before = (load_results(finished / f"evaluations/step-{step:08d}").predictions for step in (40, 20))
    chosen = choose_answers(now, before, 8)
    gallery = section(page, "gallery")
    parts = dict(part.split('"', 1) for part in gallery.split('data-group="')[1:])
    for name, answers in vars(chosen).items():
        assert parts[name].count("<figure") == len(answers), name
    assert chosen.newly_right and chosen.best
    first = chosen.best[0]
    (x0, y0, x1, y1) = first.truth_boxes_xyxy[0]
    rect = f'<rect class="truth t{first.turn}" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"/>'
    assert rect in gallery and "data:image/jpeg;base64," in gallery


def test_a_sample_whose_loss_stays_high_is_shown_first(page: str, shards: Path) -> None:
    suspects = section(page, "suspects")
    reader = reader_of(shards, "train")
    assert re.findall(r"<small>([^<]*)</small>", suspects)[0] == reader.index.key(HARD)
    first = suspects.partition("</figure>")[0]
    assert "3.00, 3.00, 3.00" in first
    assert all(target.phrase in first for target in reader.read(HARD).record.targets)
    assert first.count('class="truth t') == sum(len(t.boxes_xyxy) for t in reader.read(HARD).record.targets)


def test_an_evaluation_alone_has_a_page(finished: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / LAST, tmp_path / "scores")
    path = write_report(tmp_path / "scores", reader_of(shards))
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "scores" / REPORT_FILE
    assert 'id="curves"' not in text and 'id="suspects"' not in text and 'data-group="newly' not in text
    assert section(text, "gallery").count("<image ") >= 4


def test_older_evaluations_lack_fields_and_files(finished: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (finished / LAST / "predictions.jsonl").read_text().splitlines()]
    wanted = ("key", "turn", "prompt", "answer", "truth_boxes_xyxy", "image_size_px")
    old = [{name: row[name] for name in wanted} | {"score": {"kind": "present", "iou": 0.3}} for row in rows]
    old[0] |= {"score": None, "from_the_future": 1}
    old[1]["score"]["from_the_future"] = 2
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, [*old, {}])) + "\n")
    text = write_report(tmp_path, None).read_text(encoding="utf-8")
    assert "IoU 0.30" in text and "no image" in text
    assert "Size and IoU" in text and "Precision and recall" not in text


def test_what_data_says_is_text_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>{{about}}\"'&\udce9"
    rows = [json.loads(line) for line in (finished / LAST / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {name: evil for name in ("key", "prompt", "answer", "truth")}
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    metrics = {"mean_iou": 0.5, f"mean_iou/source={evil}": 0.5, "about": {evil: evil}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = write_report(tmp_path, None).read_text(encoding="utf-8")
    elements = Elements(text)
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert "<script>alert(1)</script>{{about}}\"'&\\udce9" in elements.text


def test_whatever_is_wrong_the_training_goes_on(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert try_report(tmp_path / "nowhere", None) is None
    (tmp_path / "predictions.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"predictions\.jsonl cannot be read"):
        write_report(tmp_path, None)
    assert try_report(tmp_path, None) is None
    assert caplog.text.count("no report.html for") == 2


def test_without_shards_the_kept_photos_are_shown(finished: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "step-00000040"
    shutil.copytree(finished / LAST, folder)
    save_gallery(choose(read_predictions(folder / "predictions.jsonl"), [], 2), folder, reader_of(shards))
    assert write_report(folder, None).read_text(encoding="utf-8").count("<image ") >= 1
    shutil.rmtree(tmp_path / "evaluations" / "photos")
    assert "<image " not in write_report(folder, None).read_text(encoding="utf-8")


def test_pictures_stay_within_their_bound() -> None:
    thumbnails, random = Thumbnails(max_bytes=300_000), np.random.default_rng(0)
    html = []
    for _ in range(6):
        noise = Image.fromarray(random.integers(0, 255, (700, 900, 3), dtype=np.uint8))
        html.append(thumbnails.draw(noise, (1800, 1400), BOXES, "x"))
    shown = [each for each in html if each]
    assert 1 <= len(shown) < 6 and thumbnails.num_left_out == 6 - len(shown)
    assert sum(map(len, shown)) <= 300_000 + 100 * len(shown)
    assert shown[0].count("<svg") == 2 and shown[0].count('class="answer t2"') == 2 * (MAX_BOXES - 1)
    assert 'viewBox="0.0 0.0 1800.0 1400.0"' in shown[0]
    assert thumbnails.draw(None, (10, 10), [], "x") == ""


def test_small_boxes_are_enlarged() -> None:
    assert zoom_region([(0, 0, 100, 100)], (480, 480)) is None
    assert zoom_region([], (480, 480)) is None
    assert zoom_region([(100, 200, 110, 220)], (480, 480)) == (45, 150, 165, 270)
    assert zoom_region([(0, 0, 10, 10)], (480, 480)) == (0, 0, 60, 60)  # stays in the photo


def test_photos_that_cannot_be_read_are_not_shown(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    photos = Photos(reader_of(shards), {"broken": tmp_path / "broken.jpg", "gone": tmp_path / "gone.jpg"})
    key = reader_of(shards).index.key(1)
    photos.look_up([key, "broken"])
    assert photos.image(key) is not None
    assert photos.image("broken") is photos.image("gone") is photos.image("unknown") is None


def prediction(key: str, score: float | None, kind: str = "present", turn: int = 0, **fields: Any) -> Prediction:
    of_kind = {"iou": score} if kind == "present" else {"said_not_found": bool(score)}
    scored = None if score is None else AnswerScore(kind, **of_kind)
    known: dict[str, Any] = {"prompt": f"question {turn}", "answer": "", "truth": "", "boxes_xyxy": [BOX]}
    known |= {"truth_boxes_xyxy": [BOX] if kind == "present" else [], "image_size_px": (100, 100)}
    return Prediction(key=key, turn=turn, score=scored, **{**known, **fields})


def keys(answers: list[Prediction]) -> list[str]:
    return [each.key for each in answers]


def test_best_and_worst_answers() -> None:
    answers = [prediction("a", 0.9), prediction("a", 1.0, turn=1), prediction("b", 0.2), prediction("c", 0.6)]
    answers += [prediction("d", 1.0, "absent"), prediction("e", 0.0, "absent"), prediction("f", 0.0, confidences=[0.9])]
    answers += [prediction("g", None), prediction("h", 0.0, confidences=[0.1, 0.5])]
    found = choose_answers(answers, [], 8)
    assert keys(found.best) == ["a", "c"] and found.best[0].turn == 1
    assert keys(found.worst) == ["f", "h", "e", "b"]  # the surest mistakes first
    assert keys(choose_answers(answers, [], 1).worst) == ["f"]
    assert found.newly_right == found.newly_wrong == []


def test_newly_right_and_wrong_answers() -> None:
    now = [prediction("a", 0.9), prediction("b", 0.1), prediction("c", 0.0, "absent"), prediction("d", 0.8)]
    now += [prediction("e", 1.0, "absent"), prediction("f", 0.9, prompt="another"), prediction("g", 0.45)]
    before = [prediction("a", 0.1), prediction("b", 0.9), prediction("c", 1.0, "absent"), prediction("d", 0.6)]
    before += [prediction("e", 0.0, "absent"), prediction("f", 0.0), prediction("g", 0.55)]
    found = choose_answers(now, before, 8)
    assert keys(found.newly_right) == ["a", "e"]  # things that are there first
    assert keys(found.newly_wrong) == ["c", "b", "g"]
    assert "a" not in keys(found.best) and keys(found.worst) == []  # no photo twice


def test_the_ceiling_knows_what_the_model_saw() -> None:
    small: list[Box] = [(500.3, 200.3, 503.3, 203.3)]
    squash = ceiling_of(prediction("a", 0.5, truth_boxes_xyxy=small, image_size_px=(1000, 400)))
    letterbox = ceiling_of(
        prediction("a", 0.5, truth_boxes_xyxy=small, image_size_px=(1000, 400), frame_px=(1000, 1000))
    )
    assert squash is not None and letterbox is not None
    assert 0.5 < letterbox < squash < 1  # a letterbox spends its thousandths of the height on grey
    assert ceiling_of(prediction("a", 1.0, "absent")) is None
    assert ceiling_of(prediction("a", 1.0, image_size_px=(0, 0))) is None


def test_the_program_writes_the_page_again(
    finished: Path, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(finished, folder)
    (folder / REPORT_FILE).unlink()
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / REPORT_FILE)
    assert (folder / REPORT_FILE).read_text(encoding="utf-8") == page
    assert main([str(folder), "--step", "20", f"data.shards={tmp_path / 'gone'}"]) == 0
    again = (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert (
        "Evaluation at step 20" in again and "<image " not in again and "the report has no images of it" in caplog.text
    )
    assert main([str(folder), "--step", "7"]) == 2
    assert "found those at 0, 20, 40; expected an evaluation at step 7" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "expected a run with evaluations, or an evaluation" in capsys.readouterr().err
    assert find_evaluation(folder / LAST) == folder / LAST


def test_a_report_of_a_run_that_recorded_little(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "evaluations", tmp_path / "evaluations")
    report = load_report(tmp_path / LAST, tmp_path)
    assert (report.rows, report.high_losses, report.config, report.facts) == ([], None, "", {})
    assert report.former is not None and report.former.folder.name == "step-00000020"
    assert 'id="overview"' in write_report(tmp_path / LAST, None, run_folder=tmp_path).read_text(encoding="utf-8")
    (report.former.folder / "metrics.json").write_text("")  # as a power failure leaves it
    assert load_report(tmp_path / LAST, tmp_path).former is None


def test_phrases_and_confusions_of_them() -> None:
    near, other = (12.0, 10.0, 30.0, 30.0), (50.0, 50.0, 90.0, 90.0)
    about = {"phrase": "dog", "boxes_xyxy": [near, other, (0.0, 60.0, 9.0, 70.0)], "source": "voc/a.xml:1"}
    answers = [prediction("a", 0.9, **about), prediction("a", 0.0, turn=1, phrase="cat", truth_boxes_xyxy=[other])]
    answers += [prediction("b", 0.0, "absent", phrase="dog", boxes_xyxy=[BOX], source="voc/b.xml:1")]
    answers += [prediction("b", 1.0, turn=1, phrase="puppy"), prediction("c", 1.0, phrase="a dog", source="c.json[3]")]
    found = [(each.asked, each.given, each.num_boxes, each.num_answered) for each in find_confusions(answers)]
    assert found == [
        ("dog", "cat", 1, 4),
        ("dog", NOTHING, 1, 4),
        ("cat", "dog", 1, 1),
        ("dog", "puppy", 1, 4),
    ]
    results = Results(Path(), {}, {}, {}, answers)
    table = phrase_table(results)
    assert table is not None and [column[0] for column in table.columns][:2] == ["n", "mean IoU"]
    rows = {str(title): dict(zip([en for en, _ in table.columns], cells, strict=True)) for title, cells in table.rows}
    assert rows["dog"]["mean IoU"] == "0.900" and rows["dog"]["absent"] == "0.000"
    assert rows["cat"]["mean IoU"] == "0.000" and rows["cat"]["absent"] == "–"
    (by_source,) = tables_of(results, {})
    assert [(str(title), cells[0]) for title, cells in by_source.rows] == [("voc/", "2"), ("c.json", "1")]
    only_absent = Results(Path(), {}, {}, {}, [prediction("a", 1.0, "absent", phrase="x"), answers[0]])
    cells = {str(title): cells for title, cells in phrase_table(only_absent).rows}
    assert cells["x"][1] == "–" and "0.000" not in cells["x"][1:5], "nothing was there to be found"
    assert phrase_table(Results(Path(), {}, {}, {}, [prediction("a", 1.0)])) is None


def test_curves_are_drawn_for_what_was_recorded() -> None:
    rows: list[dict[str, Any]] = [{"kind": "val", "epoch": epoch, "step": epoch, "probe_same": 0.9} for epoch in (0, 1)]
    panels = curve_panels([*rows, {"kind": "summary", "best_mean_iou": 0.5}], None)
    assert [panel.title[0] for panel in panels] == ["Forgetting"] and panels[0].chart.count('class="chart"') == 1
    assert curve_panels([], None) == curve_panels([{"kind": "train", "step": 1, "loss": None}], 0.9) == []
    points = [[0.9, 1.0, 0.5, 0.67], [0.2, 0.6, 0.5, 0.55]]
    results = Results(Path(), {"tile_min_confidence": 0.55}, {}, {"confidence": points}, [])
    [panel] = evaluation_panels(results)
    assert panel.title[0] == "Boxes from tiles by confidence" and panel.chart.count("<polyline") == 3
    assert "0.55" in panel.note and evaluation_panels(Results(Path(), {}, {}, {}, [])) == []


def test_what_is_not_a_number_is_a_dash_without_a_change(finished: Path) -> None:
    report = load_report(finished / LAST, finished)
    report.results.metrics["mean_iou"] = float("nan")
    first = tiles_of(report, {})[0]
    assert (first.number, first.change) == ("–", "")


def test_a_run_in_a_folder_called_run_is_named_after_its_place(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "raccoons" / "run").title == "raccoons/run"
    assert RunFolder(tmp_path / "raccoons").title == "raccoons"
