"""Annotations and photos -> WebDataset shards.

    python shards/build.py --format coco --images photos/ --annotations instances.json --out shards_out/

Can be stopped at any time: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvlm_ft.data.index import INDEX_VERSION, read_json_file
from cogvlm_ft.data.reader import MAX_PIXELS
from cogvlm_ft.errors import DataError
from shards.candidates import Candidate, Problem
from shards.formats import FORMATS
from shards.layout import SPLITS, Slice, assign_keys, plan_slices
from shards.pack import PackSettings, is_written, rejection, shard_paths, to_json_bytes, write_atomically
from shards.summary import summarize
from shards.workers import write_shards

_COUNTS = ("num_samples", "num_targets", "num_boxes", "num_absent", "num_turns")


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides the bytes of the shards."""

    format: str
    images: Path
    annotations: Path
    val_fraction: float = 0.1
    seed: int = 0
    samples_per_shard: int = 1000
    max_pixels: int = MAX_PIXELS


def build(settings: BuildSettings, out: Path, *, num_workers: int, overwrite: bool = False) -> str:
    """Write the shards, index.json and rejected.jsonl; returns a summary for people. Raises DataError."""
    _check_settings(settings)
    signature = _signature(settings)
    _prepare_folder(out, signature, overwrite)
    found = list(FORMATS[settings.format].read(settings.annotations, settings.images))
    by_key, duplicates = assign_keys([part for part in found if isinstance(part, Candidate)])
    slices = plan_slices(
        by_key,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
        samples_per_shard=settings.samples_per_shard,
    )
    rejected = [rejection(problem) for problem in found if isinstance(problem, Problem)]
    for candidate, problem in duplicates:
        rejected.extend(rejection(each, candidate) for each in (*candidate.problems, problem))
    _write_missing_shards(slices, PackSettings(settings.images, out, settings.max_pixels), num_workers)
    index = _finish(out, slices, signature, rejected)
    return summarize(index, rejected, out)


def _check_settings(settings: BuildSettings) -> None:
    if not settings.images.is_dir():
        raise DataError(f"--images {settings.images} is no folder")
    if not settings.annotations.is_file():
        raise DataError(f"--annotations {settings.annotations} is no file")
    if not 0 <= settings.val_fraction < 1:
        raise DataError(f"--val-fraction {settings.val_fraction}, wanted 0 or more and below 1")
    for name in ("samples_per_shard", "max_pixels"):
        if getattr(settings, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(settings, name)}, wanted 1 or more")


def _signature(settings: BuildSettings) -> dict[str, Any]:
    """The settings of build.json: with another one, finished shards must not be mixed with new ones."""
    return {
        "format": settings.format,
        "images": str(settings.images.resolve()),
        "annotations_sha256": hashlib.sha256(settings.annotations.read_bytes()).hexdigest(),
        "val_fraction": settings.val_fraction,
        "seed": settings.seed,
        "samples_per_shard": settings.samples_per_shard,
        "max_pixels": settings.max_pixels,
    }


def _prepare_folder(out: Path, signature: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ready for a new build or for going on with one. Raises DataError if it holds something else."""
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "build.json"
    if overwrite:
        for path in _own_files(out):
            path.unlink()
    elif marker.is_file():
        found = read_json_file(marker)
        other = [name for name in signature if found.get(name) != signature[name]]
        if other:
            changes = "; ".join(f"{name}: {found.get(name)!r} there, {signature[name]!r} now" for name in other)
            raise DataError(f"{out} was built with other settings ({changes}); take another --out, or add --overwrite")
    elif any(_own_files(out)):
        raise DataError(f"{out} holds shards or an index.json, but no build.json: not our build; choose another --out")
    for path in out.glob("*.[0-9]*.tmp"):  # left by a killed build
        path.unlink(missing_ok=True)
    write_atomically(marker, to_json_bytes(signature))


def _own_files(out: Path) -> Iterator[Path]:
    """Everything a build writes; index.json first, so that a half-deleted build is never taken for a whole one."""
    for name in ("index.json", "rejected.jsonl"):
        yield from out.glob(name)
    for split in SPLITS:
        for suffix in (".tar", ".json"):
            yield from out.glob(f"{split}-{'[0-9]' * 6}{suffix}")


def _write_missing_shards(slices: list[Slice], settings: PackSettings, num_workers: int) -> None:
    missing = [part for part in slices if not is_written(part, settings.out)]
    total = sum(len(part.candidates) for part in slices)
    done = total - sum(len(part.candidates) for part in missing)
    with tqdm(total=total, initial=done, unit="image", desc="shards") as bar:
        for num_candidates in write_shards(missing, settings, num_workers):
            bar.update(num_candidates)


def _finish(
    out: Path, slices: list[Slice], signature: dict[str, Any], rejected: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write rejected.jsonl and, last, index.json; `rejected` is extended by what the shards left out."""
    splits: dict[str, Any] = {split: {"shards": [], **dict.fromkeys(_COUNTS, 0)} for split in SPLITS}
    for part in slices:
        tar_path, offsets_path = shard_paths(part.name, out)
        content = read_json_file(offsets_path)
        split = splits[part.name.partition("-")[0]]
        shard = {name: content[name] for name in ("num_samples", "size", "sha256")}
        split["shards"].append({"path": tar_path.name, **shard})
        for name in _COUNTS:
            split[name] += content[name]
        rejected.extend(content["rejected"])
    write_atomically(out / "rejected.jsonl", b"".join(to_json_bytes(row) + b"\n" for row in rejected))
    if not any(split["num_samples"] for split in splits.values()):
        first = f"; first: {rejected[0]['reason']}: {rejected[0]['detail']}" if rejected else ""
        raise DataError(f"no sample is left, see {out / 'rejected.jsonl'}{first}")
    reasons = sorted(row["reason"] for row in rejected)
    index = {
        "version": INDEX_VERSION,
        "splits": splits,
        "rejected": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        "build": {name: value for name, value in signature.items() if name != "images"},
    }
    write_atomically(out / "index.json", to_json_bytes(index))
    return index


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Annotations and photos -> WebDataset shards.", allow_abbrev=False)
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder that the image paths are relative to")
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--val-fraction", type=float, default=BuildSettings.val_fraction, help="share of the images")
    parser.add_argument("--seed", type=int, default=BuildSettings.seed)
    parser.add_argument("--samples-per-shard", type=int, default=BuildSettings.samples_per_shard)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are rejected")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="does not change the result")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier build wrote to --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit code 1 with one line on stderr for a mistake of the user."""
    args = _parse_args(argv)
    settings = BuildSettings(
        format=args.format,
        images=args.images,
        annotations=args.annotations,
        val_fraction=args.val_fraction,
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        max_pixels=args.max_pixels,
    )
    try:
        print(build(settings, args.out, num_workers=args.workers, overwrite=args.overwrite))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
