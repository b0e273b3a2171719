"""Pascal VOC: one XML file per photo, in whole pixels, which all tools read."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.predict.writers.labelled import LabelledBox, LabelledPhoto, write_text


def write_voc(photos: Sequence[LabelledPhoto], labels: Sequence[str], folder: Path) -> None:
    """Write Annotations/NAME.xml, ImageSets/Main/default.txt in the order of the photos, and labelmap.txt."""
    for photo in photos:
        root = ElementTree.Element("annotation")
        _add(root, folder=posixpath.basename(posixpath.dirname(photo.name)), filename=posixpath.basename(photo.name))
        width, height = photo.size_px
        _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
        _add(root, segmented=0)
        for box in photo.boxes:
            _add_object(root, box, photo.size_px)
        ElementTree.indent(root)
        write_text(
            folder / "Annotations" / photo.file(".xml"),
            ElementTree.tostring(root, encoding="unicode") + "\n",
        )
    names = "".join(f"{photo.file('')}\n" for photo in photos)
    write_text(folder / "ImageSets" / "Main" / "default.txt", names)
    if not any(":" in label for label in labels):  # the separator of this file
        write_text(
            folder / "labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(f"{name}:::\n" for name in labels)
        )


def _add_object(root: ElementTree.Element, box: LabelledBox, size_px: tuple[int, int]) -> None:
    found = ElementTree.SubElement(root, "object")
    _add(found, name=box.label, pose="Unspecified", truncated=0, difficult=0)
    x0, y0, x1, y1 = _whole_pixels(box.xyxy, size_px)
    _add(ElementTree.SubElement(found, "bndbox"), xmin=x0, ymin=y0, xmax=x1, ymax=y1)
    if box.confidence is not None:
        attributes = ElementTree.SubElement(found, "attributes")
        _add(ElementTree.SubElement(attributes, "attribute"), name="confidence", value=box.confidence)


def _whole_pixels(box: Box, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round to pixels; a box keeps at least one."""
    x0, y0 = (min(round(start), side - 1) for start, side in zip(box[:2], size_px, strict=True))
    return x0, y0, max(x0 + 1, round(box[2])), max(y0 + 1, round(box[3]))


def _add(parent: ElementTree.Element, **values: object) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)
