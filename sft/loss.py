"""The next-token loss from hidden states, without logits for the whole batch.

Shapes: N = labelled positions, H = hidden size, V = vocabulary, C = positions of a chunk.

BLOOM's vocabulary has 250,880 entries: at 2,048 tokens one fp32 copy of the logits is 1.9 GiB, and the usual loss
holds three. Here only positions with a label are multiplied, a chunk at a time, and each chunk's gradient is taken
while its logits are there.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE_INDEX = -100  # a position with this label takes no part in the loss
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}  # of fp32 logits held at a time


@dataclass
class TiedGradient:
    """The gradient (V, H) of a weight that is both head and embedding, on its way from the head to the embedding."""

    tensor: torch.Tensor | None = None


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden_states @ weight.T`, summed over the positions and divided by `num_items`."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, num_items: float, tied: TiedGradient | None):
        """Return the loss, fp32, of hidden states (N, H), weight (V, H) and labels (N,), and keep its gradients."""
        dtype = _compute_dtype(weight)
        inputs, matrix = hidden_states.to(dtype), weight.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = None
        loss = torch.zeros((), device=weight.device)
        for chunk in _chunks(len(labels), len(weight), weight.device.type):
            log_probs = grad_logits = None  # or the last chunk's would be there until this one's are made
            log_probs = _product(inputs[chunk], matrix.T)
            torch.log_softmax(log_probs, dim=-1, out=log_probs)
            targets = labels[chunk, None]
            loss -= log_probs.gather(1, targets).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad_logits = log_probs.exp_().scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float))
            grad_logits = grad_logits.to(dtype)
            if needs_hidden:
                grad_hidden[chunk] = _product(grad_logits, matrix) / num_items
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad_logits.T, inputs[chunk], 1 / num_items)
        if needs_weight:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.grads, ctx.tied = (grad_hidden, grad_weight), tied
        return loss / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: torch.Tensor):
        """Return the gradients that forward kept, times `grad_loss`."""
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if grad_loss.is_cuda or grad_loss != 1:  # on a CPU, a pass over (V, H) that changes nothing is worth sparing
            for grad in (grad_hidden, grad_weight):
                if grad is not None:
                    grad.mul_(grad_loss)
        if ctx.tied is not None and grad_hidden is not None and grad_weight is not None:
            ctx.tied.tensor = grad_weight if ctx.tied.tensor is None else ctx.tied.tensor.add_(grad_weight)
            grad_weight = None
        return grad_hidden, grad_weight, None, None, None


class TiedEmbedding(torch.autograd.Function):
    """The embedding of a weight that is also the head; it returns the gradient of both.

    The head hands its gradient on, and the rows of this one are added to it in place: a gradient of its own would be
    a second tensor of the vocabulary's size, mostly zeros.
    """

    @staticmethod
    def forward(ctx, input_ids: torch.Tensor, weight: torch.Tensor, tied: TiedGradient) -> torch.Tensor:
        """Return the embeddings (B, T, H) of `input_ids`, int64 (B, T)."""
        ctx.save_for_backward(input_ids)
        ctx.tied, ctx.shape = tied, weight.shape
        return functional.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_embeddings: torch.Tensor):
        """Return the gradient of the weight: what the head left, if anything, and this one's rows."""
        (input_ids,) = ctx.saved_tensors
        total, ctx.tied.tensor = ctx.tied.tensor, None
        if total is None:
            total = grad_embeddings.new_zeros(ctx.shape)
        total.index_add_(0, input_ids.flatten(), grad_embeddings.flatten(0, -2))
        return None, total, None


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return what a linear layer would compute in: autocast's dtype, or else the weight's own."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def _chunks(num_positions: int, vocab_size: int, device_type: str) -> list[slice]:
    """Return slices of nearly equal size that cover the positions, each of at most CHUNK_BYTES of fp32 logits."""
    most = max(1, CHUNK_BYTES[device_type] // (4 * vocab_size))
    size = math.ceil(num_positions / max(1, math.ceil(num_positions / most)))
    return [slice(start, start + size) for start in range(0, num_positions, max(1, size))]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply matrices into fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.device.type == "cpu" and left.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return torch.mm(left, right).float()


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `total` plus `scale` times the product of two matrices, in place and in fp32; None counts as zeros."""
    if left.dtype == torch.float32:
        if total is None:
            return torch.mm(left, right * scale)
        return total.addmm_(left, right, alpha=scale)
    product = _product(left, right).mul_(scale)
    return product if total is None else total.add_(product)


@torch.compiler.disable  # its own kernels, and shapes that change with every batch
def next_token_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: float | None = None,
    tied: TiedGradient | None = None,
) -> torch.Tensor:
    """Return the cross entropy of each position's next token, in nats, over the labels that are not IGNORE_INDEX.

    `hidden_states` are (B, T, H), `labels` int64 (B, T) and unshifted, `weight` is the head's (V, H). Summed and
    divided by `num_items_in_batch`, by default the number of labels; zero, and with a gradient, where there is none.
    `tied` is that of the embedding of the same hidden states.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORE_INDEX
    targets = targets[labelled]
    num_items = float(len(targets) if num_items_in_batch is None else num_items_in_batch)
    inputs = hidden_states[:, :-1][labelled]
    if not torch.is_grad_enabled():  # the function sees only which of its inputs want a gradient
        inputs, weight = inputs.detach(), weight.detach()
    return LinearCrossEntropy.apply(inputs, weight, targets, max(num_items, 1.0), tied)
