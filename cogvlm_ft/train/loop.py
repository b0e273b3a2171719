"""The training: decide -> evaluate -> save -> (stop?) -> step. So the last state is always evaluated and saved."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from cogvlm_ft.build import Run
from cogvlm_ft.checkpoints.checkpoint import (
    CHECKPOINTS,
    Best,
    TrainState,
    load_checkpoint,
    newest_intact,
    remove_leftovers,
)
from cogvlm_ft.checkpoints.saver import CheckpointSaver
from cogvlm_ft.config import config_sha256
from cogvlm_ft.data.collate import BadSample, Batch
from cogvlm_ft.data.loader import read_steps
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.evaluate.evaluate import Evaluation, evaluate, save_evaluation
from cogvlm_ft.evaluate.probe import run_probe
from cogvlm_ft.grounding.metrics import LOWER_IS_BETTER
from cogvlm_ft.planning.flops import step_flops
from cogvlm_ft.report.report import try_report
from cogvlm_ft.report.wandb_media import evaluation_folder, save_pictures, show_evaluation
from cogvlm_ft.runtime.distributed import any_ranks, barrier, from_main, gather_to_main, is_main, rank, world_size
from cogvlm_ft.runtime.stop_signals import StopRequest
from cogvlm_ft.tracking.provenance import provenance
from cogvlm_ft.tracking.sample_losses import SampleLosses
from cogvlm_ft.tracking.tracker import Tracker
from cogvlm_ft.train.early_stopping import monitor_name, monitor_value, updated_best
from cogvlm_ft.train.health import Health
from cogvlm_ft.train.meter import Meter
from cogvlm_ft.train.schedule import lr_at
from cogvlm_ft.train.skipped_steps import SkippedSteps
from cogvlm_ft.train.step import losses_by_row, train_step

logger = logging.getLogger(__name__)


def train(run: Run, stop_request: StopRequest) -> TrainState:
    """Collective. Train to the end, to an early stop, or to a stop request; returns the last state, which is saved."""
    state, saver = start_or_resume(run)
    tracker = start_tracking(run, state)
    state = dataclasses.replace(state, wandb_run_id=from_main(tracker.run_id if tracker else None))
    meter, bad_samples = Meter(step_flops(run.config, run.model.config)), BadSamples(run)
    sample_losses = SampleLosses(run.output_dir, rank(), world_size(), state.step)
    health, skipped = Health(), skipped_steps(run)
    steps: Iterator[list[Batch]] = iter(())
    bar = tqdm(total=run.num_steps, initial=state.step, desc="train", unit="step", disable=None if is_main() else True)
    with bar:
        while True:
            finished = state.step >= run.num_steps
            if is_evaluation_due(run, state, finished):
                state = evaluate_epoch(run, state, tracker)
            stop, is_writing = any_ranks([stop_request.seen, saver.is_writing])
            if not is_writing:
                saver.finish()
            ended = finished or is_patience_over(run, state)
            if (skipped.is_save_due(is_save_due(run, state)) or stop or ended) and saver.last_step != state.step:
                saver.start(state)
            if stop or ended:
                break
            waiting_since = time.perf_counter()
            batches = next(steps, None)
            if batches is None:
                steps, bad_samples = epoch_steps(run, state), BadSamples(run)
                batches = next(steps)
            data_wait_s = time.perf_counter() - waiting_since
            lr = lr_at(state.step, run.num_steps, run.config.train)
            stats = train_step(run.engine, batches, lr=lr, seed=run.config.seed, step=state.step)
            row_losses = losses_by_row(batches, stats)
            sample_losses.add(state.step + 1, state.epoch, *row_losses)
            skipped.add(state, stats.is_skipped, row_losses, lr=lr, micro_batch_size=run.config.train.micro_batch_size)
            state = advance(run, state)
            health.add(row_losses[0])
            meter.add(stats, data_wait_s)
            bad_samples.add(batches, stats.num_bad)
            bar.update()
            if state.step % run.config.train.log_every == 0:
                report = meter.report()
                values = {"lr": lr, **report.values, **health.report(report, state.step)}
                if tracker:
                    tracker.log_train(state.step, {**values, "epoch": epoch_of(run, state)})
                    tqdm.write(log_line(run, state, values))
    saver.close(state.step)
    if tracker:
        if state.best:
            name = monitor_name(run.config.train.monitor)
            tracker.summary({f"best_{name}": state.best.value, "best_step": state.best.step})
        tracker.finish()
    return state


def start_or_resume(run: Run) -> tuple[TrainState, CheckpointSaver]:
    """Collective. The newest intact checkpoint's state if there is one and resuming is on, else a new one."""
    folder = run.output_dir / CHECKPOINTS
    if is_main():
        remove_leftovers(folder)
    barrier()
    fresh = TrainState(config_sha256=config_sha256(run.config), data_sha256=run.dataset.reader.index.data_sha256)
    newest = newest_intact(folder)
    if newest is None:
        return fresh, CheckpointSaver(run.engine, folder, run.save_model_files, run.config.checkpoint)
    if not run.config.resume:
        raise ConfigError(
            f"{folder} holds checkpoints of a former run: take another output_dir, or resume=true to go on"
        )
    state = load_checkpoint(run.engine, newest, is_checked=True)
    if state.data_sha256 != fresh.data_sha256:
        raise CheckpointError(
            f"{newest} was trained on other shards than data.shards={run.config.data.shards} holds now, or "
            "with another data.max_turns_per_image or wording for it; its position in them means nothing here. "
            "Take another output_dir"
        )
    logger.info("resuming from %s (step %d)", newest, state.step)
    saver = CheckpointSaver(run.engine, folder, run.save_model_files, run.config.checkpoint, state.step)
    return dataclasses.replace(state, config_sha256=fresh.config_sha256), saver


