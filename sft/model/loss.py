"""The next-token loss from hidden states, without logits for the whole batch.

Shapes: T = tokens of the batch, N = labelled positions, H = hidden size, V = vocabulary, C = positions of a chunk.

BLOOM's vocabulary has 250,880 entries: at 2,048 tokens one fp32 copy of the logits is 1.9 GiB, and the usual loss
holds three. Here only positions with a label are multiplied, a chunk at a time, and each chunk's gradient is taken
while its logits are there.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._triton import has_triton

from sft import IGNORE_INDEX
from sft.model import products

# Bytes of fp32 logits held at a time: little beside the memory of a GPU, or of a host that its GPU shares.
CHUNK_BYTES, CHUNK_BYTES_ON_HOST = 1024 * 2**20, 256 * 2**20


@dataclass
class TiedGradient:
    """The gradient (V, H), fp32, of a weight that is both head and embedding, passed from one to the other."""

    tensor: torch.Tensor | None = None


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden_states @ weight.T`, summed over the positions and divided by `num_items`."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, num_items: float | torch.Tensor, tied: TiedGradient | None):
        """Return the loss, fp32, of hidden states (N, H), weight (V, H) and labels (N,), and keep its gradients."""
        dtype = _compute_dtype(weight)
        inputs, matrix = hidden_states.to(dtype), weight.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight, scale = None, 1 / num_items
        # A number on the device is not waited for: it divides the gradients in the backward.
        factor, ctx.left = (1.0, scale) if torch.is_tensor(scale) else (scale, None)
        loss = torch.zeros((), device=weight.device)
        for chunk in _chunks(len(labels), len(weight), weight.device.type):
            logits = grad_logits = None  # or those of the last chunk would live until this one's are made
            logits = _product(inputs[chunk], matrix.T)
            chunk_loss, grad_logits = softmax_loss(logits, labels[chunk], dtype, needs_hidden or needs_weight)
            loss += chunk_loss
            if needs_hidden:
                grad_hidden[chunk] = _product(grad_logits, matrix) * factor
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad_logits.T, inputs[chunk], factor)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.grads, ctx.tied, ctx.dtype = (grad_hidden, grad_weight), tied, weight.dtype
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: torch.Tensor):
        """Return the gradients that forward kept, times `grad_loss`."""
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        # On a CPU this saves a pass over (V, H) that changes nothing; elsewhere, looking would mean waiting.
        if ctx.left is not None or grad_loss.device.type != "cpu" or grad_loss != 1:
            factor = grad_loss if ctx.left is None else grad_loss * ctx.left
            for grad in (grad_hidden, grad_weight):
                if grad is not None:
                    grad.mul_(factor)
        if ctx.tied is not None and grad_hidden is not None and grad_weight is not None:
            ctx.tied.tensor = grad_weight if ctx.tied.tensor is None else ctx.tied.tensor.add_(grad_weight)
            grad_weight = None
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.dtype), None, None, None


class TiedEmbedding(torch.autograd.Function):
    """The embedding of a weight that is also the head; it returns the gradient of both.

    The head hands its gradient on, and the rows of this one are added to it in place: a gradient of its own would be
    a second tensor as large as the vocabulary, mostly zeros. The sum is in fp32, whatever the dtype of the weight: a
    token that occurs a thousand times would be rounded as often.
    """

    @staticmethod
    def forward(ctx, input_ids: torch.Tensor, weight: torch.Tensor, tied: TiedGradient) -> torch.Tensor:
        """Return the embeddings (B, T, H) of `input_ids`, int64 (B, T)."""
        ctx.save_for_backward(input_ids)
        ctx.tied, ctx.shape, ctx.dtype = tied, weight.shape, weight.dtype
        return functional.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_embeddings: torch.Tensor):
        """Return the gradient of the weight: what the head left, if anything, and this one's rows."""
        (input_ids,) = ctx.saved_tensors
        total, ctx.tied.tensor = ctx.tied.tensor, None
        if total is None:
            total = grad_embeddings.new_zeros(ctx.shape, dtype=torch.float32)
        total.index_add_(0, input_ids.flatten(), grad_embeddings.flatten(0, -2).to(total.dtype))
        return None, total.to(ctx.dtype), None


# ------------------------------------------------------------------------------------------- one chunk, on its device


