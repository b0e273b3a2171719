"""The whole path on one machine: make a grounding set, pack it, train a tiny CogVLM on it, show what came out.

    python launch/demo.py [--num-scenes N] [key=value ...]        (or: make demo)

Two ranks on a machine without GPU, all GPUs otherwise. Everything goes to runs/demo; what is there already is not made
again, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cogvlm_ft.config import Config, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/demo.yaml")
NUM_SCENES = 13000
IMAGE_SIZE = 32
VAL_FRACTION = 0.02
VOCAB_SIZE = 420  # so small that a colour and a kind stay pieces of their own, in Chinese too
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_heads": 4,
    "patch_size": 8,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-scenes", type=int, default=NUM_SCENES)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override configs/demo.yaml")
    args = parser.parse_intermixed_args(argv)
    os.chdir(REPOSITORY)
    config = load_config(CONFIG, args.settings)
    scenes = Path(config.output_dir).parent / "scenes"
    make_shards(scenes, args.num_scenes, Path(config.data.shards))
    make_start_model(scenes, config)
    start = time.perf_counter()
    train(args.settings)
    show(config, time.perf_counter() - start)
    return 0


def make_shards(scenes: Path, num_scenes: int, shards: Path) -> None:
    """Coloured shapes with Chinese and English phrases, some of them absent; then WebDataset shards of them."""
    from cogvlm_ft.shards.build import main as build
    from cogvlm_ft.shards.demo_scenes import write_scenes

    if (shards / "index.json").exists():
        return
    print(f"1. making {num_scenes} scenes of {IMAGE_SIZE} px in {scenes}", flush=True)
    annotations = write_scenes(scenes, num_scenes, IMAGE_SIZE, seed=0)
    print(f"2. packing them into {shards}", flush=True)
    arguments = ["--format", "jsonl", "--images", scenes, "--annotations", annotations, "--out", shards]
    if build([*map(str, arguments), "--val-fraction", str(VAL_FRACTION)]):
        raise SystemExit("the shards could not be built")


def make_start_model(scenes: Path, config: Config) -> None:
    """A random CogVLM of the published form, some 2 million parameters, and a tokenizer for it."""
    import torch

    from cogvlm_ft.data.record import record_from_json
    from cogvlm_ft.grounding.turns import build_turns
    from cogvlm_ft.grounding.wording import load_wording
    from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, CogVLMTokenizer
    from cogvlm_ft.model.tokenizer import MODEL_FILE, train_tokenizer

    folder = Path(config.model.path)
    if (folder / "model.safetensors").exists():
        return
    print(f"3. making a tiny CogVLM in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    wording, size = load_wording(config.data.wording), (IMAGE_SIZE, IMAGE_SIZE)
    texts = []
    for line in (scenes / "annotations.jsonl").read_text(encoding="utf-8").splitlines()[:500]:
        scene = json.loads(line)
        targets = [{**target, "boxes_xyxy": target["boxes"]} for target in scene["targets"]]
        record = record_from_json(json.dumps({"targets": targets, "image_size_px": size}).encode(), scene["image"])
        turns = build_turns(record.targets, size, wording, seed=0, epoch=0, key=record.key)
        texts += [text for turn in turns for text in (turn.prompt, turn.answer)]
    train_tokenizer(texts, scenes / MODEL_FILE, VOCAB_SIZE)
    tokenizer = CogVLMTokenizer.from_folder(scenes)
    tokenizer.save(folder)

    num_positions = (IMAGE_SIZE // VISION_SIZES["patch_size"]) ** 2 + 1
    vision = {**VISION_SIZES, "image_size": IMAGE_SIZE, "num_positions": num_positions}
    model_config = CogVLMConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.09,
        template_version="base",
        vision_config=vision,
    )
    torch.manual_seed(0)
    model = CogVLMForCausalLM(model_config)
    # All patches share one position id in the language model: where a patch is, only this table tells.
    torch.nn.init.normal_(model.model.vision.patch_embedding.position_embedding.weight)
    # The tower normalises what each layer adds: at full size, random layers would bury the patch they are added to, and
    # the model would be blind for thousands of pictures. Small, the patches shine through from the first step.
    for layer in model.model.vision.transformer.layers:
        torch.nn.init.constant_(layer.input_layernorm.weight, 0.2)
        torch.nn.init.constant_(layer.post_attention_layernorm.weight, 0.2)
    model.save_pretrained(folder)


def train(settings: list[str]) -> None:
    """The command that a user would type."""
    import torch

    if torch.cuda.is_available():
        ranks, environment = torch.cuda.device_count(), dict(os.environ)
    else:
        ranks, environment = 2, {**os.environ, "DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", ranks, "launch/train.py", "--config", CONFIG, *settings]
    print("4. training:", *command[1:], flush=True)
    subprocess.run([str(part) for part in command], env=environment, check=True)


def show(config: Config, seconds: float) -> None:
    """IoU and not-found accuracy per epoch, and where everything is."""
    run = Path(config.output_dir)
    print(f"\ntrained for {seconds / 60:.1f} min\n")
    print("epoch  mean IoU  acc@0.5  absent answered with 'not found'  unreadable")
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "val":
            print(
                f"{row['epoch']:5.3g}  {row['mean_iou']:8.3f}  {row['acc@0.5']:7.3f}"
                f"  {row['not_found_acc']:32.3f}  {row['unreadable']:10.3f}"
            )
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    evaluation = sorted((run / "evaluations").glob("step-*"))[-1]
    wandb_run = sorted((run / "wandb").glob("*run-*"))[-1:]
    print(f"\ncheckpoint   {checkpoint}\nmetrics      {run / 'metrics.jsonl'}")
    print(f"predictions  {evaluation / 'predictions.jsonl'}\npictures     {evaluation / 'pictures'}")
    print(f"W&B run      {wandb_run[0] if wandb_run else 'none'}")
    print(f"\nnext: python launch/export.py --checkpoint {checkpoint} --out {run.parent / 'exported'}")


if __name__ == "__main__":
    sys.exit(main())
