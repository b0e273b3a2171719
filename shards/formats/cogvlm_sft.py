"""Folders like CogVLM-SFT-311K: images/ next to labels_zh/, labels_en/ or labels/ with one JSON per image.

{"conversations": [{"role": "user", "content": "图中有什么?"}, {"role": "assistant", "content": "一只狗。"}]}
{"captions": [{"role": "caption", "content": "一只狗躺在草地上。"}]}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.data.record import detect_language
from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.shards.formats.conversations import checked_turn, questions_and_answers
from cogvlm_ft.shards.formats.rows import parse_object, read_head
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected, require
from cogvlm_ft.shards.packing.files import MAX_ANNOTATION_BYTES, read_inside

LABEL_FOLDERS = ("labels_zh", "labels_en", "labels")
CAPTION_PROMPTS = {"zh": "描述这张图片。", "en": "Describe this image."}
"""Questions used for captions, which have no question of their own."""
_HEAD_BYTES = 4096


def read_cogvlm_sft(annotations: Path, images_dir: Path) -> Iterator[Candidate | Problem]:
    """Yield one candidate per image, with the conversations of every language.

    annotations: a folder with images/ and labels, one that holds several such folders, or a folder of labels itself.
    """
    folders = _label_folders(annotations)
    if not folders:
        expected = ", ".join(f"{name}/" for name in LABEL_FOLDERS)
        raise DataError(f"{annotations} has no folder {expected}; expected a folder like CogVLM-SFT-311K")
    num_labels = 0
    for root, labels in folders.items():
        pictures = _pictures(root / "images", images_dir)
        names = sorted({path.name for folder in labels for path in folder.glob("*.json")})
        num_labels += len(names)
        for name in names:
            yield _candidate([folder / name for folder in labels], annotations, pictures)
    if not num_labels:
        raise DataError(f"{annotations}: {_words(folders)} without a .json file; expected one per image")


def recognise_cogvlm_sft(annotations: Path) -> str | None:
    """Recognise the folder names, and the beginning of the first JSON file in them."""
    folders = _label_folders(annotations)
    labels = (path for group in folders.values() for folder in group for path in folder.glob("*.json"))
    head = read_head(next(labels, Path()), _HEAD_BYTES)
    spoken = b'"conversations"' in head or b'"captions"' in head
    return f"conversation folders {_words(folders)}" if spoken else None


def _label_folders(annotations: Path) -> dict[Path, list[Path]]:
    """Label folders by the folder they are in."""
    if not annotations.is_dir():
        return {}
    if annotations.name in LABEL_FOLDERS:
        return {annotations.parent: [annotations]}
    roots = [annotations, *sorted(path for path in annotations.iterdir() if path.is_dir())]
    found = {root: [root / name for name in LABEL_FOLDERS if (root / name).is_dir()] for root in roots}
    return {root: labels for root, labels in found.items() if labels}


def _words(folders: dict[Path, list[Path]]) -> str:
    return ", ".join(f"{folder.parent.name}/{folder.name}" for labels in folders.values() for folder in labels)


def _pictures(folder: Path, images_dir: Path) -> dict[str, str]:
    """Map file names without extension to image paths relative to the images folder."""
    folder = folder if folder.is_dir() else images_dir
    if not folder.is_dir():
        return {}
    names = sorted(path.name for path in folder.iterdir() if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
    prefix = os.path.relpath(os.path.realpath(folder), os.path.realpath(images_dir))
    return {Path(name).stem: os.path.normpath(f"{prefix}/{name}") for name in names}


def _candidate(paths: list[Path], annotations: Path, pictures: dict[str, str]) -> Candidate:
    problems: list[Problem] = []
    turns: list[Turn] = []
    present = [path for path in paths if path.is_file()] or paths[:1]
    for path in present:
        source = str(path.relative_to(annotations.parent))
        try:
            data = read_inside(annotations, str(path.relative_to(annotations)), "annotation", MAX_ANNOTATION_BYTES)
            turns += _turns(parse_object(data), source, problems)
        except Rejected as rejected:  # costs this language, not the image
            problems.append(Problem("turn", rejected.reason, rejected.detail, source))
    stem = paths[0].stem
    return Candidate(
        image=pictures.get(stem, f"{stem}.jpg"),
        key=None,
        source=str(present[0].relative_to(annotations.parent)),
        turns=tuple(turns),
        problems=tuple(problems),
    )


def _turns(content: dict[str, Any], source: str, problems: list[Problem]) -> list[Turn]:
    messages = content.get("conversations", content.get("captions"))
    require(isinstance(messages, list), "turn", '"conversations" or "captions"', messages, "a list")
    turns: list[Turn] = []
    earlier: tuple[tuple[str, str], ...] = ()
    for prompt, answer in _pairs(messages or [], source, problems):
        try:
            turn = checked_turn(prompt, answer, earlier, source, problems)
            turns.append(turn)
            earlier = (*earlier, (turn.prompt, turn.answer))
        except Rejected as rejected:
            problems.append(rejected.problem(source))
    return turns


def _pairs(messages: list[Any], source: str, problems: list[Problem]) -> list[tuple[str, str]]:
    """Yield the pairs, captions with a question; a message that is not an object is a problem of its own."""
    spoken: list[tuple[Any, Any]] = []
    for message in messages:
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (message, None)
        if role == "caption":
            spoken.append(("user", CAPTION_PROMPTS[detect_language(text) if isinstance(text, str) else "en"]))
        spoken.append(("assistant" if role == "caption" else role, text))
    return questions_and_answers(spoken, source, problems)
