"""Train tiny models on a device that is neither a CPU nor CUDA, as far as PyTorch knows.

    python tests/support/elsewhere.py bloom-tiny float32      (a process has room for one such device)

Its tensors hold a CPU tensor each and compute with it, so what they compute can be compared with the CPU; what PyTorch
asks of them it asks of an Ascend NPU, too: no code may need a name of a device that it knows.
"""

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sft.data.collate import flatten
from sft.model import attention, patch
from sft.tools.random_model import build_model

DEVICE = "elsewhere"
# Operations whose result the host must wait for: numbers that it reads, and sizes that depend on them.
READING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}
WAITS: list[str] = []  # what the host has waited for


class There(torch.Tensor):
    """A tensor on the device; `here` is what it holds."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        """Return a tensor of the same shape and dtype that claims to be on the device."""
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        there = torch.Tensor._make_wrapper_subclass(cls, here.size(), device=f"{DEVICE}:0", **layout)
        there.here = here
        return there

    def tolist(self) -> list:
        """Return the numbers."""
        WAITS.append("tolist")
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run an operation on what its tensors hold."""
        return compute(function, *args, **(kwargs or {}))


def compute(function, *args, **kwargs):
    """Run an operation on the CPU; its result is on the device, unless the CPU was asked for."""
    leaves_for_cpu, name = str(kwargs.get("device")) == "cpu", function.overloadpacket.__name__
    comes_from_cpu = any(type(each) is torch.Tensor and each.ndim for each in args)
    if leaves_for_cpu or comes_from_cpu or name in READING:
        WAITS.append(name)
    given = {id(there.here): there for there in (*args, *kwargs.values()) if isinstance(there, There)}

    def to_here(value):
        is_device = isinstance(value, torch.device) and value.type == DEVICE
        return value.here if isinstance(value, There) else torch.device("cpu") if is_device else value

    def to_there(value):
        if not isinstance(value, torch.Tensor) or leaves_for_cpu:
            return value
        return given.get(id(value)) if id(value) in given else There(value)  # what was written in place is the same

    args, kwargs = tree_map(to_here, (args, kwargs))
    return tree_map(to_there, function(*args, **kwargs))


def loss_and_gradients(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    """Return the loss of a batch, and every gradient."""
    loss = model(**batch, num_items_in_batch=torch.full((), 40.0, device=batch["input_ids"].device)).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def move(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model on the device."""
    moved = copy.deepcopy(model)
    for module in moved.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                there = There(tensor.detach().clone())
                setattr(module, name, torch.nn.Parameter(there) if name in module._parameters else there)
    moved.tie_weights()
    return moved


def compare(shape: str, dtype: torch.dtype) -> dict:
    """Return by how much loss and gradients on the device are off those on the CPU, and what its attention is given."""
    library = torch.library.Library("_", "IMPL")  # its name keeps it alive
    library.fallback(compute, "PrivateUse1")
    given, own = [], functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        given.append([query.device.type, *(heads.shape[1] for heads in (query, key, value)), query.shape[-1]])
        return own(query, key, value, **options)

    functional.scaled_dot_product_attention = watched
    rows = [{"input_ids": list(range(start, start + 30)), "lengths": [10, 20]} for start in (5, 90)]
    batch, model = flatten(rows), build_model(shape).to(dtype)
    moved = move(model)
    patch.install(model), patch.install(moved)
    assert not attention.has_flex_attention(torch.device(DEVICE))
    WAITS.clear()
    there = {name: There(each) if torch.is_tensor(each) else each for name, each in batch.items()}
    loss, gradients = loss_and_gradients(moved, there)
    waits = list(WAITS)
    expected, expected_gradients = loss_and_gradients(model, batch)
    assert gradients.keys() == expected_gradients.keys()
    worst = max(
        ((gradients[name].here - gradient).norm() / gradient.norm().clamp(min=1e-3)).item()
        for name, gradient in expected_gradients.items()
    )
    off_by = abs(loss.here - expected).item() / expected.item()
    return {"loss": off_by, "gradients": worst, "given": given, "waits": waits}


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    print(json.dumps(compare(sys.argv[1], getattr(torch, sys.argv[2]))))
