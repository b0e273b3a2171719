"""Ask a model about images: answers, boxes in pixels with their confidence, and images with the boxes drawn.

Reads one image, a folder, or a JSONL file of questions. --serve starts a web page instead.

Examples:
  python launch/predict.py --model exported --image photo.jpg --prompt "红色的车在哪里?"
  python launch/predict.py --model exported --image photos/ --targets 红色的车 狗
  python launch/predict.py --model exported --image photos/ --targets 红色的车 狗 --format labelme --order doubtful
  python launch/predict.py --model exported --serve
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.grounding.boxes import READINGS
    from cogvlm_ft.plain_files import real_path
    from cogvlm_ft.settings import DECODINGS, RESIZES
    from cogvlm_ft.terminal import say
    from cogvlm_ft.tile_settings import TilesConfig
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

ZOOM_PATCHES = 16.0
TOOLS = ("coco", "labelme", "voc", "yolo", "cvat", "label-studio")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="model folder, checkpoint, or run (its best checkpoint)",
    )
    add_questions(parser)
    add_answers(parser)
    add_small_targets(parser)
    add_weights(parser)
    page = parser.add_argument_group("web page")
    page.add_argument("--serve", action="store_true", help='needs pip install -e ".[serve]"')
    page.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; there is no password (default: 127.0.0.1, this machine only)",
    )
    page.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: 8000)")
    args = parser.parse_args(argv)
    return exit_code(lambda: predict(args))


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Add the options for questions and images."""
    group = parser.add_argument_group("questions")
    group.add_argument("--image", type=Path, help='an image, a folder, or JSONL: {"image": "a.jpg", "prompt": "..."}')
    group.add_argument("--prompt", action="append", default=[], help="a question; can be repeated")
    group.add_argument("--targets", nargs="+", default=[], help="targets to ask about, with the questions of --wording")
    group.add_argument(
        "--steps",
        action="store_true",
        help="ask which objects are present, then for each of --targets, or for each that the answer to --prompt names",
    )
    group.add_argument(
        "--wording", help="wording of the questions (default: that of the training run; if not known, box)"
    )
    group.add_argument("--image-size", type=int, help="input resolution in px (default: the model's own)")
    group.add_argument("--resize", choices=RESIZES, help="as in training (default: that of the model folder)")
    group.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        default="apply",
        help="apply: rotate the image upright by its EXIF orientation, as viewers do; boxes are in pixels of the"
        " upright image. ignore: take the pixels as stored, as the reference implementation does (default: apply)",
    )
    group.add_argument("--batch-size", type=int, default=4, help="images that are answered together (default: 4)")


def add_answers(parser: argparse.ArgumentParser) -> None:
    """Add the options for how answers are generated, read and saved."""
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--out",
        type=Path,
        help="drawn image of one image (default: NAME-answer.png); otherwise a folder (default: answers)",
    )
    group.add_argument("--no-pictures", action="store_true", help="for a folder or JSONL: write predictions.jsonl only")
    group.add_argument("--format", choices=TOOLS, help="also write the boxes of --targets for a labelling tool")
    group.add_argument(
        "--order", choices=("given", "doubtful"), default="given", help="doubtful: least certain photos first"
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        help="maximum length of an answer (default: enough for the largest number of boxes in the wording)",
    )
    group.add_argument(
        "--decoding",
        choices=DECODINGS,
        default="free",
        help="grammar: answers have well-formed boxes, or are the not-found sentence of --wording (default: free)",
    )
    group.add_argument(
        "--min-boxes",
        type=int,
        default=0,
        help="with --decoding grammar: minimum number of boxes (default: 0)",
        metavar="N",
    )
    group.add_argument(
        "--reading",
        choices=(*READINGS, "expected"),
        default="centre",
        help="coordinate of a number from 0 to 999: the centre of its bin, its lower edge as in the reference"
        " implementation, or the mean over the model's probabilities of its digits (default: centre)",
    )