def start_tracking(run: Run, state: TrainState) -> Tracker | None:
    """Rank 0's tracker."""
    if not is_main():
        return None
    tracking = run.config.tracking
    facts = {
        "world_size": world_size(),
        "num_samples": run.plan.num_samples,
        "data_sha256": run.dataset.reader.index.data_sha256,
        "val_data_sha256": run.val_reader.index.data_sha256,
        "config_sha256": state.config_sha256,
    }
    tracker = Tracker(
        output_dir=run.output_dir,
        mode=tracking.mode,
        project=tracking.project,
        entity=tracking.entity,
        name=tracking.name,
        run_id=state.wandb_run_id,
        config={**dataclasses.asdict(run.config), **facts, **provenance()},
        lower_is_better=LOWER_IS_BETTER,
    )
    tracker.truncate_after(state.step, state.evaluated_step)
    return tracker


def epoch_of(run: Run, state: TrainState) -> float:
    """Epochs done, as a fraction."""
    return state.samples_consumed / run.plan.num_samples


def is_evaluation_due(run: Run, state: TrainState, finished: bool) -> bool:
    if state.evaluated_step == state.step:
        return False
    settings = run.config.evaluate
    epoch, offset = run.plan.position(state.samples_consumed)
    at_epoch_end = offset == 0 and epoch > 0 and epoch % settings.every_epochs == 0
    return finished or at_epoch_end or (state.step == 0 and settings.before_training)


def is_save_due(run: Run, state: TrainState) -> bool:
    every = run.config.checkpoint.every_steps
    _, offset = run.plan.position(state.samples_consumed)
    return state.step > 0 and (offset == 0 or (every is not None and state.step % every == 0))


def is_patience_over(run: Run, state: TrainState) -> bool:
    """Early stopping: as many evaluations as `train.patience` without a new best."""
    patience = run.config.train.patience
    over = patience is not None and state.best is not None and state.best.num_since >= patience
    if over and is_main() and state.best:
        logger.info("stopping: no better %s since step %d", monitor_name(run.config.train.monitor), state.best.step)
    return over


def evaluate_epoch(run: Run, state: TrainState, tracker: Tracker | None) -> TrainState:
    """Collective. Evaluate, write the results down, and keep score of the best."""
    folder = evaluation_folder(run.output_dir, state.step)
    probed = run_probe(run.config, run.model, run.tokenizer, folder, is_untouched=state.step == 0)
    result = evaluate(
        run.model,
        run.tokenizer,
        run.val_reader,
        run.dataset.wording,
        run.config.evaluate,
        seed=run.config.seed,
        about=about_weights(run, state),
    )
    result = dataclasses.replace(result, metrics=result.metrics | probed)
    train = run.config.train
    best = updated_best(state.best, monitor_value(result.metrics, train.monitor), state.step, train)
    if tracker:
        report_evaluation(run, state, result, best, tracker)
    return dataclasses.replace(state, evaluated_step=state.step, best=best)


