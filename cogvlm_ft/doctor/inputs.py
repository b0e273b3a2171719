"""Check the inputs of training: model folder, tokenizer, wording, shards; and whether the run fits these machines."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cogvlm_ft.build import build_dataset
from cogvlm_ft.data.collate import BadSample
from cogvlm_ft.data.index import ShardIndex
from cogvlm_ft.data.loader import GroundingDataset, Item, most_turns_of
from cogvlm_ft.data.plan import PhotoParts, most_bad, split_photos
from cogvlm_ft.data.reader import ShardReader, open_split
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.data.remote import RemoteShard
from cogvlm_ft.data.shard_sets import read_json_file
from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.data.tiling import plan_tiles
from cogvlm_ft.doctor.examination import Examination, Finding, Reading, green, red, yellow
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.evaluate.measurable import monitor_problem
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer, model_config_of
from cogvlm_ft.model.adapters import of_base
from cogvlm_ft.model.loading import load_weights
from cogvlm_ft.model.quantized import float_shapes
from cogvlm_ft.planning.memory import build_on_meta, judge
from cogvlm_ft.planning.preflight import what_would_fit
from cogvlm_ft.runtime.distributed import rank, world_size
from cogvlm_ft.safetensors_io import read_chunks
from cogvlm_ft.terminal import progress_bar

NUM_SAMPLES = {"train": 64, "val": 16}  # random ones, without --all-shards
MOST_NAMED = 5


class Model(NamedTuple):
    """Facts of a model folder."""

    image_size: int
    num_pieces: int
    vocab_size: int
    num_tensors: int


def read_model(examination: Examination) -> Model:
    """Check every tensor's name and shape by the files' headers, without reading values."""
    model = examination.config.model
    config = model_config_of(examination.config)
    tokenizer = CogVLMTokenizer.from_folder(model.folder)
    shapes = of_base(float_shapes(build_on_meta(examination.config, config)).items())
    load_weights(model.folder, shapes, lambda name, fetch, num_rows: None)
    return Model(config.image_size, len(tokenizer), config.vocab_size, len(shapes))


def judge_model(examination: Examination, readings: list[Reading]) -> list[Finding]:
    path = examination.config.model.path
    if len({part.facts for part in readings}) > 1:
        return [
            red(
                f"{path} differs between nodes", "the same model on all nodes", "use a file system that all nodes share"
            )
        ]
    found: Model = readings[0].facts
    if found.num_pieces != found.vocab_size:
        return [
            red(
                f"{path}: tokenizer.model has {found.num_pieces} pieces, config.json has {found.vocab_size}",
                "the same number",
                "take both files from the same model: Vicuna's tokenizer.model for the published 17B",
            )
        ]
    return [
        green(
            f"{path}: {found.num_tensors} tensors with the expected names and shapes, {found.num_pieces} pieces, "
            f"{found.image_size} px"
        )
    ]


class Shards(NamedTuple):
    """Samples that one rank has read, by split. bad: those that cannot be used."""

    data_sha256: tuple[str, ...]
    num_samples: dict[str, int]
    num_read: dict[str, int]
    bad: dict[str, list[BadSample]]
    damaged: list[str]


def read_shards(examination: Examination) -> Shards:
    """Read this rank's part of the samples and prepare them for the model as training does."""
    data = examination.config.data
    indexes = {
        name: open_split(examination.config, split).index
        for name, split in (("train", data.train_split), ("val", data.val_split))
    }
    num_read, bad = {}, {}
    for name, index in indexes.items():
        reader = ShardReader(index)
        dataset = _dataset(examination, reader) if name == "train" else None
        total = len(dataset.parts) if dataset and dataset.parts else len(index)
        chosen = list(range(total))
        if not examination.all_shards:
            chosen = random.Random(examination.config.seed).sample(chosen, min(total, NUM_SAMPLES[name]))
        mine = chosen[rank() :: world_size()]
        num_read[name], bad[name] = len(mine), [found for i in mine if (found := _problem_of(i, reader, dataset))]
        lost = index.losses if rank() == 0 else ()
        bad[name] += [BadSample(loss.key or loss.shard, loss.reason, loss.detail) for loss in lost]
    damaged = _damaged_shards(indexes) if examination.all_shards else []
    sizes = {name: len(index) for name, index in indexes.items()}
    return Shards(tuple(index.data_sha256 for index in indexes.values()), sizes, num_read, bad, damaged)


def _dataset(examination: Examination, reader: ShardReader) -> GroundingDataset | None:
    """Return None without a model, or if splitting images into sequences would need all records first."""
    data, model = examination.config.data, examination.config.model
    wording = load_wording(data.wording)
    parts: PhotoParts | None = None
    if data.tiles.side_px is not None:
        parts = plan_tiles(reader, wording, data.tiles, data.max_turns_per_image, examination.config.seed)
    elif data.max_turns_per_image is not None:
        if (reader.index.num_targets < 0).any():
            return None
        parts = split_photos(most_turns_of(reader, wording), data.max_turns_per_image)
    if examination.planner is None or not (model.folder / "tokenizer.model").is_file():
        return None
    model_config = model_config_of(examination.config)
    tokenizer = CogVLMTokenizer.from_folder(model.folder)
    return build_dataset(examination.config, reader.index, wording, parts, tokenizer, model_config)


