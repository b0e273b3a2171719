"""Write README.md of an exported model: what it is, its training data, its scores and how to use it.

The card is meant to be published: it has no paths of this machine and no settings but those it shows.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

import yaml

from cogvlm_ft.checkpoints.checkpoint import TrainState, read_state
from cogvlm_ft.data.transforms import resize_of
from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.evaluate import METRICS_FILE
from cogvlm_ft.export.blend import Blend
from cogvlm_ft.export.verification import Verification
from cogvlm_ft.model import load_config
from cogvlm_ft.model.fingerprint import fingerprint
from cogvlm_ft.model.prompt import render_prompt
from cogvlm_ft.plain_files import read_json, write_text
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.settings import Config
from cogvlm_ft.terminal import plain_line, plain_text
from cogvlm_ft.tracking.provenance import git_state
from cogvlm_ft.tracking.tracker import read_run_file

CARD_FILE = "README.md"
SHOWN_METRICS = (
    *("mean_iou", "acc@0.5", "acc@0.75", "ap50", "not_found_acc", "false_not_found", "unreadable", "chrf"),
    *("num_present", "num_absent", "num_images"),
)
UNKNOWN = "not known"
MAX_VALUE = 200  # characters of a value
_HUB_CACHE = re.compile(r"^models--([\w.-]+)--([\w.-]+)$")  # where huggingface_hub keeps what it downloads
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_OWNERS = {"THUDM", "zai-org"}

_CARD = Template(
    """\
# $name

CogVLM, fine-tuned for visual grounding: asked in Chinese or English where an object is in a photo, it answers with
boxes, such as `[[086,540,400,760]]`: thousandths of width and height, x0, y0, x1, y1 from the top left.

## Training

| | |
|---|---|
| base model | $base |
| step, epoch | $step, $epoch |
| samples seen | $samples_consumed |
| samples in an epoch | $num_samples (split $train_split) |
| sha256 of the training data | `$data_sha256` |
| precision of training; of these weights | $precision; $dtype |
| input | $image_size x $image_size px ($num_patches patches of $patch_size px), photos $resize |
| prompt template | `$template_version`: `$prompt` |
| wording of questions and answers | $wording |
| code of the training; of this export | $training_code; $code |
| fingerprint of this folder | `$fingerprint` |

## Evaluation

$evaluation

## These weights and their checkpoint

$verification

## Use

With the program that trained the model:

```
python launch/predict.py --model $shell_name --image photo.jpg --prompt "$question"
```

With transformers; cogvlm_ft defines the architecture, no code of this folder is run:

```python
import torch
from PIL import Image
from transformers import AutoModelForCausalLM
from cogvlm_ft.model import CogVLMTokenizer

folder = $python_name
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.$dtype).eval()
tokenizer = CogVLMTokenizer.from_folder(folder)
photo = Image.open("photo.jpg").convert("RGB")
inputs = model.build_conversation_input_ids(tokenizer, query="$question", images=[photo])
batch = {key: value[None] for key, value in inputs.items() if key != "images"}
with torch.no_grad():
    ids = model.generate(**batch, images=[inputs["images"]], max_new_tokens=128, do_sample=False)
print(tokenizer.decode(ids[0, len(inputs["input_ids"]) :].tolist()))
```
$letterbox
## Licence

The licence of the base model also applies to these weights, and so do the terms of their training data.

## 中文说明

本模型由 CogVLM 微调而来，用于视觉定位：用中文或英文询问图中某个目标的位置，模型以方框作答，
例如 `[[086,540,400,760]]`：以左上角为原点的 x0、y0、x1、y1，单位为图宽、图高的千分之一。

