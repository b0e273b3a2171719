"""The start of a training run: what is certain to fail later is refused before weights are loaded."""

from __future__ import annotations

from cogvlm_ft.build import Run, build_run
from cogvlm_ft.data.reader import open_split
from cogvlm_ft.evaluate.measurable import check_monitor
from cogvlm_ft.model import model_config_of
from cogvlm_ft.settings import Config


def build_checked_run(config: Config) -> Run:
    """Build a run whose validation images can produce `train.monitor`. Collective. Raises ConfigError."""
    val_reader = open_split(config, config.data.val_split)
    check_monitor(config, val_reader, model_config_of(config))
    return build_run(config, val_reader)
