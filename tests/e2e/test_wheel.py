"""The built wheel, installed away from the checkout: it holds every file, trains, and finds presets by name."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from ranks import REPOSITORY, read_metrics

from cogvlm_ft.shards.demo_scenes import write_scenes

pytestmark = pytest.mark.slow
FOLDERS = ("cogvlm_ft", "launch", "shards", "configs", "slurm")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
DATA_ENDINGS = {".yaml", ".json", ".sbatch", ".sh", ".def", ".html", ".css", ".js", ".typed", ".py", ".ttf", ".txt"}


def run(command: list[object], folder: Path) -> str:
    """Run a program without anything in the environment that leads to the checkout."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SLURM_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**keep, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the sdist, built from a copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(
            REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in FILES:
        shutil.copy(REPOSITORY / name, source)
    out = tmp_path_factory.mktemp("built")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", out, source], source)
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", out], source)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin/ of a new environment with the wheel; the libraries are those of the running environment."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, next(built.glob("*.whl"))], folder)
    # A plain path in a .pth file: .pth files in that folder, such as that of an editable install, are not read.
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def expected_files() -> set[str]:
    """List the files of the package, the linked folders included, as they are called in the wheel."""
    found = set()
    for name in FOLDERS:
        root = REPOSITORY / name
        for path in root.rglob("*"):
            if path.suffix in DATA_ENDINGS and path.is_file():
                parts = path.relative_to(REPOSITORY).parts
                found.add("/".join(parts if parts[0] == "cogvlm_ft" else ("cogvlm_ft", *parts)))
    return found


def test_wheel_and_sdist_hold_every_file(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        in_sdist = {member.name.partition("/")[2] for member in sdist.getmembers() if not member.isdir()}
    assert expected_files() <= names
    assert expected_files() <= in_sdist and "LICENSE" in in_sdist
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cogvlm_ft"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_training_and_building_away_from_the_checkout(installed: Path, start_model: Path, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", 12, 56, seed=1)
    arguments = ["--images", tmp_path / "scenes", "--annotations", scenes, "--out", "shards_out"]
    run([installed / "cogvlm-build-shards", *arguments, "--val-fraction", "0.25", "--workers", "1"], tmp_path)
    settings = ["--config", "grounding_490", "deepspeed=zero3_bf16", "train.precision=bf16", "model.image_size=null"]
    settings += ["output_dir=run", f"model.path={start_model}", "data.shards=shards_out", "data.num_workers=0"]
    settings += ["train.max_steps=2", "train.global_batch_size=2", "evaluate.max_samples=2"]
    settings += ["evaluate.max_new_tokens=4", "tracking.mode=disabled"]
    run([installed / "cogvlm-train", *settings], tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == [1, 2]

    # The path that configs of earlier versions hold, and a wording that is in configs/.
    old = ["deepspeed=configs/deepspeed/zero3.json", "data.wording=configs/demo_wording.yaml"]
    names = ["model.path=m", "data.shards=s", "output_dir=o"]
    code = (
        "import json, sys, cogvlm_ft.build, cogvlm_ft.launch.train, cogvlm_ft.shards.build\n"
        "from cogvlm_ft.config import load_config\n"
        "from cogvlm_ft.grounding.wording import load_wording\n"
        "from cogvlm_ft.jobs.submit import script\n"
        "from cogvlm_ft.planning.zero_settings import read_zero_settings\n"
        "config = load_config('demo', sys.argv[1:])\n"
        "load_wording(config.data.wording), read_zero_settings(config, 1)\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'cogvlm_ft' and m.__file__]\n"
        "print(json.dumps([*files, script('train')]))"
    )
    used = json.loads(run([installed / "python", "-c", code, *names, *old], tmp_path).splitlines()[-1])
    packages = next(installed.parent.glob("lib/python*/site-packages"))
    assert len(used) > 50 and all(Path(file).is_relative_to(packages / "cogvlm_ft") for file in used), used
