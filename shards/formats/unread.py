"""Name formats that are known but not read, and the export to choose instead."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cogvlm_ft.shards.formats.folders import files_below
from cogvlm_ft.shards.packing.files import read_ends

_ENDS_BYTES = 2**16
_MAX_INSPECTED = 400
_TFRECORD = re.compile(r".*\.(tfrecords?|record|tfrecord-[0-9]+-of-[0-9]+)", re.IGNORECASE)
_NUMBER = rb"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?"
_DOTA_LINE = re.compile(rb"(%s[ ,]+){8}[A-Za-z][\w-]*[ ,]+[0-2]\s*" % _NUMBER)
_KITTI_LINE = re.compile(rb"[A-Za-z][\w-]* (%s ){13,14}%s\s*" % (_NUMBER, _NUMBER))
_MOT_LINE = re.compile(rb"[0-9]+,-?[0-9]+(,%s){5,8}\s*" % _NUMBER)
_VERTEX_LINE = re.compile(rb"(TRAIN|TRAINING|VALIDATION|TEST|UNASSIGNED)?,?gs://[^,]+(,[^,]*){5,9}\s*")
_DATUMARO = "Convert it to COCO with Datumaro: datum convert -if {0} -i FOLDER -f coco -o OUT -- --save-media"

_AS_CSV = "as a CSV with the columns image, x, y, w, h, label (docs/formats.md)."
_DOTA_ADVICE = (
    "Write the box around the four points of each line as a CSV with the columns image, left, top, right, bottom, "
    "label (docs/formats.md), or as COCO."
)


class _Unread(NamedTuple):
    """A format. endings: of its files; markers: texts that all are near the beginning or the end of one."""

    name: str
    endings: tuple[str, ...]
    markers: tuple[bytes, ...]
    advice: str


_UNREAD = (
    _Unread("Datumaro's JSON", (".json",), (b'"items"', b'"categories"', b'"label"'), "Export COCO 1.0 instead."),
    _Unread(
        "VIA's JSON", (".json",), (b'"shape_attributes"',), "In VIA: Annotation, Export Annotations (COCO format)."
    ),
    _Unread(
        "VIA's CSV", (".csv",), (b"region_shape_attributes",), "In VIA: Annotation, Export Annotations (COCO format)."
    ),
    _Unread("Label Studio's CSV", (".csv",), (b"annotation_id", b"lead_time"), "Export JSON instead."),
    _Unread("VIA 3's JSON", (".json",), (b'"vid_list"',), "In VIA 3: export the annotations as COCO."),
    _Unread(
        "CreateML's JSON",
        (".json",),
        (b'"coordinates"', b'"annotations"', b'"label"'),
        "Export COCO or Pascal VOC instead. Its x and y are the centre of a box, not a corner.",
    ),
    _Unread(
        "Supervisely's JSON", (".json",), (b'"classTitle"',), "Run its app Export to COCO, or Export to Pascal VOC."
    ),
    _Unread(
        "BDD100K's JSON",
        (".json",),
        (b'"box2d"',),
        "Convert it to COCO: python -m bdd100k.label.to_coco -m det -i FILE -o OUT.json.",
    ),
    _Unread(
        "Cityscapes' JSON", (".json",), (b'"imgHeight"', b'"objects"', b'"polygon"'), _DATUMARO.format("cityscapes")
    ),
    _Unread(
        "Labelbox's export",
        (".json", ".ndjson", ".jsonl"),
        (b'"data_row"',),
        f"Write left, top, width, height of each bounding_box {_AS_CSV}",
    ),
    _Unread(
        "SageMaker Ground Truth's manifest",
        (".manifest", ".jsonl", ".json"),
        (b'"source-ref"',),
        f"Write left, top, width, height of each box {_AS_CSV}",
    ),
    _Unread(
        "V7 Darwin's JSON",
        (".json",),
        (b'"bounding_box"', b'"dataset"'),
        "Convert it with darwin-py: darwin convert coco FOLDER OUT.",
    ),
    _Unread("VoTT's JSON", (".json", ".vott"), (b'"regions"', b'"asset'), "In VoTT: export Pascal VOC or CSV."),
    _Unread("Vertex AI's JSON lines", (".jsonl", ".json"), (b'"imageGcsUri"',), "Write jsonl of docs/formats.md."),
    _Unread(
        "metadata of a Hugging Face image folder",
        (".jsonl",),
        (b'"file_name"', b'"objects"'),
        "Write the boxes as targets of jsonl, see docs/formats.md.",
    ),
    _Unread(
        "Visual Genome's JSON",
        (".json",),
        (b'"region_id"', b'"phrase"'),
        f"Write x, y, width, height, phrase of each region {_AS_CSV}",
    ),
    _Unread(
        "dlib imglab's XML",
        (".xml",),
        (b"<dataset>", b"<images>"),
        f"Write left, top, width, height of each box {_AS_CSV}",
    ),
    _Unread(
        "FiftyOne's own data set",
        (".json",),
        (b'"_cls"',),
        "Export COCO: dataset.export(export_dir=OUT, dataset_type=fiftyone.types.COCODetectionDataset,"
        " label_field=FIELD).",
    ),
    _Unread(
        "COCO results JSON, which names no photos",
        (".json",),
        (b'"image_id"', b'"score"', b'"bbox"'),
        "Pass the instances JSON with the annotations.",
    ),
)


class _Lines(NamedTuple):
    """A format of plain lines."""

    name: str
    endings: tuple[str, ...]
    line: re.Pattern[bytes]
    advice: str


_LINES = (
    _Lines("DOTA's rotated boxes", (".txt",), _DOTA_LINE, _DOTA_ADVICE),
    _Lines("KITTI's labels", (".txt",), _KITTI_LINE, _DATUMARO.format("kitti")),
    _Lines("MOT's tracks", (".txt",), _MOT_LINE, _DATUMARO.format("mot_seq")),
    _Lines("Vertex AI's CSV", (".csv",), _VERTEX_LINE, "Pass this file itself as --annotations."),
)
_DOTA_HEAD = (b"imagesource", b"gsd")


def describe_unread(annotations: Path) -> str | None:
    """Return what was found, in which file, and what to do; None if nothing is known."""
    if not annotations.is_dir():
        return _described(annotations.parent, annotations.name)
    found = (_described(annotations, name) for name in islice(files_below(annotations, ""), _MAX_INSPECTED))
    return next((text for text in found if text), None)


def _described(folder: Path, name: str) -> str | None:
    if _TFRECORD.fullmatch(name):
        return f"TFRecord ({name}); expected a format of docs/formats.md. Export COCO or Pascal VOC instead."
    ends = b""
    is_of = name.lower().endswith
    for unread in _UNREAD:
        if is_of(unread.endings):
            ends = ends or read_ends(folder / name, _ENDS_BYTES)
            if all(marker in ends for marker in unread.markers):
                return f"{unread.name} ({name}); expected a format of docs/formats.md. {unread.advice}"
    for lines in _LINES:
        if is_of(lines.endings):
            ends = ends or read_ends(folder / name, _ENDS_BYTES)
            first = (line for line in ends.splitlines() if line.strip() and not line.lower().startswith(_DOTA_HEAD))
            if lines.line.fullmatch(next(first, b"")):
                return f"{lines.name} ({name}); expected a format of docs/formats.md. {lines.advice}"
    return None
