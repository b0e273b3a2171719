"""Which metrics a validation split can produce. A run that chooses its best checkpoint by another one is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from PIL import Image

from cogvlm_ft.data.frames import move_record, whole_frame
from cogvlm_ft.data.look import turns_of
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.transforms import resize_of
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.evaluate.generate import Answer
from cogvlm_ft.evaluate.questions import Question, source_of
from cogvlm_ft.evaluate.scoring import score_turn
from cogvlm_ft.grounding.breakdown import summarize_predictions
from cogvlm_ft.grounding.metrics import AVERAGED, PRESENT
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.protocols import PROTOCOLS
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.wording import Wording, load_wording
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.runtime.distributed import computed_by_main
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.settings import Config

FIRST_RECORDS = 16
"""Number of records read first; the others are read only if these are not enough."""
COUNTS = frozenset({"num_images", "num_bad", "num_unscored", "num_cut_boxes"})
PROBE = frozenset({"probe_chrf", "probe_same", "num_probe"})
MOST_USEFUL = ("mean_iou", "acc@0.5", "not_found_acc", "text_exact", "chrf")


def check_monitor(config: Config, reader: ShardReader, model_config: CogVLMConfig) -> None:
    """Raise ConfigError if the validation images cannot produce `train.monitor`. Collective: rank 0 reads records."""
    wording = load_wording(config.data.wording)
    problem = computed_by_main(lambda: monitor_problem(config, reader, wording, model_config))
    if problem:
        raise ConfigError(problem)


def monitor_problem(config: Config, reader: ShardReader, wording: Wording, model_config: CogVLMConfig) -> str:
    """Return why the validation images cannot produce `train.monitor`, "" if they can. Reads records."""
    monitor = config.train.monitor
    needed = {monitor} if isinstance(monitor, str) else set(monitor)
    if config.train.ema:  # of averaged weights there are the same metrics, but not by group
        needed = {name if "/" in name else name.removeprefix(AVERAGED) for name in needed}
    always = COUNTS | (PROBE if config.evaluate.probe is not None else frozenset())
    total = min(len(reader), config.evaluate.max_samples or len(reader))
    # The names of sources depend on how many there are, so all are needed for them.
    sizes = [total] if any("/source=" in name for name in needed) else sorted({min(FIRST_RECORDS, total), total})
    predictions, known = list[Prediction](), 0
    for size in sizes:
        predictions += _answered(range(known, size), config, reader, wording, model_config)
        known = size
        summary = summarize_predictions(predictions, model_config.num_patches, PROTOCOLS[config.evaluate.protocol])
        missing = sorted(needed - summary.metrics.keys() - always)
        if not missing:
            return ""
    return _describe(config, missing, summary.metrics, predictions, total)


def _describe(
    config: Config, missing: list[str], metrics: Mapping[str, float], predictions: list[Prediction], total: int
) -> str:
    asked = [each.score.kind for each in predictions if each.score]
    if PRESENT in asked:
        about = "they produce no such metric"
    elif not asked:
        about = "they have no questions that can be scored"
    else:
        about = "none of their questions has boxes as its answer"
    plain = sorted(name for name in metrics if "/" not in name and not name.startswith("num_"))
    first = [name for name in MOST_USEFUL if name in plain]
    chosen = f", such as train.monitor={first[0]}" if first else ""
    groups = sorted({name.partition("/")[2].partition("=")[0] for name in metrics if "/" in name})
    found = ", ".join(plain) or "none"
    each = f", and these of each group ({', '.join(groups)}), such as acc@0.5/size=small" if PRESENT in asked else ""
    return (
        f"train.monitor={config.train.monitor}: found {', '.join(missing)}, but {total} validation images "
        f"(data.val_split={config.data.val_split}) cannot be measured by it: {about}; expected one of {found}{each}. "
        f"Choose one of these{chosen}, or validation images with boxes"
    )


def _answered(
    indices: Iterable[int], config: Config, reader: ShardReader, wording: Wording, model_config: CogVLMConfig
) -> Iterable[Prediction]:
    """Yield what a model would be scored on that answers everything as it was taught.

    Images are read only where a record does not hold the size.
    """
    protocol, no_image = PROTOCOLS[config.evaluate.protocol], Image.new("RGB", (1, 1))
    for index in indices:
        progress()
        try:
            record = reader.read_record(index)
            if record.image_size_px is None:
                record = reader.read(index).record
            frame = whole_frame(record, resize_of(model_config))
            worded = turns_of(move_record(record, frame), wording, seed=config.seed, epoch=0)
            turns = [turn for turn in worded if turn.prompt.strip()]
        except DataError:  # reported when the image is read
            continue
        question = Question(index, record.key, source_of(reader, record), no_image, frame, turns)
        for number, turn in enumerate(turns):
            yield score_turn(question, number, _right_answer(turn), wording, protocol)


def _right_answer(turn: Turn) -> Answer:
    """Return the true answer, with all probabilities known."""
    digits = [int(character) for character in turn.answer if character in "0123456789"]
    certain = tuple(tuple(float(value == digit) for value in range(10)) for digit in digits)
    return Answer(turn.answer, (), (), certain, 0.5)
