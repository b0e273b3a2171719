"""Cut large photos into stored tiles when shards are built."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

from cogvlm_ft.data.cutting import QUALITY, WHOLE_SIDE_PX, CutPhoto, TileCut, cut_photo
from cogvlm_ft.data.reader import decode_image
from cogvlm_ft.data.row_streams import DecodedRows, RowStream, StreamedRows
from cogvlm_ft.data.tars import IMAGE_FORMATS, MAX_MEMBER_BYTES
from cogvlm_ft.shards.packing.candidates import Candidate, Rejected
from cogvlm_ft.shards.packing.checks import CheckedSample, large_photo, open_large


def add_tile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `tile_cut` reads."""
    tiles_help = "cut photos larger than this side in px into tiles, for data.tiles; also photos above --max-pixels"
    parser.add_argument("--tiles", type=int, metavar="SIDE", help=tiles_help)
    parser.add_argument("--overlap", type=float, default=0.2, help="overlap of tiles, as a fraction of their side")
    quality_help = f"store JPEG tiles; default: {QUALITY} for JPEG photos, lossless PNG for others"
    parser.add_argument("--tile-quality", type=int, help=quality_help)


def tile_cut(args: argparse.Namespace) -> TileCut | None:
    """Return how the command line asks to cut photos, if it does. Raises DataError."""
    if args.tiles is None:
        return None
    return TileCut(args.tiles, args.overlap, args.tile_quality, args.max_side or WHOLE_SIDE_PX)


def cut_sample(
    sample: CheckedSample, candidate: Candidate, images: Path, max_pixels: int, cut: TileCut, folder: Path
) -> CheckedSample:
    """Return the sample with its photo in tiles; unchanged if it is not larger than one.

    folder: of the temporary file that holds the tiles. Raises Rejected, and BadSampleError for a photo that cannot be
    decoded.
    """
    record = sample.record
    assert record.image_size_px is not None, "a checked sample knows its size"
    if len(cut.windows(record.image_size_px)) < 2 and sample.image:
        return sample
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed when it is written into the tar
    try:
        with ExitStack() as opened:
            rows: RowStream
            if sample.image:
                image = decode_image(sample.image, record.key, max_pixels, upright=record.upright)
                rows, orientation = DecodedRows(image), 1
            else:
                photo = opened.enter_context(open_large(candidate, images))[0]
                header = large_photo(candidate, images, max_pixels)
                assert header is not None
                rows, orientation = StreamedRows(photo, header.size_px), header.orientation if record.upright else 1
            found = _cut(rows, orientation, sample, candidate, cut, file)
    except BaseException:
        file.close()
        raise
    return CheckedSample(replace(record, upright=False, tiles=found.tiles), "jpg", found.whole, file)


def _cut(
    rows: RowStream, orientation: int, sample: CheckedSample, candidate: Candidate, cut: TileCut, file: IO[bytes]
) -> CutPhoto:
    is_jpeg = sample.ext in IMAGE_FORMATS["JPEG"]
    name = candidate.image.encode("utf-8", "backslashreplace").decode()
    try:
        found = cut_photo(rows, cut, file, photo=name, is_jpeg=is_jpeg, orientation=orientation)
    except ValueError as error:
        raise Rejected("sample", "broken_image", f"{candidate.image}: {error}") from None
    num_bytes = sum(found.tiles.num_bytes)
    if num_bytes > MAX_MEMBER_BYTES:
        hint = "" if cut.quality else " Add --tile-quality 95, which stores JPEG tiles."
        detail = f"{candidate.image}: {num_bytes} bytes in tiles; expected at most {MAX_MEMBER_BYTES}.{hint}"
        raise Rejected("sample", "too_large", detail)
    return found
