"""Compare building shards with `tar`, and reading them with a plain Pillow loop.

    python bench/build_shards.py [--mib 2048] [--rounds 3] [--records 100000] [--photos FOLDER]

Prints ratios. The two sides of a ratio alternate, so that other load slows both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.pixels import open_image
from cogvlm_ft.data.reader import MAX_PIXELS, ShardReader
from cogvlm_ft.shards.packing.verify import verify_image

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_PHOTOS = REPOSITORY.parent / "shared" / "data"
SIDE_PX = 490
NUM_WORKERS = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=REAL_PHOTOS, help="folder with .jpg and .png files")
    parser.add_argument("--mib", type=int, default=2048, help="repeat the photos up to this size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-read", type=int, default=400, help="photos decoded in each round")
    parser.add_argument("--records", type=int, default=100_000, help="records of the memory measurement; 0 skips it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = repeat_photos(args.photos, folder / "photos", args.mib << 20)
        bench_build(folder, names, args.rounds)
        bench_cpu(folder, names)
        bench_read(folder, names[: args.num_read], args.rounds)
        bench_memory_of_reading(folder, args.num_read // 4)
        if args.records:
            bench_memory_of_building(folder, args.records)


def repeat_photos(source: Path, folder: Path, num_bytes: int) -> list[str]:
    """Copy the photos under new names and write x.jsonl with one box for each; return the names.

    Every copy is a few bytes longer than the one before, as different photos are: identical ones would be hashed.
    """
    photos = sorted(path for path in source.rglob("*") if path.suffix in (".jpg", ".png"))
    if not photos:
        sys.exit(f"{source}: found no .jpg or .png file. Name a folder of photos with --photos.")
    folder.mkdir()
    names: list[str] = []
    lines, size = [], 0
    while size < num_bytes:
        photo = photos[len(names) % len(photos)]
        names.append(f"{len(names):06d}{photo.suffix}")
        shutil.copyfile(photo, folder / names[-1])
        with (folder / names[-1]).open("ab") as file:
            file.write(bytes(len(names) // len(photos)))
        size += photo.stat().st_size
        targets = [{"phrase": "the object in the corner", "boxes": [[0, 0, 20, 20]]}]
        lines.append(json.dumps({"image": names[-1], "targets": targets}))
    (folder.parent / "x.jsonl").write_text("\n".join(lines))
    print(f"{len(names)} photos of {size / len(names) / 1024:.0f} KiB, {NUM_WORKERS} workers")
    return names


def bench_build(folder: Path, names: Sequence[str], rounds: int) -> None:
    """Time the complete commands."""
    (folder / "names").write_text("\n".join(names))
    tar, build = _commands(folder)

    def run(command: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)

    def start_clean() -> None:
        """Remove the output of both, so that deleting old files is not timed."""
        (folder / "plain.tar").unlink(missing_ok=True)
        shutil.rmtree(folder / "shards", ignore_errors=True)
        os.sync()

    def start_from_disk() -> None:
        """Remove the photos from the page cache too, as for a data set larger than memory."""
        start_clean()
        for name in names:
            forget(folder / "photos" / name)

    sides = {"tar": run(tar), "build": run(build)}
    for where, before in (("disk", start_from_disk), ("memory", start_clean)):
        seconds = take_turns(sides, rounds, before=before)
        measured = f"{ratio(seconds['build'], seconds['tar'])} x the time of tar (target 1.3)"
        print(f"build, photos in {where:<12}{measured}", flush=True)


def _commands(folder: Path) -> tuple[list[str], list[str]]:
    """Return the commands of tar and of the build."""
    tar = ["tar", "-cf", str(folder / "plain.tar"), "-C", str(folder / "photos"), "-T", str(folder / "names")]
    build = [sys.executable, "-m", "cogvlm_ft.shards.build", "--format", "jsonl", "--images", str(folder / "photos")]
    build += ["--annotations", str(folder / "x.jsonl"), "--out", str(folder / "shards"), "--val-fraction", "0"]
    return tar, [*build, "--samples-per-shard", "200"]


def bench_cpu(folder: Path, names: Sequence[str]) -> None:
    """Print the CPU per photo of both commands, each in one process, and of some parts, with all photos in memory."""
    tar, build = _commands(folder)
    shutil.rmtree(folder / "shards", ignore_errors=True)
    code = (
        "import sys; from cogvlm_ft.shards.build import main; "
        "from cogvlm_ft.shards.packing.workers import import_webdataset_without_torch as start; start(); "
        "sys.exit(main(sys.argv[1:]))"  # as a worker starts
    )
    in_one = [sys.executable, "-c", code, *build[build.index("--format") :], "--workers", "1"]
    photos = [(folder / "photos" / name).read_bytes() for name in names[:1000]]
    parts: dict[str, tuple[int, Callable[[], object]]] = {
        "tar": (len(names), lambda: subprocess.run(tar, check=True)),
        "build": (len(names), lambda: subprocess.run(in_one, cwd=REPOSITORY, check=True, capture_output=True)),
        "verifying": (len(photos), lambda: [verify_image(photo, "", MAX_PIXELS) for photo in photos]),
        "hashing": (len(photos), lambda: [hashlib.sha256(photo) for photo in photos]),
    }
    found = []
    for name, (num_photos, part) in parts.items():
        before = sum(os.times()[:4])
        part()
        found.append(f"{name} {1000 * (sum(os.times()[:4]) - before) / num_photos:.2f}")
    print(f"ms of CPU per photo          {', '.join(found)}")


def bench_read(folder: Path, names: Sequence[str], rounds: int) -> None:
    """Time decoding and resizing with ShardReader and with a loop that opens the files."""
    index = load_index(folder / "shards", "train")
    by_key = {index.key(i): i for i in range(len(index))}
    chosen = [by_key[name.rpartition(".")[0]] for name in names]
    with multiprocessing.Pool(NUM_WORKERS, _start_worker, (folder,)) as pool:
        sides = {
            "bare": lambda: pool.map(_read_file, names, chunksize=10),
            "reader": lambda: pool.map(_read_sample, chosen, chunksize=10),
        }
        seconds = take_turns(sides, rounds)
    print(
        f"ShardReader + resize         {ratio(seconds['bare'], seconds['reader'])} x the speed of Pillow (target 0.9)"
    )


def bench_memory_of_reading(folder: Path, num_samples: int) -> None:
    """Print the resident memory of one process after one and after ten epochs."""
    _start_worker(folder)
    used = []
    for _ in range(10):
        for i in range(num_samples):
            _read_sample(i)
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
    print(f"memory of reading            {used[0]:.0f} MiB after one epoch, {used[-1]:.0f} MiB after ten")


def bench_memory_of_building(folder: Path, num_records: int) -> None:
    """Print the peak memory of the main process for a fifth of the records and for all, with tiny images."""
    code = (
        "import resource, sys; from cogvlm_ft.shards.build import main; failed = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10); sys.exit(failed)"
    )
    photos = folder / "tiny"
    photos.mkdir()
    for number in range(10):
        Image.new("RGB", (16, 12), (number, 0, 0)).save(photos / f"{number}.png")
    for count in (num_records // 5, num_records):
        annotations, out = folder / "records.jsonl", folder / f"records-{count}"
        targets = [{"phrase": "the red cup", "boxes": [[1, 2, 10, 11]]}, {"phrase": "dog", "boxes": []}]
        with annotations.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"image": f"{i % 10}.png", "key": f"key-{i}", "targets": targets}) + "\n")
        arguments = ["--format", "jsonl", "--images", photos, "--annotations", annotations, "--out", out]
        start = time.perf_counter()
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        print(f"memory of building           {done.stdout.split()[-1]} MiB for {count} records, {seconds:.0f} s")
        shutil.rmtree(out)


def take_turns(
    sides: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds of each side per round after a warm-up round; `before` precedes each and is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, action in sides.items():
            before()
            start = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def forget(path: Path) -> None:
    """Remove this file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def ratio(above: list[float], below: list[float]) -> str:
    """Format the ratio of the medians, and the medians."""
    a, b = statistics.median(above), statistics.median(below)
    return f"{a / b:.2f} ({a:.2f} s / {b:.2f} s)"


def _start_worker(folder: Path) -> None:
    global _reader, _photos
    _photos = folder / "photos"
    _reader = ShardReader(load_index(folder / "shards", "train"))


def _read_file(name: str) -> None:
    with open_image((_photos / name).read_bytes()) as image:
        image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


def _read_sample(i: int) -> None:
    _reader.read(i).image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


_reader: ShardReader
_photos: Path

if __name__ == "__main__":
    main()
