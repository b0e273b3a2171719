"""A tiny model that has memorized some answers, whatever the image shows: real generation, known answers."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_config

from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.predict.steps import target_turns

NOT_FOUND = "未找到指定目标"
DOG, CAT = "狗", "猫"
FOUND = f"共找到2处：{DOG}、{CAT}。"
DOG_BOX = "[[100,200,300,400]]"
STEPS = f"共找到1处：{DOG}。\n{DOG}：{DOG_BOX}\n{CAT}：{NOT_FOUND}"
WHAT, WHERE_SMALL, WHERE_MANY, WHO = "图中有什么？", "small", "many", "who?"
SMALL_BOX = "[[500,500,540,540]]"
MANY_BOXES = "[[000,000,500,500;600,600,640,640]]"
NOBODY = "nobody"
MAX_NEW_TOKENS = 64


def _conversation(first_prompt: str | None) -> list[Turn]:
    """Return the turns about the dog and the cat, each with the answers of those before it."""
    said: list[tuple[str, str]] = []
    turns = []
    for turn in target_turns([DOG, CAT], load_wording("conversation")):
        if not turn.history:
            prompt, answer = first_prompt or turn.prompt, FOUND
        else:
            assert turn.target is not None
            prompt, answer = turn.prompt, DOG_BOX if turn.target.phrase == DOG else NOT_FOUND
        turns.append(Turn(prompt, answer, history=tuple(said)))
        said.append((prompt, answer))
    return turns


def lessons() -> list[Turn]:
    [steps] = target_turns([DOG, CAT], load_wording("steps"))
    alone = [(WHERE_SMALL, SMALL_BOX), (WHERE_MANY, MANY_BOXES), (WHO, NOBODY), (steps.prompt, STEPS)]
    return [*_conversation(None), *_conversation(WHAT), *(Turn(*pair) for pair in alone)]


def teach(tokenizer: CogVLMTokenizer, folder: Path) -> Path:
    """Train and save the model: 8 x 8 patches, and a template that shows the model earlier turns."""
    torch.manual_seed(0)
    config = tiny_config(
        vision=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, image_size=112, num_positions=65),
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        template_version="chat",
    )
    model = CogVLMForCausalLM(config)
    rows = encode_turns(lessons(), tokenizer, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = model(
            input_ids=rows.input_ids[None],
            pixel_values=torch.randn(1, 3, 112, 112),
            labels=rows.labels[None],
            position_ids=rows.position_ids[None],
            block_ids=rows.block_ids[None],
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.05, "the model has not learned its answers"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder
