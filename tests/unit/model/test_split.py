"""Layers split over devices: which layer is where, and that tensors follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.model.loading import CPU, allocate_model
from cogvlm_ft.model.split import split_layers
from cogvlm_ft.runtime.distributed import first_devices

META = torch.device("meta")


@pytest.mark.parametrize(
    ("layers", "others", "devices", "expected"),
    [
        ([10, 10, 10, 10], 10, 1, [0, 0, 0, 0]),
        ([10, 10, 10, 10], 0, 2, [0, 0, 1, 1]),
        ([10, 10, 10, 10], 20, 2, [0, 1, 1, 1]),  # the vision tower and the embeddings are on the first
        ([10, 10, 10, 10], 40, 3, [1, 1, 1, 1]),  # no device can hold less than the first
        ([10, 30, 10, 10], 5, 3, [0, 1, 2, 2]),
        ([10, 10], 5, 4, [1, 2]),
    ],
)
def test_the_fullest_device_holds_as_little_as_possible(
    layers: list[int], others: int, devices: int, expected: list[int]
) -> None:
    assert split_layers(layers, others, devices) == expected


@torch.no_grad()
def test_a_split_model_computes_the_same_and_its_layers_take_tensors_to_their_device() -> None:
    plain = CogVLMForCausalLM(tiny_config()).eval()
    size, patches = plain.config.image_size, plain.config.num_patches
    inputs = {"input_ids": torch.randint(3, 400, (2, patches + 9)), "pixel_values": torch.randn(2, 3, size, size)}
    split = allocate_model(plain.config, torch.float32, [CPU, CPU])
    split.load_state_dict(plain.state_dict())
    given: list[tuple[Any, ...]] = []
    split.model.layers[1].register_forward_hook(lambda _, arguments, out: given.append(arguments))
    assert torch.equal(split(**inputs).logits, plain(**inputs).logits)

    apart = allocate_model(plain.config, torch.float32, [CPU, META])
    devices = {name: parameter.device for name, parameter in apart.named_parameters()}  # the rest fills the first
    assert {name for name, device in devices.items() if device == META} == {
        name for name in devices if name.startswith("model.layers.")
    }
    with pytest.raises(NotImplementedError, match="meta"):  # back to the first device: nothing can be copied from meta
        apart(**inputs)
    hidden, shared = given[0]
    assert apart.model.layers[1](hidden, shared).device == META


def test_more_devices_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device) for device in first_devices(2)] == ["cuda:0", "cuda:1"]
    for wrong in (0, 3):
        with pytest.raises(ConfigError, match=rf"--devices {wrong}: found 2 GPUs; expected 1 to 2"):
            first_devices(wrong)
