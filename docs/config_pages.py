"""Write docs/config.md and docs/config_zh.md from the fields of cogvlm_ft/settings.py.

    python docs/config_pages.py

The Chinese descriptions are in docs/config_zh.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from cogvlm_ft.config import bounds_of
from cogvlm_ft.settings import Config, Rules

DOCS = Path(__file__).resolve().parent
INTRODUCTION = {
    "en": """# Settings

[中文](config_zh.md)

Give settings as `key=value` on the command line, or in a YAML file that `--config` names; the
command line wins. A mistyped key or a value out of bounds is an error before anything is loaded.
`~` means your home folder. Text is taken as it is written: `0123` and `12:30:00` are names, not
numbers. `null` (or `None`, where null is allowed) means no value.

`${oc.env:NAME}` stands for an environment variable, for example in an address with a password:
`'data.shards=https://${oc.env:LOGIN}@host/shards'`, in quotes. It works in your own YAML and on the
command line. What is written about a run keeps the text, never the value. In the `config.yaml` of a
run folder, which may be somebody else's, it is an error: type that setting again. `~/.netrc` keeps
passwords of `https://` addresses too, and needs no setting.

This page is generated: `python docs/config_pages.py`.
""",
    "zh": """# 设置

[English](config.md)

设置可以在命令行用 `key=value` 给出，也可以写在 `--config` 指定的 YAML 文件里；命令行优先。
键写错或取值超出范围，都会在加载之前报错。`~` 表示你的主目录。文本按原样读取：`0123`、`12:30:00` 是名字，不是数字。
`null`（允许为空时也可写 `None`）表示没有值。

`${oc.env:NAME}` 代表环境变量，例如用于带密码的地址：`'data.shards=https://${oc.env:LOGIN}@host/shards'`（加引号）。
它可以写在你自己的 YAML 和命令行里；训练写出的文件只保留原文，不含变量的值。
在训练目录的 `config.yaml`（可能来自他人）里它会报错：请在命令行里重新给出该设置。
`https://` 地址的密码也可以放在 `~/.netrc` 里，无需任何设置。

本页自动生成：`python docs/config_pages.py`。
""",
}
HEADINGS = {"en": ("Setting", "Default", "Allowed", "Meaning"), "zh": ("设置", "默认值", "取值", "含义")}
REQUIRED = {"en": "required", "zh": "必填"}
TITLES_ZH = {
    "Config": "运行",
    "ModelConfig": "模型 `model`",
    "DataConfig": "数据 `data`",
    "AdapterConfig": "LoRA 适配器 `adapter`",
    "AugmentConfig": "数据增强 `data.augment`",
    "TilesConfig": "切块 `data.tiles`",
    "TrainConfig": "训练 `train`",
    "BoxLossConfig": "边界框损失 `train.box_loss`",
    "EvaluateConfig": "评估 `evaluate`",
    "CheckpointConfig": "检查点 `checkpoint`",
    "TrackingConfig": "W&B 与 TensorBoard `tracking`",
}


def render(language: str) -> str:
    """Return the page in "en" or "zh"."""
    chinese = yaml.safe_load((DOCS / "config_zh.yaml").read_text(encoding="utf-8"))
    parts = [INTRODUCTION[language]]
    for prefix, section in sections(Config(), ""):
        name = type(section).__name__
        title = (section.__doc__ or "").partition(".")[0] + (f" `{prefix[:-1]}`" if prefix else "")
        parts.append(f"## {TITLES_ZH[name] if language == 'zh' else title}\n")
        parts.append("| " + " | ".join(HEADINGS[language]) + " |\n|---|---|---|---|")
        for key, value, rules in own_settings(section, prefix):
            meaning = chinese[key] if language == "zh" else rules.description
            cells = (f"`{key}`", shown_default(value, language), shown_bounds(rules, language), meaning)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def sections(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (prefix of its keys, section): the config itself, then its sections, each before those inside it."""
    yield prefix, section
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            yield from sections(value, f"{prefix}{each.name}.")


def own_settings(section: Any, prefix: str) -> Iterator[tuple[str, Any, Rules]]:
    """Yield (key, default, rules) of the settings of one section, without those of sections inside it."""
    for each in fields(section):
        value = getattr(section, each.name)
        if not is_dataclass(value):
            yield f"{prefix}{each.name}", value, each.metadata["rules"]


def shown_default(value: Any, language: str) -> str:
    """Format a default as YAML would have it."""
    if value == MISSING:
        return REQUIRED[language]
    return f"`{value if isinstance(value, (str, float)) else json.dumps(value)}`"


def shown_bounds(rules: Rules, language: str) -> str:
    """Format choices, bounds and unit."""
    if rules.choices:
        return ", ".join(f"`{choice}`" for choice in rules.choices)
    bounds = ", ".join(filter(None, bounds_of(rules)))
    if language == "zh":
        for english, chinese in (("at least ", "≥ "), ("at most ", "≤ "), ("more than ", "> "), ("less than ", "< ")):
            bounds = bounds.replace(english, chinese)
    return " ".join(filter(None, (bounds, rules.unit)))


if __name__ == "__main__":
    (DOCS / "config.md").write_text(render("en"), encoding="utf-8")
    (DOCS / "config_zh.md").write_text(render("zh"), encoding="utf-8")
