"""Attention by blocks, compiled for a GPU, against attention by examples."""

import pytest
import torch

from model.test_attention import paper_slopes
from sft.model import attention
from sft.model.attention import FlatBatch
from support.examples import off_by, positions_of


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="no FlexAttention on this GPU")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("num_groups", "has_bias"), [(6, True), (6, False), (2, False), (1, False)])
def test_blocks_and_examples_give_the_same_gradients_on_a_gpu(head_dim: int, num_groups: int, has_bias: bool):
    lengths, num_heads = (5, 300, 1, 40, 166), 6
    position_ids = positions_of(lengths, "cuda")
    bias = paper_slopes(num_heads).to("cuda")[:, None] * position_ids[0] if has_bias else None
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    packed = torch.randn(1, sum(lengths), num_groups, num_heads // num_groups + 2, head_dim, **options)
    upstream = torch.randn(1, sum(lengths), num_heads * head_dim, **options)
    results = []
    for attend in (attention.attend_by_blocks, attention.attend_by_paths):
        inputs = packed.clone().requires_grad_()
        context = attend(inputs, FlatBatch(position_ids, bias))
        results.append([context, *torch.autograd.grad(context, inputs, upstream)])
    for by_blocks, by_examples in zip(*results, strict=True):
        assert off_by(by_blocks.float(), by_examples.float()) <= 2e-2
