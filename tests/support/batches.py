"""Random hidden states with a head and labels.

Shapes: V = VOCAB, H = HIDDEN; hidden states (rows, length, H), weight (V, H), labels (rows, length).
"""

import torch

VOCAB, HIDDEN = 37, 8


def batch(
    device: str = "cpu", rows: int = 1, length: int = 12, vocab: int = VOCAB, hidden: int = HIDDEN, share: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random hidden states, weight and labels; each row's first and last positions have a label."""
    generator = torch.Generator().manual_seed(rows * length)
    hidden_states = torch.randn(rows, length, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator)
    labels = torch.randint(vocab, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) > share
    ignored[:, [0, -1]] = False
    labels[ignored] = -100
    return hidden_states.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device)
