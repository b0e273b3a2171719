"""Build WebDataset shards from annotations and images.

A build can be stopped at any time; the same command resumes it. Exit codes: 0 built, 2 an option or the annotations
cannot be used, 1 any other error. docs/formats.md describes the formats.

Examples:
  python shards/build.py --images photos/ --annotations instances.json --out shards_out
  python shards/build.py --format coco --images photos/ --annotations instances.json --out shards_out --negatives 0.2
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from cogvlm_ft.command_line import build_parser, explained_path
    from cogvlm_ft.plain_files import real_path
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

from tqdm import tqdm

from cogvlm_ft.data.cutting import TileCut
from cogvlm_ft.data.reader import MAX_PIXELS
from cogvlm_ft.data.shard_sets import INDEX_VERSION, read_json_file
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import FORMATS, check_kind
from cogvlm_ft.shards.formats.choice import settle_source
from cogvlm_ft.shards.negatives import KINDS, NegativeSettings, Vocabulary, negatives_report
from cogvlm_ft.shards.negatives.two_passes import SecondPass, is_exhaustive, run_first_pass
from cogvlm_ft.shards.packing.box_units import BOX_UNITS, BoxUnits, UnitSurvey
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.dataset_card import write_dataset_card
from cogvlm_ft.shards.packing.decisions import Decisions, load_decisions
from cogvlm_ft.shards.packing.exif import EXIF_MODES, decide_exif
from cogvlm_ft.shards.packing.given_splits import SPLIT_CHOICES, with_splits
from cogvlm_ft.shards.packing.label_names import load_names
from cogvlm_ft.shards.packing.photo_headers import PhotoHeaders
from cogvlm_ft.shards.packing.photo_names import with_photos
from cogvlm_ft.shards.packing.problem_files import PROBLEM_FILES, ProblemFiles
from cogvlm_ft.shards.packing.source_photos import GroupBy
from cogvlm_ft.shards.packing.split_plan import DEFAULT_SEED, DEFAULT_VAL_FRACTION, SplitRules, advice_on_splits
from cogvlm_ft.shards.packing.splits import SPLITS, ShardPlan
from cogvlm_ft.shards.packing.staging import StagingDatabase
from cogvlm_ft.shards.packing.summary import summarize
from cogvlm_ft.shards.packing.tar_writing import (
    WriteSettings,
    is_written,
    problem_row,
    shard_paths,
    to_json_bytes,
    write_atomically,
)
from cogvlm_ft.shards.packing.tile_photos import add_tile_options, tile_cut
from cogvlm_ft.shards.packing.verify import VERIFY
from cogvlm_ft.shards.packing.workers import warm_up, write_shards

_COUNTS = ("num_samples", "num_targets", "num_boxes", "num_absent", "num_turns")
_STAGING = ".staging.sqlite"
_FORMER_STAGING = ".spool.sqlite"  # left by a killed build of version 0.1

Parts = Iterator[Candidate | Problem]


@dataclass(frozen=True)
class BuildSettings:
    """All settings that determine the bytes of the shards."""

    format: str
    images: Path
    annotations: Path
    val_fraction: float | None = None
    split: str = SPLIT_CHOICES[0]
    group_by: str = "photo"
    seed: int = DEFAULT_SEED
    samples_per_shard: int = 1000
    max_pixels: int = MAX_PIXELS
    verify: str = VERIFY[0]
    decisions: Path | None = None
    exif: str = EXIF_MODES[0]
    box_unit: str = "auto"
    negatives: NegativeSettings | None = None
    max_side: int | None = None
    names: Path | None = None
    tiles: TileCut | None = None


def build(settings: BuildSettings, out: Path, *, num_workers: int, overwrite: bool = False) -> str:
    """Write the shards, index.json, rejected.jsonl and notes.jsonl; return a summary to print. Raises DataError."""
    _check_settings(settings)
    signature = _signature(settings)
    found = _check_folder(out, signature, overwrite)
    warm_up(num_workers)
    staging = StagingDatabase(out / _STAGING, settings.seed)
    try:
        headers = PhotoHeaders(settings.images)
        box_units = _stage(settings, staging, headers)
        signature["annotations_sha256"] = staging.sha256
        signature["box_units"] = sorted([*group, units] for group, units in box_units.units_of.items())
        exif = decide_exif(staging.candidates(), headers, settings.exif)
        signature["exif"] = {"mode": settings.exif, "applied": exif.apply}
        rules = SplitRules(settings.val_fraction, settings.split, settings.group_by, settings.images)
        plans, splitting = staging.plan_shards(rules, samples_per_shard=settings.samples_per_shard)
        signature["splitting"] = splitting.to_json()
        _begin(out, signature, found)
        vocabulary, second_pass = _first_pass(settings, staging)
        staging.commit()
        limits = settings.max_pixels, settings.verify, exif.apply, settings.max_side
        packing = WriteSettings(staging.path, settings.images, out, *limits, second_pass, settings.tiles)
        _write_missing_shards(plans, packing, num_workers)
        index, files = _finish(out, plans, signature, staging, vocabulary, settings.negatives)
    except sqlite3.Error as error:  # no room for it, or another build is writing there
        raise DataError(f"{staging.path}: {error}. Check the free space and that no other build uses {out}.") from None
    finally:
        staging.close()
    decided = "\n".join(line for line in (box_units.explanation, exif.explanation) if line)
    return f"{decided}\n\n{summarize(index, files, out)}"


def _stage(settings: BuildSettings, staging: StagingDatabase, headers: PhotoHeaders) -> BoxUnits:
    """Stage everything that the annotations contain; return the decided units. Raises DataError if they are unclear."""
    survey = UnitSurvey(headers)
    for part in tqdm(headers.ahead(_parts(settings, staging)), unit="", desc="annotations"):
        staging.add(part)
        survey.add(part)
    box_units = survey.decide(settings.box_unit, settings.annotations)
    for note in box_units.notes:
        staging.add(note)
    staging.settle_units(box_units)
    return box_units


def _parts(settings: BuildSettings, staging: StagingDatabase) -> Parts:
    """Yield what the annotations contain, with the decisions, the words for labels and the stated splits applied."""
    parts: Parts = with_photos(FORMATS[settings.format].read(settings.annotations, settings.images), settings.images)
    if settings.decisions:
        parts = _decided(parts, load_decisions(settings.decisions), staging)
    if settings.names:
        parts = load_names(settings.names).apply(parts)
    return with_splits(parts, settings.split, settings.annotations, settings.images)


def _decided(parts: Parts, decisions: Decisions, staging: StagingDatabase) -> Parts:
    for part in parts:
        if isinstance(part, Problem):
            yield part
            continue
        kept, problems = decisions.apply(part)
        yield from problems
        if kept:
            yield kept
        else:
            staging.add_context(part)
    yield from decisions.unmet()


def _first_pass(settings: BuildSettings, staging: StagingDatabase) -> tuple[Vocabulary | None, SecondPass | None]:
    if not settings.negatives:
        return None, None
    exhaustive = is_exhaustive(settings.negatives, settings.format)
    return run_first_pass(staging, settings.negatives, exhaustive=exhaustive)


def _check_settings(settings: BuildSettings) -> None:
    if not settings.images.is_dir():
        raise DataError(f"--images {settings.images}: not a folder; expected the folder of the photos")
    if not settings.annotations.exists():
        raise DataError(f"--annotations {settings.annotations}: no such file or folder")
    check_kind(settings.annotations)
    if settings.val_fraction is not None and not 0 <= settings.val_fraction <= 1:
        raise DataError(f"--val-fraction: {settings.val_fraction}; expected 0 (only train) to 1 (only val)")
    if settings.split not in SPLIT_CHOICES:
        raise DataError(f"--split: {settings.split!r}; expected {', '.join(SPLIT_CHOICES)}")
    GroupBy(settings.group_by)
    for name in ("samples_per_shard", "max_pixels", "max_side"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')}: {value}; expected 1 or more")
    if settings.negatives:
        settings.negatives.check()


def _signature(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings for build.json; shards of other settings must not be mixed with new ones.

    Of the annotations, the decisions and the names counts what came out, of EXIF and the unit of the boxes what was
    decided: both are added when all is read.
    """
    negatives = settings.negatives.signature() if settings.negatives else None
    parts = {"negatives": negatives, "tiles": vars(settings.tiles) if settings.tiles else None}
    signature = {**vars(settings), "images": str(real_path(settings.images)), **parts}
    read_or_decided = ("annotations", "decisions", "exif", "box_unit", "names")
    return {name: value for name, value in signature.items() if name not in read_or_decided}