输入为 $image_size x $image_size 像素；训练数据、指标与权重指纹见上面的表格，用法见 Use 一节。
基座模型的许可证同样适用于这些权重，训练数据的使用条款亦然。
"""
)

_LETTERBOX = """
This model was trained on images padded to a square ("letterbox"). `launch/predict.py` pads automatically; with
transformers, pad the photo first.
"""


def write_model_card(
    folder: Path,
    checkpoint: Path,
    config: Config | None,
    *,
    name: str,
    blend: Blend | None = None,
    averaged: bool = False,
) -> None:
    """Write the card, as the last file of the folder, since it states the folder's fingerprint.

    config: of the run; None if it is not known. proof.json of the folder is quoted; the checkpoint's
    scores are not those of its blend. averaged: whether the checkpoint's weights are its running averages.
    """
    verification = Verification.load(folder)
    state, model = read_state(checkpoint), load_config(folder)
    run = _run_facts(checkpoint)
    path = PurePosixPath(config.model.path) if config else PurePosixPath()
    hub_name = find_hub_name(path)
    question = "Where is the red car?"
    facts = {
        "name": name,
        "shell_name": shlex.quote(plain_line(name)),
        "python_name": json.dumps(plain_line(name), ensure_ascii=False),
        "base": f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else plain_value(path.name or UNKNOWN),
        "step": state.step,
        "epoch": state.epoch,
        "samples_consumed": state.samples_consumed,
        "num_samples": run.get("num_samples", UNKNOWN),
        "train_split": config.data.train_split if config else UNKNOWN,
        "data_sha256": state.data_sha256,
        "precision": config.train.precision if config else UNKNOWN,
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_size": model.image_size,
        "num_patches": model.num_patches,
        "patch_size": model.vision["patch_size"],
        "resize": {"squash": "squashed to the square", "letterbox": "padded to a square"}[resize_of(model)],
        "template_version": model.template_version,
        "prompt": render_prompt("...", model.template_version),
        "wording": PurePosixPath(config.data.wording).name if config else UNKNOWN,
        "training_code": _code_version(run.get("code")),
        "code": _code_version(vars(git_state()) if git_state() else None),
        "fingerprint": fingerprint(folder),
        "evaluation": _blend_text(blend, averaged) if blend else _evaluation(checkpoint, state, averaged),
        "verification": _verification_text(verification, "blend" if blend else "checkpoint"),
        "question": question,
        "letterbox": _LETTERBOX if resize_of(model) == "letterbox" else "",
    }
    raw = ("shell_name", "python_name", "base", "evaluation", "verification", "letterbox", "prompt")  # plain already
    shown = {name: value if name in raw else plain_value(value) for name, value in facts.items()}
    write_text(folder / CARD_FILE, _front_matter(hub_name) + _CARD.substitute(shown))


def plain_value(value: object) -> str:
    """Return a value as one line that is neither Markdown nor HTML, in a table or between backticks too."""
    text = re.sub(r"[^\S ]|[\u2028\u2029]", " ", plain_text(value))[:MAX_VALUE]
    return re.sub(r"[&<>|`\[\]*~\\]", lambda found: f"&#{ord(found[0])};", text)


def find_hub_name(path: PurePosixPath) -> str | None:
    """Return owner/name on the Hugging Face hub if the local path has it: in the hub's cache, or as its end."""
    for part in path.parts:
        cached = _HUB_CACHE.match(part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    name = "/".join(path.parts[-2:])
    return name if path.parts[-2:-1] and path.parts[-2] in _HUB_OWNERS and _HUB_NAME.fullmatch(name) else None


def _front_matter(hub_name: str | None) -> str:
    fields: dict[str, Any] = {
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "language": ["zh", "en"],
        "tags": ["cogvlm", "visual-grounding", "referring-expression-comprehension"],
        "license": "other",
        "license_name": "as-the-base-model",
    }
    if hub_name:
        fields["base_model"] = hub_name
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n\n"


def _run_facts(checkpoint: Path) -> Mapping[str, Any]:
    """Return what the training run recorded about itself in run.json; empty without that file."""
    try:
        return dict(read_run_file(RunFolder.containing(checkpoint).path)["config"])
    except (DataError, TypeError, ValueError):
        return {}


def _blend_text(blend: Blend, averaged: bool) -> str:
    which = "the running averages (train.ema) of the checkpoint" if averaged else "those of the checkpoint"
    return (
        f"Not measured. These weights are {blend.fraction:g} x {which} + {1 - blend.fraction:g} x "
        f"those of the model `{plain_value(blend.start.name)}` that training started from."
    )


def _verification_text(verification: Verification | None, source: str) -> str:
    if verification is None:
        return "They were not compared."
    return "\n".join(map(plain_value, verification.summary(source).split("\n")))


def _code_version(state: Mapping[str, Any] | None) -> str:
    """Format a provenance.GitState."""
    return f"commit {state['commit']}{', changed since' if state['dirty'] else ''}" if state else UNKNOWN


def _evaluation(checkpoint: Path, state: TrainState, averaged: bool) -> str:
    """Return a short table of the metrics at this step."""
    folder = RunFolder.containing(checkpoint)
    about = "These weights are running averages over the steps of training (train.ema).\n\n" if averaged else ""
    path = (folder.averaged_evaluation if averaged else folder.evaluation)(state.step) / METRICS_FILE
    try:
        metrics: Mapping[str, Any] = read_json(path)
        rows = [(name, metrics[name]) for name in SHOWN_METRICS if isinstance(metrics.get(name), (int, float))]
        split = metrics.get("about", {}).get("split", UNKNOWN)
    except (OSError, ValueError, AttributeError):
        rows = []
    if not rows:
        return f"{about}None at this step."
    table = "\n".join(f"| `{name}` | {value:.4g} |" for name, value in rows)
    title = f"On held-out photos (split {plain_value(split)}), with the prompts of training and greedy decoding:"
    return f"{about}{title}\n\n| | |\n|---|---|\n{table}"
