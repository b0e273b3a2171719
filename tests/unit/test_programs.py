"""Conventions of every program: --help, --version, exit codes, and what is printed outside the environment."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogvlm_ft import __version__
from cogvlm_ft.command_line import build_parser, exit_code, paste
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]
FORMER_NAMES = {"launch/replay.py"}
PROGRAMS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (*REPOSITORY.glob("launch/*.py"), REPOSITORY / "shards/build.py", REPOSITORY / "shards/review.py")
    if path.stem != "__init__"
)
CURRENT = [program for program in PROGRAMS if program not in FORMER_NAMES]


def main_of(program: str):
    """Return the `main` of a program, imported as in an installed package."""
    return importlib.import_module("cogvlm_ft." + program.removesuffix(".py").replace("/", ".")).main


def printed(program: str, argument: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main_of(program)([argument])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", CURRENT)
def test_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(program, "--version", capsys) == f"cogvlm-ft {__version__}\n"


@pytest.mark.parametrize("program", CURRENT)
def test_help_opens_with_the_purpose_and_ends_with_examples(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(program, "--help", capsys)
    description = text.split("\n\n")[1]
    assert re.match(r"[A-Z][a-z]+(-[a-z]+)? .*\.$", description.splitlines()[0].rstrip() + "."), description
    examples = text.partition("\nExamples:\n")[2]
    commands = [shlex.split(line, comments=True) for line in examples.replace("\\\n", " ").splitlines() if line.strip()]
    assert commands, "no examples"
    for words in commands:
        assert words[0] in ("python", "deepspeed", "sbatch"), words
        named = re.findall(r"(?:launch|shards)/\w+\.py", " ".join(words))
        assert named and all((REPOSITORY / name).is_file() for name in named), words
        assert not re.search(r"\.\.\.|\[|\]", " ".join(words)), "an example can be pasted as it is"


@pytest.mark.parametrize("program", CURRENT)
def test_an_unknown_option_is_a_mistake_of_the_user(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(program)(["--no-such-option"])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_outside_the_environment(program: str) -> None:
    """As with the system's Python: started by its path, and neither this package nor its libraries are found."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "activate the environment first: source .venv/bin/activate" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_program_has_an_entry_point() -> None:
    points = dict(re.findall(r'"(cogvlm-[a-z-]+) = ([\w.]+):main"', (REPOSITORY / "setup.py").read_text("utf-8")))
    expected = {"cogvlm_ft." + program.removesuffix(".py").replace("/", ".") for program in PROGRAMS}
    assert set(points.values()) == expected
    for name, module in points.items():
        stem = module.rpartition(".")[2].replace("_", "-")
        assert name in (f"cogvlm-{stem}", "cogvlm-build-shards"), name


@pytest.mark.parametrize("error", [ConfigError("x: 1"), DataError("y: 2"), CheckpointError("z: 3")])
def test_mistakes_of_the_user_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert exit_code(fail) == 2
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_a_home_folder_that_is_not_known_is_a_mistake_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: Path("~no-such-user/x").expanduser() and 0) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_shells_leave_the_home_folder_of_an_option_to_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = build_parser("Do it.")
    parser.add_argument_group("places").add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/a b"]).out == tmp_path / "a b"
    with pytest.raises(SystemExit):
        parser.parse_args(["--out=~no-such-user/x"])
    assert "~no-such-user/x: found no such home folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2), (errno.ELOOP, 2), (errno.ENOSPC, 1)]
)
def test_a_disk_or_a_path_that_fails_is_one_line(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "photos/a.jpg")

    assert exit_code(fail) == code
    printed = capsys.readouterr().err
    assert f"Error: photos/a.jpg: {os.strerror(number)}. " in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "is_one_line"), [(errno.ENAMETOOLONG, True), (errno.ELOOP, True), (errno.EACCES, False)]
)
def test_training_too_has_one_line_for_what_can_be_no_path(
    number: int, is_one_line: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "x" * 300)

    if is_one_line:
        assert exit_code(fail, explain_paths=False) == 2
        assert f"xxx: {os.strerror(number)}. Check the path" in capsys.readouterr().err
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            exit_code(fail, explain_paths=False)


def test_a_name_that_is_not_utf_8_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: len("runs/\udcd5\udcd5".encode())) == 2
    assert capsys.readouterr().err.startswith("ConfigError: runs/\\udcd5\\udcd5: found a text that is not UTF-8; ")
    with pytest.raises(UnicodeEncodeError):
        exit_code(lambda: len("红".encode("ascii")))


