"""What a run keeps on two ranks: its last epoch with any batch size, and its state whatever else cannot be written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from ranks import read_metrics, run
from reference import NUM_SAMPLES
from servers import Server, serve
from tiny import run_settings

from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, list_checkpoints, read_state
from cogvlm_ft.data.index import load_index
from cogvlm_ft.runtime.distributed import WATCHED_TIMEOUT_S

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("saving_rules.py")


class ServerThatLeaves(Server):
    """Answers 503 once a file exists."""

    def __init__(self, folder: Path, away: Path) -> None:
        self.away = away
        super().__init__(folder)

    @property
    def failures(self) -> int:
        return int(self.away.exists())

    @failures.setter
    def failures(self, number: int) -> None:
        pass


@pytest.fixture(scope="module")
def attempts(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the run folder and the output of the first rank."""
    out = tmp_path_factory.mktemp("attempts")
    changes = ["train.epochs=2", "train.log_every=1", "evaluate.before_training=false", "evaluate.max_samples=2"]
    settings = run_settings(shards, out / "model", out / "run", *changes)
    (out / "foreign").mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, out / "foreign")
    with serve(ServerThatLeaves(shards, out / "away")) as server:
        output = run([PROGRAM, start_model, out, server.url, *settings], 2, out / "logs")
    return out / "run", output.split("--- rank 1")[0]


def test_one_rank_of_a_node_scans_for_all(attempts: tuple[Path, str]) -> None:
    """Each tar is scanned once, although a start opens both splits several times, and the plans are the same."""
    folder, output = attempts
    [found] = [json.loads(line)["foreign"] for line in output.splitlines() if line.startswith('{"foreign"')]
    tars = folder.with_name("foreign")
    assert sorted(found[0][0]) == sorted(path.name for path in tars.iterdir()) and found[1][0] == []
    index = load_index(tars, "train")
    places = hashlib.sha256(index.keys.tobytes() + index.image_offset.tobytes() + index.json_offset.tobytes())
    assert [each[1:3] for each in found] == [[index.data_sha256, places.hexdigest()]] * 2
    assert [each[3] for each in found] == [[0, 0], [0, 1]], "ranks with other inputs compute their own"


def test_what_one_rank_cannot_read_saves_and_ends_all_ranks(attempts: tuple[Path, str]) -> None:
    folder, output = attempts
    [found] = [json.loads(line)["errors"] for line in output.splitlines() if line.startswith('{"errors"')]
    assert found[0] == found[1]
    outage, absent, unreadable, missing, other = found[0]
    assert re.match(
        r"http://.*/train-\d+\.tar: HTTP 503; gave up after \d+ attempts? in \d s\. Start again when", outage
    )
    assert absent.endswith("absent'")
    assert unreadable == "DataError: val-000000.tar: the disk of rank 1 is gone"
    assert re.match(r"DataError: .*/of-0: found nothing; expected a folder", missing)
    assert re.match(r"ConfigError: train\.epochs: found 2 on rank 1 \(.*\), 1 on rank 0 .*; expected the same", other)
    last = read_state(list_checkpoints(folder.with_name("outage") / "checkpoints")[-1])
    rows = [row["step"] for row in read_metrics(folder.with_name("outage"), "train")]
    assert last.step >= 3 and rows == list(range(1, last.step + 1))
    assert last.samples_consumed == 4 * last.step < 4 * NUM_SAMPLES


def test_a_stop_before_the_first_step_writes_no_checkpoint(attempts: tuple[Path, str]) -> None:
    """Of 17B it would be 68 GB that are in the model folder already; and the weights are not loaded just to stop."""
    [found] = [json.loads(line)["stopped"] for line in attempts[1].splitlines() if line.startswith('{"stopped"')]
    assert found == ["before loading", 0, []]


def test_other_batch_sizes_end_at_exactly_the_last_epoch(attempts: tuple[Path, str]) -> None:
    folder, output = attempts
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"step"')]
    assert [(each["step"], each["samples"]) for each in found] == [(2, 16), (6, 32), (10, 2 * NUM_SAMPLES)]
    assert [row["step"] for row in read_metrics(folder, "val")] == [2, 6, 7, 10]  # 7: the end of the first epoch
    seen: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
    for path in (folder / "sample_losses").glob("*.jsonl"):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            seen[row["epoch"]][row["key"]] += 1
    assert [set(of_epoch.values()) for of_epoch in seen.values()] == [{1}, {1}]
    assert output.count("seed=5: found a checkpoint of seed 0: the rest of this epoch has another order") == 1
    assert len(seen[0]) == len(seen[1]) == NUM_SAMPLES


def test_files_that_cannot_be_written_and_a_vanished_model_folder_cost_no_state(attempts: tuple[Path, str]) -> None:
    """Rows that met a full disk were written later; each kind was reported once.

    A checkpoint whose name may not outlive a power failure is one.
    """
    folder, output = attempts
    checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    assert (read_state(checkpoint).step, read_state(checkpoint).evaluated_step) == (10, 10)
    assert (checkpoint / MODEL_FOLDER / "tokenizer.model").is_file()
    assert [row["step"] for row in read_metrics(folder, "train")] == list(range(1, 11))
    assert not (folder / "evaluations" / "step-00000010").exists()
    assert "step-00000010: its name could not be synced to disk: [Errno 5] Input/output error" in output
    for kind in ("metrics", "sample losses", "results of evaluations"):
        assert output.count(f"{kind} cannot be written: OSError: [Errno 28] No space left on device") == 1, output


def test_deepspeed_keeps_nothing_between_steps_and_has_one_timeout(attempts: tuple[Path, str]) -> None:
    found = [json.loads(line) for line in attempts[1].splitlines() if line.startswith('{"step"')]
    assert [each["stack"] for each in found] == [1, 1, 1]
    assert found[-1]["num_groups"] > found[0]["num_groups"]  # those of hpZ
    assert all(each["timeouts"] == [WATCHED_TIMEOUT_S] for each in found)