def about_weights(run: Run, state: TrainState) -> dict[str, str | int]:
    """Which weights an evaluation was of."""
    return {
        "model": run.config.model.path,
        "step": state.step,
        "config_sha256": state.config_sha256,
        "train_data_sha256": state.data_sha256,
    }


def report_evaluation(run: Run, state: TrainState, result: Evaluation, best: Best, tracker: Tracker) -> None:
    """Rank 0. Files, W&B and one line to read."""
    epoch = epoch_of(run, state)
    folder = evaluation_folder(run.output_dir, state.step)
    save_evaluation(result, folder)
    monitor = run.config.train.monitor
    name, value = monitor_name(monitor), monitor_value(result.metrics, monitor)
    tracker.log_val(epoch, state.step, {**result.metrics, name: value, f"best_{name}": best.value})
    save_pictures(folder, run.val_reader, run.config.evaluate.num_pictures)
    show_evaluation(tracker.wandb, folder, epoch)
    try_report(folder, run.val_reader, run_folder=run.output_dir, train_reader=run.dataset.reader)
    shown = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items() if "/" not in key)
    tqdm.write(f"epoch {epoch:.3g} (step {state.step})  {shown}")


def epoch_steps(run: Run, state: TrainState) -> Iterator[list[Batch]]:
    """This rank's micro-batches from the state's position to the end of its epoch."""
    return read_steps(
        run.dataset,
        run.plan,
        state.samples_consumed,
        rank=rank(),
        world_size=world_size(),
        micro_batch_size=run.config.train.micro_batch_size,
        num_workers=run.config.data.num_workers,
    )


def advance(run: Run, state: TrainState) -> TrainState:
    """The state after one more step: the last batch of an epoch may be short."""
    _, offset = run.plan.position(state.samples_consumed)
    num_samples = min(run.plan.global_batch_size, run.plan.num_samples - offset)
    epoch, _ = run.plan.position(state.samples_consumed + num_samples)
    return state.advanced(num_samples, epoch)


def log_line(run: Run, state: TrainState, values: dict[str, float]) -> str:
    bad = f"  bad {values['num_bad']:.0f}" if values["num_bad"] else ""
    cut = f"  boxes cut {values['num_cut_boxes']:.0f}" if values["num_cut_boxes"] else ""
    skipped = f"  skipped {values['num_skipped']:.0f}" if values["num_skipped"] else ""
    return (
        f"step {state.step}/{run.num_steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"grad {values['grad_norm']:.3f}  {values['images_per_s']:.1f} images/s  "
        f"{values['tokens_per_s']:.0f} tokens/s  data wait {values['data_wait_fraction']:.0%}  "
        f"{values['memory_gib']:.2f} GiB{bad}{cut}{skipped}"
    )


def skipped_steps(run: Run) -> SkippedSteps:
    config = run.config
    return SkippedSteps(
        run.output_dir, run.output_dir / CHECKPOINTS, config.model.path, run.plan, config.train.max_skipped_in_a_row
    )


class BadSamples:
    """Counts the samples of an epoch that could not be used, and ends the run when they are too many."""

    def __init__(self, run: Run) -> None:
        self._limit = run.config.data.max_bad_fraction * run.plan.num_samples
        self._num_everywhere = 0
        self._here: list[BadSample] = []

    def add(self, batches: Sequence[Batch], num_bad_everywhere: int) -> None:
        """Collective once the limit is passed; `num_bad_everywhere` is the step's count over all ranks."""
        for bad in (bad for batch in batches for bad in batch.bad):
            logger.warning("sample %s cannot be used: %s", bad.key, bad.reason)
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
            f"{self._num_everywhere} samples cannot be used ({reasons}; first: {', '.join(s.key for s in bad[:5])}), "
            f"more than data.max_bad_fraction allows ({self._limit:g}): mend or rebuild the shards, or raise it"
        )
