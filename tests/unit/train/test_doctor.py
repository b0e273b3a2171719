"""The doctor's checks, each on a real thing that is really broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cogvlm_ft.config import load_config
from cogvlm_ft.model.tokenizer import train_tokenizer
from cogvlm_ft.runtime.bandwidth import SideChannel
from cogvlm_ft.train.doctor import build_locks, storage
from cogvlm_ft.train.doctor.build_locks import LOCKS
from cogvlm_ft.train.doctor.checks import CHECKS
from cogvlm_ft.train.doctor.examination import (
    Check,
    Examination,
    Seen,
    as_text,
    begin,
    examine,
    green,
    red,
)
from cogvlm_ft.train.doctor.inputs import MODEL, PLAN, SHARDS, WORDING
from cogvlm_ft.train.doctor.links import ENGINE, LINKS
from cogvlm_ft.train.doctor.machine import CLOCKS, GPUS, HOST, RANKS, VERSIONS
from cogvlm_ft.train.doctor.services import WANDB
from cogvlm_ft.train.doctor.storage import DISK, FOLDER, LEFTOVERS, SHARING
from launch.doctor import main

REPOSITORY = Path(__file__).resolve().parents[3]
KEY = "0123456789abcdef0123456789abcdef01234567"

Examine = Callable[..., tuple[int, str]]


@pytest.fixture
def model(start_model: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(start_model, tmp_path / "model"))


@pytest.fixture
def set_of_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def run_checks(
    start_model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Examine:
    """Examine this process's machine: checks, settings -> (number of red lines, what was printed)."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))

    def run(checks: list[Check], *settings: str, all_shards: bool = False, fix: bool = False) -> tuple[int, str]:
        usual = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={tmp_path / 'run'}"]
        usual += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=disabled"]
        config = load_config(None, [*usual, *settings])
        channel = SideChannel()
        examination = begin(config, channel, all_shards=all_shards, fix=fix)
        capsys.readouterr()
        num_red = examine(examination, channel, checks)
        storage.remove_probes(examination)
        return num_red, capsys.readouterr().out

    return run


def test_nothing_is_red_where_all_is_well_and_nothing_is_left(run_checks: Examine, tmp_path: Path) -> None:
    num_red, said = run_checks(list(CHECKS))
    assert num_red == 0 and "red " not in said
    for check in CHECKS:
        assert f"{check.title}: " in said or check in (CLOCKS, SHARING, FOLDER), check.title
    assert "63 tensors of the right names and shapes, 400 pieces, 56 px" in said
    assert "train: 33 samples, 33 at random read and decoded" in said and "val: 9 samples" in said
    assert not (tmp_path / "run").exists()


def test_what_was_there_stays(run_checks: Examine, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".tmp-step-00000003").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "damaged-step-00000002").mkdir()
    num_red, said = run_checks([FOLDER, SHARING, DISK, LEFTOVERS])
    assert num_red == 0 and "yellow  leftovers" in said
    assert ".tmp-step-00000003" in said and "damaged-step-00000002" in said
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        ".tmp-step-00000003",
        "checkpoints",
        "damaged-step-00000002",
    ]


