"""Products of fp32 matrices on a CPU, by the faster of the two libraries that PyTorch brings.

Shapes: T = rows of the input, I = size of an input, O = size of an output.

PyTorch multiplies with Intel's MKL, which uses AVX2 on processors of other makers even where they have AVX-512. oneDNN
uses what is there, and is twice as fast on such a processor. `benchmarks.products` measures both.
"""

from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CPU_INFORMATION = Path("/proc/cpuinfo")


@cache
def is_faster() -> bool:
    """Tell whether oneDNN is the faster library on this machine's processor."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and CPU_INFORMATION.exists()
        and "GenuineIntel" not in CPU_INFORMATION.read_text()
    )


def product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the product of fp32 matrices (T, I) and (I, O) on a CPU, plus a bias (O,), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")


class LinearFunction(torch.autograd.Function):
    """A linear layer whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the outputs (T, O) of inputs (T, I), weight (O, I) and bias (O,), all fp32."""
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs: torch.Tensor):
        """Return the gradients of inputs, weight and bias, those that are needed."""
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_outputs, weight) if needs_inputs else None,
            product(grad_outputs.T, inputs) if needs_weight else None,
            grad_outputs.sum(0) if needs_bias else None,
        )


def linear(self: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Stand in for Linear.forward; a compiler chooses its own products."""
    is_fp32 = inputs.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not is_fp32 or inputs.device.type != "cpu" or torch.compiler.is_compiling():
        return functional.linear(inputs, self.weight, self.bias)
    outputs = LinearFunction.apply(inputs.flatten(0, -2), self.weight, self.bias)
    return outputs.unflatten(0, inputs.shape[:-1])
