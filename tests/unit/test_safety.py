"""What files from others can do here, and what files of ours allow others: nothing that nobody asked for."""

from __future__ import annotations

import ast
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_run import write_run

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.sources import shard_sources
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.evaluate.evaluate import Evaluation, Shown, save_evaluation
from cogvlm_ft.evaluate.results import find_evaluation
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.model.loading import save_weights
from cogvlm_ft.report.report import write_report
from cogvlm_ft.shards.demo_scenes import write_scenes

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("cogvlm_ft", "launch", "shards", "bench")

# Calls that run what a file says, or leave the place where they should stay; by their last names.
FORBIDDEN = {
    *("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "pandas.read_pickle", "torch.jit.load"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("os.startfile", "shutil.unpack_archive", "torch.hub.load"),
}
FORBIDDEN_METHODS = {"extractall", "extract", "load_checkpoint_and_dispatch"}  # of a tar or a zip
FORBIDDEN_ARGUMENTS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True), ("weights_only", False)}


def dangerous_calls(source: str) -> Iterator[str]:
    """`line: call` for each."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS
        arguments = {(word.arg, word.value.value) for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name == "yaml.load" and ast.unparse(node).endswith(("yaml.SafeLoader)", "yaml.BaseLoader)")):
            continue  # plain values only
        if name == "torch.load" and ("weights_only", True) in arguments:
            continue  # tensors only; test_architecture.py names the one module that may
        if name in FORBIDDEN or is_method or arguments & FORBIDDEN_ARGUMENTS:
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_nothing_runs_what_a_file_says() -> None:
    files = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    found = {str(path): list(dangerous_calls(path.read_text(encoding="utf-8"))) for path in files}
    assert len(files) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(command, shell=True)",
        "tarfile.open(path).extractall(folder)",
        "eval(text)",
        "os.system(text)",
    ],
)
def test_what_it_looks_for_is_found(line: str) -> None:
    assert len(list(dangerous_calls(f"def f():\n    return {line}"))) == 1
    assert list(dangerous_calls("model.eval(); np.load(path); yaml.safe_load(text)")) == []


# ---- names that lead elsewhere


@pytest.mark.parametrize(
    "key", ["../../x", "/etc/x", "..", ".", "a/b/c", "x" * 5000, "犬" * 300, "nul\0", "line\n", "a\\..\\b", "\udcff"]
)
def test_a_picture_stays_in_its_folder_whatever_its_key(key: str, tmp_path: Path) -> None:
    shown = [Shown(key, Image.new("RGB", (8, 8)), []), Shown(key, Image.new("RGB", (8, 8)), [])]
    save_evaluation(Evaluation({}, [], shown, {}, {}), tmp_path / "deep" / "down" / "step")
    pictures = list((tmp_path / "deep" / "down" / "step" / "pictures").iterdir())
    assert len(pictures) == 2 and all(path.suffix == ".png" for path in pictures)
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(everything) == 2 + 3  # metrics, curves, predictions


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "sub/x.tar", "x", "x.tar\0"])
def test_an_index_that_names_files_elsewhere_is_refused(name: str, shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["path"] = name
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: found a damaged index"):
        load_index(str(tmp_path), "train")


def test_a_mistyped_source_is_told_without_its_password() -> None:
    with pytest.raises(ConfigError) as caught:
        shard_sources([{"path": "https://tester:pa55@host/shards", "wieght": 2.0}])
    assert "wieght" in str(caught.value) and "pa55" not in str(caught.value)


# ---- the user's umask


@pytest.fixture(params=[0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def other_modes(folder: Path, umask: int) -> dict[str, str]:
    """Of what is not as the umask leaves it."""
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): oct(mode)
        for path, mode in found.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    }


def test_a_run_and_its_report_have_the_user_s_umask(umask: int, shards: Path, tmp_path: Path) -> None:
    """config.yaml, metrics, predictions, pictures, the losses of samples, report.html."""
    folder = tmp_path / "run"
    write_run(folder, shards)
    reader = ShardReader(load_index(str(shards), "val"))
    write_report(find_evaluation(folder, None), reader, run_folder=folder, train_reader=None)
    assert (folder / "report.html").is_file() and len(list(folder.rglob("*"))) > 10
    assert other_modes(folder, umask) == {}


def test_a_model_folder_has_the_user_s_umask(umask: int, tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    """Also in several files: the library for safetensors lets only their owner read them."""
    (tmp_path / "model").mkdir()
    contents = {f"layer.{i}.weight": torch.ones(300, 300) for i in range(3)}
    save_weights(tmp_path / "model", contents.items(), torch.float32, max_file_bytes=400_000)
    tokenizer.save(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    assert other_modes(tmp_path, umask) == {}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o002, 0o027], ids=oct)
def test_shards_have_the_user_s_umask_and_nothing_else_is_left(umask: int, tmp_path: Path) -> None:
    annotations = write_scenes(tmp_path / "scenes", 12, 56, seed=1)
    command = [
        sys.executable,
        "-m",
        "cogvlm_ft.shards.build",
        "--format",
        "jsonl",
        "--images",
        str(tmp_path / "scenes"),
    ]
    command += ["--annotations", str(annotations), "--out", str(tmp_path / "out" / "shards")]
    subprocess.run([*command, "--samples-per-shard", "5"], cwd=REPOSITORY, umask=umask, check=True, timeout=120)
    assert other_modes(tmp_path / "out", umask) == {}
    names = {path.name.partition("-")[0] for path in (tmp_path / "out" / "shards").iterdir()}
    assert names == {"train", "val", "index.json", "build.json", "rejected.jsonl", "notes.jsonl", "README.md"}
