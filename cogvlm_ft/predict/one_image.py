"""Questions about one image, answered in the terminal and drawn."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.predict.files import Question, answer_questions
from cogvlm_ft.predict.large_photos import load_photo
from cogvlm_ft.predict.predictor import Predictor, draw_replies
from cogvlm_ft.terminal import plain_line, say


def check_picture(out: Path) -> Path:
    """Return where the drawn image is saved; ConfigError if its name has no ending that Pillow writes."""
    if out.suffix.lower() not in {
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE
    }:
        found = "a folder" if out.is_dir() else f"the ending {out.suffix}" if out.suffix else "no ending"
        raise ConfigError(f"--out {out}: found {found}; expected a picture for one --image. Name it such as {out}.png")
    return out


def answer_image(predictor: Predictor, questions: list[Question], out: Path, upright: bool) -> None:
    """Print all answers about one image, and save it with their boxes drawn."""
    for question in questions:
        if question.problem:
            raise DataError(question.problem)
    photo = load_photo(questions[0].path, upright=upright, tiles=predictor.asking.tiles)
    replies = [reply for part in answer_questions(predictor, [photo], [questions])[0] for reply in part]
    for reply in replies:
        if len(replies) > 1:
            say(plain_line(reply.prompt))
        say(plain_line(reply.text))
        if reply.truncated:
            say("  the answer was cut off at --max-new-tokens; an incomplete box is not read")
        for box in reply.boxes or ():
            confidence = "" if box.confidence is None else f"  confidence {box.confidence:.2f}"
            notes = f"{'  ' + box.phrase if box.phrase else ''}{'  zoomed' if box.zoomed else ''}"
            say("  box in pixels: " + " ".join(f"{value:.1f}" for value in box.xyxy) + confidence + notes)
        if predictor.asking.tiles.side_px is not None:
            say(f"  images that were asked about: {reply.num_looks}, the whole photo and its tiles")
        if reply.num_removed:
            say(f"  less confident boxes from tiles, removed: {reply.num_removed}")
        if reply.not_found_prob is not None:
            say(f"  probability of the not-found sentence: {reply.not_found_prob:.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_replies(photo, replies).save(out)
    say(f"drawn: {out}")
