"""Templates and conversations: defaults, and what is refused. The exact ids are compared in tests/golden."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, preprocess_image
from cogvlm_ft.model.prompt import build_conversation, render_prompt

HISTORY = [("Is there a dog?", "Yes."), ("And a cat?", "No.")]


@pytest.mark.parametrize(
    ("template_version", "wanted"),
    [
        ("base", "Where?"),
        ("chat", "Question: Is there a dog? Answer: Yes.\nQuestion: And a cat? Answer: No.\nQuestion: Where? Answer:"),
        (
            "vqa",
            "Question: Is there a dog? Short answer: Yes.\nQuestion: And a cat? Short answer: No.\n"
            "Question: Where? Short answer:",
        ),
    ],
)
def test_templates(template_version: str, wanted: str) -> None:
    assert render_prompt("Where?", template_version, HISTORY) == wanted
    assert render_prompt("Where?", template_version) == wanted.splitlines()[-1]


def test_braces_in_a_question_stay_as_they_are() -> None:
    assert render_prompt("{x} %s", "chat") == "Question: {x} %s Answer:"


def test_an_unknown_template_names_the_known_ones(tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    with pytest.raises(ValueError, match=r"template_version: found 'grounding'; expected one of base, chat, vqa"):
        render_prompt("Where?", "grounding")
    with pytest.raises(ValueError, match="grounding"):
        build_conversation(tokenizer, tiny_model.config, query="Where?", template_version="grounding")


def test_two_images_are_refused(tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    image = torch.zeros(3, 56, 56)
    with pytest.raises(ValueError, match="found 2; expected at most one image per conversation"):
        build_conversation(tokenizer, tiny_model.config, query="Where?", images=[image, image])


@pytest.mark.parametrize("template_version", ["base", "chat", "vqa"])
def test_the_template_is_the_config_s_unless_given(
    tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, template_version: str
) -> None:
    tiny_model.config.template_version = template_version
    default = tiny_model.build_conversation_input_ids(tokenizer, query="Where?")
    wanted = [tokenizer.bos_token_id, *tokenizer.encode(render_prompt("Where?", template_version))]
    assert default["input_ids"].tolist() == wanted
    other = tiny_model.build_conversation_input_ids(tokenizer, query="Where?", template_version="chat")
    wanted = [tokenizer.bos_token_id, *tokenizer.encode("Question: Where? Answer:")]
    assert other["input_ids"].tolist() == wanted


def test_a_picture_is_preprocessed_and_a_tensor_taken_as_it_is(
    tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer
) -> None:
    picture = Image.new("RGB", (30, 20), (200, 10, 90))
    pixels = torch.rand(3, 56, 56)
    outs = [
        tiny_model.build_conversation_input_ids(tokenizer, query="Where?", images=[image])
        for image in (picture, pixels)
    ]
    assert torch.equal(outs[0]["images"][0], preprocess_image(picture, 56))
    assert outs[1]["images"][0] is pixels
    assert outs[0]["input_ids"].tolist() == outs[1]["input_ids"].tolist()
    assert outs[0]["token_type_ids"].sum() == tiny_model.config.num_patches + 2


def test_without_an_image_everything_is_text(tiny_model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    for images in (None, []):
        out = tiny_model.build_conversation_input_ids(tokenizer, query="Where?", images=images)
        assert out["images"] == []
        assert out["token_type_ids"].sum() == 0
        assert len(out["input_ids"]) == len(out["attention_mask"]) == 1 + len(tokenizer.encode("Where?"))
