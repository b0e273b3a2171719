"""Estimate whether a run fits, how long it takes and the largest configuration that fits, without GPU or weights.

Accepts the settings of launch/train.py. The sizes of the model are read from model.path or --model-config; without
either, those of the 17B model are used. Speeds are assumptions; give measured ones with --tflops, --mfu,
--network-gb-s and so on. --json prints the same as JSON, --table the tables of docs/performance.md.

Examples:
  python launch/plan.py --config grounding_490 --nodes 2 --gpus-per-node 8
  python launch/plan.py --config grounding_490 --gpus-per-node 4 deepspeed=zero3_offload_optimizer train.precision=bf16
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

try:
    from omegaconf import OmegaConf

    from cogvlm_ft.command_line import add_settings, build_parser, exit_code, fast_imports
    from cogvlm_ft.config import RUN_PRESETS, find_preset, load_config
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.rehearsal.stand_in import with_model
    from cogvlm_ft.settings import Config
    from cogvlm_ft.terminal import say
    from cogvlm_ft.yaml_text import read_yaml
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

USUAL_TURNS = 4  # per image, where the shards do not say
NOT_NEEDED = ("model.path", "data.shards", "output_dir")  # required for training, not for an estimate


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--model-config", type=Path, help="a config.json, if there is no model.path yet")
    parser.add_argument("--nodes", type=int, default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    parser.add_argument(
        "--gpu-memory-gib", type=float, default=79.0, help="default: 79, as torch reports for an 80 GB GPU"
    )
    parser.add_argument("--host-memory-gib", type=float, help="host memory of a node (default: not checked)")
    parser.add_argument("--turns", type=int, help="questions per image (default: the most in data.shards, or 4)")
    parser.add_argument(
        "--turn-tokens", type=int, default=60, help="tokens of one question with its answer (default: 60)"
    )
    parser.add_argument("--answer-tokens", type=int, default=30, help="tokens of the answer among these (default: 30)")
    parser.add_argument("--images", type=int, help="images per epoch (default: counted in data.shards, if it exists)")
    parser.add_argument(
        "--tflops", type=float, help="peak TFLOP/s of a GPU (default: an H100 SXM in the precision of the run)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="fraction of the peak that training reaches (default: 0.4)"
    )
    parser.add_argument(
        "--link-gb-s", type=float, default=300.0, help="speed between the GPUs of a node (default: 300)"
    )
    parser.add_argument("--network-gb-s", type=float, default=50.0, help="speed between nodes (default: 50)")
    parser.add_argument(
        "--disk-gb-s", type=float, default=2.0, help="disk write speed of all nodes together (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--table", action="store_true", help="print tables for the 17B model on 4 to 32 GPUs, as Markdown"
    )
    add_settings(parser)
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: say(plan(args)))


def plan(args: argparse.Namespace) -> str:
    """Return the text to print."""
    _check_numbers(args)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is needed; DeepSpeed warns if it finds none
    config: Config = load_config(args.config, [*_stand_ins(args), *args.settings])
    config = with_model(config) if config.data.shards != "unset" else config
    with fast_imports():
        from cogvlm_ft.pinned_memory import rounded_up_to
        from cogvlm_ft.planning.activations import MicroBatchShape
        from cogvlm_ft.planning.data_turns import most_turns_of
        from cogvlm_ft.planning.memory import Cluster
        from cogvlm_ft.planning.preflight import as_json, as_text, count_images, inspect_run
        from cogvlm_ft.planning.step_time import H100_TFLOPS, Speeds, number_format
        from cogvlm_ft.planning.tables import write_tables

    known = config.data.shards != "unset"
    turns = args.turns or (known and most_turns_of(config, config.data.train_split)) or USUAL_TURNS
    asked = args.turns or (known and most_turns_of(config, config.data.val_split)) or turns
    turns = min(turns, config.data.max_turns_per_image or turns)
    sequences = MicroBatchShape(
        config.train.micro_batch_size, turns, args.turn_tokens, args.answer_tokens, asked_turns=asked
    )
    speeds = Speeds(
        tflops=args.tflops or H100_TFLOPS[number_format(config)],
        mfu=args.mfu,
        link_gb_s=args.link_gb_s,
        network_gb_s=args.network_gb_s,
        disk_gb_s=args.disk_gb_s,
    )
    if args.table:
        return write_tables(config, sequences, speeds, args.gpu_memory_gib)
    cluster = Cluster(
        args.nodes,
        args.gpus_per_node,
        args.gpu_memory_gib,
        args.host_memory_gib,
        rounded_up_to=rounded_up_to(os.environ),
    )
    model_config, source = _model_config(config, args.model_config)
    num_images = args.images or (count_images(config) if known else None)
    found = inspect_run(config, model_config, cluster, sequences, speeds, num_images)
    return json.dumps(as_json(found), indent=2) if args.json else f"sizes: {source}\n{as_text(found)}"


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if args.answer_tokens > args.turn_tokens:
        raise ConfigError(f"--answer-tokens {args.answer_tokens}: expected at most --turn-tokens, {args.turn_tokens}")


def _stand_ins(args: argparse.Namespace) -> list[str]:
    """Return values for required settings that an estimate does not need."""
    try:
        content = read_yaml(find_preset(args.config, RUN_PRESETS, "--config ")) if args.config else {}
        written = OmegaConf.create(content or {})
    except (OSError, ValueError):  # load_config names what is wrong with the file
        return []
    return [f"{key}=unset" for key in NOT_NEEDED if OmegaConf.select(written, key, throw_on_missing=False) is None]


def _model_config(config: Config, file: Path | None) -> tuple[Any, str]:
    """Return (sizes of the model, where they come from)."""
    from cogvlm_ft.model import CogVLMConfig
    from cogvlm_ft.model import load_config as load_model_config
    from cogvlm_ft.model.loading import read_config

    image_size = config.model.image_size
    if file is None and (config.model.folder / "config.json").is_file():
        return load_model_config(config.model.folder, image_size), config.model.path
    if file is not None and not file.is_file():
        raise ConfigError(f"--model-config {file}: no such file")
    sizes = read_config(file) if file else CogVLMConfig()
    source = (
        str(file) if file else "those of the 17B model, because neither model.path nor --model-config has a config.json"
    )
    try:
        return (sizes.at_image_size(image_size) if image_size else sizes), source
    except ValueError as error:
        raise ConfigError(f"model.image_size: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
