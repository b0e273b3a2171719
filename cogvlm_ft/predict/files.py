"""Photos, folders and JSONL of questions -> predictions.jsonl and drawn images; a line for each question."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.stored_photo import Photo
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.plain_files import parse_json
from cogvlm_ft.predict.large_photos import load_photo
from cogvlm_ft.predict.predictor import Predictor, draw_replies
from cogvlm_ft.predict.replies import Reply
from cogvlm_ft.predict.steps import MAX_PHRASES, conversation_turns, target_turns

PREDICTIONS_FILE, PICTURES_FOLDER = "predictions.jsonl", "pictures"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PROMPT_CHARACTERS = 4000
MAX_QUESTIONS = 64
"""Maximum number of questions about one photo, before it is read and drawn again."""


@dataclass(frozen=True)
class Question:
    """A prompt, or targets to ask for; or the reason why it cannot be asked.

    name: of the photo in the results. in_steps: the prompt begins a conversation. problem: empty if it can be asked.
    said: earlier (prompt, answer) pairs of the same conversation, oldest first.
    """

    path: Path
    name: str
    prompt: str = ""
    targets: tuple[str, ...] = ()
    in_steps: bool = False
    problem: str = ""
    said: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Counts:
    """Numbers of questions; answered and failed are all of them. reasons: failures by reason."""

    answered: int
    failed: int
    reasons: dict[str, int]


def read_questions(
    source: Path, prompts: Sequence[str], targets: Sequence[str] = (), *, in_steps: bool = False
) -> list[Question]:
    """Read the questions about a photo, about every photo below a folder, or of a JSONL file.

    Raises DataError if there is nothing to ask, ConfigError if the options do not fit.
    """
    if source.suffix.lower() == ".jsonl" and source.is_file():
        if prompts or targets:
            raise ConfigError(f"{source} has its own questions. Omit --prompt and --targets")
        lines = source.read_bytes().splitlines()
        questions = [_read_line(source, line, number, in_steps) for number, line in enumerate(lines, 1) if line.strip()]
        if not questions:
            raise DataError(f'{source}: found no line; expected lines such as {{"image": "a.jpg", "prompt": "..."}}')
        return questions
    if not prompts and not targets:
        raise ConfigError("nothing is asked: give --prompt or --targets")
    photos = _photos(source)
    asked = [Question(*photo, targets=tuple(targets)) for photo in photos] if targets else []
    asked += [Question(*photo, prompt=prompt, in_steps=in_steps) for photo in photos for prompt in prompts]
    checked = [_checked(question) for question in asked]
    return sorted(checked, key=lambda question: question.name)  # stable: all questions about a photo together


def _photos(source: Path) -> list[tuple[Path, str]]:
    if source.is_file():
        return [(source, source.name)]
    if not source.is_dir():
        raise DataError(f"--image {source}: no such file")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"--image {source}: no photo below it; expected files that end in {', '.join(SUFFIXES)}")
    return [(path, path.relative_to(source).as_posix()) for path in found]


def _read_line(source: Path, line: bytes, number: int, in_steps: bool) -> Question:
    """Read {"image", "prompt"} or {"image", "targets"}; the image is relative to the file."""
    where = f"line {number}"
    try:
        fields = parse_json(line)
    except (ValueError, RecursionError) as error:
        return Question(source, where, problem=f"{where}: not valid JSON ({error})")
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str) or not fields["image"].strip("\0 "):
        return Question(source, where, problem=f"{where}: expected an object with the name of its image")
    name, prompt, targets = fields["image"], fields.get("prompt"), fields.get("targets")
    if isinstance(prompt, str) and targets is None:
        return _checked(Question(source.parent / name, name, prompt, in_steps=in_steps))
    if isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets) and prompt is None:
        return _checked(Question(source.parent / name, name, targets=tuple(targets)))
    return Question(source.parent / name, name, problem=f"{where}: expected a prompt (text) or targets (list of texts)")


def question_of(
    prompt: str = "", targets: Sequence[str] = (), said: Sequence[tuple[str, str]] = (), *, in_steps: bool = False
) -> Question:
    """Build the question about a photo that is not in a file."""
    return _checked(Question(Path(), "", prompt, tuple(targets), in_steps, said=tuple(said)))


def _checked(question: Question) -> Question:
    """Replace a question that cannot be asked by its problem."""
    texts = question.targets or (question.prompt,)
    length = sum(map(len, texts)) + sum(len(text) for pair in question.said for text in pair)
    problem = ""
    if not all(text.strip() for text in texts):
        problem = "an empty prompt"
    elif length > MAX_PROMPT_CHARACTERS or len(texts) > MAX_PHRASES:
        problem = f"{len(texts)} text(s) of {length} characters; at most {MAX_PHRASES} of {MAX_PROMPT_CHARACTERS}"
    elif _has_surrogate(question.name):
        problem = "a file name that is not UTF-8; expected UTF-8. Rename the photo"
    elif any(map(_has_surrogate, _all_texts(question))):
        problem = "half of a surrogate pair in its text"
    return Question(question.path, question.name, problem=problem) if problem else question


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _all_texts(question: Question) -> list[str]:
    return [question.prompt, *question.targets, *(text for pair in question.said for text in pair)]


def answer_questions(
    predictor: Predictor, photos: Sequence[Photo], questions: Sequence[Sequence[Question]]
) -> list[list[list[Reply]]]:
    """Answer `questions[n]` about photos[n], all together: for each question one reply, or one for each step."""
    turns = _word_questions(predictor, photos, questions)
    said = [[len(question.said) for question in row] for row in questions]
    given = [_said_replies(*row) for row in zip(turns, said, strict=True)]
    answered = predictor.ask_turns(photos, [[turn for part in row for turn in part] for row in turns], given)
    rows = [_split(replies, [len(part) for part in row]) for replies, row in zip(answered, turns, strict=True)]
    return [[part[n:] for part, n in zip(row, lengths, strict=True)] for row, lengths in zip(rows, said, strict=True)]


def _said_replies(parts: Sequence[Sequence[Turn]], num_said: Sequence[int]) -> dict[int, Reply]:
    """Return the replies that a conversation already has, by the number of the turn in its row."""
    given: dict[int, Reply] = {}
    start = 0
    for part, count in zip(parts, num_said, strict=True):
        given |= {start + i: Reply(turn.prompt, turn.answer, None, False, None) for i, turn in enumerate(part[:count])}
        start += len(part)
    return given


def _word_questions(
    predictor: Predictor, photos: Sequence[Photo], questions: Sequence[Sequence[Question]]
) -> list[list[list[Turn]]]:
    """Return the turns of each question; all conversations begin together."""
    about = [photo for photo, row in zip(photos, questions, strict=True) for each in row if each.in_steps]
    prompts = [each.prompt for row in questions for each in row if each.in_steps]
    conversations = iter(conversation_turns(predictor, about, prompts) if prompts else ())

    def turns_of(question: Question) -> list[Turn]:
        if question.in_steps:
            return next(conversations)
        if question.targets:
            return target_turns(question.targets, predictor.wording)
        earlier = [Turn(*pair, history=question.said[:i]) for i, pair in enumerate(question.said)]
        return [*earlier, Turn(question.prompt, "", history=question.said)]

    return [[turns_of(question) for question in row] for row in questions]


def _split(replies: Iterable[Reply], lengths: Sequence[int]) -> list[list[Reply]]:
    """Split replies into consecutive parts of these lengths."""
    left = iter(replies)
    return [list(islice(left, length)) for length in lengths]


def predict_files(
    predictor: Predictor,
    questions: Sequence[Question],
    out: Path,
    *,
    batch_size: int,
    upright: bool = True,
    pictures: bool = True,
) -> Counts:
    """Write a line of predictions.jsonl for every question, in their order, and a drawn image for every photo.

    The line of a photo or question that cannot be used holds the reason. Raises ConfigError if `out` has results.
    """
    if (out / PREDICTIONS_FILE).exists():
        raise ConfigError(f"--out {out} holds predictions already: give another folder, or delete them")
    (out / PICTURES_FOLDER if pictures else out).mkdir(parents=True, exist_ok=True)
    reasons: dict[str, int] = {}
    with (out / PREDICTIONS_FILE).open("w", encoding="utf-8") as file, tqdm(total=len(questions), unit="answer") as bar:
        numbered = enumerate(_by_photo(questions))
        while batch := list(islice(numbered, batch_size)):
            for lines in _predict_batch(predictor, batch, out if pictures else None, upright):
                for line in lines:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    if "error" in line:
                        reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
                bar.update(len(lines))
            file.flush()
    failed = sum(reasons.values())
    return Counts(len(questions) - failed, failed, reasons)


def _by_photo(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Group neighbours about the same photo, at most MAX_QUESTIONS."""
    for _, same in groupby(questions, key=lambda question: question.path):
        while group := list(islice(same, MAX_QUESTIONS)):
            yield group


