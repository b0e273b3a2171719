"""Notes: what was decided for the user. Nothing is lost, so they are never among the rejections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from photo_builds import run_build

from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.formats import FORMATS, Format
from cogvlm_ft.shards.negatives import NegativeSettings
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.decisions import load_decisions, part_ids
from cogvlm_ft.shards.review import annotated_items, review, summarize

DOG = Target("dog", "en", ((1.0, 2.0, 30.0, 20.0),))
OF_THE_SOURCE = Problem("note", "names_file", "names are those of data.yaml", "labels")


def note(name: str) -> Problem:
    return Problem("note", "stale_image_name", f"{name}.xml states other.jpg", f"{name}.xml")


PARTS = (
    OF_THE_SOURCE,
    Candidate("a.jpg", None, "a.xml", (DOG,), problems=(note("a"),)),
    Candidate("b.jpg", None, "b.xml", (DOG,)),
    Candidate("c.jpg", None, "c.xml", problems=(note("c"),)),
    Candidate("gone.jpg", None, "gone.xml", (DOG,), problems=(note("gone"),)),
    Candidate("b.jpg", None, "twice.xml", (DOG,), problems=(note("twice"),)),
)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A format that finds PARTS, whatever the files."""
    monkeypatch.setitem(FORMATS, "voc", Format(lambda annotations, images: iter(PARTS), lambda path: None))
    yield


@pytest.mark.usefixtures("noted")
def test_notes_are_counted_and_kept_apart_from_rejections(photos: Path, tmp_path: Path) -> None:
    found = run_build("voc", photos, photos, tmp_path / "out", samples_per_shard=1)
    assert found["records"].keys() == {"a", "b"}
    assert found["index"]["notes"] == {"names_file": 1, "stale_image_name": 4}
    assert found["index"]["rejected"] == {"duplicate_key": 1, "missing_image": 1, "no_targets": 1}
    assert [row["level"] for row in found["notes"]] == ["note"] * 5
    assert not any(row["level"] == "note" for row in found["rejected"])
    row = next(row for row in found["notes"] if row["image"] == "a.jpg")
    expected = {"level": "note", "reason": "stale_image_name", "image": "a.jpg", "key": "a", "source": "a.xml"}
    assert row == expected | {"detail": "a.xml states other.jpg"}


@pytest.mark.usefixtures("noted")
def test_the_table_shows_an_example_of_each_note(photos: Path, tmp_path: Path) -> None:
    printed = build(BuildSettings("voc", photos, photos), tmp_path / "out", num_workers=1)
    assert "rejected: 3\n" in printed and "notes (nothing was lost): 5\n" in printed
    assert "4 stale_image_name" in printed and "e.g. labels: names are those of data.yaml" in printed


@pytest.mark.usefixtures("noted")
def test_notes_survive_decisions_and_a_resumed_build(photos: Path, tmp_path: Path) -> None:
    decisions = tmp_path / "decisions.json"
    rows = [{"id": part_ids(PARTS[2]).sample, "decision": "drop"}]  # type: ignore[arg-type]
    decisions.write_text(json.dumps({"decisions": rows}))
    assert len(load_decisions(decisions)) == 1
    first = run_build("voc", photos, photos, tmp_path / "out", decisions=decisions)
    assert first["index"]["notes"] == {"names_file": 1, "stale_image_name": 4}
    again = run_build("voc", photos, photos, tmp_path / "out", decisions=decisions)
    assert again == first


@pytest.mark.usefixtures("noted")
def test_a_note_does_not_keep_absent_targets_from_a_photo(photos: Path, tmp_path: Path) -> None:
    """A rejected part does, since its name may be lost."""
    cat = Target("cat", "en", ((1.0, 2.0, 30.0, 20.0),))
    parts = [Candidate(f"{name}.jpg", None, name, (DOG,), problems=(note(name),)) for name in "abcd"]
    parts.append(Candidate("e.jpg", None, "e", (cat,)))
    FORMATS["voc"] = Format(lambda annotations, images: iter(parts), lambda path: None)
    found = run_build("voc", photos, photos, tmp_path / "out", negatives=NegativeSettings(0.4))
    assert any(not target["boxes_xyxy"] for key in "abcd" for target in found["records"][key]["targets"])


@pytest.mark.usefixtures("noted")
def test_the_review_lists_notes(photos: Path, tmp_path: Path) -> None:
    found = review(annotated_items("voc", photos, photos), "voc", tmp_path / "out")
    suspects: dict[str, Any] = found.report["suspects"]
    assert suspects["note.stale_image_name"] == 4 and suspects["note.names_file"] == 1
    assert suspects["no_targets"] == 1
    assert "4 Note: stale image name" in summarize(found, tmp_path / "out")
    assert "Nothing was left out" in (tmp_path / "out" / "review.html").read_text()
