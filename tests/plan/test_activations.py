"""What autograd keeps of a layer, counted."""

import gc

import pytest
import torch

from sft.plan.activations import Probe, Strategy, dtypes_of, kept_by
from support.loads import load_of


@pytest.mark.parametrize(
    ("shape", "method", "by_token"),
    [
        ("bloom-560m", "full", 36_944),
        ("bloom-560m", "LoRA", 39_120),
        ("falcon-7b", "full", 136_996),
        ("falcon-7b", "LoRA", 146_212),
    ],
)
def test_a_layer_keeps_what_was_counted_under_the_autocast_of_a_gpu(shape, method, by_token):
    # Counted with tensors that claim to be on a GPU: its autocast, unlike the CPU's, norms in fp32.
    load = load_of(shape)
    assert kept_by(load, method, dtypes_of(Strategy(method), load)).layer_by_token == by_token


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_a_counted_model_is_freed(method):
    load = load_of("bloom-560m")
    Probe(load, method, dtypes_of(Strategy(method), load)).count(2, 8)
    gc.collect()
    shapes = [tuple(tensor.shape) for tensor in gc.get_objects() if isinstance(tensor, torch.nn.Parameter)]
    assert (3 * 1024, 1024) not in shapes, "gigabytes of a large model would stay for the whole run"
