"""A sweep's file, and the settings of each of its trainings."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.jobs.sweep import TASK_VARIABLE, choose_entry, load_task, read_sweep

REPOSITORY = Path(__file__).resolve().parents[3]
YOURS = ["model.path=m", "data.shards=s", "output_dir=runs/lr"]
SWEEP = """
- name: lr-1e-5
  settings: [train.lr=1e-5]
- name: frozen
  settings: ["model.freeze=[model.vision.*]", train.epochs=2]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


def test_each_task_has_settings_and_a_folder_of_its_own(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASK_VARIABLE, "1")
    first, second = load_task(None, YOURS, sweep, 0), load_task(None, [*YOURS, "train.epochs=9"], sweep)
    assert (first.train.lr, first.output_dir, first.tracking.name) == (1e-5, "runs/lr/lr-1e-5", "lr-1e-5")
    assert (second.model.freeze, second.output_dir) == (["model.vision.*"], "runs/lr/frozen")
    assert second.train.epochs == 2, "the sweep overrides the command line"
    assert load_task(None, YOURS, None).output_dir == "runs/lr"


def test_the_sweep_of_the_documents_is_one(tmp_path: Path) -> None:
    for document in ("slurm.md", "slurm_zh.md"):
        text = (REPOSITORY / "docs" / document).read_text(encoding="utf-8")
        path = tmp_path / document
        path.write_text(text.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
        for task, entry in enumerate(read_sweep(path)):
            assert load_task(None, YOURS, path, task).output_dir == f"runs/lr/{entry.name}"
        assert len(read_sweep(path)) == 2


@pytest.mark.parametrize("name", ["0123", "1e-5", "20241128_120000", "12", "true", "null", "1.50", "lr=1e-5"])
def test_names_stay_as_they_are_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"- {{name: {name}, settings: [train.lr=1e-5]}}", encoding="utf-8")
    config = load_task(None, ["model.path=m", "data.shards=s", "output_dir=."], path, 0)
    assert (config.output_dir, config.tracking.name, config.train.lr) == (name, name, 1e-5)


@pytest.mark.parametrize("task", [None, "2", "-1", "x"])
def test_a_task_that_the_sweep_lacks(sweep: Path, monkeypatch: pytest.MonkeyPatch, task: str | None) -> None:
    monkeypatch.delenv(TASK_VARIABLE, raising=False)
    if task is not None:
        monkeypatch.setenv(TASK_VARIABLE, task)
    with pytest.raises(ConfigError, match=f"entries 0 to 1, and .* is {task}: sbatch --array=0-1"):
        choose_entry(sweep)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list"),
        ("a: 1", "expected a list"),
        ("- [", "not valid YAML"),
        ("- name: a", "entry 0 is .*expected"),
        ("- {name: a, settings: train.lr=1}", "entry 0 is .*expected"),
        ("- {name: a, settings: [{train.lr: 1}]}", "entry 0 is .*written key=value"),
        ("- {name: [a], settings: []}", "entry 0 is .*expected a name"),
        ("- {name: ../a, settings: []}", "names a folder"),
        ("- {name: a, settings: []}\n- {name: a, settings: []}", "a more than once"),
        ("- {name: a, settings: [output_dir=x]}", "entry 0 sets output_dir"),
        ("- {name: a, settings: ['data.shards=pipe:touch x']}", "entry 0: found a command .*command line only"),
    ],
)
def test_mistakes_in_the_file_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_sweep(path)


def test_a_mistake_in_an_entry_is_explained(sweep: Path) -> None:
    sweep.write_text("- {name: a, settings: [train.lrr=1]}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.lrr"):
        load_task(None, YOURS, sweep, 0)
