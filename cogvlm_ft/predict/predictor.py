"""Ask a model about photos: texts, boxes in pixels, conversations in steps, and a second look at small targets."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cogvlm_ft.build import load_whole_model
from cogvlm_ft.checkpoints.choice import chosen_boxes, find_weights, model_files, trained_wording
from cogvlm_ft.data.encode import encode_prompt
from cogvlm_ft.data.frames import Frame, fit, photo_frame
from cogvlm_ft.data.record import clip_box
from cogvlm_ft.data.stored_photo import Photo, whole_image
from cogvlm_ft.data.transforms import model_input, resize_of
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.evaluate.draw import DrawnTurn, draw_boxes, scale_box
from cogvlm_ft.evaluate.evaluate import build_grammar
from cogvlm_ft.evaluate.generate import Answer, generate_answers
from cogvlm_ft.evaluate.looks import can_ask_in_tiles, split_turns
from cogvlm_ft.evaluate.survey import answer_limit, longest_worded_answer
from cogvlm_ft.grounding.boxes import boxes_from_bins, close_cut_list, parse_boxes, read_boxes
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.grounding.overlap import pairwise_iou
from cogvlm_ft.grounding.targets import Box, Turn
from cogvlm_ft.grounding.tile_answers import EVERY_BOX
from cogvlm_ft.grounding.wording import Wording, load_wording
from cogvlm_ft.model import CogVLMTokenizer
from cogvlm_ft.model.generation_memory import GenerationMemory
from cogvlm_ft.predict.replies import FoundBox, Reply, merge_replies
from cogvlm_ft.runtime.distributed import device
from cogvlm_ft.runtime.param_gathering import free_bytes
from cogvlm_ft.runtime.tf32 import allow_tf32
from cogvlm_ft.tile_settings import TilesConfig

MAX_TURNS = 16
"""Maximum number of questions about one photo that are answered in one pass; fewer if memory is short."""
TILES_PER_PASS = 16
"""Number of tiles that are answered together, if memory allows and no other photos are waiting."""
ZOOM_SHARE = 1 / 4
"""A second look shows the part of the photo of which the target fills this fraction of the width or the height,"""
ZOOM_MIN_PATCHES = 4
"""but at least this number of patches of the first look, whose answer may be off by one."""
ZOOM_MAX_SHARE = 1 / 2
"""No second look if it would show more than this fraction of width and height: little would be gained."""
DRAWN_SIDE_PX = 1600
IN_STEPS = ("conversation", "steps")  # styles of wordings


@dataclass(frozen=True)
class Asking:
    """How questions are put and answers are read.

    quantized: "int8" or "int4" weights of the linear layers, quantised while they are read.
    num_devices: GPUs over which the layers are split.
    image_size: px, None: the model's own. resize: one of RESIZES, None: as the model was trained.
    wording: name or file; its not-found sentences, and the questions about targets. None: as the model was trained.
    in_steps: questions in several steps, which need a wording that has them.
    max_new_tokens: None: room for as many boxes as the wording allows.
    reading: one of READINGS, or "expected". zoom_patches: boxes that cover fewer vision patches get a second look.
    adapter: a folder in the files of peft, merged into the model.
    tiles: of photos that are larger than one; off without a side. min_confidence: every box from
    tiles from this on; None: those that validation chose for the model, else all.
    """

    image_size: int | None = None
    resize: str | None = None
    dtype: str = "fp32"
    wording: str | None = None
    in_steps: bool = False
    decoding: str = "free"
    min_boxes: int = 0
    max_new_tokens: int | None = None
    reading: str = "centre"
    zoom_patches: float = 0.0
    adapter: Path | None = None
    tiles: TilesConfig = field(default_factory=TilesConfig)
    min_confidence: float | None = None
    quantized: str | None = None
    num_devices: int = 1


@dataclass(frozen=True)
class _Look:
    """One image that the model sees, and what it is asked about it.

    free: turns without a grammar. in_tiles: turns that can be asked about a part of the image too.
    """

    photo: Photo
    frame: Frame
    prompts: Sequence[str]
    histories: Sequence[Sequence[tuple[str, str]]]
    free: Sequence[bool]
    in_tiles: Sequence[bool] = ()


def dtype_settings(dtype: str | None, weights: str | None) -> dict[str, str | None]:
    """Return the fields of Asking for the options --dtype and --weights. Raises ConfigError if they clash."""
    if weights == "bf16" and dtype == "fp32":
        raise ConfigError("--dtype fp32, --weights bf16: found both; expected one of them. Omit one of them")
    quantized = None if weights == "bf16" else weights
    return {"dtype": dtype or ("bf16" if weights else "fp32"), "quantized": quantized}


def load_predictor(path: Path, asking: Asking) -> Predictor:
    """Load a model folder, a checkpoint, or the best checkpoint of a run. Raises CheckpointError, ConfigError."""
    if asking.min_boxes and asking.decoding == "free":
        raise ConfigError(f"--min-boxes {asking.min_boxes} needs --decoding grammar")
    weights = find_weights(path, "--model")
    trained = trained_wording(asking.adapter) if asking.adapter else None
    wording = choose_wording(asking, trained or trained_wording(weights))
    tokenizer = CogVLMTokenizer.from_folder(model_files(weights))
    allow_tf32(False)
    dtype = torch.bfloat16 if asking.dtype == "bf16" else torch.float32
    quantized, adapter, num_devices = asking.quantized, asking.adapter, asking.num_devices
    model = load_whole_model(weights, dtype, asking.image_size, None, quantized, adapter, num_devices)
    return Predictor(model, tokenizer, asking, wording, weights)


def choose_wording(asking: Asking, trained: Wording | None) -> Wording:
    """Return the wording that was asked for, else the one of the training, else a built-in one.

    In steps, it is the trained one, or a part of it, if it has steps.
    """
    if asking.wording is not None:
        return load_wording(asking.wording)
    if not asking.in_steps:
        return trained or load_wording("box")
    parts = (trained.mix or (trained,)) if trained else ()
    return next((part for part in parts if part.style in IN_STEPS), None) or load_wording("conversation")


class Predictor:
    """A model with everything that its answers need. Not for several threads at once."""

    def __init__(self, model: Any, tokenizer: CogVLMTokenizer, asking: Asking, wording: Wording, weights: Path) -> None:
        """Prepare to ask. weights: the source of the model's weights."""
        self.model = model
        self.tokenizer = tokenizer
        self.asking = asking
        self.wording = wording
        self.weights = weights
        least = asking.min_confidence
        self.kept = (chosen_boxes(asking.adapter or weights) or EVERY_BOX) if least is None else KeptBoxes(least)
        self._resize = asking.resize or resize_of(model.config)
        self._grammar = build_grammar(tokenizer, self.wording, asking.decoding, asking.min_boxes)
        least = self._grammar.least_tokens if self._grammar else 1
        self._longest = max(least, longest_worded_answer(self.wording, tokenizer))
        if self._grammar:
            self._grammar.start(asking.max_new_tokens or self._longest)

    def ask(self, photos: Sequence[Photo], prompts: Sequence[Sequence[str]]) -> list[list[Reply]]:
        """Reply to `prompts[i]` about photos[i], each question on its own."""
        return self.ask_turns(photos, [[Turn(prompt, "") for prompt in row] for row in prompts])

    def ask_turns(
        self,
        photos: Sequence[Photo],
        turns: Sequence[Sequence[Turn]],
        given: Sequence[Mapping[int, Reply]] | None = None,
    ) -> list[list[Reply]]:
        """Reply to the prompts of turns, `turns[n]` about photos[n]; their answers are ignored.

        given: for each photo, replies that are known already, by the number of their turn.

        A turn whose history has d pairs follows the d turns before it, and gets the model's replies to these as its
        history. So the first turns of all photos are asked together, then the second ones, and so on.
        """
        replies = [dict(row) for row in given or [{}] * len(turns)]  # by the number of the turn
        for depth in sorted({len(turn.history) for row in turns for turn in row}):
            numbers = [
                [i for i, turn in enumerate(row) if len(turn.history) == depth and i not in replies[n]]
                for n, row in enumerate(turns)
            ]
            asked = [n for n, row in enumerate(numbers) if row]
            looks = [self._first_look(photos[n], turns[n], numbers[n], replies[n]) for n in asked]
            for n, row in zip(asked, self._zoom(looks, self._answer_with_tiles(looks)), strict=True):
                for i, reply in zip(numbers[n], row, strict=True):
                    replies[n][i] = _name_boxes(reply, turns[n][i])
        return [[row[i] for i in sorted(row)] for row in replies]

    def _first_look(
        self, photo: Photo, turns: Sequence[Turn], numbers: Sequence[int], replies: Mapping[int, Reply]
    ) -> _Look:
        """Ask the turns with these numbers about the whole photo. replies: to the turns before them."""
        before = [range(i - len(turns[i].history), i) for i in numbers]
        return _Look(
            photo,
            photo_frame(photo.size, self._resize),
            [turns[i].prompt for i in numbers],
            [[(replies[j].prompt, replies[j].text) for j in earlier if j in replies] for earlier in before],
            [not turns[i].scored for i in numbers],
            [can_ask_in_tiles(turns[i]) for i in numbers],
        )

    def _answer(self, looks: Sequence[_Look]) -> list[list[Reply]]:
        """Answer in passes of as many photos and questions as fit into memory, at most MAX_TURNS per photo."""
        config = self.model.config
        template = config.template_version
        prompts = [pair for look in looks for pair in zip(look.prompts, look.histories, strict=True)]
        lengths = [len(encode_prompt(prompt, self.tokenizer, template, history)) for prompt, history in prompts]
        longest_prompt = max([1, *lengths])
        limit = self.asking.max_new_tokens or answer_limit(self._longest, longest_prompt, config)
        memory = GenerationMemory(config, self.model.dtype.itemsize, longest_prompt, limit)
        size = memory.choose_pass([len(look.prompts) for look in looks], len(looks), free_bytes())
        rows: list[list[Reply]] = []
        for start in range(0, len(looks), size.num_images):
            some = looks[start : start + size.num_images]
            answers = self._generate(some, limit, min(size.num_turns, MAX_TURNS))
            rows += [
                [self._read(prompt, answer, look.frame) for prompt, answer in zip(look.prompts, row, strict=True)]
                for look, row in zip(some, answers, strict=True)
            ]
        return rows

    def _generate(self, looks: Sequence[_Look], limit: int, turns_per_pass: int) -> list[list[Answer]]:
        size = self.model.config.image_size
        pixels = [model_input(look.photo, look.frame, size) for look in looks]
        with torch.no_grad():
            return generate_answers(
                self.model,
                self.tokenizer,
                torch.stack(pixels).to(device()),
                [look.prompts for look in looks],
                limit,
                [look.histories for look in looks],
                not_found=self.wording.not_found_sentences,
                grammars=[[None if free else self._grammar for free in look.free] for look in looks],
                turns_per_pass=turns_per_pass,
            )

    def _read(self, prompt: str, answer: Answer, frame: Frame) -> Reply:
        not_found = answer.text.strip() in self.wording.not_found_sentences
        closed = answer.readable()
        bins, read = parse_boxes(closed.text), read_boxes(closed.text, closed.digit_probs)
        known = not_found, answer.not_found_prob, answer.truncated
        if bins is None:
            return Reply(prompt, answer.text, () if not_found else None, *known)
        if self.asking.reading == "expected" and read is not None:
            numbers = boxes_from_bins([box.expected for box in read], frame.size_px)
        else:
            reading = "official" if self.asking.reading == "official" else "centre"
            numbers = boxes_from_bins(bins, frame.size_px, reading)
        in_photo = frame.invert_boxes((x0, y0, x1, y1) for x0, y0, x1, y1 in numbers.tolist())
        boxes = tuple(
            FoundBox(clip_box(box, frame.photo_px), read[i].confidence if read else None)
            for i, box in enumerate(in_photo)
        )
        return Reply(prompt, answer.text, boxes, *known)

    def _answer_with_tiles(self, looks: Sequence[_Look]) -> list[list[Reply]]:
        """Answer about whole photos, and about their tiles what can be asked there."""
        parts, places = list[_Look](), list[tuple[int, tuple[int, ...]]]()
        for n, look in enumerate(looks):
            for window, numbers in split_turns(look.photo.size, look.in_tiles, self.asking.tiles):
                frame = look.frame if window is None else fit(Frame(look.photo.size, window), self._resize)
                prompts, histories = [look.prompts[i] for i in numbers], [look.histories[i] for i in numbers]
                parts.append(_Look(look.photo, frame, prompts, histories, [look.free[i] for i in numbers]))
                places.append((n, numbers))
        step = max(len(looks), TILES_PER_PASS)
        rows = [row for start in range(0, len(parts), step) for row in self._answer(parts[start : start + step])]
        frames: dict[tuple[int, int], list[Frame]] = defaultdict(list)
        replies: dict[tuple[int, int], list[Reply]] = defaultdict(list)
        for part, (n, numbers), row in zip(parts, places, rows, strict=True):
            for i, reply in zip(numbers, row, strict=True):
                frames[n, i].append(part.frame)
                replies[n, i].append(reply)
        rules = self.model.config.num_patches, self.kept, self.wording.not_found_sentences
        return [
            [merge_replies(frames[n, i], replies[n, i], *rules) for i in range(len(look.prompts))]
            for n, look in enumerate(looks)
        ]

    def _zoom(self, looks: Sequence[_Look], rows: list[list[Reply]]) -> list[list[Reply]]:
        """Replace boxes under `zoom_patches` by the answers about the part of the photo around them.

        The question is the same, without its history: boxes of another frame mean other places.
        """
        places: list[tuple[int, int, int]] = []
        nearby: list[_Look] = []
        for n, (look, row) in enumerate(zip(looks, rows, strict=True)):
            for i, reply in enumerate(row):
                for k, box in enumerate(reply.boxes or ()):
                    frame = self._closer(look.frame, box.xyxy)
                    if frame is not None:
                        places.append((n, i, k))
                        nearby.append(_Look(look.photo, frame, [reply.prompt], [()], [look.free[i]]))
        step = max(1, len(looks))
        seconds = [row[0] for at in range(0, len(nearby), step) for row in self._answer(nearby[at : at + step])]
        zoomed = [list(row) for row in rows]
        for (n, i, k), second in zip(places, seconds, strict=True):
            zoomed[n][i] = _take_second(zoomed[n][i], k, second, self._patch_px(looks[n].frame))
        return zoomed

    def _patch_px(self, frame: Frame) -> tuple[float, float]:
        """Return width and height of one vision patch in pixels of the photo."""
        side = math.isqrt(self.model.config.num_patches)
        return frame.size_px[0] / side, frame.size_px[1] / side

    def _closer(self, frame: Frame, box: Box) -> Frame | None:
        """Choose the part of the photo for a second look at this box, in the photo's shape; None if it needs none."""
        patch_w, patch_h = self._patch_px(frame)
        width, height = box[2] - box[0], box[3] - box[1]
        num_patches = width / patch_w * height / patch_h
        if min(width, height) < 0 or num_patches >= self.asking.zoom_patches:
            return None
        photo_w, photo_h = frame.photo_px
        share = max(
            max(width / ZOOM_SHARE, ZOOM_MIN_PATCHES * patch_w) / photo_w,
            max(height / ZOOM_SHARE, ZOOM_MIN_PATCHES * patch_h) / photo_h,
        )
        if share > ZOOM_MAX_SHARE:
            return None
        x0, x1 = _window((box[0] + box[2]) / 2, share * photo_w, photo_w)
        y0, y1 = _window((box[1] + box[3]) / 2, share * photo_h, photo_h)
        return fit(Frame(frame.photo_px, (x0, y0, x1, y1)), self._resize)


