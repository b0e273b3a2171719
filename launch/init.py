"""Write the config of a run, with comments, and print the commands that check and start it.

Asks for all values that are not given as options. Without a terminal, defaults are used, and options without a
default are required.

Examples:
  python launch/init.py
  python launch/init.py --shards shards_out --model models/cogvlm-grounding-generalist --nodes 2 --out my_run.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import yaml

    from cogvlm_ft.command_line import build_parser, exit_code, paste, paste_ranks
    from cogvlm_ft.config import load_config
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.plain_files import write_text
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

SIZES = {"large": (490, 4096, 8), "small": (756, 4096, 8), "tiny": (980, 8192, 2)}
"""Size of the targets that matter: at least a tenth of the photo's side; a twentieth; smaller.

Values: image_size, max_sequence_length (980 px are 4,900 patches), images evaluated together.
"""
MEMORY_WITHOUT_OFFLOAD_GIB = 600  # of all GPUs together: 8 of 80 GB, or 16 of 40 GB


@dataclass(frozen=True)
class Question:
    """A question, the type of its answer, and the answer if none is given; None: there is no default."""

    text: str
    kind: Callable[[str], Any]
    default: Any = None


QUESTIONS = {
    "shards": Question("Folder of the shards, written by shards/build.py", str),
    "model": Question("Model folder, such as cogvlm-grounding-generalist", str),
    "nodes": Question("Number of nodes", int, 1),
    "gpus_per_node": Question("GPUs per node", int, 8),
    "gpu_memory_gib": Question("Memory of a GPU in GiB", float, 79.0),
    "targets": Question("Size of the targets: large (at least a tenth of the photo), small, tiny", str, "large"),
    "output": Question("Folder of the run", str, "runs/grounding"),
}


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    for name, question in QUESTIONS.items():
        default = "" if question.default is None else f" (default: {question.default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{question.text}{default}")
    parser.add_argument("--out", type=Path, default=Path("my_run.yaml"), help="file to write (default: my_run.yaml)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse_args(argv)
    return exit_code(lambda: write_config(args))


def write_config(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_file():
        raise ConfigError(f"--out {args.out}: found no regular file; expected a file, or nothing. Choose another name")
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"--out {args.out}: found a file; expected a new one. Add --overwrite, or rename it")
    answers = {name: answer(name, getattr(args, name)) for name in QUESTIONS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, config_text(answers))
    load_config(str(args.out))
    nodes, per_node = answers["nodes"], answers["gpus_per_node"]
    named = ("--config", args.out, "--nodes", nodes, "--gpus-per-node", per_node)
    for name in ("shards", "model"):
        if not Path(answers[name]).expanduser().exists():
            say(f"note: {answers[name]}: found nothing; expected the {name} there when the run starts")
    say(f"wrote {args.out}. Does the run fit, and how long does it take?")
    say(f"  {paste('plan', *named, '--gpu-memory-gib', answers['gpu_memory_gib'])}")
    say("Check the machine, then train:")
    if nodes == 1:
        for program in ("doctor", "train"):
            say(f"  {paste_ranks(program, '--config', args.out, num_gpus=per_node)}")
    else:
        say(f"  {paste('submit', *named)}")


def answer(name: str, given: str | None) -> Any:
    """Return the value of an option, or ask for it at a terminal until the answer is valid."""
    question, is_terminal = QUESTIONS[name], sys.stdin.isatty()
    while True:
        text = given
        if text is None and is_terminal:
            default = "" if question.default is None else f" [{question.default}]"
            text = ask(f"{question.text}{default}: ")
        if text is None and question.default is not None:
            return question.default
        try:
            return check(name, text)
        except ConfigError as error:
            if given is not None or not is_terminal:
                raise
            say(str(error))


def ask(text: str) -> str | None:
    """Return what is typed; None for an empty line. Raises ConfigError at the end of the input."""
    try:
        return input(text).strip() or None
    except (EOFError, KeyboardInterrupt):
        raise ConfigError("found no answer; expected one. Nothing was written. Start again") from None


def check(name: str, text: str | None) -> Any:
    """Return the text as a value of the question. Raises ConfigError."""
    option = f"--{name.replace('_', '-')}"
    if not text:
        raise ConfigError(f"{option}: found nothing; expected a value. {QUESTIONS[name].text}")
    if name == "targets" and text not in SIZES:
        raise ConfigError(f"{option}: found {text!r}; expected {', '.join(SIZES)}. Choose one of them")
    try:
        value = QUESTIONS[name].kind(text)
    except ValueError:
        raise ConfigError(f"{option}: found {text!r}; expected a number. Type digits only") from None
    if not isinstance(value, str) and not 0 < value < 1e6:
        raise ConfigError(f"{option}: found {text}; expected more than 0 and less than a million. Correct the number")
    return value


def config_text(answers: dict[str, Any]) -> str:
    """Return the YAML of a run on all GPUs of the answers."""
    num_gpus = answers["nodes"] * answers["gpus_per_node"]
    total_gib = num_gpus * answers["gpu_memory_gib"]
    engine = "zero3" if answers["nodes"] == 1 else "zero3_multinode"
    engine = engine if total_gib >= MEMORY_WITHOUT_OFFLOAD_GIB else "zero3_offload_optimizer"
    size, max_tokens, num_together = SIZES[answers["targets"]]
    gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    return f"""# A run on {gpus}, {total_gib:g} GiB together. Every setting: docs/config.md.
output_dir: {quoted(answers["output"])}
deepspeed: {engine}  # configs/deepspeed/; the plan says whether the run fits
model:
  path: {quoted(answers["model"])}
  image_size: {size}  # px; {answers["targets"]} targets; more finds smaller ones, slower
data:
  shards: {quoted(answers["shards"])}
  max_sequence_length: {max_tokens}  # tokens of an image and its texts; longer samples are not used
train:
  global_batch_size: {-(-16 // num_gpus) * num_gpus}  # images per step over all GPUs, a multiple of their number
  micro_batch_size: 1  # images per GPU at once; raise it if the plan says that there is room
  epochs: 5
  lr: 5.0e-5
  patience: 3  # evaluations without a new best; then the run ends
evaluate:
  batch_size: {num_together}  # images answered together per GPU; fewer need less memory
"""


def quoted(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


if __name__ == "__main__":
    sys.exit(main())
