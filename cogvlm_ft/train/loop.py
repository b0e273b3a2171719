"""The training loop: save, evaluate, stop or step. A checkpoint is saved before it is evaluated."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from tqdm import tqdm

from cogvlm_ft.build import Run
from cogvlm_ft.checkpoints.adapters import check_same_adapters
from cogvlm_ft.checkpoints.checkpoint import (
    Best,
    TrainState,
    discard_later_evaluations,
    load_checkpoint,
    newest_intact,
    remove_leftovers,
)
from cogvlm_ft.checkpoints.saver import CheckpointSaver
from cogvlm_ft.checkpoints.slices import check_averages_kept
from cogvlm_ft.config import config_sha256, written_settings
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.evaluate.evaluate import Evaluation, evaluate, save_evaluation
from cogvlm_ft.evaluate.monitor import monitor_name, monitor_value
from cogvlm_ft.evaluate.probe import run_probe
from cogvlm_ft.grounding.metrics import AVERAGED, LOWER_IS_BETTER
from cogvlm_ft.report.preview.inputs import try_preview
from cogvlm_ft.report.report import try_report
from cogvlm_ft.report.wandb_media import save_pictures, show_evaluation
from cogvlm_ft.runtime.distributed import (
    any_ranks,
    computed_by_main,
    from_main,
    is_main,
    release_unused_memory,
    shared_errors_of_main,
    world_size,
)
from cogvlm_ft.runtime.partitions import averages_as_weights, update_averages
from cogvlm_ft.runtime.stop_signals import StopRequest, StopRequested
from cogvlm_ft.runtime.trained_parameters import settings_of_rates
from cogvlm_ft.tracking.auxiliary import failures_as_warnings, print_line
from cogvlm_ft.tracking.provenance import provenance
from cogvlm_ft.tracking.tracker import Tracker
from cogvlm_ft.train.early_stopping import is_out_of_patience, updated_best
from cogvlm_ft.train.printed_lines import BAR_WITH_END, evaluation_line, metrics_before
from cogvlm_ft.train.schedule import lr_at
from cogvlm_ft.train.start import changed_settings
from cogvlm_ft.train.step import StepStats, train_step
from cogvlm_ft.train.step_log import StepLog
from cogvlm_ft.train.step_reader import StepReader

logger = logging.getLogger(__name__)


def train(run: Run, stop_request: StopRequest) -> TrainState:
    """Train to the end, an early stop or a stop request; return the last state, which is saved. Collective.

    Raises the error of a rank that could not read its data on all ranks, after the state is saved.
    """
    state, saver = start_or_resume(run)
    if is_main():
        with failures_as_warnings("settings (config.yaml)"):
            run.save_settings()
        try_preview(run, state.samples_consumed)
    with shared_errors_of_main():
        tracker = start_tracking(run, state)
    state = dataclasses.replace(state, wandb_run_id=from_main(tracker.run_id if tracker else None))
    log = StepLog(run, state, tracker)
    saved, num_steps = state, run.last_step(state)
    shown = {"desc": "train", "unit": "step", "disable": None if is_main() else True}
    with StepReader(run, state) as reader, tqdm(total=num_steps, initial=state.step, **shown) as bar:  # type: ignore[call-overload]
        while True:
            # ---- Save (collective): the last state always ----
            finished = run.is_finished(state)
            stop, is_writing = any_ranks([stop_request.seen, saver.is_writing])
            if not is_writing:
                saver.finish()  # publish what all ranks have written
            is_due = stop or finished or is_save_due(run, state, saved, log.skipped.hold_checkpoints)
            if is_due and saver.last_step != state.step:
                saver.start(state)
                saved = state

            # ---- Evaluate (collective): a request to stop abandons it, and the next start repeats it ----
            if is_evaluation_due(run, state, finished) and not stop:
                try:
                    state = evaluate_epoch(run, state, tracker, stop_request)
                except StopRequested:
                    stop = True
                else:
                    saver.record_evaluation(state)

            # ---- Stop ----
            if stop or finished or is_patience_over(run, state):
                if saver.last_step != state.step:
                    saver.start(state)
                break

            # ---- Step (collective) ----
            batches, data_wait_s = reader.next_step(state, stop_request)
            lr = lr_at(*run.schedule_position(state), run.config.train)
            try:
                stats = train_step(run.engine, batches, lr=lr, seed=run.config.seed, step=state.step)
            except StopRequested:  # the data of some rank cannot be read
                continue
            average_weights(run, stats)
            before, state = state, advance(run, state)
            with stop_request.failing(DataError):  # too many samples that cannot be used, known to all ranks
                log.add(before, state, batches, stats, lr=lr, data_wait_s=data_wait_s)
            bar.update()
            bar.bar_format = BAR_WITH_END  # now that there is a rate
    saver.close(state.step)
    finish_tracking(run, state, tracker)
    stop_request.raise_error()
    return state


def average_weights(run: Run, stats: StepStats) -> None:
    """Add the weights after a step to their running averages."""
    if run.config.train.ema and not stats.is_skipped:
        update_averages(run.engine, run.config.train.ema)


def start_or_resume(run: Run) -> tuple[TrainState, CheckpointSaver]:
    """Load the newest intact checkpoint, or start with a new state. Collective.

    Raises ConfigError if there are checkpoints but `resume` is off, CheckpointError if they belong to other data.
    """
    folder = run.folder.checkpoints
    newest = newest_intact(folder)
    computed_by_main(lambda: remove_leftovers(folder))
    fresh = TrainState(
        config_sha256=config_sha256(run.config),
        data_sha256=run.dataset.reader.index.data_sha256,
        rates=settings_of_rates(run.config.train),
        seed=run.config.seed,
    )
    if newest is None:
        return fresh, CheckpointSaver(run.engine, folder, run.save_model_files, run.config.checkpoint)
    if not run.config.resume:
        raise ConfigError(
            f"{folder}: checkpoints of an earlier run; expected resume=true to continue, or another output_dir"
        )
    check_same_adapters(newest, run.adapters)
    check_averages_kept(newest, run.config.train.ema)
    state = load_checkpoint(run.engine, newest, is_checked=True)
    computed_by_main(lambda: discard_later_evaluations(folder, state.step))
    if state.data_sha256 != fresh.data_sha256:
        raise CheckpointError(
            f"{newest} was trained on other shards than data.shards holds now, or "
            "with another data.max_turns_per_image, data.tiles or wording for it; its position in them means nothing "
            "here. Use another output_dir"
        )
    if state.rates != fresh.rates:
        raise ConfigError(
            f"train.lr_scale, train.vision_layer_decay: found {fresh.rates or 'neither'}; expected "
            f"{state.rates or 'neither'}, with which {newest} was trained. Set the same, or use another output_dir"
        )
    if is_main() and state.seed not in (None, fresh.seed) and run.plan.position(state.samples_consumed)[1]:
        logger.warning(
            "seed=%d: found a checkpoint of seed %d: the rest of this epoch has another order, so that some samples "
            "come twice in it and some not at all",
            fresh.seed,
            state.seed,
        )
    logger.info("resuming from %s (step %d)", newest, state.step)
    if is_main() and (changed := changed_settings(run.config)):
        logger.info("settings changed since the last start: %s", "; ".join(changed))
    saver = CheckpointSaver(run.engine, folder, run.save_model_files, run.config.checkpoint, state.step)
    return dataclasses.replace(state, config_sha256=fresh.config_sha256, seed=fresh.seed), saver


def start_tracking(run: Run, state: TrainState) -> Tracker | None:
    """Start the tracker on rank 0; return None on the others."""
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
        output_dir=run.folder.path,
        mode=tracking.mode,
        project=tracking.project,
        entity=tracking.entity,
        name=tracking.name,
        run_id=state.wandb_run_id,
        tensorboard=tracking.tensorboard,
        config={**written_settings(run.config), **facts, **provenance()},
        lower_is_better=LOWER_IS_BETTER,
    )
    tracker.truncate_after(state.step, state.evaluated_step)
    return tracker


def finish_tracking(run: Run, state: TrainState, tracker: Tracker | None) -> None:
    """Record the best value in the run's summary, and close it."""
    if tracker is None:
        return
    if state.best:
        name = monitor_name(run.config.train.monitor)
        tracker.summary({f"best_{name}": state.best.value, "best_step": state.best.step})
    tracker.finish()


