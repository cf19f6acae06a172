"""NEFTune's noise: as strong for each example as if it were alone, and none where the model does not train."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sft.model import neftune, patch
from sft.model.load import load_model

ALPHA = 5.0
LENGTHS = [3, 90, 17]


@pytest.fixture(params=["bloom-tiny", "falcon-tiny"])
def model(request: pytest.FixtureRequest, make_model: Callable[[str], Path]):
    model = load_model(str(make_model(request.param)), torch.float32)
    patch.install(model)
    neftune.install(model, ALPHA)
    return model


def embedded(model, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings that a forward of the patched model uses, (1, T, D)."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, given, output: seen.append(output))
    model(input_ids=input_ids, position_ids=position_ids)
    handle.remove()
    return seen[0].detach()


def test_the_noise_of_each_example_is_scaled_by_its_own_length(model):
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    input_ids = torch.full_like(position_ids, 7)
    plain = embedded(model.eval(), input_ids, position_ids)
    assert torch.equal(plain, model.get_input_embeddings().weight[input_ids].detach())
    noise = torch.cat([embedded(model.train(), input_ids, position_ids) - plain for _ in range(20)])
    for part, length in zip(noise.split(LENGTHS, dim=1), LENGTHS, strict=True):
        largest = ALPHA / (length * plain.shape[-1]) ** 0.5
        assert part.abs().max() <= largest * 1.0001
        assert part.abs().max() > 0.95 * largest and part.std() == pytest.approx(largest / 3**0.5, rel=0.1)
        assert abs(part.mean()) < 0.1 * largest


def test_weights_get_a_gradient_through_the_noise(model):
    position_ids = torch.arange(6)[None]
    model.train()
    model(input_ids=position_ids, position_ids=position_ids, labels=position_ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