def test_a_check_that_crashes_is_a_red_line_and_the_others_go_on(run_checks: Examine) -> None:
    def crash(_: Examination) -> None:
        raise ZeroDivisionError("the disk of node7 turned into smoke")

    looks, judges = Check("first", crash, lambda _, seen: []), Check("second", lambda _: 1, lambda _, seen: 1 // 0)  # type: ignore[arg-type, return-value]
    num_red, said = run_checks([looks, judges, RANKS])
    assert num_red == 2
    assert "red     first: rank 0 on " in said and "ZeroDivisionError: the disk of node7 turned into smoke" in said
    assert "red     second: " in said and "green   ranks: 1 on 1 host: " in said and "Traceback" not in said


def test_nothing_is_looked_at_behind_a_vital_check_that_is_red(run_checks: Examine) -> None:
    broken = Check("broken", lambda _: None, lambda _, seen: [red("a", "b", "c")], is_vital=True)
    assert run_checks([broken, RANKS]) == (1, "red     broken: a\n        wanted: b\n        do: c\n")


def test_colours() -> None:
    assert as_text("disk", green("fast"), coloured=True) == "\033[32mgreen   \033[0mdisk: fast"


# ---- versions and machines


def test_a_package_of_another_version(run_checks: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("transformers", "4.46.3"), ("deepspeed", "0.15.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    num_red, said = run_checks([VERSIONS])
    assert num_red == 2
    assert "transformers: found 4.46.3" in said and "<6,>=5.20" in said
    assert "deepspeed: found 0.15.0" in said and "do: pip install -c constraints.txt -e ." in said


def test_versions_that_differ_between_nodes(run_checks: Examine) -> None:
    def look(examination: Examination) -> object:
        return VERSIONS.look(examination)

    def judge(examination: Examination, seen: list[Seen]) -> list:
        other = seen[0].facts._replace(installed={**seen[0].facts.installed, "torch": "2.9.0"}, commit="abc")
        return VERSIONS.judge(examination, [seen[0]._replace(host="node1"), Seen(1, "node2", other)])

    num_red, said = run_checks([Check("versions", look, judge)])
    assert num_red == 1 and "on node1, 2.9.0 on node2" in said and "the same on every rank" in said
    assert "yellow  versions: the code is" in said


def test_ranks_that_are_spread_unevenly(run_checks: Examine) -> None:
    seen = [Seen(0, "node1"), Seen(1, "node1"), Seen(2, "node2")]
    num_red, said = run_checks([Check("ranks", lambda _: None, lambda e, _: RANKS.judge(e, seen))])
    assert num_red == 0 and "yellow  ranks: 3 on 2 hosts: node1 x 2, node2 x 1" in said


def test_clocks_that_differ(run_checks: Examine) -> None:
    seen = [Seen(0, "node1", 1000.0), Seen(1, "node2", 1007.5)]
    _, said = run_checks([Check("clocks", lambda _: None, lambda e, _: CLOCKS.judge(e, seen))])
    assert "yellow  clocks: node2 is 7.5 s ahead of node1" in said


def test_few_open_files(run_checks: Examine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(list(Path("/proc/self/fd").iterdir())) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        num_red, said = run_checks([HOST])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert num_red == 0 and f"yellow  host: open files: {limit} allowed" in said and "ulimit -n 1024" in said


def test_too_many_loader_processes_for_the_cores_and_for_shared_memory(run_checks: Examine) -> None:
    num_red, said = run_checks([HOST], "data.num_workers=1000000")
    assert num_red == 1 and "red     host: /dev/shm" in said and "data.num_workers=0" in said
    assert "yellow  host: cores" in said


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there are GPUs here")
def test_without_gpus_it_says_so(run_checks: Examine) -> None:
    assert "yellow  GPUs: none" in run_checks([GPUS])[1]


# ---- build locks


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Of a build that was killed an hour ago."""
    path = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    return path


def test_a_stale_build_lock_is_red_and_goes_if_asked(run_checks: Examine, lock: Path) -> None:
    num_red, said = run_checks([LOCKS])
    assert num_red == 1 and f"{lock} is 60 min old, and nobody here holds it" in said and f"rm {lock}" in said
    assert lock.exists()
    num_red, said = run_checks([LOCKS], fix=True)
    assert num_red == 0 and "is removed" in said and not lock.exists()
    assert run_checks([LOCKS])[1].startswith("green   build locks: none in ")


def test_a_build_lock_that_is_held_stays(run_checks: Examine, lock: Path) -> None:
    with lock.open():
        num_red, said = run_checks([LOCKS], fix=True)
    assert num_red == 0 and f"held by process {os.getpid()}" in said and lock.exists()


def test_a_young_build_lock_stays(run_checks: Examine, lock: Path) -> None:
    os.utime(lock)
    num_red, said = run_checks([LOCKS], fix=True)
    assert num_red == 0 and "yellow  build locks: " in said and lock.exists()


def test_the_default_folder_of_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert build_locks.build_root().name == "torch_extensions"


# ---- model and tokenizer


def test_a_tokenizer_of_another_size(run_checks: Examine, model: Path) -> None:
    train_tokenizer(["Where is the red circle?", "[[086,540,400,760]]"], model / "tokenizer.model", vocab_size=300)
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "vocab_size" not in said and "pieces, config.json has 400" in said
    assert "Vicuna's tokenizer.model" in said


def test_a_missing_tensor(run_checks: Examine, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "missing lm_head.weight [400, 60]" in said


def test_weights_that_are_cut_off(run_checks: Examine, model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "100000 bytes, is no whole safetensors file" in said


def test_no_model_at_all(run_checks: Examine, tmp_path: Path) -> None:
    """What needs the model's sizes says that it cannot tell; everything else is still looked at."""
    num_red, said = run_checks(list(CHECKS), f"model.path={tmp_path}")
    assert num_red == 1 and "is no model folder" in said and "yellow  plan: cannot be told" in said
    assert "33 at random read and decoded" in said and "GB/s written" in said


def test_an_engine_preset_that_is_not_there(run_checks: Examine) -> None:
    num_red, said = run_checks([MODEL, PLAN, ENGINE], "deepspeed=nosuch.json")
    assert num_red == 1 and "red     engine: deepspeed=nosuch.json: no such file" in said
    assert "green   model: " in said and "yellow  plan: cannot be told" in said


def test_a_broken_tokenizer(run_checks: Examine, model: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    num_red, said = run_checks([MODEL], f"model.path={model}")
    assert num_red == 1 and "red     model: rank 0" in said and "Traceback" not in said


def test_an_image_size_that_is_impossible(run_checks: Examine) -> None:
    num_red, said = run_checks([MODEL], "model.image_size=57")
    assert num_red == 1 and "model.image_size" in said and "multiple of the patch size 14" in said


def test_a_wording_or_a_probe_that_is_not_there(run_checks: Examine) -> None:
    assert run_checks([WORDING], "data.wording=nosuch")[0] == 1
    num_red, said = run_checks([WORDING], "evaluate.probe=nosuch.jsonl")
    assert num_red == 1 and "evaluate.probe=nosuch.jsonl: no such file" in said


# ---- shards


def damage(folder: Path, split: str, part: str) -> str:
    """Overwrite the middle of the first sample's image or record; its key."""
    described = json.loads((folder / f"{split}-000000.json").read_text())
    sample = described["samples"][0]
    offset, size = sample[part]
    with (folder / f"{split}-000000.tar").open("r+b") as file:
        file.seek(offset + size // 3)
        file.write(b"\xff" * (size // 3))
    return sample["key"]


@pytest.mark.parametrize("part", ["image", "json"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_with_flipped_bytes(run_checks: Examine, set_of_shards: Path, part: str, split: str) -> None:
    key = damage(set_of_shards, split, part)
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}")
    assert num_red == 1 and f"red     shards: {split}: " in said
    assert "1 cannot be used" in said and key in said and "data.max_bad_fraction=0.01" in said
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}", "data.max_bad_fraction=0.5")
    assert num_red == 0 and f"yellow  shards: {split}: " in said


def test_bytes_that_no_sample_holds_are_found_by_their_hash(run_checks: Examine, set_of_shards: Path) -> None:
    with (set_of_shards / "train-000001.tar").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert run_checks([SHARDS], f"data.shards={set_of_shards}")[0] == 0
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}", all_shards=True)
    assert num_red == 1 and f"1 files are not what was built: {set_of_shards / 'train-000001.tar'}" in said
    assert "33 samples, all read and decoded" in said


def test_samples_that_are_too_long_for_the_settings(run_checks: Examine) -> None:
    num_red, said = run_checks([SHARDS], "data.max_sequence_length=60")
    assert num_red == 1 and "too_long" in said


def test_photos_that_are_split_into_several_sequences(run_checks: Examine) -> None:
    num_red, said = run_checks([SHARDS], "data.max_turns_per_image=1", all_shards=True)
    assert num_red == 0 and "33 samples, all read and decoded" in said


def test_a_shard_that_is_gone(run_checks: Examine, set_of_shards: Path) -> None:
    (set_of_shards / "val-000000.tar").unlink()
    num_red, said = run_checks([SHARDS], f"data.shards={set_of_shards}")
    assert num_red == 1 and "index.json names 1 shards that are not there" in said


# ---- plan, engine, links


def test_a_plan_that_is_too_much_here(run_checks: Examine) -> None:
    """Alone, it may be meant for more machines: tests/distributed has the red line."""
    num_red, said = run_checks([PLAN], "train.micro_batch_size=100000", "train.global_batch_size=100000")
    assert num_red == 0 and "yellow  plan: on this machine alone it is too much" in said


def test_a_batch_that_does_not_divide(run_checks: Examine) -> None:
    num_red, said = run_checks([LINKS, ENGINE], "train.micro_batch_size=3")
    assert num_red == 1 and "train.global_batch_size=16 is no multiple of 1 ranks x train.micro_batch_size=3" in said


# ---- output folder and disk


def test_an_output_folder_that_cannot_be(run_checks: Examine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    num_red, said = run_checks([FOLDER, SHARING, DISK, LEFTOVERS], f"output_dir={tmp_path / 'file' / 'run'}")
    assert num_red == 1 and "red     output folder: " in said and "Not a directory" in said


def test_a_disk_that_takes_no_more(run_checks: Examine, tmp_path: Path) -> None:
    """A limit on the size of files does what a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        num_red, said = run_checks([FOLDER, DISK, LEFTOVERS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert num_red == 1 and "File too large" in said and "make room" in said
    assert not (tmp_path / "run").exists()


def test_what_a_killed_examination_left_is_removed(run_checks: Examine, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    old, young = (tmp_path / "run" / f".tmp-doctor-{name}" for name in ("old", "young"))
    old.touch()
    young.touch()
    os.utime(old, (old.stat().st_mtime - 7200,) * 2)
    run_checks([FOLDER, DISK, LEFTOVERS])
    assert list((tmp_path / "run").iterdir()) == [young]


def test_no_room_for_the_checkpoints(run_checks: Examine) -> None:
    num_red, said = run_checks([FOLDER, DISK, LEFTOVERS], "checkpoint.keep_last=1000000000")
    assert num_red == 1 and "red     disk: " in said and "1000000002 more checkpoints take" in said


# ---- Weights & Biases


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A W&B server that knows KEY. What it got is in `asked`, what it answers instead in `status`."""
    state: dict = {"asked": [], "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            state["asked"].append((self.path, self.headers["Authorization"]))
            viewer = {"username": "maria"} if self.headers["Authorization"] == state["login"] else None
            body = json.dumps({"data": {"viewer": viewer}}).encode()
            self.send_response(state["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    import base64

    import wandb

    wandb.teardown()
    state["login"] = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    state["address"] = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", state["address"])
    yield state
    listening.shutdown()
    thread.join()
    listening.server_close()
    wandb.teardown()


def test_wandb_answers_and_knows_the_key(
    run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server["address"])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    num_red, said = run_checks([WANDB], "tracking.mode=auto")
    assert num_red == 0 and f"green   W&B: online: {server['address']} answers and knows the key (maria)" in said
    assert server["asked"] == [("/graphql", server["login"])] and KEY not in said
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "(maria)" in run_checks([WANDB], "tracking.mode=online")[1]


def test_wandb_does_not_know_the_key(run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server["address"])
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    num_red, said = run_checks([WANDB], "tracking.mode=auto")
    assert num_red == 0 and "yellow  W&B: " in said and "the server does not know this key" in said
    server["status"] = 401
    num_red, said = run_checks([WANDB], "tracking.mode=online")
    assert num_red == 1 and "does not know this key" in said and "f" * 40 not in said


def test_wandb_is_not_there(run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:pa55word@127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    num_red, said = run_checks([WANDB], "tracking.mode=auto")
    assert num_red == 0 and "http://127.0.0.1:9: ConnectionError" in said and "recorded offline" in said
    assert "pa55word" not in said and KEY not in said
    monkeypatch.setenv("WANDB_BASE_URL", server["address"])
    server["status"] = 503
    assert "HTTPError" in run_checks([WANDB], "tracking.mode=online")[1]


def test_wandb_offline(run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "green   W&B: offline: launch/replay.py" in run_checks([WANDB], "tracking.mode=offline")[1]
    assert "green   W&B: offline, since there is no key" in run_checks([WANDB], "tracking.mode=auto")[1]
    assert run_checks([WANDB], "tracking.mode=online")[0] == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert "green   W&B: offline: launch/replay.py" in run_checks([WANDB], "tracking.mode=auto")[1]
    assert server["asked"] == []


# ---- the program


def test_settings_that_are_wrong(capsys: pytest.CaptureFixture) -> None:
    assert main(["model.pth=x"]) == 2
    assert "ConfigError: " in capsys.readouterr().err
    assert main([]) == 2
    assert "no value for data.shards" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_on_a_disk_that_is_really_full(start_model: Path, shards: Path, tmp_path: Path) -> None:
    """One red line, exit code 1, no traceback, no colours in a file."""
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    (tmp_path / "full").mkdir()
    settings = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={tmp_path}/full/run"]
    settings += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=offline"]
    script = f"mount -t tmpfs -o size=9m none {tmp_path}/full && head -c 6M /dev/zero > {tmp_path}/full/photos; "
    script += f'exec {sys.executable} launch/doctor.py "$@"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *settings],
        cwd=REPOSITORY,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "red     disk: writing 8 MiB on " in done.stdout and "No space left on device" in done.stdout
    assert done.stdout.endswith("1 red\n") and "\033" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_signal_leaves_nothing_behind(start_model: Path, shards: Path, tmp_path: Path) -> None:
    settings = [f"model.path={start_model}", f"data.shards={shards}", f"output_dir={tmp_path}/run"]
    settings += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=disabled"]
    process = subprocess.Popen([sys.executable, "launch/doctor.py", *settings], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob(f".tmp-doctor-*-{process.pid}")):  # while it measures the disk
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "run").exists()
