"""Write report.html: one page about a run, or about one evaluation, that needs no network and no other file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.results import load_report
from cogvlm_ft.plain_files import read_json, replaced_file
from cogvlm_ft.report.gallery import GALLERY_FILE, photo_inside
from cogvlm_ft.report.page import render_page
from cogvlm_ft.report.thumbnails import Photos
from cogvlm_ft.run_folder import RunFolder

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
NUM_PHOTOS = 8
"""Maximum number of images in each group."""


def write_report(
    folder: Path,
    reader: ShardReader | None,
    *,
    run_folder: Path | None = None,
    train_reader: ShardReader | None = None,
    num_photos: int = NUM_PHOTOS,
) -> Path:
    """Write report.html into an evaluation's folder; with `run_folder` about the whole run, and there too.

    reader: of the evaluated images; train_reader: of the training images. Without them, the page shows the images
    that the evaluations kept. Raises DataError for files that cannot be read.
    """
    report = load_report(folder, run_folder)
    photos, train_photos = Photos(reader, _kept_photos(folder)), Photos(train_reader)
    page = render_page(report, photos, train_photos, num_photos).encode("utf-8", "backslashreplace")
    path = folder / REPORT_FILE
    _write(path, page)
    if run_folder is not None:
        path = RunFolder(run_folder).report
        _write(path, page)
    return path


def try_report(folder: Path, reader: ShardReader | None, **options: Any) -> Path | None:
    """Write the report; whatever goes wrong is a warning, as a page must not end a training run."""
    try:
        return write_report(folder, reader, **options)
    except Exception as error:
        is_usual = isinstance(error, (OSError, DataError))
        logger.warning("no %s for %s: %s", REPORT_FILE, folder, error, exc_info=not is_usual)
        return None


def _write(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename it: the page may be open."""
    with replaced_file(path) as file:
        file.write(content)


def _kept_photos(folder: Path) -> dict[str, Path]:
    """Find the images that evaluations of this run kept, by key."""
    found: dict[str, Path] = {}
    for path in sorted(folder.parent.glob(f"step-*/{GALLERY_FILE}")):
        try:
            photos = dict(read_json(path)["photos"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error!r}); expected the gallery.json of an evaluation") from None
        found |= {key: kept for key, file in photos.items() if (kept := photo_inside(folder.parent, file))}
    return found