def _problem_of(i: int, reader: ShardReader, dataset: GroundingDataset | None) -> BadSample | None:
    try:
        if dataset is None:
            whole_image(reader.read(i).image)
            return None
        return dataset[Item(epoch=0, index=i, weight=1.0)].bad
    except BadSampleError as error:
        return BadSample(error.key, error.reason, error.detail)
    except DataError as error:  # none of its replacements could be used either
        return BadSample(f"sample {i}", "unusable", str(error))


def _damaged_shards(indexes: dict[str, ShardIndex]) -> list[str]:
    """Return those of this rank's part of the local files whose bytes differ from what was built."""
    paths = [path for index in indexes.values() for path in index.shard_paths if not isinstance(path, RemoteShard)]
    described = {path: path.with_suffix(".json") for path in paths[rank() :: world_size()]}
    described = {path: description for path, description in described.items() if description.is_file()}
    total = sum(path.stat().st_size for path in described)
    damaged = []
    with progress_bar(desc="hash shards", unit="B", total=total, is_shown=rank() == 0) as bar:
        for path, description in described.items():
            digest = hashlib.sha256()
            for chunk in read_chunks(path):
                digest.update(chunk)
                bar.update(len(chunk))
            if digest.hexdigest() != read_json_file(description).get("sha256"):
                damaged.append(str(path))
    return damaged


def judge_shards(examination: Examination, readings: list[Reading]) -> list[Finding]:
    if len({part.facts.data_sha256 for part in readings}) > 1:
        return [red("differ between ranks", "one shard set", "use a file system that all nodes share, or copy again")]
    findings = []
    damaged = sorted({path for part in readings for path in part.facts.damaged})
    if damaged:
        named = ", ".join(damaged[:MOST_NAMED])
        to_do = "copy them again from where they were built, or build them again"
        files = "1 file differs" if len(damaged) == 1 else f"{len(damaged)} files differ"
        findings.append(red(f"{files} from what was built: {named}", "the sha256 of the index", to_do))
    for name in NUM_SAMPLES:
        total = readings[0].facts.num_samples[name]
        num_read = sum(part.facts.num_read[name] for part in readings)
        bad = sorted({sample for part in readings for sample in part.facts.bad[name]}, key=str)
        findings.append(_judge_samples(examination, name, total, num_read, bad))
    return findings


def _judge_samples(examination: Examination, name: str, total: int, num_read: int, bad: list[BadSample]) -> Finding:
    limit = examination.config.data.max_bad_fraction
    how = "all" if examination.all_shards else f"{num_read} at random"
    found = f"{name}: {total} samples, {how} read and decoded"
    if not bad:
        return green(found)
    reasons = ", ".join(
        f"{reason} {number}x" for reason, number in Counter(sample.reason for sample in bad).most_common()
    )
    named = ", ".join(sample.key for sample in bad[:MOST_NAMED])
    named += f"; {bad[0].key}: {bad[0].detail}" if bad[0].detail else ""
    found = f"{found}, {len(bad)} cannot be used ({reasons}): {named}"
    to_do = "fix them and build the shards again, or raise data.max_bad_fraction"
    if len(bad) > most_bad(limit, num_read):
        return red(found, f"at most data.max_bad_fraction={limit:g} of them", to_do)
    return yellow(found, f"training replaces them; {to_do}")


def read_wording(examination: Examination) -> str:
    config = examination.config
    load_wording(config.data.wording)
    probe = config.evaluate.probe
    if probe is not None and not Path(probe).expanduser().is_file():
        raise ConfigError(f"evaluate.probe={probe}: no such file")
    return f"data.wording={config.data.wording}" + (f", evaluate.probe={probe}" if probe else "")


def judge_wording(_: Examination, readings: list[Reading]) -> list[Finding]:
    return [green(readings[0].facts)]


def read_monitor(examination: Examination) -> str:
    """Return the metric that chooses the best checkpoint; "" if model or shards, reported already, cannot be read.

    Raises ConfigError if the validation images cannot produce it.
    """
    config = examination.config
    try:
        reader, model_config = open_split(config, config.data.val_split), model_config_of(config)
    except (DataError, CheckpointError):
        return ""
    problem = monitor_problem(config, reader, load_wording(config.data.wording), model_config)
    if problem:
        raise ConfigError(problem)
    return f"train.monitor={config.train.monitor}"


def judge_monitor(_: Examination, readings: list[Reading]) -> list[Finding]:
    return [green(part.facts) for part in readings if part.facts]


def judge_plan(examination: Examination, readings: list[Reading]) -> list[Finding]:
    """Judge as launch/train.py does when it starts. One process cannot know how many GPUs the run will have."""
    planner, cluster = examination.planner, examination.cluster
    if planner is None or examination.estimate is None:
        return [
            yellow("cannot be estimated without the model's config.json and the engine's settings", "fix those first")
        ]
    verdict = judge(examination.estimate, cluster)
    if verdict.status == "fits":
        return [green(f"fits: {verdict.why}")]
    if verdict.status == "tight":
        return [yellow(f"tight: {verdict.why}", "see launch/plan.py for settings that fit")]
    if examination.is_alone:
        return [
            yellow(f"too much for this machine alone: {verdict.why}", "estimate more nodes: launch/plan.py --nodes N")
        ]
    changes = f"{what_would_fit(planner)}; see launch/plan.py"
    if examination.config.plan != "refuse":
        return [yellow(f"too much, and plan={examination.config.plan}: {verdict.why}", changes)]
    return [red(verdict.why, "a run that fits", changes)]