def softmax_loss(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, needs_gradient: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed cross entropy of logits, fp32 (C, V), and its gradient by them in `dtype`, (C, V), or None.

    The labels are int64 (C,). The logits are overwritten where PyTorch runs operation by operation; compiled for a GPU
    they are read twice, and the gradient is written once: 18 bytes a logit with the products, where it was 34.
    """
    if needs_gradient and _has_kernels(logits.device):
        torch._dynamo.maybe_mark_dynamic(logits, 0)
        torch._dynamo.maybe_mark_dynamic(labels, 0)
        return _compiled_softmax_loss()(logits, labels, dtype)
    log_probs, targets = torch.log_softmax(logits, dim=-1, out=logits), labels[:, None]
    loss = -log_probs.gather(1, targets).sum()
    if not needs_gradient:
        return loss, None
    gradient = log_probs.exp_().scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float))
    return loss, gradient.to(dtype)


def _softmax_loss(logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `softmax_loss` does, in operations that a compiler fuses into two passes."""
    shifted = logits - logits.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    loss = (total.log() - shifted.gather(1, labels[:, None])).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return loss, (shifted.exp() / total - is_target.float()).to(dtype)


@cache
def _compiled_softmax_loss():
    return torch.compile(_softmax_loss)


@cache
def _has_kernels(device: torch.device) -> bool:
    """Tell whether to compile for a device; on a CPU PyTorch's own kernels are as fast."""
    return device.type == "cuda" and has_triton()


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return what a linear layer would compute in: autocast's dtype, or else the weight's own."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def chunk_bytes(device_type: str) -> int:
    """Return how many bytes of fp32 logits are held at a time on a device."""
    return CHUNK_BYTES_ON_HOST if device_type in ("cpu", "mps") else CHUNK_BYTES


def _chunks(num_positions: int, vocab_size: int, device_type: str) -> list[slice]:
    """Return slices of nearly equal size that cover the positions, each within `chunk_bytes` of fp32 logits."""
    most = max(1, chunk_bytes(device_type) // (4 * vocab_size))
    size = math.ceil(num_positions / max(1, math.ceil(num_positions / most)))
    return [slice(start, start + size) for start in range(0, num_positions, max(1, size))]


@cache
def _multiplies_into_fp32(device: torch.device) -> bool:
    """Tell whether a device's products of 16-bit matrices can be fp32: CUDA's can."""
    matrix = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(matrix, matrix, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


@cache
def _adds_into_fp32(device: torch.device) -> bool:
    """Tell whether a device adds products of 16-bit matrices to an fp32 matrix in place, in one operation."""
    ones, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, torch.float32, alpha=2.0, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1 + 2 * 16).all())


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply matrices into fp32."""
    if left.dtype != torch.float32 and _multiplies_into_fp32(left.device):
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.device.type == "cpu" and left.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return products.product(left, right)
    return torch.mm(left, right).float()


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `total` plus `scale` times the product of two matrices, in place and in fp32; None counts as zeros."""
    if left.dtype == torch.float32:
        if total is None:
            return torch.mm(left, right * scale)
        return total.addmm_(left, right, alpha=scale)
    if total is not None and _adds_into_fp32(left.device):
        return torch.addmm(total, left, right, torch.float32, alpha=scale, out=total)
    product = _product(left, right).mul_(scale)
    return product if total is None else total.add_(product)


# ---------------------------------------------------------------------------------------------------------- the loss


def label_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions whose next token has a label, int64 (N,), of labels int64 (B, T) end to end.

    On a GPU this waits for the device, so the collator does it beforehand.
    """
    is_labelled = functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return is_labelled.flatten().nonzero()[:, 0]


@torch.compiler.disable  # its own kernels, and shapes that change with every batch
def next_token_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: float | torch.Tensor | None = None,
    tied: TiedGradient | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross entropy of each position's next token, in nats, over the labels that are not IGNORE_INDEX.

    `hidden_states` are (B, T, H), `labels` int64 (B, T) and unshifted, `weight` is the head's (V, H). Given the
    `positions`, int64 (N,), that predict, of all B * T, `labels` are what each should predict, (N,). Summed and divided
    by `num_items_in_batch`, by default the number of labels; zero, and with a gradient, where there is none. `tied` is
    that of the embedding of the same hidden states.
    """
    if positions is None:
        positions = label_positions(labels)
        labels = labels.flatten()[positions + 1]
    num_items = len(positions) if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(num_items) and num_items.device.type != "cpu":
        num_items = num_items.to(torch.float32).clamp(min=1)
    else:
        num_items = max(float(num_items), 1.0)
    inputs = hidden_states.flatten(0, 1).index_select(0, positions)
    if not torch.is_grad_enabled():  # the function only sees which of its inputs need a gradient
        inputs, weight = inputs.detach(), weight.detach()
    return LinearCrossEntropy.apply(inputs, weight, labels.flatten(), num_items, tied)
