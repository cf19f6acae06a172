"""Examples of random tokens, and how far a model's outputs and gradients are from those of its own forward.

Shapes: an example is (1, length), token ids and labels alike.
"""

import torch
from transformers import PreTrainedModel

from sft import IGNORE_INDEX

TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}  # in fp32; a GPU may multiply in TF32


def make_examples(lengths: tuple[int, ...], device: str = "cpu", vocab: int = 1024) -> list[torch.Tensor]:
    """Return an example of each length, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (1, length), generator=generator).to(device) for length in lengths]


def positions_of(lengths: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    """Return the positions of a flat batch of examples, (1, T)."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def mask_prompt(example: torch.Tensor) -> torch.Tensor:
    """Return labels for an example whose first third is its prompt."""
    labels = example.clone()
    labels[:, : 1 + example.shape[1] // 3] = IGNORE_INDEX
    return labels


def off_by(actual: torch.Tensor, expected: torch.Tensor, floor: float = 1e-30) -> float:
    """Return the largest difference by the largest expected value, or by `floor` where that is larger."""
    return ((actual - expected).abs().max() / max(expected.abs().max().item(), floor)).item()


def wrong_gradients(model: PreTrainedModel, own: PreTrainedModel, tolerance: float = 1e-5) -> dict[str, float]:
    """Return by how much the gradients of a model are off those of its own forward, where by more than `tolerance`."""
    expected = {name: parameter.grad for name, parameter in own.named_parameters()}
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
    differences = {name: off_by(p.grad, expected.pop(name), floor) for name, p in model.named_parameters()}
    assert not expected
    return {name: difference for name, difference in differences.items() if not difference <= tolerance}
