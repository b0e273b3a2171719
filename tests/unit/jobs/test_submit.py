"""Jobs that launch/submit.py submits, and settings that it refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
from checkpoint_files import write_checkpoint
from omegaconf import OmegaConf

from cogvlm_ft.checkpoints.checkpoint import Best, TrainState
from cogvlm_ft.checkpoints.choice import best_checkpoint
from cogvlm_ft.config import load_config
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.jobs.submit import SlurmCluster, check_plan, job_number, load_cluster, run_sbatch
from cogvlm_ft.launch.best import main as best
from cogvlm_ft.launch.submit import main as submit
from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.settings import Config

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text("{partition: gpu, account: lab, gpus_per_node: 4, time: '48:00:00', options: [--exclusive]}")
    return path


@pytest.fixture
def arguments(cluster: Path, tiny_folder: Path) -> list[str]:
    settings = [f"model.path={tiny_folder}", "data.shards=s", "output_dir=runs/a"]
    return ["--dry-run", "--cluster", str(cluster), *settings]


def test_the_shipped_file_has_every_key_with_its_default() -> None:
    shipped = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "slurm/cluster.yaml"))
    assert shipped == dataclasses.asdict(SlurmCluster())


def test_file_and_options_become_sbatch_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert submit([*arguments, "--nodes", "2", "--account", "other"]) == 0
    summary, command = capsys.readouterr().out.splitlines()
    assert summary.startswith("8 GPUs: fits:")
    options, _, given = command.partition(" slurm/train.sbatch ")
    for option in (
        "--nodes=2 --time=48:00:00 --signal=B:USR1@300 --gres=gpu:4 --ntasks-per-node=4 --cpus-per-task=8",
        "--partition=gpu --account=other --exclusive",
    ):
        assert option in options
    assert given == " ".join(arguments[3:])


def test_a_tiny_model_is_submitted_as_it_was_typed(
    cluster: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.path=tiny", f"data.shards={shards}", f"output_dir={tmp_path}/run"]
    assert submit(["--dry-run", "--cluster", str(cluster), *settings]) == 0
    summary, command = capsys.readouterr().out.splitlines()
    assert summary.startswith("4 GPUs: fits:") and "model.path=tiny" in command


def test_a_chain_and_what_comes_after(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert submit([*arguments, "--chain", "3", "--after"]) == 0
    _, first, second, third, after = capsys.readouterr().out.splitlines()
    assert "--dependency" not in first
    assert "--dependency=afterany:JOB1 " in second and "--dependency=afterany:JOB2 " in third
    assert "--dependency=afterok:JOB3 slurm/after.sbatch runs/a" in after
    assert "--time=48" not in after, "it has a limit of its own"


@pytest.mark.slow
def test_a_sweep_is_an_array(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("- {name: a, settings: [train.lr=1e-4]}\n- {name: b, settings: [train.micro_batch_size=2]}")
    assert submit([*arguments, "--sweep", str(sweep), "--after"]) == 0
    *_, train, after = capsys.readouterr().out.splitlines()
    for command in (train, after):
        assert "--array=0-1 --output=slurm-%A_%a.log" in command and f"--sweep {sweep}" in command
    assert "--dependency=aftercorr:JOB1" in after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nodes", "0"], "nodes=0"),
        (["--chain", "0"], "--chain 0"),
        (["train.lrr=1"], "train.lrr"),
        (["train.global_batch_size=6"], "train.global_batch_size: 6 is not a multiple of 4 ranks"),
        (["model.path=nowhere"], "nowhere"),
        (["--sweep", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_is_refused(
    arguments: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit([*arguments, *more]) == 2
    said = capsys.readouterr()
    assert message in said.err and "sbatch" not in said.out


@pytest.mark.slow
def test_what_cannot_fit_is_refused_unless_plan_is_warn(
    arguments: list[str], cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text("{gpus_per_node: 4, gpu_memory_gib: 0.001}")
    assert submit(arguments) == 2
    said = capsys.readouterr()
    assert "this run cannot fit on 4 GPUs: too much" in said.err and not said.out
    assert submit([*arguments, "plan=warn"]) == 0
    assert "too much" in capsys.readouterr().out


@pytest.mark.slow
def test_too_little_time_to_save(
    arguments: list[str], cluster: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cluster.write_text("{gpus_per_node: 4, signal_s: 300}")
    assert submit(arguments) == 0 and not caplog.text
    found = SlurmCluster(gpus_per_node=2, signal_s=1)
    sizes = CogVLMConfig(vision_config={"image_size": 490})
    sizes.save_pretrained(arguments[3].partition("=")[2])  # the 17B model's sizes in place of the tiny ones
    config = load_config(None, [*arguments[3:], "plan=warn"])
    seconds = [float(check_plan(replace_limit(config, tokens), found).split()[-2]) for tokens in (10, 1000)]
    assert "signal_s=1 leaves no time to save" in caplog.text and "a batch of an evaluation" in caplog.text
    assert seconds[1] > 20 * seconds[0], "of a batch of an evaluation, with its answers"


def replace_limit(config: Config, max_new_tokens: int) -> Config:
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, max_new_tokens=max_new_tokens))


@pytest.mark.parametrize("script", ["train", "evaluate", "after"])
def test_scripts_need_a_python_that_has_the_package(script: str, tmp_path: Path) -> None:
    """Away from the repository root; tests/slurm runs them there with an installed package."""
    command = ["bash", REPOSITORY / "slurm" / f"{script}.sbatch"]
    environment = {"SLURM_JOB_ID": "1", "PYTHON": "false", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "false: cannot import cogvlm_ft. Activate the environment before sbatch, or set PYTHON" in done.stderr


def test_without_slurm(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(arguments[1:]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 2", "node"),
        ("[]", "found '\\[\\]'; expected settings"),
        ("nodes: two", "nodes"),
        ("nodes: [", "not valid YAML"),
    ],
)
def test_mistakes_about_the_cluster(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_cluster(path, {})


def test_text_about_the_cluster_is_taken_as_it_is_written(tmp_path: Path) -> None:
    """YAML 1.1 would read an octal number, a bool and seconds."""
    path = tmp_path / "cluster.yaml"
    path.write_text("account: 0123\nqos: no\npartition: null\ntime: 12:30:00\nnodes: 4\noptions: [0123, --mem=0]\n")
    found = load_cluster(path, {"signal_s": 90})
    assert (found.account, found.qos, found.partition, found.time) == ("0123", "no", None, "12:30:00")
    assert (found.nodes, found.signal_s, found.options) == (4, 90, ["0123", "--mem=0"])


def test_the_best_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for step, best_step in ((4, 4), (8, 8), (12, 8)):
        write_checkpoint(tmp_path / "run" / "checkpoints", step, TrainState(best=Best(value=0.5, step=best_step)))
    assert best([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/run/checkpoints/step-00000008"
    assert not caplog.text
    for step in (4, 8):
        write_checkpoint(tmp_path / "poor" / "checkpoints", step, TrainState(best=Best(value=0.5, step=0)))
    assert best_checkpoint(tmp_path / "poor").name == "step-00000008"
    assert "no checkpoint was better than the model before training" in caplog.text


def test_no_best_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        best_checkpoint(tmp_path)
    assert best([str(tmp_path)]) == 2
    assert "contains no checkpoint" in capsys.readouterr().err


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    (folder / "sbatch").write_text(f"#!/bin/bash\n{lines}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_refused_chain_names_the_jobs_that_are_queued(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    takes_two = f"echo x >>{tmp_path}/jobs; n=$(wc -l <{tmp_path}/jobs); [ $n -gt 2 ] && {{ echo limit >&2; exit 1; }}"
    fake_sbatch(tmp_path, monkeypatch, f"{takes_two}; env >{tmp_path}/environment; echo $((4000 + n))")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("OF_THE_SHELL", "1")
    assert submit([*arguments[1:], "--chain", "5"]) == 2
    handed_on = (tmp_path / "environment").read_text()
    assert "OF_THE_SHELL=1" in handed_on
    assert "DS_ACCELERATOR" not in handed_on, "set by this process for a login node; jobs would train on the CPU"
    said = capsys.readouterr()
    assert "\njob 4001\n" in said.out and "--dependency=afterany:4001 " in said.out and "\njob 4002\n" in said.out
    assert "sbatch refused: limit; the command: sbatch" in said.err and "--dependency=afterany:4002" in said.err
    assert "Queued before: jobs 4001, 4002. Cancel with `scancel 4001 4002`" in said.err


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        ("12\n", "12"),
        ("12;cluster\n", "12"),
        ("\n----\n  Welcome, 5 nodes are down\n2026\n--> Checking ...OK\n4711\n", "4711"),
        ("4711\nsee you\n", "4711"),
        ("Submitted batch job 4711\n", None),
        ("", None),
    ],
)
def test_the_number_of_a_job(printed: str, number: str | None) -> None:
    assert job_number(printed) == number


def test_a_job_without_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo hello")
    with pytest.raises(ConfigError, match=r"sbatch printed 'hello'; expected .*squeue --me.*Queued before: job 7\."):
        run_sbatch(["sbatch"], queued=["7"])