def _window(centre: float, length: float, limit: int) -> tuple[int, int]:
    """Return whole pixels within 0..limit, around the centre where there is room."""
    whole = min(max(1, round(length)), limit)
    start = min(max(0, round(centre - whole / 2)), limit - whole)
    return start, start + whole


def _take_second(reply: Reply, k: int, second: Reply, patch_px: tuple[float, float]) -> Reply:
    """Replace box k by the nearest box of the second look, if one touches it or is within a patch of the first look.

    A box that the answer already has (IoU over 0.5) is not taken.
    """
    boxes = list(reply.boxes or ())
    first, others = boxes[k], [box.xyxy for at, box in enumerate(boxes) if at != k]
    margin_x, margin_y = patch_px
    x0, y0, x1, y1 = first.xyxy
    grown = (x0 - margin_x, y0 - margin_y, x1 + margin_x, y1 + margin_y)
    usable = [
        box
        for box in second.boxes or ()
        if pairwise_iou([grown], [box.xyxy]).item() > 0 and not (pairwise_iou([box.xyxy], others) > 0.5).any()
    ]
    if usable:
        nearest = min(usable, key=lambda box: math.dist(_centre(box.xyxy), _centre(first.xyxy)))
        boxes[k] = replace(nearest, zoomed=True)
    return replace(reply, boxes=tuple(boxes))


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _name_boxes(reply: Reply, turn: Turn) -> Reply:
    """Add the phrase of each box: in a step-wise answer that of its line, else that of the turn."""
    if turn.target is None or not reply.boxes:
        return reply
    names: list[str | None] = [turn.target.phrase] * len(reply.boxes)
    if turn.style == "steps":
        phrases = sorted(split_phrases(turn.target.phrase), key=len, reverse=True)
        text = close_cut_list(reply.text) if reply.truncated else reply.text
        lines = [line for line in text.splitlines() for _ in parse_boxes(line) or ()]
        names = [next((phrase for phrase in phrases if phrase in line), None) for line in lines]
    if len(names) != len(reply.boxes):  # the brackets of one group on two lines
        return reply
    return replace(reply, boxes=tuple(replace(box, phrase=name) for box, name in zip(reply.boxes, names, strict=True)))