def is_evaluation_due(run: Run, state: TrainState, finished: bool) -> bool:
    """Return whether the state must be evaluated: before training, at the end of an epoch, or at the end."""
    if state.evaluated_step == state.step:
        return False
    settings = run.config.evaluate
    epoch, offset = run.plan.position(state.samples_consumed)
    at_epoch_end = offset == 0 and epoch > 0 and epoch % settings.every_epochs == 0
    return finished or at_epoch_end or (state.step == 0 and settings.before_training)


def is_save_due(run: Run, state: TrainState, saved: TrainState, on_hold: bool) -> bool:
    """Return whether an epoch or `checkpoint.every_steps` steps ended since the last checkpoint; not while on hold."""
    every = run.config.checkpoint.every_steps
    is_epoch_over = state.epoch > saved.epoch
    return not on_hold and (is_epoch_over or (every is not None and state.step // every > saved.step // every))


def is_patience_over(run: Run, state: TrainState) -> bool:
    """Return whether `train.patience` evaluations in a row brought no new best."""
    over = is_out_of_patience(state, run.config.train)
    if over and is_main() and state.best:
        logger.info("stopping: no better %s since step %d", monitor_name(run.config.train.monitor), state.best.step)
    return over


def evaluate_epoch(run: Run, state: TrainState, tracker: Tracker | None, stop_request: StopRequest) -> TrainState:
    """Evaluate, save the results and update the best value. Collective. Raises StopRequested."""
    result = measure(run, state, run.folder.evaluation(state.step), stop_request)
    averaged_kept = None
    if run.config.train.ema:
        averaged = measure_averages(run, state, stop_request) if state.step else result
        averaged_kept = averaged.kept
        of_averages = {AVERAGED + name: value for name, value in averaged.metrics.items() if "/" not in name}
        result = dataclasses.replace(result, metrics=result.metrics | of_averages)
    train, value = run.config.train, monitor_value(result.metrics, run.config.train.monitor)
    best = updated_best(state.best, value, state.step, train)
    if value is None and is_main():
        logger.warning("train.monitor=%s: the answers give no value for it; counted as no improvement", train.monitor)
    if tracker:
        report_evaluation(run, state, result, best, tracker)
    state = dataclasses.replace(state, kept_boxes=result.kept, averaged_kept_boxes=averaged_kept)
    return dataclasses.replace(state, evaluated_step=state.step, best=best)


def measure(run: Run, state: TrainState, folder: Path, stop_request: StopRequest) -> Evaluation:
    """Ask and score the model as it is now; answers of the probe go to `folder`. Collective. Raises StopRequested."""
    is_untouched = state.step == 0
    probed = run_probe(
        run.config, run.model, run.tokenizer, folder, is_untouched=is_untouched, stop_request=stop_request
    )
    result = evaluate(
        run.model,
        run.tokenizer,
        run.val_reader,
        run.dataset.wording,
        run.config.evaluate,
        seed=run.config.seed,
        about=about_weights(run, state),
        stop_request=stop_request,
        tiles=run.config.data.tiles,
    )
    release_unused_memory()  # generation's, whose shapes are others than those of training
    return dataclasses.replace(result, metrics=result.metrics | probed)


def measure_averages(run: Run, state: TrainState, stop_request: StopRequest) -> Evaluation:
    """Measure the averaged weights, and save the results beside those of the weights. Collective."""
    folder = run.folder.averaged_evaluation(state.step)
    with averages_as_weights(run.engine):
        result = measure(run, state, folder, stop_request)
    if is_main():
        with failures_as_warnings("results of evaluations", Exception):
            save_evaluation(result, folder)
    return result


def about_weights(run: Run, state: TrainState) -> dict[str, str | int]:
    """Describe which weights were evaluated."""
    return {
        "model": written_settings(run.config)["model"]["path"],
        "step": state.step,
        "config_sha256": state.config_sha256,
        "train_data_sha256": state.data_sha256,
    }


def report_evaluation(run: Run, state: TrainState, result: Evaluation, best: Best | None, tracker: Tracker) -> None:
    """Write files and pages, log to W&B, and print one line. Rank 0 only. No failure ends the run."""
    epoch = run.epochs_done(state)
    folder = run.folder.evaluation(state.step)
    monitor = run.config.train.monitor
    name, value = monitor_name(monitor), monitor_value(result.metrics, monitor)
    monitored = {} if value is None else {name: value}
    tracker.log_val(
        epoch, state.step, {**result.metrics, **monitored, **({f"best_{name}": best.value} if best else {})}
    )
    with failures_as_warnings("results of evaluations", Exception):
        save_evaluation(result, folder)
        save_pictures(folder, run.val_reader, run.config.evaluate.num_pictures)
        show_evaluation(tracker.wandb, folder, epoch)
    try_report(folder, run.val_reader, run_folder=run.folder.path, train_reader=run.dataset.reader)
    before = metrics_before(run.folder, state.step)
    print_line(evaluation_line(epoch, state.step, {**result.metrics, **monitored}, before, name))


def advance(run: Run, state: TrainState) -> TrainState:
    """Return the state after one more step; the last batch of an epoch may be short."""
    _, offset = run.plan.position(state.samples_consumed)
    num_samples = min(run.plan.global_batch_size, run.plan.num_samples - offset)
    epoch, _ = run.plan.position(state.samples_consumed + num_samples)
    return state.advanced(num_samples, epoch)
