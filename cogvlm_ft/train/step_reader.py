"""Read the micro-batches of one step after another; a server of shards that is away is asked again.

The position in the data is one number, so after a failure the loader processes simply start again from there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

from cogvlm_ft.build import Run
from cogvlm_ft.checkpoints.checkpoint import TrainState
from cogvlm_ft.data.collate import Batch
from cogvlm_ft.data.loader import end_loader_processes, read_steps
from cogvlm_ft.data.patience import Patience
from cogvlm_ft.errors import ConfigError, DataError, ServerError
from cogvlm_ft.runtime.distributed import rank, world_size
from cogvlm_ft.runtime.stop_signals import StopRequest


class StepReader:
    """Context manager; reads this rank's part of each step, from a state of the run on, without end."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._run = run
        self._steps = read_epochs(run, state)

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._steps.close()
        end_loader_processes()  # an error holds on to them, and the rank would wait for them

    def next_step(self, state: TrainState, stop_request: StopRequest) -> tuple[list[Batch], float]:
        """Return the micro-batches of the step after `state`, and how many seconds it waited for them.

        There are none if they cannot be read: all ranks are then asked to stop, so that they save first.
        """
        waiting_since = time.perf_counter()
        data = self._run.config.data
        patience = Patience(data.retry_s if data.num_workers else 0.0)  # without loader processes, reading has waited
        while True:
            try:
                return next(self._steps), time.perf_counter() - waiting_since
            except ServerError as error:
                if not patience.wait(str(error)):
                    stop_request.fail(error)
                    break
                self._steps = read_epochs(self._run, state)
            except (DataError, ConfigError) as error:
                stop_request.fail(error)
                break
        return [], time.perf_counter() - waiting_since


def read_epochs(run: Run, state: TrainState) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches of every step from the state's position on, without end."""
    epoch, _ = run.plan.position(state.samples_consumed)
    yield from epoch_steps(run, state.samples_consumed)
    while True:
        epoch += 1
        yield from epoch_steps(run, epoch * run.plan.num_samples)


def epoch_steps(run: Run, samples_consumed: int) -> Iterator[list[Batch]]:
    """Return this rank's micro-batches from a position to the end of its epoch."""
    return read_steps(
        run.dataset,
        run.plan,
        samples_consumed,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=run.config.train.micro_batch_size,
        num_workers=run.config.data.num_workers,
    )
