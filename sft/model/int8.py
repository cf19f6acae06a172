"""Linear layers with 8-bit integer weights, which generate several times as fast on a CPU.

Generating one token reads every weight once, so memory bandwidth sets the speed, and a quarter of the bytes takes a
quarter of the time. Activations are split into two 7-bit integers, whose rounding is far below that of the weights;
the weights are read once for both.
"""

import platform
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from sft.program import UserError

ENGINE = "fbgemm"
WEIGHT_LIMIT = 127
# Where the processor adds pairs of products in 16 bits, 2 * 127 * 127 still fits and 2 * 255 * 127 would not.
ACTIVATION_LIMIT, ZERO_POINT = 63, 64


class Int8Linear(nn.Module):
    """A Linear with int8 weights, one fp32 scale per output, in the engine's own memory layout."""

    def __init__(self, linear: nn.Linear):
        """Quantize the weight (out_features, in_features) of a Linear of any floating dtype on the CPU."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = pack(linear.weight.detach())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) fp32 for (..., in_features) fp32; each position has its own activation scale."""
        rows = hidden.reshape(-1, self.in_features)
        step = rows.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(ACTIVATION_LIMIT)
        scaled = rows / step
        high = scaled.round()
        low = scaled.sub_(high).mul_(2 * ACTIVATION_LIMIT)
        both = torch.cat([high, low])
        both = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, ZERO_POINT, self.packed)
        high, low = both.chunk(2)
        output = torch.add(high, low, alpha=0.5 / ACTIVATION_LIMIT).mul_(step)
        if self.bias is not None:
            output += self.bias
        return output.view(*hidden.shape[:-1], self.out_features)

    def dequantize(self) -> torch.Tensor:
        """Return the weight that it computes with, fp32 (out_features, in_features)."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()

    def weight_in_bytes(self) -> int:
        """Count one byte per weight, and per output a scale, a zero point and a sum of 4 bytes each."""
        return self.out_features * (self.in_features + 3 * 4)

    def get_extra_state(self) -> None:
        """Raise RuntimeError: a saved folder would lack these weights."""
        raise RuntimeError("int8 weights are not saved; save the model that was quantized")


def pack(weight: torch.Tensor) -> torch.ScriptObject:
    """Return a floating weight (out_features, in_features) as int8 with a symmetric scale per output, packed"""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min_(1e-30).div_(WEIGHT_LIMIT)
    zero_points = torch.zeros(len(weight), dtype=torch.int64)
    rounded = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None)


@contextmanager
def engine() -> Iterator[None]:
    """Pack weights for `ENGINE` inside the block, and for the process's own engine again afterwards."""
    usual = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            # A warning of their removal in a release after the pinned one.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = usual


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Give every Linear of a model int8 weights in place, and return it; the rest is fp32 and takes no gradients.

    A head tied to the embedding becomes a copy; the embedding stays. Raises UserError if the model is not on the CPU,
    or PyTorch has no engine for this processor.
    """
    if model.device.type != "cpu":
        raise UserError(
            f"--quantize int8 needs the CPU, and the model is on {model.device}; type --device cpu with it, or leave "
            "--quantize out"
        )
    engines = torch.backends.quantized.supported_engines
    if ENGINE not in engines:
        raise UserError(
            f"--quantize int8 needs PyTorch's {ENGINE}, for x86-64 with AVX2; this {platform.machine()} processor has "
            f"{', '.join(engines)}; leave --quantize out"
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    largest_first = sorted(linears, key=lambda name: -linears[name].weight.numel())

    def replace(name: str) -> None:
        model.set_submodule(name, Int8Linear(linears.pop(name)))

    # Packing uses one core and releases Python's lock.
    with engine(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(replace, largest_first))
    return model.float().requires_grad_(False).eval()


def weights_in_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's parameters and buffers, tied ones once, and of its int8 weights."""
    tensors = [*model.parameters(), *model.buffers()]
    packed = [module.weight_in_bytes() for module in model.modules() if isinstance(module, Int8Linear)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + sum(packed)
