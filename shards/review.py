"""Check annotations or shards, and write the findings as a page to look at (review.html) and as JSON.

Decisions made on the page are applied by shards/build.py --decisions.

Examples:
  python shards/review.py --format coco --images photos/ --annotations instances.json --out review
  python shards/review.py --shards shards_out --out review
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import FORMATS, recognise_format
from cogvlm_ft.shards.packing.box_units import BOX_UNITS
from cogvlm_ft.shards.packing.candidates import Problem
from cogvlm_ft.shards.packing.tar_writing import to_json_bytes, write_atomically
from cogvlm_ft.shards.reviewing.page import render_page
from cogvlm_ft.shards.reviewing.sources import Item, annotated_items, shard_items
from cogvlm_ft.shards.reviewing.statistics import PATCH_PX
from cogvlm_ft.shards.reviewing.survey import Survey, survey
from cogvlm_ft.shards.reviewing.suspect_texts import title_of

Parts = Iterator[Item | Problem]


def review(
    parts: Parts, source: str, out: Path, *, image_size: int = 490, max_pictures: int = 200, num_workers: int = 1
) -> Survey:
    """Write review.html, review.json and suspects.jsonl to `out`. Raises DataError."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out}: a file; expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    found = survey(parts, out, image_size=image_size, max_pictures=max_pictures, num_workers=num_workers)
    write_atomically(out / "review.html", render_page(found, source).encode())
    write_atomically(out / "review.json", to_json_bytes({"source": source, **found.report}))
    return found


def summarize(found: Survey, out: Path) -> str:
    """Format the summary for the terminal."""
    counts, best = found.report["counts"], found.report["recommended"]
    lines = [f"{counts['photos']} photos, {counts['targets']} targets, {counts['boxes']} boxes"]
    if best["image_size"]:
        fraction = f"{best['share']:.0%} of the boxes are at least one patch wide"
        lines.append(f"recommended image size: {best['image_size']} px ({fraction})")
    lines.append(f"suspects: {sum(found.report['suspects'].values()) or 'none'}")
    lines += [f"  {count:>7} {title_of(kind, 'en')}" for kind, count in found.report["suspects"].items()]
    lines.append(f"{out}: review.html, review.json, suspects.jsonl")
    return "\n".join(lines)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--shards", type=Path, help="folder written by shards/build.py; instead of the next three options")
    add("--format", choices=["auto", *sorted(FORMATS)], default="auto", help="default: recognised from the files")
    add("--images", type=Path, help="folder of the photos; default: the folder of the annotations")
    add("--annotations", type=Path, help="annotation file or folder")
    add("--box-unit", choices=["auto", *BOX_UNITS], default="auto", help="as of shards/build.py")
    add("--out", type=Path, required=True, help="folder for review.html, review.json and suspects.jsonl")
    add("--image-size", type=int, default=490, help="of training, in px: reports boxes smaller than one patch")
    add("--max-pictures", type=int, default=200, help="maximum on the page; suspects.jsonl lists all suspects")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; the result does not depend on it")
    args = parser.parse_args(argv)
    if (args.shards is None) == (args.annotations is None):
        parser.error("expected --shards, or --annotations (and --images)")
    if args.annotations and not args.images:
        args.images = args.annotations if args.annotations.is_dir() else args.annotations.parent
    if args.image_size < PATCH_PX or args.max_pictures < 0:
        parser.error(f"expected --image-size {PATCH_PX} or more, and --max-pictures 0 or more")
    return args


def _parts(args: argparse.Namespace) -> tuple[Parts, str]:
    """Return what is reviewed, and its name: the user's input. Raises DataError."""
    if args.shards:
        return shard_items(args.shards), str(args.shards)
    for option, path in (("--annotations", args.annotations), ("--images", args.images)):
        if not path.exists():
            raise DataError(f"{option} {path}: no such file or folder")
    name = args.format
    if name == "auto":
        name, seen = recognise_format(args.annotations)
        print(f"--format {name}: {seen}")
    return annotated_items(name, args.annotations, args.images, args.box_unit), f"{args.annotations} ({name})"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a user's mistake, or 1 for any other error, with one line on stderr."""
    args = _parse_args(argv)
    try:
        parts, source = _parts(args)
        found = review(
            parts,
            source,
            args.out,
            image_size=args.image_size,
            max_pictures=args.max_pictures,
            num_workers=args.workers,
        )
    except (DataError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, DataError) else 1
    print(summarize(found, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