def split_phrases(text: str) -> list[str]:
    """Split a list in Chinese or English, as wordings write it, into its phrases."""
    return [phrase.strip() for phrase in re.split("、|, ", text) if phrase.strip()]


def draw_replies(photo: Photo, replies: Sequence[Reply]) -> Image.Image:
    """Draw the boxes of every reply, at most DRAWN_SIDE_PX on the longer side, and the texts below."""
    whole = whole_image(photo)
    scale = min(whole.width / photo.size[0], DRAWN_SIDE_PX / max(photo.size))
    shown = whole if scale == 1 else whole.resize([max(1, round(side * scale)) for side in photo.size])
    return draw_boxes(shown, [_drawn(reply, scale) for reply in replies])


def _drawn(reply: Reply, scale: float) -> DrawnTurn:
    phrases = {box.phrase for box in reply.boxes or ()}
    return DrawnTurn(
        prompt=reply.prompt,
        answer=reply.text + _confidences(reply),
        phrase=(phrases.pop() or "") if len(phrases) == 1 else "",
        answer_boxes=[scale_box(box.xyxy, scale) for box in reply.boxes or ()],
    )


def _confidences(reply: Reply) -> str:
    known = [f"{box.confidence:.2f}" for box in reply.boxes or () if box.confidence is not None]
    return f"  ({', '.join(known)})" if known else ""
