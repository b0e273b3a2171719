"""Check annotations or shards, and write the results as a web page (review.html) and as JSON.

Decisions made on the page are applied by shards/build.py --decisions.

Examples:
  python shards/review.py --format coco --images photos/ --annotations instances.json --out review
  python shards/review.py --shards shards_out --out review
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, explained_path
    from cogvlm_ft.terminal import counted, say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.settings import RESIZES, DataConfig
from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.formats.choice import settle_source
from cogvlm_ft.shards.packing.box_units import BOX_UNITS
from cogvlm_ft.shards.packing.candidates import Problem
from cogvlm_ft.shards.packing.tar_writing import to_json_bytes, write_atomically
from cogvlm_ft.shards.reviewing.label_words import names_text
from cogvlm_ft.shards.reviewing.page import render_page
from cogvlm_ft.shards.reviewing.settings import ReviewSettings, parse_augment
from cogvlm_ft.shards.reviewing.small_targets import explain
from cogvlm_ft.shards.reviewing.sources import Item, annotated_items, shard_items
from cogvlm_ft.shards.reviewing.statistics import IMAGE_SIZES, PATCH_PX, WEIGHTS_SIZE
from cogvlm_ft.shards.reviewing.survey import Survey, survey
from cogvlm_ft.shards.reviewing.suspect_texts import NOTE, title_of

Parts = Iterator[Item | Problem]


def review(parts: Parts, source: str, out: Path, settings: ReviewSettings | None = None) -> Survey:
    """Write review.html, review.json and suspects.jsonl to `out`. Raises DataError, ConfigError for the wording."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out}: a file; expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    settings = settings or ReviewSettings()
    load_wording(settings.wording)  # a mistake is reported before anything is read
    found = survey(parts, out, settings)
    write_atomically(out / "review.html", render_page(found, source, settings).encode())
    if found.report["labels"] and not (out / "names.yaml").exists():  # one that was edited is kept
        write_atomically(out / "names.yaml", names_text(found.report["labels"]).encode())
    write_atomically(out / "review.json", to_json_bytes({"source": source, **found.report}))
    return found


def summarize(found: Survey, out: Path) -> str:
    """Format the summary for the terminal: the same numbers as on the page."""
    counts, best, suspects = found.report["counts"], found.report["recommended"], found.report["suspects"]
    nouns = {
        "photos": "photo",
        "targets": "target",
        "boxes": "box",
        "absent": "absent target",
        "turns": "verbatim turn",
    }
    lines = [", ".join(counted(counts[name], noun) for name, noun in nouns.items())]
    if best["image_size"]:
        own = ", the weights' own" if best["image_size"] == best["weights_size"] else ""
        fraction = f"{best['share']:.1%} of the boxes are at least one patch wide"
        lines.append(f"recommended image size: {best['image_size']} px{own} ({fraction})")
    tiles = explain(found.report["small_targets"], best["weights_size"])
    lines += [tiles] if tiles else []
    rows = {kind: f"  {count:>7} {title_of(kind, 'en')}" for kind, count in suspects.items()}
    lines.append(f"suspects: {found.report['num_suspects'] or 'none'}")
    lines += [row for kind, row in rows.items() if not kind.startswith(NOTE)]
    if found.report["num_notes"]:
        lines.append(f"notes (nothing was lost): {found.report['num_notes']}")
        lines += [row for kind, row in rows.items() if kind.startswith(NOTE)]
    lines.append(f"{out}: review.html, review.json, suspects.jsonl")
    return "\n".join(lines)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--shards", type=Path, help="folder written by shards/build.py, instead of --format, --images and --annotations"
    )
    add(
        "--format",
        choices=["auto", *sorted(FORMATS)],
        default="auto",
        help="format of the annotations; default: detected",
    )
    add("--images", type=Path, help="folder of the photos; default: the folder of the annotations")
    add("--annotations", type=Path, help="annotation file or folder")
    add("--box-unit", choices=["auto", *BOX_UNITS], default="auto", help="as in shards/build.py")
    add("--out", type=Path, required=True, help="folder for review.html, review.json and suspects.jsonl")
    add(
        "--image-size",
        type=int,
        default=WEIGHTS_SIZE,
        help="image size of training in px; boxes below one patch are reported",
    )
    size_help = "image size of the start model in px; no smaller size is recommended"
    add("--weights-size", type=int, choices=IMAGE_SIZES, default=WEIGHTS_SIZE, help=size_help)
    add("--wording", default=DataConfig.wording, help="as data.wording, for the questions on the page")
    add("--resize", choices=RESIZES, default=RESIZES[0], help="as data.resize, for the inputs on the page")
    augment_help = "as data.augment, such as crop=0.5 flip=0.5; default: an example"
    add("--augment", nargs="+", metavar="NAME=VALUE", help=augment_help)
    add(
        "--max-pictures",
        type=int,
        default=200,
        help="maximum number of suspects with pictures; suspects.jsonl lists all suspects",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="number of processes; does not change the result",
    )
    args = parser.parse_args(argv)
    if (args.shards is None) == (args.annotations is None):
        parser.error("expected --shards, or --annotations (and --images)")
    if args.annotations and not args.images:
        args.images = args.annotations if args.annotations.is_dir() else args.annotations.parent
    if args.image_size < PATCH_PX or args.max_pictures < 0:
        parser.error(f"expected --image-size {PATCH_PX} or more, and --max-pictures 0 or more")
    return args


def _settings(args: argparse.Namespace) -> ReviewSettings:
    """Collect the settings that do not concern the source. Raises ConfigError."""
    return ReviewSettings(
        image_size=args.image_size,
        weights_size=args.weights_size,
        wording=args.wording,
        resize=args.resize,
        augment=None if args.augment is None else parse_augment(args.augment),
        max_pictures=args.max_pictures,
        num_workers=args.workers,
    )


def _parts(args: argparse.Namespace) -> tuple[Parts, str]:
    """Return the parts to review, and the name of the source as the user gave it. Raises DataError."""
    if args.shards:
        return shard_items(args.shards), str(args.shards)
    for option, path in (("--annotations", args.annotations), ("--images", args.images)):
        if not path.exists():
            raise DataError(f"{option} {path}: no such file or folder")
    if not args.images.is_dir():
        raise DataError(f"--images {args.images}: not a folder; expected the folder of the photos")
    name, annotations = settle_source(args.format, args.annotations, args.images)
    return annotated_items(name, annotations, args.images, args.box_unit), f"{annotations} ({name})"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a user's mistake, or 1 for any other error, with one line on stderr."""
    args = _parse_args(argv)
    try:
        settings = _settings(args)
        parts, source = _parts(args)
        found = review(parts, source, args.out, settings)
    except (ConfigError, DataError, OSError, sqlite3.Error) as error:
        explained = explained_path(error) if isinstance(error, OSError) else None
        say(explained or f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, (OSError, sqlite3.Error)) and not explained else 2
    say(summarize(found, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
