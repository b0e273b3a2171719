"""docs/config.md and docs/config_zh.md say what the fields of the settings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from cogvlm_ft.config import settings_of
from cogvlm_ft.settings import Config

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(("language", "page"), [("en", "config.md"), ("zh", "config_zh.md")])
def test_the_pages_are_current(language: str, page: str) -> None:
    spec = importlib.util.spec_from_file_location("config_pages", DOCS / "config_pages.py")
    assert spec and spec.loader
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    assert (DOCS / page).read_text(encoding="utf-8") == pages.render(language), "run: python docs/config_pages.py"


def test_every_setting_is_described_in_both_languages() -> None:
    chinese = yaml.safe_load((DOCS / "config_zh.yaml").read_text(encoding="utf-8"))
    rules = {key: rules for key, _, rules in settings_of(Config())}
    assert set(chinese) == set(rules)
    assert all(each.description.endswith(".") for each in rules.values())
