"""Token ids, types, labels and positions against rows of the published remote code and of the official training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_cases import root

from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.model.layout import build_position_ids
from cogvlm_ft.model.prompt import build_conversation, render_prompt

# The official training's names of our templates. Its "chat" ([INST] ... [/INST]) belongs to CogAgent.
TEMPLATE_OF_SIGNAL = {"base": "base", "chat_old": "chat", "vqa": "vqa"}


class StubTokenizer:
    """One token per character, as in the program that wrote the rows."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [5 + ord(character) % 90 for character in text]


def load_rows(name: str) -> list[dict[str, Any]]:
    return json.loads((root() / "prompts" / name).read_text(encoding="utf-8"))


def config_for(template_version: str) -> CogVLMConfig:
    return CogVLMConfig(template_version=template_version, vision_config={"image_size": 56, "num_positions": 17})


PUBLISHED_ROWS = load_rows("hf_build_conversation_input_ids.json")
TRAINING_ROWS = [
    row
    for row in load_rows("sat_llama2_text_processor.json")
    if row["signal_type"] in TEMPLATE_OF_SIGNAL and not row["skipped"]
]
# It cuts captions that are too long; this program skips such a sample.
WHOLE_ROWS = [row for row in TRAINING_ROWS if sum(label != -100 for label in row["labels"]) == len(row["caption"]) + 1]


def test_there_are_rows_of_every_kind() -> None:
    assert len(PUBLISHED_ROWS) == 40
    assert {row["template_version"] for row in PUBLISHED_ROWS} == {"base", "chat", "vqa"}
    assert len(WHOLE_ROWS) == 16
    assert {row["signal_type"] for row in WHOLE_ROWS} == TEMPLATE_OF_SIGNAL.keys()


@pytest.mark.parametrize("row", PUBLISHED_ROWS, ids=lambda row: row["template_version"])
def test_a_conversation_is_built_as_the_published_code_does(row: dict[str, Any]) -> None:
    assert render_prompt(row["query"], row["template_version"], row["history"]) == row["prompt"]
    out = build_conversation(
        StubTokenizer(),
        config_for("base"),
        query=row["query"],
        history=row["history"],
        images=[torch.zeros(3, 56, 56)] if row["image"] else None,
        template_version=row["template_version"],
        answer=row["answer"],
    )
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert out[name].tolist() == row[name], name
    assert out["labels"].tolist() == row["labels"] if row["labels"] else "labels" not in out
    assert len(out["images"]) == int(row["image"])
    positions = build_position_ids(out["token_type_ids"][None], out["attention_mask"][None])
    assert positions[0].tolist() == row["position_ids"]


def test_a_turn_with_a_history_is_encoded_as_the_published_code_does() -> None:
    rows = [row for row in PUBLISHED_ROWS if row["image"] and row["history"]]
    assert {row["template_version"] for row in rows} == {"base", "chat", "vqa"}
    for row in rows:
        turn = Turn(row["query"], row["answer"] or "", history=tuple(map(tuple, row["history"])))
        found = encode_turns([turn], StubTokenizer(), config_for(row["template_version"]))
        length = len(row["input_ids"])
        assert found.input_ids.tolist()[:length] == row["input_ids"]
        assert found.position_ids.tolist()[:length] == row["position_ids"]


@pytest.mark.parametrize("row", WHOLE_ROWS, ids=lambda row: f"{row['signal_type']}-{row['max_target_length']}")
def test_a_turn_is_encoded_as_in_the_official_training(row: dict[str, Any]) -> None:
    config = config_for(TEMPLATE_OF_SIGNAL[row["signal_type"]])
    assert config.num_patches == row["image_length"]
    assert render_prompt(row["prompt"], config.template_version) == row["full_prompt"].removeprefix("<EOI>")
    found = encode_turns([Turn(row["prompt"], row["caption"])], StubTokenizer(), config)
    length = row["context_length"] + len(row["caption"]) + 1
    assert found.input_ids.tolist() == row["input_ids"][:length]
    assert found.labels.tolist() == row["labels"][:length]
    assert found.position_ids.tolist() == row["position_ids"][:length]
