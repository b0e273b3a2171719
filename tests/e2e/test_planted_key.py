"""A whole run with secrets all around it, under a strict umask: nothing that it writes or says holds any of them."""

from __future__ import annotations

import base64
import functools
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

LOGIN, PASSWORD = "tester", "pa55-of-the-shard-server"
SECRETS = {
    "WANDB_API_KEY": "c0ffee0123456789abcdef0123456789abcdef42",
    "HF_TOKEN": "hf_PlantedTokenOfTheHub0123456789abcd",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfTheBucket/0123456789+abcde",
    "HTTPS_PROXY": "http://proxyuser:pa55-of-the-proxy@127.0.0.1:9",
    "HTTP_PROXY": "http://proxyuser:pa55-of-the-proxy@127.0.0.1:9",
}
PLANTED = [
    *(SECRETS[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")),
    *("pa55-of-the-proxy", PASSWORD),
]


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    """Of a server that gives parts of the shards to those who know the password, which is in the address."""
    wanted = "Basic " + base64.b64encode(f"{LOGIN}:{PASSWORD}".encode()).decode()

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            if self.headers["Authorization"] != wanted or not path.is_file():
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


def start(arguments: list[object], folder: Path, rank: int = 0, world_size: int = 1, port: int = 0) -> subprocess.Popen:
    """A program of ours in a home of its own, where everything it could write outside of its run would be found."""
    home = folder / "home"
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= SECRETS | {"NO_PROXY": "127.0.0.1,localhost", "HOME": str(home), "TMPDIR": str(home / "tmp")}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody is there: the run is recorded offline
    log = folder / "logs" / f"{Path(str(arguments[0])).stem}-{rank}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, umask=0o027)


def run(arguments: list[object], folder: Path, world_size: int = 1) -> None:
    port = free_port()
    processes = [start(arguments, folder, rank, world_size, port) for rank in range(world_size)]
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(path.read_text(errors="replace") for path in sorted((folder / "logs").iterdir()))
    assert codes == [0] * world_size, said


def files_with(secret: str, folder: Path) -> list[str]:
    """In the files' bytes, as it is or in base64, whatever stands before it."""
    spellings = [secret.encode(), secret.encode("utf-16-le")]
    for shift in range(3):
        spellings.append(base64.b64encode(b"x" * shift + secret.encode())[4:-4])
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and any(spelling in path.read_bytes() for spelling in spellings)
    ]


def modes(folder: Path) -> dict[str, str]:
    """What differs from what umask 027 leaves of the usual 666 and 777."""
    return {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != (0o750 if path.is_dir() else 0o640)
    }


def test_a_whole_run_keeps_every_secret_and_the_user_s_umask(address: str, start_model: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    settings = [f"output_dir={output_dir}", f"model.path={start_model}", f"data.shards={address}"]
    settings += ["data.num_workers=0", "train.max_steps=2", "train.epochs=1", "train.global_batch_size=4"]
    settings += ["train.micro_batch_size=2", "evaluate.max_new_tokens=4", "evaluate.max_samples=4"]
    settings += ["deepspeed=configs/deepspeed/zero3_tiny.json", "tracking.mode=auto"]
    run(["launch/train.py", *settings], tmp_path, world_size=2)
    (checkpoint,) = sorted((output_dir / "checkpoints").glob("step-*"))
    run(["launch/report.py", output_dir, f"data.shards={address}"], tmp_path)  # config.yaml has no password
    run(["launch/export.py", "--checkpoint", checkpoint, "--out", output_dir / "exported", "--prove", "0"], tmp_path)
    run(["launch/wandb_sync.py", output_dir, "--mode", "offline"], tmp_path)

    assert f"shards: {address.replace(f'{LOGIN}:{PASSWORD}@', '')}\n" in (output_dir / "config.yaml").read_text()
    written = {path.name for path in output_dir.rglob("*")}
    assert {"metrics.jsonl", "run.json", "report.html", "predictions.jsonl", "model.safetensors"} <= written
    assert any(path.stat().st_size for path in output_dir.glob("wandb/offline-run-*/*.wandb"))
    # Secrets that the programs were given and used: they would be found, had anything been written down.
    assert files_with("a planted thing", tmp_path) == []
    (tmp_path / "planted.bin").write_bytes(b"..." + base64.b64encode(b"api:a planted thing !") + b"...")
    assert files_with("a planted thing", tmp_path) == ["planted.bin"]
    for secret in PLANTED:
        assert files_with(secret, tmp_path) == []
    assert not modes(output_dir)
