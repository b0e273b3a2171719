"""Ask a model about photos: answers, boxes in pixels with their confidence, and pictures with the boxes drawn.

python launch/predict.py --model exported --image photo.jpg --prompt "红色的车在哪里?"     one photo
python launch/predict.py --model exported --image photos/ --targets 红色的车 狗            a folder, or a JSONL file
python launch/predict.py --model exported --serve                                         a page in the browser
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogvlm_ft.config import DECODINGS, RESIZES
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.grounding.boxes import READINGS

if TYPE_CHECKING:
    from cogvlm_ft.predict.files import Question
    from cogvlm_ft.predict.predictor import Predictor

ZOOM_PATCHES = 16.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, such as launch/export.py writes")
    add_questions(parser)
    add_answers(parser)
    page = parser.add_argument_group("web page")
    page.add_argument("--serve", action="store_true", help='needs pip install -e ".[serve]"')
    page.add_argument("--host", default="127.0.0.1", help="default: this machine only; there is no password")
    page.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    args = parser.parse_args(argv)
    try:
        return predict(args)
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def add_questions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions")
    group.add_argument("--image", type=Path, help='a photo, a folder, or JSONL: {"image": "a.jpg", "prompt": "..."}')
    group.add_argument("--prompt", action="append", default=[], help="may be given several times")
    group.add_argument("--targets", nargs="+", default=[], help="things to ask for in the words of --wording")
    group.add_argument(
        "--steps",
        action="store_true",
        help="ask what is there, then one by one for --targets, or for what the answer to --prompt names",
    )
    group.add_argument("--wording", help="as in training (default: box; with --steps conversation)")
    group.add_argument("--image-size", type=int, help="input resolution in px (default: the model's own)")
    group.add_argument("--resize", choices=RESIZES, help="as in training (default: what the model folder says)")
    group.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        default="apply",
        help="apply: turn the photo upright as its camera noted, the way viewers show it; boxes are then in pixels of"
        " the upright photo. ignore: take the pixels as stored, the way the reference does (default: apply)",
    )
    group.add_argument("--batch-size", type=int, default=4, help="photos at a time (default: 4)")


def add_answers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--out", type=Path, help="picture of one photo (default: NAME-answer.png), else folder (answers)"
    )
    group.add_argument("--no-pictures", action="store_true", help="of a folder or JSONL: predictions.jsonl only")
    group.add_argument("--max-new-tokens", type=int, default=256)
    group.add_argument(
        "--decoding",
        choices=DECODINGS,
        default="free",
        help="grammar: the answer holds well-formed boxes, or is the not-found sentence of --wording (default: free)",
    )
    group.add_argument("--min-boxes", type=int, default=0, help="with grammar: at least so many (default: 0)")
    group.add_argument(
        "--reading",
        choices=(*READINGS, "expected"),
        default="centre",
        help="where a number of 0 to 999 is in the picture: in the middle of its bin, at its lower edge as the"
        " reference has it, or at the mean of the model's doubt about its digits (default: centre)",
    )
    group.add_argument(
        "--zoom",
        type=float,
        nargs="?",
        const=ZOOM_PATCHES,
        default=0.0,
        metavar="PATCHES",
        help=f"look again, closer, at boxes that cover fewer vision patches (without a number: {ZOOM_PATCHES:.0f})",
    )
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")


def predict(args: argparse.Namespace) -> int:
    from cogvlm_ft.predict.files import predict_files, read_questions
    from cogvlm_ft.predict.predictor import Asking, load_predictor
    from cogvlm_ft.predict.serve import check_installed, serve

    upright = args.exif == "apply"
    if args.batch_size < 1 or (not args.serve and args.image is None):
        raise ConfigError("wanted --image or --serve, and --batch-size of at least 1")
    if args.serve:
        check_installed()
    questions = [] if args.serve else read_questions(args.image, args.prompt, args.targets, in_steps=args.steps)
    names = ("image_size", "resize", "dtype", "decoding", "min_boxes", "max_new_tokens", "reading")
    wording = args.wording or ("conversation" if args.steps else "box")
    asking = Asking(wording=wording, zoom_patches=args.zoom, **{name: getattr(args, name) for name in names})
    predictor = load_predictor(args.model, asking)
    if args.serve:
        serve(predictor, host=args.host, port=args.port, upright=upright)
        return 0
    if args.image.is_file() and args.image.suffix.lower() != ".jsonl":
        show(predictor, questions, args.out or Path(f"{args.image.stem}-answer.png"), upright)
        return 0
    out, pictures = args.out or Path("answers"), not args.no_pictures
    counts = predict_files(predictor, questions, out, batch_size=args.batch_size, upright=upright, pictures=pictures)
    print(f"{counts.answered} answered, {counts.failed} not {counts.reasons or ''}: {out}")
    return 0 if counts.answered else 2


def show(predictor: Predictor, questions: list[Question], out: Path, upright: bool) -> None:
    """All that is asked about one photo."""
    from cogvlm_ft.predict.files import answer_questions, load_photo
    from cogvlm_ft.predict.predictor import draw_replies

    for question in questions:
        if question.problem:
            raise DataError(question.problem)
    photo = load_photo(questions[0].path, upright=upright)
    replies = [reply for part in answer_questions(predictor, [photo], [questions])[0] for reply in part]
    for reply in replies:
        print(reply.text if len(replies) == 1 else f"{reply.prompt}\n{reply.text}")
        for box in reply.boxes or ():
            confidence = "" if box.confidence is None else f"  confidence {box.confidence:.2f}"
            notes = f"{'  ' + box.phrase if box.phrase else ''}{'  second look' if box.zoomed else ''}"
            print("  box in pixels: " + " ".join(f"{value:.1f}" for value in box.xyxy) + confidence + notes)
        if reply.not_found_prob is not None:
            print(f"  chance of the not-found sentence: {reply.not_found_prob:.2f}")
    draw_replies(photo, replies).save(out)
    print(f"drawn: {out}")


if __name__ == "__main__":
    sys.exit(main())
