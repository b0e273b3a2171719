"""What is recorded of every step: sample losses, skipped steps, unusable samples, warnings, the log line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from cogvlm_ft.build import Run
from cogvlm_ft.checkpoints.checkpoint import TrainState
from cogvlm_ft.data.collate import BadSample, Batch
from cogvlm_ft.data.plan import most_bad
from cogvlm_ft.errors import DataError
from cogvlm_ft.planning.flops import step_flops
from cogvlm_ft.runtime.distributed import from_main, gather_to_main, rank, world_size
from cogvlm_ft.runtime.trained_parameters import group_rates
from cogvlm_ft.tracking.auxiliary import print_line
from cogvlm_ft.tracking.sample_losses import SampleLosses
from cogvlm_ft.tracking.tracker import Tracker
from cogvlm_ft.train.health import Health
from cogvlm_ft.train.meter import Meter
from cogvlm_ft.train.printed_lines import step_line
from cogvlm_ft.train.skipped_steps import SkippedSteps
from cogvlm_ft.train.step import StepStats, row_losses

logger = logging.getLogger(__name__)


class StepLog:
    """Takes every step in turn; writes a log line every `train.log_every` steps."""

    def __init__(self, run: Run, state: TrainState, tracker: Tracker | None) -> None:
        self._run = run
        self._tracker = tracker
        has_box_loss = run.model.box_loss is not None
        self._meter = Meter(step_flops(run.config, run.model.config), has_box_loss=has_box_loss)
        self._health = Health()
        self._bad_samples = BadSamples(run, state.epoch)
        self._sample_losses = SampleLosses(run.folder.path, rank(), world_size(), state.step)
        self.skipped = SkippedSteps(run.folder, run.config.model.path, run.config.train.max_skipped_in_a_row)

    def add(
        self,
        before: TrainState,
        after: TrainState,
        batches: Sequence[Batch],
        stats: StepStats,
        *,
        lr: float,
        data_wait_s: float,
    ) -> None:
        """Record one step; before and after are the states around it. Collective.

        Raises DivergedError or DataError on every rank where the run cannot continue.
        """
        losses = row_losses(batches, stats)
        keys = [row.key for row in losses]
        tokens = [row.num_target_tokens for row in losses]
        self._sample_losses.add(after.step, before.epoch, keys, [row.loss for row in losses], tokens)
        self.skipped.add(after.step, stats.is_skipped, losses, lr)
        self._health.add(keys)
        self._meter.add(stats, data_wait_s)
        self._bad_samples.add(before.epoch, batches, stats.num_bad)
        if after.step % self._run.config.train.log_every == 0:
            self._write_line(after, lr)

    def _write_line(self, state: TrainState, lr: float) -> None:
        """Write to metrics.jsonl and W&B, and print a line. Collective."""
        report = self._meter.report()
        values = {
            "lr": lr,
            **group_rates(self._run.engine.optimizer, lr),
            **report.values,
            **self._health.report(report, state.step),
        }
        if self._tracker:
            self._tracker.log_train(state.step, {**values, "epoch": self._run.epochs_done(state)})
            print_line(step_line(state.step, self._run.last_step(state), values))


class BadSamples:
    """Counts the samples of an epoch that could not be used, and ends the run when there are too many."""

    def __init__(self, run: Run, epoch: int) -> None:
        self._epoch = epoch
        self._limit = most_bad(run.config.data.max_bad_fraction, run.plan.num_samples)
        self._num_everywhere = 0
        self._here: list[BadSample] = []

    def add(self, epoch: int, batches: Sequence[Batch], num_bad_everywhere: int) -> None:
        """Record a step. Collective once the limit is passed. num_bad_everywhere: the step's count over all ranks."""
        if epoch != self._epoch:
            self._epoch, self._num_everywhere, self._here = epoch, 0, []
        for bad in (bad for batch in batches for bad in batch.bad):
            logger.warning("sample %s cannot be used: %s: %s", bad.key, bad.reason, bad.detail)
            self._here.append(bad)
        self._num_everywhere += num_bad_everywhere
        if self._num_everywhere > self._limit:
            raise DataError(from_main(self._describe(gather_to_main(self._here))))

    def _describe(self, gathered: list[list[BadSample]] | None) -> str:
        if gathered is None:
            return ""
        bad = [sample for part in gathered for sample in part]
        reasons = ", ".join(
            f"{reason} {count}x" for reason, count in Counter(sample.reason for sample in bad).most_common(5)
        )
        return (
            f"{self._num_everywhere} samples cannot be used ({reasons}; first: {'; '.join(map(str, bad[:3]))}), "
            f"more than data.max_bad_fraction allows ({self._limit:g}). Fix or rebuild the shards, or raise it"
        )
