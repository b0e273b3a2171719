"""Measure a build of one large JPEG in tiles, and how fast training reads tiles of it and of a photo stored whole.

    python bench/large_photo.py [--megapixels 400] [--side 980]

The photo is noise on clouds, so that it is as large as a detailed photo. Prints time, sizes and the peak memory of the
building process, then the tiles per CPU second that a loader decodes and resizes to 490 px: stored tiles, and tiles of
a photo of at most 81 megapixels that is stored whole, which is decoded for each of them. Needs the extra `tiles`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cogvlm_ft.data.frames import Frame
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.grounding.tiles import tile_windows

REPOSITORY = Path(__file__).resolve().parents[1]
OVERLAP, INPUT_PX, MOST_WHOLE_PX = 0.2, 490, 9000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=int, default=400)
    parser.add_argument("--side", type=int, default=980, help="of a tile, px")
    args = parser.parse_args()
    side_px = round((args.megapixels * 1e6) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        photo = draw(Path(folder) / "large", side_px)
        print(f"photo: {side_px} x {side_px}, {photo.stat().st_size / 2**20:.0f} MiB")
        print(f"build: {build(photo.parent, ['--tiles', str(args.side), '--overlap', str(OVERLAP)])}")
        print(f"stored tiles: {read_tiles(photo.parent, args.side, 60):.1f} a CPU second")
        whole_px = min(side_px, MOST_WHOLE_PX)
        whole = draw(Path(folder) / "whole", whole_px)
        print(f"stored whole, {whole_px} x {whole_px}: {build(whole.parent, [])}")
        print(f"tiles of it: {read_tiles(whole.parent, args.side, 4):.1f} a CPU second")


def draw(folder: Path, side_px: int) -> Path:
    """Write a JPEG and its annotation; in a process of its own, whose memory does not count."""
    folder.mkdir()
    code = (
        "import sys, pyvips; path, side = sys.argv[1], int(sys.argv[2]); "
        "grey = pyvips.Image.perlin(side, side, cell_size=256).linear(40, 128)"
        " + pyvips.Image.gaussnoise(side, side, sigma=12, mean=0); "
        "rgb = grey.bandjoin([grey.linear(0.9, 10), grey.linear(0.8, 30)]).cast('uchar'); "
        "rgb.copy(interpretation='srgb').jpegsave(path, Q=88)"
    )
    path = folder / "photo.jpg"
    subprocess.run([sys.executable, "-c", code, path, str(side_px)], check=True)
    line = {"image": path.name, "targets": [{"phrase": "a car", "boxes": [[100, 100, 160, 140]]}]}
    (folder / "lines.jsonl").write_text(json.dumps(line), encoding="utf-8")
    return path


def build(folder: Path, options: list[str]) -> str:
    """Build shards in a process of its own; return its time, the size of the tar and its peak memory."""
    arguments = ["--images", folder, "--annotations", folder / "lines.jsonl", "--out", folder / "shards"]
    arguments += ["--workers", 1, "--val-fraction", 0, *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "shards/build.py", *map(str, arguments)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the build ended with {os.waitstatus_to_exitcode(status)}")
    num_bytes = (folder / "shards/train-000000.tar").stat().st_size
    return (
        f"{time.perf_counter() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU, "
        f"{num_bytes / 2**20:.0f} MiB, peak memory {_mib(used):.0f} MiB"
    )


def _mib(used: resource.struct_rusage) -> float:
    return used.ru_maxrss / 1024


def read_tiles(folder: Path, side_px: int, number: int) -> float:
    """Return how many tiles a CPU second reads, decodes and resizes, each as a sample of its own."""
    reader = ShardReader(load_index(folder / "shards", "train"))
    size_px = reader.read(0).image.size
    windows = tile_windows(size_px, side_px, OVERLAP)[:number]
    start = time.process_time()
    for window in windows:
        Frame(size_px, window).apply_image(reader.read(0).image, INPUT_PX)
    return len(windows) / (time.process_time() - start)


if __name__ == "__main__":
    main()
