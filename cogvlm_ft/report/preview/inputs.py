"""Write preview.html before training starts: the first inputs as the model sees them, with questions and answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from cogvlm_ft.build import Run
from cogvlm_ft.colours import TARGET_COLOURS
from cogvlm_ft.data.loader import GroundingDataset
from cogvlm_ft.data.look import describe_changes
from cogvlm_ft.data.plan import Item, SamplePlan, TurnsPart
from cogvlm_ft.data.transforms import resize_of
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.html_page import load_page
from cogvlm_ft.plain_files import write_text
from cogvlm_ft.report.thumbnails import DrawnBox, Thumbnails
from cogvlm_ft.runtime.watchdog import progress

logger = logging.getLogger(__name__)

NUM_SHOWN = 16
TIME_LIMIT_S = 30.0
"""Time after which training starts; the page shows the inputs read by then."""
_MAX_TURNS, _MAX_TEXT, _MAX_BYTES = 6, 400, 4_000_000


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. number: of the turn, for its colour; None if it has no boxes."""

    prompt: str
    answer: str
    number: int | None


@dataclass(frozen=True)
class Seen:
    """One input of the model. problem: why the sample cannot be used; another one is trained in its place."""

    key: str
    picture: Markup
    exchanges: list[Exchange] = field(default_factory=list)
    num_more: int = 0
    changes: list[str] = field(default_factory=list)
    problem: str = ""


def try_preview(run: Run, samples_consumed: int) -> Path | None:
    """Write preview.html of a run that starts at this position; whatever goes wrong is a warning. Rank 0 only."""
    path = run.folder.preview
    try:
        page = render_preview(run.dataset, run.plan, samples_consumed, run.folder.title)
        write_text(path, page)
    except Exception as error:
        is_usual = isinstance(error, (OSError, DataError))
        logger.warning("no %s: %s; training starts without it", path, error, exc_info=not is_usual)
        return None
    logger.info("the first inputs of the model: %s", path)
    return path


def render_preview(
    dataset: GroundingDataset, plan: SamplePlan, samples_consumed: int, name: str, time_limit_s: float = TIME_LIMIT_S
) -> str:
    """Return the page about the first NUM_SHOWN inputs from a position on, within its epoch."""
    end, seen = time.monotonic() + time_limit_s, list[Seen]()
    thumbnails = Thumbnails(_MAX_BYTES)
    for item in first_items(plan, samples_consumed):
        progress()
        if time.monotonic() > end:
            break
        seen.append(see_input(dataset, item, thumbnails))
    epoch, offset = plan.position(samples_consumed)
    augment = {
        key: value for key, value in vars(dataset.augment).items() if value != getattr(type(dataset.augment), key)
    }
    return load_page(Path(__file__).parent).render_file(
        name=name,
        seen=seen,
        num_left_out=thumbnails.num_left_out,
        image_size=dataset.config.image_size,
        wording=dataset.wording.name,
        resize=resize_of(dataset.config),
        augment=" ".join(f"data.augment.{key}={value:g}" for key, value in augment.items()),
        epoch=epoch + 1,
        offset=offset,
        num_colours=len(TARGET_COLOURS),
    )


def first_items(plan: SamplePlan, samples_consumed: int) -> Iterator[Item]:
    """Yield the first NUM_SHOWN sequences that are trained from a position on, up to the end of its epoch."""
    epoch, offset = plan.position(samples_consumed)
    last = min(plan.num_samples, offset + NUM_SHOWN)
    while offset < last:
        batch = plan.global_batch(epoch, offset)
        for index, passes in zip(batch.indices[: last - offset], batch.passes, strict=False):
            yield Item(int(passes), int(index), 1.0)
        offset += plan.global_batch_size


def see_input(dataset: GroundingDataset, item: Item, thumbnails: Thumbnails) -> Seen:
    """Draw what the model sees of one sequence, and its turns."""
    index, part = dataset.parts.find(item.index) if dataset.parts is not None else (item.index, TurnsPart(0, 1))
    key, side = dataset.reader.index.key(index), dataset.config.image_size
    try:
        sample = dataset.reader.read(index)
        look = dataset.look(sample.record, part, item.epoch)
        image = look.draw(sample.image, side)  # a stored tile is decoded here
    except DataError as error:
        return Seen(key, Markup(), problem=str(error))
    turns = look.turns[part.cut] or look.turns[:1]
    shown = turns[:_MAX_TURNS]
    boxes = [box for number, turn in enumerate(shown) for box in _boxes(number, turn, side)]
    with_boxes = {box.number for box in boxes}
    return Seen(
        key,
        thumbnails.draw(image, (side, side), boxes, key),
        [
            Exchange(_cut(turn.prompt), _cut(turn.answer), number if number in with_boxes else None)
            for number, turn in enumerate(shown)
        ],
        len(turns) - len(shown),
        describe_changes(look),
    )


def _boxes(number: int, turn: Turn, side: int) -> list[DrawnBox]:
    """Return the boxes of an answer, or else of its question, as they are written."""
    bins = parse_boxes(turn.answer) or parse_boxes(turn.prompt) or []
    phrase = turn.target.phrase if turn.target else ""
    boxes = boxes_from_bins(bins, (side, side)).tolist() if bins else []
    return [DrawnBox((x0, y0, x1, y1), "truth", number, phrase) for x0, y0, x1, y1 in boxes]


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
