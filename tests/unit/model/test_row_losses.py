"""The losses of single rows: they add up, and reading them does not change a bit of the training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.model.cogvlm import IGNORE_INDEX
from cogvlm_ft.model.inputs import TurnInputs

NUM_PATCHES = 16


def inputs(model: CogVLMForCausalLM) -> dict[str, torch.Tensor]:
    """Three rows; the last one has no labels, as a filler."""
    torch.manual_seed(0)
    length = NUM_PATCHES + 3 + 12
    ids = torch.randint(5, model.config.vocab_size, (3, length))
    labels = ids.clone()
    labels[:, : NUM_PATCHES + 6] = IGNORE_INDEX
    labels[1, -4:] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 56, 56), "labels": labels}


def test_rows_add_up_to_the_loss_and_are_those_of_the_rows_alone(tiny_model: CogVLMForCausalLM) -> None:
    batch = inputs(tiny_model)
    out = tiny_model(**batch, return_logits=False, num_items_in_batch=1)
    assert out.row_losses.shape == (3,) and not out.row_losses.requires_grad
    torch.testing.assert_close(out.row_losses.sum(), out.loss.detach())
    assert out.row_losses[2] == 0
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        alone = tiny_model(**one, return_logits=False, num_items_in_batch=1)
        torch.testing.assert_close(alone.loss.detach(), out.row_losses[row])
        torch.testing.assert_close(alone.row_losses[0], out.row_losses[row])


def test_loss_and_gradients_are_those_of_cross_entropy_bit_by_bit(tiny_model: CogVLMForCausalLM) -> None:
    batch = inputs(tiny_model)
    tiny_model(**batch, return_logits=False, num_items_in_batch=7.0).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    labels = batch.pop("labels")
    hidden = tiny_model.model(TurnInputs(**batch)).last_hidden_state[:, :-1]
    is_labelled = labels[:, 1:] != IGNORE_INDEX
    scores = tiny_model.lm_head(hidden[is_labelled]).float()
    loss = F.cross_entropy(scores, labels[:, 1:][is_labelled], reduction="sum") / 7.0
    loss.backward()
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter.grad, found[name]), name
    assert torch.equal(loss, tiny_model(**batch, labels=labels, return_logits=False, num_items_in_batch=7.0).loss)


def test_an_output_with_logits_is_the_published_one(tiny_model: CogVLMForCausalLM) -> None:
    out = tiny_model(**inputs(tiny_model))
    assert set(out) == {"loss", "logits"}
    loss, logits = tiny_model(**inputs(tiny_model), return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
