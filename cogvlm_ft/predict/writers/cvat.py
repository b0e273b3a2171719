"""CVAT for images 1.1: one XML file; the confidence is an attribute of a box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from cogvlm_ft.predict.writers.labelled import LabelledPhoto, write_text

_ATTRIBUTE = "confidence"
_CORNERS = ("xtl", "ytl", "xbr", "ybr")


def write_cvat(photos: Sequence[LabelledPhoto], labels: Sequence[str], folder: Path) -> None:
    """Write annotations.xml, with the labels as CVAT's tasks define them."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    root.append(_meta(len(photos), labels))
    for number, photo in enumerate(photos):
        width, height = photo.size_px
        about = {"id": number, "name": photo.name, "width": width, "height": height}
        image = ElementTree.SubElement(root, "image", {key: str(value) for key, value in about.items()})
        for box in photo.boxes:
            corners = {name: f"{value:.2f}" for name, value in zip(_CORNERS, box.xyxy, strict=True)}
            shape = {"label": box.label, "source": "auto", "occluded": "0", **corners, "z_order": "0"}
            drawn = ElementTree.SubElement(image, "box", shape)
            if box.confidence is not None:
                ElementTree.SubElement(drawn, "attribute", {"name": _ATTRIBUTE}).text = str(box.confidence)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(folder / "annotations.xml", f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def _meta(num_photos: int, labels: Sequence[str]) -> ElementTree.Element:
    meta = ElementTree.Element("meta")
    task = ElementTree.SubElement(meta, "task")
    for name, text in {"name": "predictions", "size": num_photos, "mode": "annotation"}.items():
        ElementTree.SubElement(task, name).text = str(text)
    listed = ElementTree.SubElement(task, "labels")
    for label in labels:
        entry = ElementTree.SubElement(listed, "label")
        ElementTree.SubElement(entry, "name").text = label
        attributes = ElementTree.SubElement(entry, "attributes")
        attribute = ElementTree.SubElement(attributes, "attribute")
        settings = {"name": _ATTRIBUTE, "mutable": "False", "input_type": "text", "default_value": "", "values": ""}
        for name, text in settings.items():
            ElementTree.SubElement(attribute, name).text = text
    return meta
