"""What a resumed run reports about settings that differ from those it was started with."""

from __future__ import annotations

from pathlib import Path

from cogvlm_ft.config import load_config, save_config
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.train.start import changed_settings


def test_changed_settings_are_named_with_both_values(tmp_path: Path) -> None:
    mandatory = [f"output_dir={tmp_path}", "model.path=models/tiny", "train.monitor={mean_iou: 1, not_found_acc: 0.5}"]
    mandatory.append("data.shards={a: {path: 0123, weight: 2}}")
    config = load_config(None, mandatory)
    assert not changed_settings(config)  # the first start
    save_config(config, RunFolder(tmp_path).config)
    assert not changed_settings(config)
    other = load_config(None, [*mandatory, "train.box_loss.weight=1", "data.shards=https://me:secret@host/shards"])
    shards = "data.shards: {'a': {'path': '0123', 'weight': 2}} -> https://host/shards"
    assert changed_settings(other) == [shards, "train.box_loss.weight: 0.0 -> 1.0"]
    RunFolder(tmp_path).config.write_text("of: {another: version}\n", encoding="utf-8")
    assert not changed_settings(other)
