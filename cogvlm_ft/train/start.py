"""The start of a training run: errors that are certain to occur later are found before weights are loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_ft.build import Run, TrainingData, build_run, last_step_of, open_training_data
from cogvlm_ft.checkpoints.checkpoint import TrainState, list_checkpoints, read_state
from cogvlm_ft.checkpoints.manifest import has_all_files
from cogvlm_ft.config import config_sha256, load_run_config, settings_of, value_at, written_settings
from cogvlm_ft.data.reader import ShardReader, open_split
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.evaluate.measurable import check_monitor
from cogvlm_ft.evaluate.probe import load_probe
from cogvlm_ft.model import CogVLMConfig, model_config_of
from cogvlm_ft.model.fingerprint import fingerprint
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.agreement import check_agreement
from cogvlm_ft.runtime.distributed import computed_by_main, shared_errors
from cogvlm_ft.runtime.nodes import computed_once_per_node
from cogvlm_ft.runtime.stop_signals import StopRequest
from cogvlm_ft.settings import Config
from cogvlm_ft.tracking.provenance import without_passwords
from cogvlm_ft.train.early_stopping import is_out_of_patience


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its last state, and the step with which it would end."""

    state: TrainState
    last_step: int


def build_checked_run(config: Config, stop_request: StopRequest) -> Run | FinishedRun:
    """Build a run whose validation images can produce `train.monitor`, unless nothing is left to be done.

    Of a finished run no weights are loaded. Collective. Raises ConfigError, and StopRequested before loading weights.
    """
    with shared_errors():
        val_reader = open_split(config, config.data.val_split)
        model_config = model_config_of(config)
        if config.evaluate.probe is not None:
            load_probe(Path(config.evaluate.probe).expanduser())
    check_monitor(config, val_reader, model_config)
    data = open_training_data(config, val_reader)
    check_agreement(facts_of_files(config, data, val_reader, model_config))
    finished = computed_by_main(lambda: find_finished(config, data))
    if finished is not None:
        return finished
    stop_request.check()
    return build_run(config, val_reader, data)


def facts_of_files(
    config: Config, data: TrainingData, val_reader: ShardReader, model_config: CogVLMConfig
) -> dict[str, Any]:
    """Return what identifies the files that every rank reads; the weights are read once per node. Collective."""
    folder = config.model.folder
    weights = computed_once_per_node(lambda: fingerprint(folder, "*.safetensors"), str(folder))
    return {
        "data.shards": data.index.data_sha256,
        f"data.shards, split {config.data.val_split}": val_reader.index.data_sha256,
        "data.wording": hashlib.sha256(repr(data.wording).encode("utf-8", "backslashreplace")).hexdigest(),
        "config.json of model.path": hashlib.sha256(model_config.to_json_string().encode()).hexdigest(),
        "model.path": weights,
    }


def find_finished(config: Config, data: TrainingData) -> FinishedRun | None:
    """Return the run if it has trained and evaluated its last step with these very settings, else None.

    Of the newest checkpoint only the files' sizes are checked. Whatever is doubtful is None: then the start checks it
    and reports it. Rank 0 only.
    """
    try:
        checkpoints = list_checkpoints(RunFolder(config.output_path).checkpoints)
        if not checkpoints or not config.resume:
            return None
        state = read_state(checkpoints[-1])
        is_whole = has_all_files(checkpoints[-1])
    except (CheckpointError, OSError):
        return None
    expected = (config_sha256(config), data.index.data_sha256, state.step)
    is_same = (state.config_sha256, state.data_sha256, state.evaluated_step) == expected
    last_step = last_step_of(data.plan, config.train, state)
    is_over = state.step >= last_step or is_out_of_patience(state, config.train)
    return FinishedRun(state, last_step) if is_whole and is_same and is_over else None


def changed_settings(config: Config) -> list[str]:
    """Describe the settings that differ from those of the last start in this folder; none if those are unreadable."""
    try:
        before = load_run_config(RunFolder(config.output_path).config)
    except (ConfigError, OSError):
        return []
    old, new = (without_passwords(written_settings(each)) for each in (before, config))
    pairs = [(key, value_at(old, key), value_at(new, key)) for key, _, _ in settings_of(config)]
    return [f"{key}: {was} -> {now}" for key, was, now in pairs if was != now]
