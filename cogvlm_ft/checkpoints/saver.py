"""Saves checkpoints during training: copy the slices, write them in the background, publish when all ranks are done."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvlm_ft.checkpoints.checkpoint import (
    MODEL_FOLDER,
    STATE_FILE,
    TrainState,
    evaluation_record,
    prune_checkpoints,
    record_evaluation,
    remove_leftovers,
)
from cogvlm_ft.checkpoints.manifest import write_manifest
from cogvlm_ft.checkpoints.slices import LAYOUT_FILE, Layout, layout_of, local_slices, local_specs, rank_file
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.plain_files import sync, sync_tree
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.runtime.distributed import (
    all_reduce_sum,
    from_main,
    gather_to_main,
    is_main,
    rank,
    use_device,
    world_size,
)
from cogvlm_ft.runtime.outcome import write_outcome
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.safetensors_io import FileRecord, TensorSpec, hash_file, write_tensors
from cogvlm_ft.settings import CheckpointConfig

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves one checkpoint at a time: `start` it, `finish` it once no rank `is_writing`.

    With settings.background, slices are copied into host memory, which is all that training waits for; without, they
    are written one tensor at a time before `start` returns. last_step: of the newest checkpoint, published or started;
    0 if there is none, as the state before the first step is that of the model folder; -1 if it could not be saved.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        save_model_files: Callable[[Path], None],
        settings: CheckpointConfig,
        last_step: int = 0,
    ) -> None:
        """Prepare for `folder`. `save_model_files(path)` writes config and tokenizer; rank 0 calls it."""
        self._engine = engine
        self._folder = folder
        self._save_model_files = save_model_files
        self._settings = settings
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=use_device)
        self._written: Future[dict[str, FileRecord]] | None = None
        self._state = TrainState()
        self._copies: dict[TensorSpec, Tensor] = {}
        self.last_step = last_step

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are not yet on disk."""
        return self._written is not None and not self._written.done()

    def start(self, state: TrainState) -> None:
        """Start a checkpoint, after finishing an earlier one. Collective."""
        self.finish()
        self._state, self.last_step = dataclasses.replace(state, world_size=world_size()), state.step
        specs = local_specs(self._engine)
        [num_bytes] = all_reduce_sum([sum(spec.num_bytes for spec in specs)])
        no_room = from_main(self._make_room(num_bytes) if is_main() else None)
        if no_room:
            self._report(no_room)
            return
        slices = self._copied_slices(specs) if self._settings.background else local_slices(self._engine)
        self._written = self._writer.submit(self._write, layout_of(self._engine), specs, slices)
        if not self._settings.background:
            self.finish()

    def finish(self) -> Path | None:
        """Wait until the checkpoint is written, publish it and delete old ones. Collective.

        Returns its path; None if there is none, or if it could not be saved.
        """
        if self._written is None:
            return None
        try:
            here: dict[str, FileRecord] | str = self._written.result()
        except OSError as error:
            here = f"rank {rank()}: {error}"
        self._written = None
        everywhere = gather_to_main(here)
        problem = from_main(self._publish(everywhere) if everywhere is not None else None)
        if problem:
            self._report(problem)
            return None
        return self._folder / step_name(self._state.step)

    def record_evaluation(self, state: TrainState) -> None:
        """Record what an evaluation added to a state whose checkpoint is started or saved. Rank 0 writes."""
        if not is_main() or self.last_step != state.step or state.step == 0:
            return
        try:
            record_evaluation(self._folder, state)
        except OSError as error:
            logger.warning(
                "the evaluation of step %d could not be recorded: %s. Training continues; a resumed run repeats it",
                state.step,
                error,
            )

    def close(self, step: int) -> None:
        """Finish; raise CheckpointError if the run's last state is not saved, whatever settings.on_error is.

        Collective.
        """
        self.finish()
        self._writer.shutdown()
        if self.last_step != step:
            raise CheckpointError(f"the last state, that of step {step}, could not be saved: see the warning before")

    def _make_room(self, num_bytes: float) -> str:
        """Return why there is no room, "" if there is. Rank 0 only. Quotas show only while writing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._folder)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            return str(error)
        if self._partial.exists():  # its files would be taken for ours
            return f"{self._partial} cannot be removed"
        if num_bytes < free:
            return ""
        gib = num_bytes / 2**30
        return f"No space left on device: the checkpoint needs {gib:.2f} GiB, {free / 2**30:.2f} GiB are free"

    def _copied_slices(self, specs: list[TensorSpec]) -> list[Tensor]:
        """Copy this rank's slices into host memory, which is allocated once and reused."""
        for spec, tensor in zip(specs, local_slices(self._engine), strict=True):
            if spec not in self._copies:
                self._copies[spec] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[spec].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [self._copies[spec] for spec in specs]

    def _write(self, layout: Layout, specs: list[TensorSpec], slices: Iterable[Tensor]) -> dict[str, FileRecord]:
        """Write this rank's files and return them by their path in the checkpoint. In the background.

        No collective here.
        """
        partial = self._partial
        path = partial / rank_file(rank())
        path.parent.mkdir(parents=True, exist_ok=True)
        written = dict(self._write_small_files(layout)) if is_main() else {}
        try:
            written[rank_file(rank())] = write_tensors(path, specs, _seen_by_watchdog(slices))
        except OSError:
            path.unlink(missing_ok=True)  # at once: whatever else is written there needs the room
            raise
        return written

    def _write_small_files(self, layout: Layout) -> Iterator[tuple[str, FileRecord]]:
        partial = self._partial
        (partial / MODEL_FOLDER).mkdir(exist_ok=True)
        self._save_model_files(partial / MODEL_FOLDER)
        layout.save(partial)
        text = json.dumps(dataclasses.asdict(self._state), indent=2)
        (partial / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        for path in [partial / STATE_FILE, partial / LAYOUT_FILE, *sorted((partial / MODEL_FOLDER).rglob("*"))]:
            if path.is_file():
                yield path.relative_to(partial).as_posix(), hash_file(path)

    def _publish(self, everywhere: list[dict[str, FileRecord] | str]) -> str:
        """Write the manifest and rename the folder; return why it cannot be done, "" if it is. Rank 0 only."""
        problems = [found for found in everywhere if isinstance(found, str)]
        partial, final = self._partial, self._folder / step_name(self._state.step)
        try:
            if problems:
                shutil.rmtree(partial, ignore_errors=True)  # room for the next one
                return "; ".join(problems)
            files = {name: record for found in everywhere if isinstance(found, dict) for name, record in found.items()}
            write_manifest(partial, files)
            sync_tree(partial)
            if final.exists():  # of an attempt before, which went further than the checkpoint that this run began with
                final.rename(final.with_name(f".tmp-old-{final.name}"))
            partial.rename(final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return str(error)
        try:
            sync(self._folder)
        except OSError as error:  # the checkpoint is there, whole
            logger.warning("%s: its name could not be synced to disk: %s", final, error)
        logger.info("saved %s", final)
        write_outcome("progress")
        self._prune()
        return ""

    def _prune(self) -> None:
        best = self._state.best
        try:
            prune_checkpoints(self._folder, self._settings, best.step if best else None)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)
        remove_leftovers(self._folder)

    def _report(self, problem: str) -> None:
        message = (
            f"the checkpoint of step {self._state.step} could not be saved in {self._folder}: {problem}. Earlier ones "
            f"are unchanged. {_advice(problem)}"
        )
        self.last_step = -1
        if is_main():
            with contextlib.suppress(OSError):  # a record without its checkpoint
                evaluation_record(self._folder / step_name(self._state.step)).unlink(missing_ok=True)
        if self._settings.on_error == "stop":
            raise CheckpointError(message)
        if is_main():
            logger.warning("%s; training continues, as checkpoint.on_error=continue", message)

    @property
    def _partial(self) -> Path:
        return self._folder / f".tmp-{step_name(self._state.step)}"


def _advice(problem: str) -> str:
    is_full = any(os.strerror(number) in problem for number in (errno.ENOSPC, errno.EDQUOT))
    return (
        "Free space, or lower checkpoint.keep_last" if is_full else "Check the disk and the permissions of the folder"
    )


def _seen_by_watchdog(slices: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the slices and report progress: a slow disk is not a hang."""
    for tensor in slices:
        progress()
        yield tensor
