"""The worked example of docs/data.md, command by command: from a labelme folder to an answer of a trained model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from ranks import REPOSITORY, read_metrics
from test_real_photos import DATA, program

LABELME = DATA / "labelme_examples" / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LABELME.is_dir(), reason="../shared/data is missing"),
]

OUTPUTS = re.compile(
    r"(?<![\w/.])(?=(?:photos|review|shards_out|review_shards|runs|scores|exported)(?:/|\s|$)"
    r"|review_decisions\.json|answer\.png)"
)


def blocks() -> list[str]:
    """Return the code blocks of the worked example, in order."""
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    example = text[text.index("## From a labelme folder") : text.index("## Formats")]
    return re.findall(r"^```\n(.*?)^```", example, re.DOTALL | re.MULTILINE)


def copy_photos(folder: Path) -> None:
    """Copy the photos as the document describes."""
    for name, part in (("bbox_detection", "data_annotated"), ("instance_segmentation", "data_annotated")):
        shutil.copytree(LABELME / name / part, folder / name)
    shutil.copytree(LABELME / "tutorial", folder / "tutorial")


def run_commands(block: str, folder: Path) -> str:
    """Run the commands with all that they read and write in `folder`, and return what they print.

    The command for the 17B model is left out.
    """
    printed = ""
    for line in block.replace("\\\n", " ").splitlines():
        if not line.startswith("deepspeed "):
            _, *words = shlex.split(OUTPUTS.sub(f"{folder}/", line), comments=True)
            printed += program(*words).replace(f"{folder}/", "")
    return printed


def assert_shown(shown: str, printed: str) -> None:
    """Check that every line of the document is among those printed; "..." stands for text left out."""
    for line in shown.splitlines():
        pattern = ".*".join(re.escape(part.strip()) for part in line.split("..."))
        assert re.search(pattern, printed), f"{line!r} is not in\n{printed}"


def test_the_worked_example_of_the_document(start_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    copy_photos(tmp_path / "photos")
    shutil.copytree(start_model, tmp_path / "runs" / "rehearsal" / "photos" / "start")
    printed = ""
    for block in blocks():
        if block.startswith('{"decisions"'):
            (tmp_path / "review_decisions.json").write_text(block, encoding="utf-8")
            assert_reviewed(tmp_path, {row["id"] for row in json.loads(block)["decisions"]})
        elif block.startswith(("python ", "deepspeed ")):
            printed = run_commands(block, tmp_path)
        elif not block.startswith("make try "):  # test_rehearsal.py runs it
            assert_shown(block, printed)
    rows = read_metrics(tmp_path / "runs" / "try", "train")
    assert [row["step"] for row in rows] == list(range(1, 10))
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text(encoding="utf-8"))
    assert scores["num_images"] == 1 and scores["num_bad"] == 0
    with Image.open(tmp_path / "answer.png") as answer:
        assert answer.width >= 500, "the photo with what was found"


def assert_reviewed(folder: Path, dropped: set[str]) -> None:
    """Check that the review has listed what the document drops, under these ids."""
    lines = (folder / "review" / "suspects.jsonl").read_text(encoding="utf-8").splitlines()
    suspects = [json.loads(line) for line in lines]
    assert dropped == {row["photos"][0]["part"] for row in suspects if row["kind"] == "same_photo"}
