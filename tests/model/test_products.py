"""Products by another library are the same products."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sft.model import patch, products
from sft.tools.random_model import build_model
from support.examples import off_by, positions_of


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 5), (9,)])
def test_a_linear_layer_has_the_output_and_gradients_of_pytorchs(bias: bool, shape: tuple[int, ...]):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 4, bias=bias), torch.randn(*shape, 6, requires_grad=True)
    upstream, results = torch.randn(*shape, 4), []
    for compute in (layer, lambda given: products.linear(layer, given)):
        output = compute(inputs)
        results.append([output, *torch.autograd.grad(output, [inputs, *layer.parameters()], upstream)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert off_by(found, expected) <= 1e-6


def test_a_frozen_layer_has_the_gradient_of_its_input_alone():
    layer, inputs = nn.Linear(6, 4).requires_grad_(False), torch.randn(3, 6, requires_grad=True)
    products.linear(layer, inputs).sum().backward()
    assert torch.allclose(inputs.grad, layer.weight.sum(0).expand(3, 6))
    assert layer.weight.grad is None


def test_other_dtypes_and_autocast_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products.LinearFunction, "apply", lambda *given: pytest.fail("not fp32"))
    layer = nn.Linear(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(layer, torch.randn(3, 6)).dtype == torch.bfloat16
    assert products.linear(layer.to(torch.bfloat16), torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vendor", "capability", "is_faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        (None, "AVX512", False),
    ],
)
def test_the_processor_decides(vendor: str | None, capability: str, is_faster: bool, monkeypatch, tmp_path: Path):
    information = tmp_path / "cpuinfo"
    if vendor:
        information.write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "CPU_INFORMATION", information)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.is_faster.__wrapped__() == is_faster


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny-rw"])
def test_both_libraries_train_alike(shape: str, monkeypatch: pytest.MonkeyPatch):
    input_ids, positions = torch.randint(1024, (1, 30)), positions_of((20, 10))
    results = []
    for is_faster in (True, False):
        monkeypatch.setattr(products, "is_faster", lambda is_faster=is_faster: is_faster)
        model = build_model(shape)
        patch.install(model)
        replaced = [name for name, module in model.named_modules() if "forward" in module.__dict__]
        assert any(name.endswith("dense") for name in replaced) == is_faster
        loss = model(input_ids, positions, input_ids).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*results, strict=True):
        assert off_by(found, expected, 1e-3) <= 1e-5