HOSTILE = ("missing", "file/x", "loop", "loop/x", "x" * 300, "new\nline", "pipe", "folder", "binary", "empty", "\udcff")
READ_BY = {
    "plan": ["data.shards=unset", "output_dir=out", "model.path=unset", "--model-config"],
    "submit": ["--dry-run", "model.path=m", "data.shards=s", "output_dir=out", "--hostfile"],
    "report": ["--config"],
    "stop": [],
    "best": [],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("program", READ_BY)
def test_a_path_that_cannot_be_read_is_one_line(
    program: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_hostile(tmp_path)
    before = [str(tmp_path)] if program == "report" else []
    assert main_of(f"launch/{program}.py")([*before, *READ_BY[program], name]) == 2
    printed = capsys.readouterr().err
    assert "Error: " in printed and "Traceback" not in printed


def make_hostile(folder: Path) -> None:
    for name in ("file", "empty"):
        (folder / name).touch()
    (folder / "file").write_text("text", encoding="utf-8")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def test_a_pipe_is_no_file_to_write_settings_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hostile(tmp_path)
    for name in ("pipe", "folder"):
        assert main_of("launch/init.py")(["--out", str(tmp_path / name), "--overwrite"]) == 2
        assert f"--out {tmp_path / name}: found no regular file; expected" in capsys.readouterr().err


def test_other_failures_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)
    with pytest.raises(ModuleNotFoundError):
        exit_code(lambda: importlib.import_module("cogvlm_ft.nosuch"))  # type: ignore[arg-type,return-value]


def test_a_missing_library_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: importlib.import_module("no_such_library")) == 2  # type: ignore[arg-type,return-value]
    assert "No module named 'no_such_library'; activate the environment" in capsys.readouterr().err


def test_exit_codes_of_work() -> None:
    assert exit_code(lambda: None) == 0 and exit_code(lambda: 1) == 1


def test_the_former_name_of_wandb_sync(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("launch/replay.py")([str(tmp_path)]) == 2
    assert "cogvlm-replay is now cogvlm-wandb-sync" in capsys.readouterr().err


def test_commands_to_paste_run_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = shlex.split(paste("export", "--out", "a folder"))
    assert command == [sys.executable, "-m", "cogvlm_ft.launch.export", "--out", "a folder"]
    monkeypatch.chdir(Path(sys.executable).parents[1])
    assert shlex.split(paste("best"))[0] == f"{Path(sys.executable).parent.name}/{Path(sys.executable).name}"


def run_batch_script(folder: Path, fakes: Path, **more: str) -> subprocess.CompletedProcess:
    """Run slurm/evaluate.sbatch in a folder, with an srun that only prints its arguments."""
    for name, line in (("scontrol", "echo node1"), ("srun", 'echo "$@"')):
        (fakes / name).write_text(f"#!/bin/sh\n{line}\n")
        (fakes / name).chmod(0o755)
    environment = {"PATH": f"{fakes}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", **more}
    command = ["bash", REPOSITORY / "slurm/evaluate.sbatch", "--out", "scores"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_batch_scripts_find_the_programs_from_any_folder(tmp_path: Path) -> None:
    start = f"--kill-on-bad-exit=1 {sys.executable}"
    in_checkout = run_batch_script(REPOSITORY, tmp_path)
    assert in_checkout.stdout == f"{start} launch/evaluate.py --out scores\n", in_checkout.stderr
    elsewhere = run_batch_script(tmp_path, tmp_path)
    assert elsewhere.stdout == f"{start} {REPOSITORY}/cogvlm_ft/launch/evaluate.py --out scores\n", elsewhere.stderr
    without = run_batch_script(tmp_path, tmp_path, PYTHON="false")
    assert without.returncode == 2 and "false: cannot import cogvlm_ft. Activate the environment" in without.stderr


@pytest.mark.parametrize("program", ["shards/build.py", "shards/review.py"])
def test_an_output_that_cannot_be_a_folder_is_a_mistake_of_one_line(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "targets": []}')
    (tmp_path / "file").write_text("")
    arguments = ["--annotations", str(tmp_path / "a.jsonl"), "--out"]
    for out in (tmp_path / "file", tmp_path / "file" / "shards", Path("/proc/shards")):
        assert main_of(program)([*arguments, str(out)]) == 2
        error = capsys.readouterr().err
        assert str(out) in error and len(error.splitlines()) == 1, error


def test_ctrl_c_is_no_traceback() -> None:
    """The program still ends by the signal, so that a loop of a shell ends too."""
    program = "from cogvlm_ft.terminal import prepare_terminal; prepare_terminal(); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (-signal.SIGINT, "interrupted")
