"""Gradients of 16-bit weights are rounded once, and what is on the device already changes nothing."""

import pytest
import torch

from sft.model.loss import TiedEmbedding, TiedGradient, label_positions, next_token_loss
from support.batches import HIDDEN, batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_token_that_comes_often_is_rounded_once(device, dtype, monkeypatch):
    own, added_in = torch.Tensor.index_add_, []
    # The CPU's own sum is exact enough in 16 bits, too; a GPU's is not.
    monkeypatch.setattr(
        torch.Tensor, "index_add_", lambda total, *rest: added_in.append(total.dtype) or own(total, *rest)
    )
    times, weight = 3000, torch.randn(5, HIDDEN, device=device).to(dtype).requires_grad_()
    ids = torch.full((1, times), 3, device=device)
    upstream = (1 + torch.rand(1, times, HIDDEN, device=device)).to(dtype)
    TiedEmbedding.apply(ids, weight, TiedGradient()).backward(upstream)
    expected = upstream.double().sum((0, 1))
    assert weight.grad.dtype == dtype and added_in == [torch.float32]
    assert ((weight.grad[3].double() - expected).abs() / expected).max() <= torch.finfo(dtype).eps
    assert not weight.grad[[0, 1, 2, 4]].any()


def test_the_head_hands_its_gradient_on_in_fp32(device):
    hidden_states, weight, labels = batch(device)
    weight, tied = weight.to(torch.bfloat16).requires_grad_(), TiedGradient()
    value = next_token_loss(hidden_states.to(torch.bfloat16).requires_grad_(), weight, labels, tied=tied)
    value.backward()
    assert tied.tensor.dtype == torch.float32 and weight.grad is None


@pytest.mark.parametrize("num_items", [None, 7.0, torch.tensor(7.0)], ids=str)
def test_positions_and_a_number_on_the_device_change_nothing(device, num_items):
    hidden_states, weight, labels = batch(device)
    results = []
    positions = label_positions(labels)
    for own_labels, own_positions in ((labels, None), (labels.flatten()[positions + 1], positions)):
        given = num_items.to(device) if torch.is_tensor(num_items) else num_items
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden_states, weight)]
        value = next_token_loss(*inputs, own_labels, given, positions=own_positions)
        results.append([value, *torch.autograd.grad(2 * value, inputs)])
    for found, given in zip(*results, strict=True):
        assert torch.equal(found, given)
