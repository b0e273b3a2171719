"""Training samples in tiles: which tiles of which photos are shown, and what is asked about each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cogvlm_ft.data.frames import Frame
from cogvlm_ft.data.mentions import compares_in_image
from cogvlm_ft.data.plan import WHOLE, PhotoParts, TurnsPart, view_photos
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError, Record, clip_box
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.tiles import Window, clip_to_window, tile_windows, visible_fractions
from cogvlm_ft.grounding.turns import most_turns
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.runtime.watchdog import progress
from cogvlm_ft.terminal import progress_bar
from cogvlm_ft.tile_settings import TilesConfig

_ASKS_ABOUT_EVERYTHING = {"steps", "conversation"}  # styles whose questions may name no phrases


@dataclass(frozen=True)
class TileContent:
    """What can be asked about one tile. asked: present targets, with the parts of their boxes inside the tile.

    numbers: of the present targets. absent: certainly absent ones, without boxes. is_unclear: something is visible that
    is not asked.
    """

    window: Window
    asked: tuple[Target, ...]
    numbers: tuple[int, ...]
    absent: tuple[Target, ...]
    is_unclear: bool


def tile_contents(
    targets: Sequence[Target], windows: Sequence[Window], min_visible: float, fully_annotated: bool
) -> list[TileContent]:
    """Decide for every tile what is present, what is certainly absent, and what is neither.

    Targets with a word in common are decided together: none of them is asked where a box of one is cut below
    `min_visible`. A target whose text names a place in the photo, or a rank in it, is never asked in a tile. Elsewhere
    means that no part of it is inside; it counts as absent only if no word of what is visible contains a word of it or
    the reverse.
    """
    boxes = [box for target in targets for box in target.boxes_xyxy]
    owners = np.array([i for i, target in enumerate(targets) for _ in target.boxes_xyxy], dtype=np.int64)
    fractions = visible_fractions(boxes, windows)
    words = [_words(target) for target in targets]
    tied = [any(map(compares_in_image, (*words[i], target.description or ""))) for i, target in enumerate(targets)]
    found = []
    for window, inside in zip(windows, fractions, strict=True):
        visible = set(owners[inside > 0].tolist())
        cut = set(owners[(inside > 0) & (inside < min_visible - 1e-9)].tolist())
        cut_words = {word for i in cut for word in words[i]}
        asked = [i for i in sorted(visible) if not tied[i] and not words[i] & cut_words]
        seen = {word for i in visible for word in words[i]}
        absent = [
            target
            for i, target in enumerate(targets)
            if not tied[i] and not words[i] & seen and (fully_annotated or not target.boxes_xyxy)
            if not target.boxes_xyxy or not _related(words[i], seen)
        ]
        found.append(
            TileContent(
                window,
                tuple(_inside(targets[i], window) for i in asked),
                tuple(asked),
                _once(absent),
                len(asked) < len(visible),
            )
        )
    return found


def _words(target: Target) -> frozenset[str]:
    return frozenset(text.strip().casefold() for text in (target.phrase, *(words for _, words in target.names)))


def _related(words: frozenset[str], seen: set[str]) -> bool:
    return any(word in other or other in word for word in words for other in seen)


def _inside(target: Target, window: Window) -> Target:
    kept = (clip_to_window(box, window) for box in target.boxes_xyxy)
    return replace(target, boxes_xyxy=tuple(box for box in kept if box[0] < box[2] and box[1] < box[3]))


def _once(absent: Sequence[Target]) -> tuple[Target, ...]:
    """Return absent targets without boxes, one of each phrase and language."""
    first: dict[tuple[str, str], Target] = {}
    for target in absent:
        first.setdefault((target.phrase, target.language), replace(target, boxes_xyxy=()))
    return tuple(first.values())


def _styles(wording: Wording) -> set[str]:
    return {part.style for part in (wording.mix or (wording,))}


def photo_tiles(size_px: tuple[int, int], settings: TilesConfig) -> list[Window]:
    """Return the tiles of a photo; [] if the photo is not larger than one."""
    assert settings.side_px is not None
    windows = tile_windows(size_px, settings.side_px, settings.overlap)
    return windows if len(windows) > 1 else []


def check_stored(record: Record, settings: TilesConfig) -> None:
    """Raise ConfigError if the photo is stored in other tiles than those of the settings."""
    stored = record.tiles
    if stored is None or (stored.side_px, stored.overlap) == (settings.side_px, settings.overlap):
        return
    raise ConfigError(
        f"data.tiles.side_px, data.tiles.overlap: found {settings.side_px}, {settings.overlap}; expected "
        f"{stored.side_px}, {stored.overlap}, the tiles in which the shards hold {stored.photo!r:.200}. Set these, or "
        f"build again with --tiles {settings.side_px} --overlap {settings.overlap}"
    )


def contents_of(record: Record, settings: TilesConfig) -> list[TileContent]:
    """Return what can be asked about each tile of a photo whose size is known."""
    assert record.image_size_px is not None
    windows = photo_tiles(record.image_size_px, settings)
    return tile_contents(record.targets, windows, settings.min_visible, _is_fully_annotated(record, settings))


def _is_fully_annotated(record: Record, settings: TilesConfig) -> bool:
    return settings.fully_annotated and _source_of(record.key) not in settings.partly_annotated


def _source_of(key: str) -> str:
    """Return the name of the source of a sample, if there are several."""
    return key.partition("/")[0]


def _check_sources(reader: ShardReader, settings: TilesConfig) -> None:
    """Raise ConfigError if `partly_annotated` names a source that is not there."""
    sizes = reader.index.source_sizes
    starts = np.cumsum([0, *sizes[:-1]]).tolist() if len(sizes) > 1 else []
    known = {_source_of(reader.index.key(start)) for start in starts}
    unknown = [name for name in settings.partly_annotated if name not in known]
    if unknown:
        names = f"names of {', '.join(sorted(known))}" if known else "[], as data.shards is not a list"
        raise ConfigError(f"data.tiles.partly_annotated: found {unknown[0]!r:.200}; expected {names}. Correct the name")


def _rules(settings: TilesConfig) -> str:
    """Return the settings as text, which is that of earlier runs where no source is an exception."""
    return repr(settings).replace(", partly_annotated=[])", ")")


def show_tile(
    record: Record, tile: int, settings: TilesConfig, *, seed: int, epoch: int
) -> tuple[Record, Frame | None]:
    """Return the record as it is asked about one tile, boxes still in pixels of the photo, and the tile's frame.

    The absent targets change from epoch to epoch. tile: its number, or WHOLE, which changes nothing.
    """
    if tile == WHOLE:
        return record, None
    assert record.image_size_px is not None
    window = photo_tiles(record.image_size_px, settings)[tile]
    is_full = _is_fully_annotated(record, settings)
    [content] = tile_contents(record.targets, [window], settings.min_visible, is_full)
    key = f"{record.key}#{tile}"
    rng = random.Random(f"tile:{seed}:{epoch}:{key}")
    num_absent = min(_num_absent(len(content.asked), settings), len(content.absent))
    absent = rng.sample(content.absent, num_absent)
    shown = replace(record, key=key, targets=(*content.asked, *absent), turns=())
    return shown, Frame(record.image_size_px, content.window)


def _num_absent(num_asked: int, settings: TilesConfig) -> int:
    """Return how many absent targets are asked beside the present ones."""
    return max(num_asked == 0, round(num_asked * settings.absent / (1 - settings.absent)))


def plan_tiles(
    reader: ShardReader, wording: Wording, settings: TilesConfig, max_turns: int | None, seed: int
) -> PhotoParts:
    """Decide which tiles of which photos are samples, by their records.

    Every tile with a present target is one, and of the others as many as `settings.empty` says. The whole photo is one
    where the settings say so, where it is not larger than a tile, and where something of it is asked in no tile.
    """
    if settings.side_px is None:
        raise ConfigError("data.tiles.side_px: found null; expected the side of a tile")
    _check_sources(reader, settings)
    rows: list[list[TurnsPart]] = []
    empty: list[tuple[int, int]] = []
    num_shown, skips_unclear = 0, bool(_styles(wording) & _ASKS_ABOUT_EVERYTHING)
    asks_absent = _styles(wording) != {"describe"}
    for i in progress_bar(range(len(reader)), desc="plan tiles", unit="record", is_shown=len(reader) > 1000):
        progress()
        try:
            record = reader.read_record(i)
            record = _clipped(record, reader.read_size(i, record))
        except BadSampleError:  # reported when it is loaded
            rows.append([TurnsPart(0, 1)])
            continue
        check_stored(record, settings)
        contents = contents_of(record, settings)
        usable = [n for n, each in enumerate(contents) if not (skips_unclear and each.is_unclear)]
        shown = [n for n in usable if contents[n].asked]
        empty += [(i, n) for n in usable if asks_absent and not contents[n].asked and contents[n].absent]
        num_shown += len(shown)
        in_tiles = not record.turns and not _leaves_out(record, [contents[n] for n in shown], settings)
        is_whole = settings.whole or not in_tiles
        counts = [(WHOLE, len(record.targets), len(record.turns))] if is_whole else []
        counts += [(n, len(contents[n].asked) + _num_absent(len(contents[n].asked), settings), 0) for n in shown]
        rows.append([part for count in counts for part in _parts(*count, wording, max_turns)])
    num_empty = round(num_shown * settings.empty / (1 - settings.empty))
    for i, n in _choose(empty, num_empty, seed):
        rows[i].append(TurnsPart(0, 1, n))
    return view_photos(rows, _rules(settings))


def _clipped(record: Record, size_px: tuple[int, int]) -> Record:
    """Return the record as the reader gives it with its image."""
    targets = (
        replace(target, boxes_xyxy=tuple(clip_box(box, size_px) for box in target.boxes_xyxy))
        for target in record.targets
    )
    return replace(record, image_size_px=size_px, targets=tuple(targets))


def _leaves_out(record: Record, shown: Sequence[TileContent], settings: TilesConfig) -> bool:
    """Return whether a box of the record is asked in none of these tiles."""
    if not shown:
        return True
    fractions = visible_fractions(
        [box for target in record.targets for box in target.boxes_xyxy], [each.window for each in shown]
    )
    owners = [i for i, target in enumerate(record.targets) for _ in target.boxes_xyxy]
    is_asked = np.array([[i in each.numbers for i in owners] for each in shown]).reshape(fractions.shape)
    return bool(((fractions * is_asked).max(axis=0) < settings.min_visible - 1e-9).any())


def _parts(tile: int, num_targets: int, num_turns: int, wording: Wording, max_turns: int | None) -> list[TurnsPart]:
    num_parts = max(1, -(-(most_turns(num_targets, wording) + num_turns) // max_turns)) if max_turns else 1
    return [TurnsPart(number, num_parts, tile) for number in range(num_parts)]


def _choose(empty: list[tuple[int, int]], number: int, seed: int) -> list[tuple[int, int]]:
    """Choose that many tiles; raw bits, as in data.plan, so that a newer NumPy chooses the same."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, len(empty)))).random_raw(len(empty))
    return [empty[place] for place in sorted(np.argsort(bits, kind="stable")[:number].tolist())]