def _check_folder(out: Path, signature: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the build.json of an earlier build to resume, if any. Raises DataError if the folder is not ours."""
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        return None
    marker = out / "build.json"
    if marker.is_file():
        found: dict[str, Any] = read_json_file(marker)
        if not isinstance(found, dict):
            raise DataError(
                f"{marker}: {found!r:.80}; expected the settings of a build. Choose another --out, or add --overwrite."
            )
        _refuse_other_settings(out, found, signature)
        return found
    if any(_own_files(out)):
        raise DataError(f"{out}: shards but no build.json; expected a new folder or a build. Choose another --out.")
    return None


def _refuse_other_settings(out: Path, found: dict[str, Any], signature: dict[str, Any]) -> None:
    other = [name for name in signature if found.get(name) != signature[name]]
    if other:
        changes = "; ".join(f"{name}: found {found.get(name)!r}; expected {signature[name]!r}" for name in other)
        advice = advice_on_splits(found, signature) or "Choose another --out, or add --overwrite."
        raise DataError(f"{out}: built with other settings: {changes}. {advice}")


def _begin(out: Path, signature: dict[str, Any], found: dict[str, Any] | None) -> None:
    """Resume the earlier build, or delete what it may have left."""
    if found:
        _refuse_other_settings(out, found, signature)
    else:
        for path in _own_files(out):
            path.unlink()
    for path in (*out.glob("*.[0-9]*.tmp"), out / _FORMER_STAGING):  # left by a killed build
        path.unlink(missing_ok=True)
    write_atomically(out / "build.json", to_json_bytes(signature))


def _own_files(out: Path) -> Iterator[Path]:
    """Yield all files of a build; index.json first, so that a half-deleted build never looks complete."""
    for name in ("index.json", *PROBLEM_FILES):
        yield from out.glob(name)
    for split in SPLITS:
        for suffix in (".tar", ".json"):
            yield from out.glob(f"{split}-{'[0-9]' * 6}{suffix}")


def _write_missing_shards(plans: list[ShardPlan], settings: WriteSettings, num_workers: int) -> None:
    missing = [plan for plan in plans if not is_written(plan, settings.out)]
    total = sum(len(plan) for plan in plans)
    with tqdm(total=total, initial=total - sum(map(len, missing)), unit="image", desc="shards") as bar:
        for num_candidates in write_shards(missing, settings, num_workers):
            bar.update(num_candidates)


def _finish(
    out: Path,
    plans: list[ShardPlan],
    signature: dict[str, Any],
    staging: StagingDatabase,
    vocabulary: Vocabulary | None,
    negatives: NegativeSettings | None,
) -> tuple[dict[str, Any], ProblemFiles]:
    """Write rejected.jsonl, notes.jsonl, README.md and then index.json; return the index and the written problems."""
    names = [split for split in SPLITS if split != "test" or any(plan.split == "test" for plan in plans)]
    splits: dict[str, Any] = {split: {"shards": [], **dict.fromkeys(_COUNTS, 0)} for split in names}
    num_added: Counter[str] = Counter()
    with ProblemFiles(out) as files:
        for row in _problem_rows(out, plans, staging, splits, num_added):
            files.add(row)
    if not any(split["num_samples"] for split in splits.values()):
        first = next((f"; first: {row['reason']}: {row['detail']}" for row in files.rejected.examples.values()), "")
        raise DataError(f"no sample is left; see {out / 'rejected.jsonl'}{first}")
    index = {
        "version": INDEX_VERSION,
        "splits": splits,
        "rejected": files.rejected.counts,
        "notes": files.notes.counts,
        "build": {name: value for name, value in signature.items() if name != "images"},
    }
    if vocabulary and negatives:
        index["negatives"] = negatives_report(vocabulary, negatives, num_added)
    write_dataset_card(out, [name for name in names if splits[name]["shards"]])
    write_atomically(out / "index.json", to_json_bytes(index))
    return index, files


def _problem_rows(
    out: Path, plans: list[ShardPlan], staging: StagingDatabase, splits: dict[str, Any], num_added: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of rejected.jsonl and notes.jsonl.

    Adds up each shard in `splits` and its absent targets in `num_added`.
    """
    for problem, image in staging.problems():
        yield problem_row(problem, image)
    for plan in plans:
        tar_path, offsets_path = shard_paths(plan.name, out)
        content = read_json_file(offsets_path)
        split = splits[plan.split]
        shard = {name: content[name] for name in ("num_samples", "size", "sha256")}
        split["shards"].append({"path": tar_path.name, **shard})
        for name in _COUNTS:
            split[name] += content[name]
        num_added.update(content.get("negatives", {}))
        yield from content["rejected"]
        yield from content.get("notes", [])


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser(__doc__, allow_abbrev=False)
    add, defaults = parser.add_argument, BuildSettings
    add("--format", choices=["auto", *sorted(FORMATS)], default="auto", help="annotation format; default: detected")
    add("--annotations", type=Path, required=True, help="annotation file or folder")
    add("--images", type=Path, help="folder of the photos; default: the folder of the annotations")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--decisions", type=Path, help="decisions saved from the page of shards/review.py")
    fraction_help = f"fraction of photos for validation; default: as stated in the files, or {DEFAULT_VAL_FRACTION}"
    add("--val-fraction", type=float, help=fraction_help)
    split_help = "folders: as stated in the files; random; or one split for all photos; default: folders if stated"
    add("--split", choices=SPLIT_CHOICES, default=defaults.split, help=split_help)
    group_help = "keep in one split: copies of one photo (default), a folder, none, or a regular expression on the path"
    add("--group-by", default=defaults.group_by, help=group_help)
    add("--seed", type=int, default=defaults.seed, help="seed of the split, the order and the absent targets")
    add("--samples-per-shard", type=int, default=defaults.samples_per_shard)
    add("--max-pixels", type=int, default=MAX_PIXELS, help="maximum size of a photo without --tiles, in pixels")
    verify_help = "structure: detect truncated files (fast); decode: also detect what cannot be decoded"
    add("--verify", choices=VERIFY, default=defaults.verify, help=verify_help)
    add("--exif", choices=EXIF_MODES, default=defaults.exif, help="rotate photos by their EXIF orientation")
    box_unit_help = "unit of the boxes, if the format does not state it; default: determined from all boxes"
    add("--box-unit", choices=["auto", *BOX_UNITS], default="auto", help=box_unit_help)
    add("--max-side", type=int, help="shrink larger photos to this side in px, and store them as JPEG")
    add_tile_options(parser)
    add("--negatives", type=float, default=0.0, help="fraction of absent targets among all targets, such as 0.2")
    add("--negative-kinds", nargs="+", choices=KINDS, default=KINDS, help="sources of absent targets")
    add("--synonyms", type=Path, help="YAML file of names with the same meaning, for absent targets")
    add(
        "--names",
        type=Path,
        help="YAML file of English and Chinese words for labels, such as RBC: [red blood cell, 红细胞]",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; does not change the result")
    add("--overwrite", action="store_true", help="delete the files of an earlier build in --out")
    return parser.parse_args(argv)


def _settings(args: argparse.Namespace) -> BuildSettings:
    """Convert the command line; report the recognised format."""
    images = args.images or (args.annotations if args.annotations.is_dir() else args.annotations.parent)
    name, annotations = settle_source(args.format, args.annotations, images)
    kinds = dict.fromkeys(args.negative_kinds, 1.0)
    negatives = (
        NegativeSettings(args.negatives, kinds, args.synonyms, args.seed, args.names) if args.negatives else None
    )
    return BuildSettings(
        format=name,
        images=images,
        annotations=annotations,
        val_fraction=args.val_fraction,
        split=args.split,
        group_by=args.group_by,
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        max_pixels=args.max_pixels,
        verify=args.verify,
        decisions=args.decisions,
        exif=args.exif,
        box_unit=args.box_unit,
        negatives=negatives,
        max_side=args.max_side,
        names=args.names,
        tiles=tile_cut(args),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, 2 for a user's mistake, or 1 for any other error, with one line on stderr."""
    args = _parse_args(argv)
    try:
        say(build(_settings(args), args.out, num_workers=args.workers, overwrite=args.overwrite))
    except (DataError, OSError, sqlite3.Error) as error:  # no space, no permission
        explained = explained_path(error) if isinstance(error, OSError) else None
        say(explained or f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if explained or isinstance(error, DataError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
