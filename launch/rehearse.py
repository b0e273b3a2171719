"""Rehearse a run with your own photos: review, build, train a tiny model on 16 of them, evaluate it, write the report.

Shows whether photos, labels, boxes, wording and settings fit together, on two CPU cores, in minutes (longer with many
boxes per photo). It does not predict the quality of the 17B model. At the end it prints the commands of the real run.

Examples:
  python launch/rehearse.py photos/
  python launch/rehearse.py photos/ --annotations instances.json --config my_run.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports, paste, paste_ranks, paste_tool
    from cogvlm_ft.config import load_config
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.plain_files import real_path
    from cogvlm_ft.rehearsal.own_folder import own_folder
    from cogvlm_ft.rehearsal.photos import build_all, count
    from cogvlm_ft.run_folder import RunFolder
    from cogvlm_ft.runtime.run_lock import Use
    from cogvlm_ft.settings import Config, TrainConfig
    from cogvlm_ft.shards.formats.choice import settle_source
    from cogvlm_ft.shards.review import main as review
    from cogvlm_ft.terminal import check_encoding, counted, say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

NUM_PHOTOS, ABSENT = 16, 0.2
TEXT_MONITOR = "chrf"
REAL_MODEL = "models/cogvlm-grounding-generalist"


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("photos", type=Path, help="folder of the photos")
    parser.add_argument("--annotations", type=Path, help="file or folder (default: the folder of the photos)")
    parser.add_argument("--format", default="auto", help="format of the annotations; default: detected")
    parser.add_argument(
        "--out", type=Path, help="folder for all results (default: runs/rehearsal/NAME, the name of the photo folder)"
    )
    parser.add_argument(
        "--config",
        default="grounding_490",
        help="config of the real run: a YAML file or a preset (default: grounding_490)",
    )
    parser.add_argument(
        "--num-photos", type=int, default=NUM_PHOTOS, help=f"number of photos to train on (default: {NUM_PHOTOS})"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: depends on the number of boxes)")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), default=1, help="number of processes, on the CPU (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed by which the photos are drawn (default: 0)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of --config")
    args = parser.parse_intermixed_args(argv)
    args.annotations = args.annotations or args.photos
    args.out = args.out or Path("runs", "rehearsal", real_path(args.photos).name)
    return exit_code(lambda: rehearse(args))


def rehearse(args: argparse.Namespace) -> int:
    check_encoding()
    check_arguments(args)
    config = real_config(args)
    with own_folder(args.out, args.out / "run", Use("rehearsal", f"--out {args.out}", "--out")):
        return rehearse_alone(args, config)


def rehearse_alone(args: argparse.Namespace, config: Config) -> int:
    start, shards = time.monotonic(), args.out / "shards"
    say(f"1/5 review of {args.annotations}", flush=True)
    name, annotations = settle_source(args.format, args.annotations, args.photos)
    source = ["--format", name, "--images", str(args.photos), "--annotations", str(annotations)]
    if code := review([*source, "--out", str(args.out / "review")]):
        return code
    say(f"\n2/5 shards of all photos, in {shards}", flush=True)
    if code := build_all([*source, "--negatives", str(ABSENT)], shards):
        return code
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no GPU
    say(f"\n3/5 a tiny model for {args.num_photos} of the photos", flush=True)
    with fast_imports():
        from cogvlm_ft.rehearsal.tiny_model import IMAGE_SIZE
        from cogvlm_ft.rehearsal.training import prepare, train
    chosen = prepare(shards, args.out, config, args.num_photos, args.seed)
    learned = f"{counted(chosen.num_photos, 'photo')} at {IMAGE_SIZE} px with {counted(chosen.num_boxes, 'box')}"
    say(f"{learned}; {chosen.num_parameters / 1e6:.1f} million parameters")
    num_steps = args.steps or chosen.num_steps
    say(f"\n4/5 training for {num_steps} steps", flush=True)
    ended = train(chosen, args.out, num_steps, args.processes, ["--config", args.config, *args.settings])
    if not ended.is_finished:
        say("\nThe rehearsal is not finished; the same command resumes it")
        return ended.code
    say(f"\n5/5 the result, after {(time.monotonic() - start) / 60:.1f} min")
    show_result(args, num_steps)
    show_real_run(args, config)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    if not args.photos.is_dir():
        found = "a file" if args.photos.exists() else "nothing"
        advice = "Unpack an archive first; a file of labels belongs to --annotations"
        raise ConfigError(f"PHOTOS {args.photos}: found {found}; expected the folder of the photos. {advice}")
    if not args.annotations.exists():
        raise ConfigError(f"--annotations {args.annotations}: found nothing; expected a file or folder. Check the path")
    for name, number in (("--num-photos", args.num_photos), ("--steps", args.steps)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: found {number}; expected 1 or more. Correct the number")


def real_config(args: argparse.Namespace) -> Config:
    """Load the settings of the real run, on the shards of all photos."""
    is_taken = Path("runs", args.out.name).absolute() == args.out.absolute()
    run = Path("runs", f"{args.out.name}-17b" if is_taken else args.out.name)
    needed = {"model.path": REAL_MODEL, "data.shards": args.out / "shards", "output_dir": run}
    given = {setting.partition("=")[0] for setting in args.settings}
    stand_ins = [f"{key}={value}" for key, value in needed.items() if key not in given]
    return load_config(args.config, [*stand_ins, *args.settings])


def show_result(args: argparse.Namespace, num_steps: int) -> None:
    from cogvlm_ft.rehearsal.result import result_lines

    for line in result_lines(RunFolder(args.out / "run"), num_steps):
        say(line)
    say(f"review    {args.out / 'review' / 'review.html'}")


def show_real_run(args: argparse.Namespace, config: Config) -> None:
    from cogvlm_ft.rehearsal.verdict import advice_on_size, judge_real_run

    shards = args.out / "shards"
    say("\nThe real run, estimated:")
    for line in filter(None, [*judge_real_run(config), advice_on_size(args.out / "review", config)]):
        say(f"  {line}")
    if not count(shards, "num_samples", ["val"]):
        say("It needs photos for validation: label more, or name other shards with data.val_shards")
    say("\nIts commands:")
    if config.model.path == REAL_MODEL and not Path(REAL_MODEL).exists():
        say("  # the model, once: 35 GB")
        for files in (["THUDM/cogvlm-grounding-generalist-hf"], ["lmsys/vicuna-7b-v1.5", "tokenizer.model"]):
            say(f"  {paste_tool('hf', 'download', *files, '--local-dir', REAL_MODEL)}")
    on_one, on_two = commands_of_real_run(args, config, has_boxes=count(shards, "num_boxes") > 0)
    say(f"  # one node\n  {on_one}\n  # two nodes\n  {on_two}")


def commands_of_real_run(args: argparse.Namespace, config: Config, *, has_boxes: bool = True) -> list[str]:
    """Return the commands for one node and for two, with every setting of this command line.

    has_boxes: of the data; without any, the best checkpoint is chosen by the texts.
    """
    needed = {"model.path": config.model.path, "data.shards": config.data.shards, "output_dir": config.output_dir}
    needed |= {} if has_boxes or config.train.monitor != TrainConfig.monitor else {"train.monitor": TEXT_MONITOR}
    others = [setting for setting in args.settings if setting.partition("=")[0] not in needed]
    settings = [*(f"{key}={value}" for key, value in needed.items()), *others]
    options = ["--config", args.config, *settings]
    return [paste_ranks("train", *options), paste("submit", "--nodes", 2, *options)]


if __name__ == "__main__":
    sys.exit(main())
