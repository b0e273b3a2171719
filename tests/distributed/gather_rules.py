"""Generate under ZeRO-3 on every rank and train before and after. Usage: gather_rules.py MODEL SHARDS OUT

Prints one JSON line per rank with what the test checks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from cogvlm_ft.build import build_model_engine, build_scored_model
from cogvlm_ft.config import load_config
from cogvlm_ft.data.collate import Batch, Example, collate
from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.plan import Item
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.evaluate import evaluate as evaluation
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer, load_model
from cogvlm_ft.runtime.distributed import barrier, init_distributed, rank, shut_down
from cogvlm_ft.runtime.engine import inference
from cogvlm_ft.runtime.param_gathering import fits_everywhere, needs_all_ranks, parameters_gathered, whole_bytes
from cogvlm_ft.settings import Config
from cogvlm_ft.train.step import train_step

# Ranks differ in the numbers of images, of turns and, by their ends of text, of tokens.
PROMPTS = ([["Where is the red circle?", "dog", "a"]], [["图片中存在一只狗,所在区域为"], ["狗"]])
ZERO = {
    "stage": 3,
    "overlap_comm": True,
    "stage3_param_persistence_threshold": 0,  # even the smallest tensors are gathered and given back
    "stage3_prefetch_bucket_size": 50000000,
}
NUM_NEW = 10


class Gathers:
    """Record the names of parameters that were gathered and that were seen whole, pass by pass."""

    def __init__(self, model: Any) -> None:
        self.gathered: list[set[str]] = []
        self.whole: list[set[str]] = []
        self._names = {id(p): name for name, p in model.named_parameters()}
        for parameter in model.parameters():
            self._watch(parameter)
        # Before the engine's own hook, which gathers ahead.
        model.register_forward_pre_hook(lambda *_: self._start(), prepend=True)
        model.lm_head.register_forward_pre_hook(lambda *_: self._look(model))

    def _watch(self, parameter: Any) -> None:
        gather = parameter.all_gather_coalesced

        def watched(params: Sequence[Any], **kwargs: Any) -> Any:
            if self.gathered:
                self.gathered[-1].update(self._names[id(p)] for p in params)
            return gather(params, **kwargs)

        parameter.all_gather_coalesced = watched

    def _start(self) -> None:
        self.gathered.append(set())
        self.whole.append(set())

    def _look(self, model: Any) -> None:
        whole = {n for n, p in model.named_parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE}
        self.whole[-1] |= whole

    @contextmanager
    def of_generation(self) -> Iterator[dict[str, list[str]]]:
        """Report what the first pass, over the images, and all later ones gathered."""
        report: dict[str, list[str]] = {}
        self.gathered, self.whole = [], []
        yield report
        for name, passes in (("gathered", self.gathered), ("whole", self.whole)):
            report[f"{name}_first"] = sorted(passes[0])
            report[f"{name}_later"] = sorted(set().union(*passes[1:]))
        report["num_passes"] = len(self.gathered)  # type: ignore[assignment]
        self.gathered, self.whole = [], []


def ask(model: Any, tokenizer: CogVLMTokenizer) -> list[list[Answer]]:
    prompts = PROMPTS[rank()]
    pixels = torch.randn(len(prompts), 3, 56, 56, generator=torch.Generator().manual_seed(rank()))
    return generate_answers(model, tokenizer, pixels, prompts, NUM_NEW)


def ids_of(answers: list[list[Answer]]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in row] for row in answers]


def batch_of(tokenizer: CogVLMTokenizer, config: Any, step: int) -> Batch:
    image = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(100 * step + rank()))
    turns = [Turn("dog", "[[001,002,003,004]]"), Turn("a" * (1 + step), "No.")][: 1 + rank()]
    return collate([Example("x", Item(0, 0, 1.0), image, encode_turns(turns, tokenizer, config), 1.0, len(turns))])


def step(engine: Any, tokenizer: CogVLMTokenizer, number: int) -> float:
    batch = batch_of(tokenizer, engine.module.config, number)
    return float(train_step(engine, [batch], lr=1e-2, seed=0, step=number).loss_sum)


def generate_and_train(config: Config, folder: str) -> dict[str, Any]:
    """Generate before, between and after steps, in both modes; rank 0 ends its answers earlier than rank 1."""
    engine, tokenizer = build_model_engine(config)
    model, gathers, report = engine.module, Gathers(engine.module), {}
    num_hooks = len(engine.optimizer.parameter_offload.forward_hooks), len(FWD_MODULE_STACK)
    with torch.no_grad():
        plain, own = load_model(folder).eval(), CogVLMTokenizer.from_folder(folder)
        if rank() == 0:
            own.eos_token_id = ask(plain, own)[0][0].token_ids[1]  # a token that ends an answer early
        expected = ids_of(ask(plain, own))
    report["losses"], report["lengths"] = [], [len(ids) for row in expected for ids in row]
    with inference(model):
        with gathers.of_generation() as report["before"], parameters_gathered(model, "layerwise"):
            report["layerwise_equal"] = ids_of(ask(model, own)) == expected
        barrier()
        with parameters_gathered(model, "once"), gathers.of_generation() as report["once"]:
            for _ in range(1 + 2 * rank()):  # every rank as often as it likes
                report["once_equal"] = ids_of(ask(model, own)) == expected
            report["once_needs_ranks"] = needs_all_ranks(model)
    report["layerwise_needs_ranks"] = needs_all_ranks(model)
    report["hooks_equal"] = num_hooks == (
        len(engine.optimizer.parameter_offload.forward_hooks),
        len(FWD_MODULE_STACK),
    )
    report["partitioned"] = all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    report["losses"].append(step(engine, tokenizer, 0))
    with inference(model), parameters_gathered(model, "layerwise"):
        with gathers.of_generation() as report["after_a_step"]:
            first = ids_of(ask(model, own))
        with gathers.of_generation() as report["second_batch"]:
            report["second_equal"] = ids_of(ask(model, own)) == first
    report["losses"].append(step(engine, tokenizer, 1))
    with inference(model), parameters_gathered(model, "once"):
        ask(model, own)
    report["losses"].append(step(engine, tokenizer, 2))
    return report


def train_only(config: Config) -> list[float]:
    engine, tokenizer = build_model_engine(config)
    return [step(engine, tokenizer, number) for number in range(3)]


def evaluate_every_way(config: Config, shards: str) -> list[bool]:
    """Evaluate with an engine of training and with one for passes only; with memory for one turn of one image, too."""
    engine, tokenizer = build_model_engine(config)
    scored, _ = build_scored_model(config, config.model.folder)
    reader, found = ShardReader(load_index(shards, "val")), []
    for model, is_short in ((engine.module, False), (scored, False), (scored, True)):
        for config.evaluate.gather in ("layerwise", "once"):
            if is_short:
                evaluation.free_bytes = lambda: 0
            result = evaluate(model, tokenizer, reader, load_wording("box"), config.evaluate, seed=0)
            found.append((result.metrics, [prediction.answer for prediction in result.predictions]))
    is_trained = any(parameter.requires_grad for parameter in scored.parameters())
    return [each == found[0] for each in found] + [not is_trained]


def main() -> None:
    folder, shards, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    init_distributed()
    (out / f"zero-{rank()}.json").write_text(json.dumps({"zero_optimization": ZERO}))
    settings = [f"model.path={folder}", f"data.shards={shards}", f"output_dir={out}", "train.global_batch_size=2"]
    settings += [f"deepspeed={out}/zero-{rank()}.json", "evaluate.max_new_tokens=6", "evaluate.batch_size=2"]
    config = load_config(None, settings)
    report = generate_and_train(config, folder)
    report["losses_without"] = train_only(config)
    report["evaluations_equal"] = evaluate_every_way(config, shards)
    report["fits"] = [fits_everywhere(100, 1000), fits_everywhere(100, 1000 if rank() == 0 else 100)]
    report["whole_bytes"] = whole_bytes(build_model_engine(config)[0].module)
    print(json.dumps({"rank": rank(), **report}))
    shut_down()


if __name__ == "__main__":
    main()
