"""NEFTune's noise on the embeddings of a flat batch: as strong as for each example alone, whatever it is packed with.

Shapes: T = tokens of all examples in a flat batch, D = width of the embeddings.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


def install(model: PreTrainedModel, alpha: float) -> None:
    """Add noise to a patched model's embeddings while it trains: uniform, up to alpha / sqrt(L D) for L tokens.

    L is the length of an example, as in the paper (https://arxiv.org/abs/2310.05914), not that of the whole batch.
    """
    model.noise_alpha = alpha
    model.get_input_embeddings().register_forward_hook(_add_noise)


def tell_lengths(model: PreTrainedModel, position_ids: torch.Tensor) -> None:
    """Tell a model's embeddings the largest noise on each token of the batch that comes next, (1, T)."""
    if alpha := getattr(model, "noise_alpha", None):
        embeddings = model.get_input_embeddings()
        example_ids = (position_ids[0] == 0).cumsum(0)
        lengths = example_ids.new_zeros(len(example_ids) + 1)
        lengths.scatter_add_(0, example_ids, torch.ones_like(example_ids))
        embeddings.largest_noise = alpha / (lengths[example_ids] * embeddings.embedding_dim).sqrt()[None, :, None]


def _add_noise(embeddings: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    if not embeddings.training:
        return output
    return output + torch.empty_like(output).uniform_(-1, 1) * embeddings.largest_noise.to(output.dtype)
