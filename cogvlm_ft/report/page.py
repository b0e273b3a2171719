"""The report as HTML: one file that needs nothing else, in two languages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.colours import TARGET_COLOURS
from cogvlm_ft.evaluate.results import Report, choose_answers
from cogvlm_ft.html_page import load_page
from cogvlm_ft.report.cards import gallery_cards, suspect_cards
from cogvlm_ft.report.figures import blend_panels, curve_panels, evaluation_panels
from cogvlm_ft.report.labels import SECTIONS
from cogvlm_ft.report.scores import ceilings_of, confusions_of, phrase_table, tables_of, tiles_of
from cogvlm_ft.report.thumbnails import Photos

_MAX_TEXT, _MAX_FACTS = 240, 8_000  # characters


def render_page(report: Report, photos: Photos, train_photos: Photos, num_photos: int) -> str:
    """Return the whole page. All that comes from data is escaped, and the page's policy lets nothing else run."""
    ceilings = ceilings_of(report.results)
    former = report.former.predictions if report.former else []
    gallery, num_left_out = gallery_cards(
        choose_answers(report.results.predictions, former, num_photos), photos, bool(former)
    )
    suspects, num_suspects_left_out = suspect_cards(report.high_losses or (), train_photos)
    facts: dict[str, Any] = {**report.facts, **report.results.about}
    values: dict[str, Any] = {
        "report": report,
        "epoch": _epoch_of(report),
        "has_ceiling": "" in ceilings,
        "tiles": tiles_of(report, ceilings),
        "curves": [*curve_panels(report.rows, ceilings.get("")), *blend_panels(report.blends)],
        "phrases": phrase_table(report.results),
        "confusions": confusions_of(report.results),
        "groups": tables_of(report.results, ceilings),
        "charts": evaluation_panels(report.results),
        "gallery": gallery,
        "num_left_out": num_left_out,
        "first_group": next((group.name for group in gallery if group.cards), ""),
        "num_colours": len(TARGET_COLOURS),
        "suspects": suspects,
        "num_suspects_left_out": num_suspects_left_out,
        "facts": _as_yaml(facts),
    }
    present = {
        **{name: bool(values[name]) for name in ("gallery", "phrases", "curves", "groups", "charts")},
        "confusions": values["phrases"] is not None,
        "suspects": report.high_losses is not None,
        "about": bool(facts or report.config),
    }
    sections = {name: title for name, title in SECTIONS.items() if present[name]}
    return load_page(Path(__file__).parent).render_file(sections=sections, max_text=_MAX_TEXT, **values)


def _as_yaml(facts: Mapping[str, Any]) -> str:
    """Write facts as the settings are written; text that YAML cannot hold becomes escapes."""
    plain = json.loads(json.dumps(facts, default=str))
    return yaml.safe_dump(plain, allow_unicode=True, sort_keys=False, width=100)[:_MAX_FACTS] if plain else ""


def _epoch_of(report: Report) -> float | None:
    """Return the epoch of the evaluation, if metrics.jsonl holds it."""
    step = report.results.about.get("step")
    row = next((row for row in report.rows if row["kind"] == "val" and row.get("step") == step), {})
    return row.get("epoch")