def add_small_targets(parser: argparse.ArgumentParser) -> None:
    """Add the options for small targets."""
    group = parser.add_argument_group("small targets")
    group.add_argument(
        "--zoom",
        type=float,
        nargs="?",
        const=ZOOM_PATCHES,
        default=0.0,
        metavar="PATCHES",
        help=f"ask again about a crop around boxes below PATCHES vision patches (without a number: {ZOOM_PATCHES:.0f})",
    )
    group.add_argument(
        "--tiles",
        type=int,
        metavar="SIDE",
        help="also ask about overlapping tiles of SIDE px of larger photos, as with data.tiles, and merge the answers",
    )
    group.add_argument(
        "--overlap", type=float, default=0.2, help="overlap of --tiles, as a fraction of SIDE (default: 0.2)"
    )
    group.add_argument(
        "--min-confidence",
        type=float,
        metavar="C",
        help="with --tiles: keep every box with at least this confidence (default: as chosen in validation, or 0)",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model's weights."""
    group = parser.add_argument_group("weights")
    group.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32; bf16 with --weights")
    group.add_argument(
        "--weights",
        choices=("bf16", "int8", "int4"),
        help="int8, int4: quantise the linear layers while they are read, for small GPUs (default: as --dtype)",
    )
    group.add_argument(
        "--devices", type=int, default=1, help="number of GPUs over which the layers are split (default: 1)"
    )
    group.add_argument("--adapter", type=Path, help="folder of an adapter in peft's format, merged into --model")


def choose_tiles(args: argparse.Namespace) -> TilesConfig:
    """Return the tiles of --tiles and --overlap. Raises ConfigError."""
    if args.tiles is not None and args.tiles < 16:
        raise ConfigError(f"--tiles: found {args.tiles}; expected at least 16 px")
    if not 0 <= args.overlap <= 0.9:
        raise ConfigError(f"--overlap: found {args.overlap}; expected 0 to 0.9")
    if args.min_confidence is not None and (args.tiles is None or not 0 <= args.min_confidence <= 1):
        raise ConfigError(f"--min-confidence: found {args.min_confidence}; expected 0 to 1, and --tiles")
    return TilesConfig(side_px=args.tiles, overlap=args.overlap)


def predict(args: argparse.Namespace) -> int:
    """Answer the questions, or serve the page; return the exit code."""
    with fast_imports():
        from cogvlm_ft.predict.files import predict_files, read_questions
        from cogvlm_ft.predict.one_image import answer_image, check_picture
        from cogvlm_ft.predict.predictor import Asking, dtype_settings, load_predictor
        from cogvlm_ft.predict.serve import check_installed, serve
        from cogvlm_ft.predict.served import ServedModels
        from cogvlm_ft.predict.writers.write import check_questions, write_predictions

    upright = args.exif == "apply"
    if args.batch_size < 1 or (not args.serve and args.image is None):
        raise ConfigError("expected --image or --serve, and --batch-size of at least 1")
    if args.serve:
        check_installed("--serve")
    questions = [] if args.serve else read_questions(args.image, args.prompt, args.targets, in_steps=args.steps)
    if args.format:
        check_questions(questions, args.format)
    is_one = bool(args.image) and args.image.is_file() and args.image.suffix.lower() != ".jsonl" and not args.format
    picture = check_picture(args.out or Path(f"{args.image.stem}-answer.png")) if is_one else None
    names = ("adapter", "image_size", "resize", "decoding", "min_boxes", "max_new_tokens", "reading", "min_confidence")
    settings = {name: getattr(args, name) for name in names}
    settings |= dtype_settings(args.dtype, args.weights) | {"num_devices": args.devices}
    tiles = choose_tiles(args)
    asking = Asking(wording=args.wording, in_steps=args.steps, zoom_patches=args.zoom, tiles=tiles, **settings)
    predictor = load_predictor(args.model, asking)
    say(f"model {predictor.weights}, wording {predictor.wording.name}", file=sys.stderr)
    if tiles.side_px is not None and (predictor.kept.min_confidence or predictor.kept.only_best):
        only = ", and all but the most confident one" if predictor.kept.only_best else ""
        say(f"boxes from tiles are removed below confidence {predictor.kept.min_confidence:.2f}{only}", file=sys.stderr)
    if args.serve:
        served = ServedModels(predictor, real_path(predictor.weights).name, upright=upright)
        serve(served, host=args.host, port=args.port)
        return 0
    if picture:
        answer_image(predictor, questions, picture, upright)
        return 0
    out, pictures = args.out or Path("answers"), not args.no_pictures
    counts = predict_files(predictor, questions, out, batch_size=args.batch_size, upright=upright, pictures=pictures)
    say(f"{counts.answered} answered, {counts.failed} failed {counts.reasons or ''}".rstrip() + f"; results in {out}")
    if args.format or args.order == "doubtful":
        say(write_predictions(questions, out, args.format, doubtful_first=args.order == "doubtful"))
    return 0 if counts.answered else 2


if __name__ == "__main__":
    sys.exit(main())