def _predict_batch(
    predictor: Predictor, batch: Sequence[tuple[int, list[Question]]], out: Path | None, upright: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of each photo of the batch, after drawing it."""
    good: dict[int, Photo] = {}
    bad: dict[int, DataError] = {}
    for number, group in batch:
        try:
            if not all(question.problem for question in group):
                good[number] = load_photo(group[0].path, upright=upright, tiles=predictor.asking.tiles)
        except DataError as error:
            bad[number] = error
    asked = [[question for question in group if not question.problem] for n, group in batch if n in good]
    answers = dict(zip(good, answer_questions(predictor, list(good.values()), asked), strict=True))
    for number, group in batch:
        replies = iter(answers.get(number, ()))
        found = [None if question.problem or number in bad else next(replies) for question in group]
        picture = _draw(good[number], number, group[0], found, out) if number in good and out else None
        yield [
            _failure(question, bad.get(number)) if part is None else _line(question, good[number], part, picture)
            for question, part in zip(group, found, strict=True)
        ]


def _draw(
    photo: Photo, number: int, question: Question, found: Sequence[Sequence[Reply] | None], out: Path
) -> str | None:
    """Draw the replies and return the file's name; nothing of the photo's name can lead out of the folder."""
    replies = [reply for part in found for reply in part or ()]
    if not replies:
        return None
    stem = re.sub(r"[^\w-]+", "-", Path(question.name).stem)[:80].encode()[:120].decode(errors="ignore")
    name = f"{PICTURES_FOLDER}/{number:06d}-{stem}.png"
    draw_replies(photo, replies).save(out / name)
    return name


def _line(question: Question, photo: Photo, replies: Sequence[Reply], picture: str | None) -> dict[str, Any]:
    line: dict[str, Any] = {"image": question.name, "image_size_px": photo.size}
    line["answers"] = [reply_fields(reply) for reply in replies]
    return line | ({"picture": picture} if picture else {})


def _failure(question: Question, error: DataError | None) -> dict[str, Any]:
    """Build the line of a failure. A question that is the problem is not repeated: it may be long, or not be text."""
    name = question.name.encode("utf-8", "backslashreplace").decode()
    if question.problem:
        return {"image": name, "error": question.problem, "reason": "bad_question"}
    asked: dict[str, Any] = {"targets": question.targets} if question.targets else {"prompt": question.prompt}
    reason = error.reason if isinstance(error, BadSampleError) else "bad_photo"
    return {"image": name, **asked, "error": str(error), "reason": reason}


def reply_fields(reply: Reply) -> dict[str, Any]:
    """Return a reply for JSON; boxes are null if the answer holds none that can be read. truncated: if it was cut."""
    boxes = [
        {
            "xyxy": [round(value, 2) for value in box.xyxy],
            "confidence": None if box.confidence is None else round(box.confidence, 4),
            **({"phrase": box.phrase} if box.phrase is not None else {}),
            **({"zoomed": True} if box.zoomed else {}),
        }
        for box in reply.boxes or ()
    ]
    return {
        "prompt": reply.prompt,
        "answer": reply.text,
        "boxes": None if reply.boxes is None else boxes,
        "not_found": reply.not_found,
        "not_found_prob": None if reply.not_found_prob is None else round(reply.not_found_prob, 4),
        **({"truncated": True} if reply.truncated else {}),
        **({"looks": reply.num_looks} if reply.num_looks > 1 else {}),
        **({"duplicates": reply.num_duplicates} if reply.num_duplicates else {}),
        **({"removed": reply.num_removed} if reply.num_removed else {}),
    }
