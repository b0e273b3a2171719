"""A tiny tokenizer, tiny models and a small grounding set that many tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other

import pytest
from hypothesis import HealthCheck, settings

from cogvlm_ft import terminal
from cogvlm_ft.command_line import fast_imports

with fast_imports():
    import torch
    from tiny import odd_config, tiny_config

    from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
    from cogvlm_ft.model.tokenizer import train_tokenizer
    from cogvlm_ft.shards.build import main as build
    from cogvlm_ft.shards.demo_scenes import write_scenes

# The same examples every time and no deadline, so that a property fails only because the code has changed.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

NUM_SCENES = 42
# Folders. Slurm jobs need most of the time; the short tests at the end keep all workers busy until then.
ORDER = ("slurm", "golden", "unit", "fuzz", "soak", "distributed", "e2e", "unit/shards")

# Folders whose tests try many inputs, start programs and W&B, or measure memory: not in `make test-fast`.
SLOW = ("fuzz", "unit/doctor", "unit/export", "unit/jobs", "unit/planning", "unit/tracking")

TEXTS = [
    "Where is the red circle? Give its box as [[x0,y0,x1,y1]].",
    "图片中存在一只狗,所在区域为[[086,540,400,760]]",
    "请指出蓝色方形的位置。未找到指定目标",
    "The specified target was not found. 0123456789 [[012,345;678,999]]",
]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a file on one pytest-xdist worker, so that no fixture of it is built twice.

    Files that share more, such as a cluster, name their group themselves.
    """
    if not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if _folder(item) in SLOW:
        item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the Slurm jobs first, and beside them what starts no processes."""
    items.sort(key=lambda item: _place(_folder(item)))


def _folder(item: pytest.Item) -> str:
    return item.path.parent.relative_to(Path(__file__).parent).as_posix()


def _place(folder: str) -> int:
    return ORDER.index(folder if folder in ORDER else folder.partition("/")[0])


@pytest.fixture(autouse=True)
def hides_nothing_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of the environment that one test hides in printed text may be a plain word in another."""
    monkeypatch.setattr(terminal, "_hidden", {})


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CogVLMTokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, file, vocab_size=400)
    return CogVLMTokenizer(file)


@pytest.fixture
def tiny_model(tokenizer: CogVLMTokenizer) -> CogVLMForCausalLM:
    torch.manual_seed(0)
    return CogVLMForCausalLM(tiny_config(vocab_size=len(tokenizer)))


@pytest.fixture
def tiny_folder(tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build 33 training and 9 validation scenes with 1 to 4 targets each, some with a pair of the user's own."""
    folder = tmp_path_factory.mktemp("data")
    annotations = write_scenes(folder / "scenes", NUM_SCENES, 56, seed=1)
    lines = []
    for i, line in enumerate(annotations.read_text(encoding="utf-8").splitlines()):
        scene = json.loads(line)
        scene["targets"] = scene["targets"][: 1 + i % 4]
        if i % 5 == 0:
            scene["turns"] = [{"prompt": "How many shapes are there?", "answer": "several, of different colours"}]
        lines.append(json.dumps(scene, ensure_ascii=False))
    annotations.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["--format", "jsonl", "--images", folder / "scenes", "--annotations", annotations]
    arguments += ["--out", folder / "shards", "--val-fraction", 0.215, "--samples-per-shard", 10]
    assert build([str(argument) for argument in arguments]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def start_model(tokenizer: CogVLMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random model with tensors that two ranks cannot divide evenly."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    CogVLMForCausalLM(odd_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save(folder)
    return folder
