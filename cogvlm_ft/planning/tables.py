"""Write the tables of docs/performance.md: the 17B model on clusters of one kind of GPU."""

from __future__ import annotations

from dataclasses import replace

from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.memory import GIB, Cluster, Planner, judge
from cogvlm_ft.planning.step_time import H100_TFLOPS, Speeds, number_format, time_step
from cogvlm_ft.planning.suggestions import OFFLOADS
from cogvlm_ft.settings import Config

IMAGE_SIZES_PX = (490, 756, 980)
CLUSTERS = ((1, 4), (1, 8), (2, 8), (4, 8))  # nodes, GPUs of each
NEW_TOKENS = 128  # of an answer, unless evaluate.max_new_tokens is set
PRESETS = (
    ("fp32", "zero3", "GPU"),
    ("fp32", OFFLOADS[0], "host"),
    ("bf16", "zero3_bf16", "GPU"),
    ("bf16", OFFLOADS[0], "host"),
)
MARKS = {"fits": "", "tight": " ?", "too much": " ✗"}
HEAD = "| px | precision | Adam on the | " + " | ".join(f"{nodes * gpus}" for nodes, gpus in CLUSTERS) + " |"


def write_tables(config: Config, sequences: MicroBatchShape, speeds: Speeds, gpu_gib: float) -> str:
    """Return Markdown: memory of training, memory of evaluation, and time of a step, each for 4 to 32 GPUs.

    The batch is one image per GPU and pass, 32 per step, whatever `config` says.
    """
    train = replace(config.train, micro_batch_size=1, global_batch_size=32)
    evaluate = replace(config.evaluate, max_new_tokens=config.evaluate.max_new_tokens or NEW_TOKENS)
    config = replace(config, train=train, evaluate=evaluate)
    rows: dict[str, list[str]] = {"training": [], "evaluation": [], "step": []}
    first = Planner(config, CogVLMConfig(), Cluster())
    for precision, deepspeed, where in PRESETS:
        run = replace(config, deepspeed=deepspeed, train=replace(train, precision=precision))
        first = first.changed(run)
        at = replace(speeds, tflops=H100_TFLOPS[number_format(run)])
        for image_size in IMAGE_SIZES_PX:
            shown = replace(sequences, num_images=1, image_size=image_size)
            cells: dict[str, list[str]] = {name: [] for name in rows}
            for nodes, gpus in CLUSTERS:
                planner = first.changed(cluster=Cluster(nodes, gpus, gpu_gib))
                estimate = planner.estimate(shown)
                for phase in ("training", "evaluation"):
                    status = judge(estimate, planner.cluster, (phase,)).status
                    cells[phase].append(f"{estimate.peaks[phase] / GIB:.1f}{MARKS[status]}")
                cells["step"].append(f"{time_step(planner, estimate, shown, at).step_s:.1f}")
            for name, row in cells.items():
                rows[name].append(f"| {image_size} | {precision} | {where} | {' | '.join(row)} |")
    titles = {
        "training": "Training, one image per GPU and pass: GiB per GPU",
        "evaluation": f"Evaluation, {config.evaluate.batch_size} images at a time: GiB per GPU",
        "step": "A step of 32 images: seconds",
    }
    rule = "|" + "---|" * (3 + len(CLUSTERS))
    return "\n\n".join("\n".join([f"**{titles[name]}**", "", HEAD, rule, *lines]) for name, lines in rows.items())
