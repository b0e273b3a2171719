"""`model.path=tiny`: a tiny random model for the shards of a run, in any program that loads settings."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from cogvlm_ft.settings import Config

TINY = "tiny"
NUM_RECORDS = 500  # whose texts the tokenizer is trained on


def with_model(config: Config) -> Config:
    """Return the settings with a model folder, `OUTPUT_DIR-tiny-model`, in place of `tiny`, at the model's own size.

    Any number of ranks may call it at once: the first that is ready gives the folder its name.
    """
    if config.model.path != TINY:
        return config
    run = config.output_path
    folder = run.with_name(f"{run.name}-tiny-model")
    if not (folder / "config.json").is_file():
        _save(config, folder)
    return replace(config, model=replace(config.model, path=str(folder), image_size=None))


def _save(config: Config, folder: Path) -> None:
    # Imported late: torch takes seconds, and only this value of the setting needs it here.
    from cogvlm_ft.data.reader import open_split
    from cogvlm_ft.grounding.wording import load_wording
    from cogvlm_ft.rehearsal.tiny_model import save_tiny_model, texts_of

    reader = open_split(config, config.data.train_split)
    records = [reader.read_record(i) for i in range(min(NUM_RECORDS, len(reader)))]
    texts = texts_of(records, load_wording(config.data.wording), config.seed, num_epochs=1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_tiny_model(partial, texts)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # otherwise another rank was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
