"""A whole run with secrets in its environment, under a strict umask: nothing that it writes or logs contains them."""

from __future__ import annotations

import base64
import functools
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ranks import REPOSITORY, free_port

pytestmark = pytest.mark.slow

SHARDS = "data.shards=${oc.env:SHARDS_ADDRESS}"
LOGIN, PASSWORD = "tester", "pa55-of-the-shard-server"
SECRETS = {
    "WANDB_API_KEY": "c0ffee0123456789abcdef0123456789abcdef42",
    "HF_TOKEN": "hf_PlantedTokenOfTheHub0123456789abcd",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfTheBucket/0123456789+abcde",
    "HTTPS_PROXY": "http://proxyuser:pa55-of-the-proxy@127.0.0.1:9",
    "HTTP_PROXY": "http://proxyuser:pa55-of-the-proxy@127.0.0.1:9",
}
# One interpreter per rank for all its programs: each start costs more than what they do here.
ONE_BY_ONE = """
import json, os, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # only the first program has other ranks
"""
PLANTED = [
    *(SECRETS[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")),
    *("pa55-of-the-proxy", PASSWORD),
]


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    """Yield the address, password included, of a server that gives parts of the shards to those who know it."""
    expected = "Basic " + base64.b64encode(f"{LOGIN}:{PASSWORD}".encode()).decode()

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            if self.headers["Authorization"] != expected or not path.is_file():
                self.send_error(401 if path.is_file() else 404)
                return
            data = path.read_bytes()
            part, total = self.headers["Range"], len(data)
            if part:
                first, last = map(int, part.removeprefix("bytes=").split("-"))
                data = data[first : last + 1]
            self.send_response(206 if part else 200)
            if part:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{LOGIN}:{PASSWORD}@127.0.0.1:{server.server_port}"
        server.shutdown()


def start(programs: list[list[str]], folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen:
    """Start programs with a home of their own, where everything they could write outside of the run is found."""
    home = folder / "home"
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= SECRETS | {"NO_PROXY": "127.0.0.1,localhost", "HOME": str(home), "TMPDIR": str(home / "tmp")}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # no server listens there: the run is recorded offline
    log = folder / "logs" / f"{rank}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", ONE_BY_ONE, json.dumps(programs)]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, umask=0o027)


def run(programs_of_ranks: list[list[list[str]]], folder: Path) -> None:
    port, world_size = free_port(), len(programs_of_ranks)
    processes = [start(programs, folder, rank, world_size, port) for rank, programs in enumerate(programs_of_ranks)]
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(path.read_text(errors="replace") for path in sorted((folder / "logs").iterdir()))
    assert codes == [0] * world_size, logs


def files_with(secret: str, folder: Path) -> list[str]:
    """Return the files that contain `secret`, as it is or in base64 at any offset."""
    spellings = [secret.encode(), secret.encode("utf-16-le")]
    for shift in range(3):
        spellings.append(base64.b64encode(b"x" * shift + secret.encode())[4:-4])
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and any(spelling in path.read_bytes() for spelling in spellings)
    ]


def modes(folder: Path) -> dict[str, str]:
    """Return the modes that differ from what umask 027 leaves of the usual 666 and 777; W&B's staging has its own."""
    return {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink()
        and "staging" not in path.parts
        and stat.S_IMODE(path.stat().st_mode) != (0o750 if path.is_dir() else 0o640)
    }


def test_a_whole_run_keeps_every_secret_and_the_user_s_umask(
    address: str, start_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = tmp_path / "run"
    monkeypatch.setenv("SHARDS_ADDRESS", address)
    settings = [f"output_dir={output_dir}", f"model.path={start_model}", SHARDS]
    settings += ["data.num_workers=0", "train.max_steps=2", "train.epochs=1", "train.global_batch_size=4"]
    settings += ["train.micro_batch_size=2", "evaluate.max_new_tokens=4", "evaluate.max_samples=4"]
    settings += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=auto"]
    train = ["launch/train.py", *settings]
    checkpoint = output_dir / "checkpoints" / "step-00000002"
    afterwards = [
        ["launch/report.py", str(output_dir), SHARDS],  # config.yaml is not expanded
        ["launch/export.py", "--checkpoint", str(checkpoint), "--out", str(output_dir / "exported"), "--prove", "0"],
        ["launch/wandb_sync.py", str(output_dir), "--mode", "offline"],
    ]
    run([[train, *afterwards], [train]], tmp_path)

    assert "shards: ${oc.env:SHARDS_ADDRESS}\n" in (output_dir / "config.yaml").read_text()
    written = {path.name for path in output_dir.rglob("*")}
    assert {"metrics.jsonl", "run.json", "report.html", "predictions.jsonl", "model.safetensors"} <= written
    assert any(path.stat().st_size for path in output_dir.glob("wandb/offline-run-*/*.wandb"))
    # The search finds what is there.
    assert files_with("a planted thing", tmp_path) == []
    (tmp_path / "planted.bin").write_bytes(b"..." + base64.b64encode(b"api:a planted thing !") + b"...")
    assert files_with("a planted thing", tmp_path) == ["planted.bin"]
    for secret in PLANTED:
        assert files_with(secret, tmp_path) == []
    assert not modes(output_dir)
