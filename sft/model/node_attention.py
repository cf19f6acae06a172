"""Attention over a forest on a CPU: each query meets each key of its path once, by PyTorch's own kernel.

Shapes: T = tokens of the flat batch, H = heads, K = key-value heads (K divides H), D = size of a head.

The keys of a path lie in several nodes. The kernel attends to those of one node at a time, and tells the logarithm of
the sum of the exponentials of a query's scores; with it parts are weighed against one another, as FlashAttention does
with blocks (https://arxiv.org/abs/2205.14135). The backward of a part is the kernel's own: it needs only the output and
the logarithm over all parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

Node = tuple[int, int, int]  # the places of its first token, past its last one, and where its subtree ends


class Part(NamedTuple):
    """Queries that attend to the keys of one node: its own, causally, or those of all nodes that continue it."""

    queries: slice
    keys: slice
    is_causal: bool
    is_first: bool  # of these queries; all of them, or none


def parts_of(nodes: Sequence[Node]) -> list[Part]:
    """Return the parts of attention over a forest, each node's after those of the nodes that it continues."""
    parts, tree_ends = [], 0
    for start, end, subtree_ends in nodes:
        assert start < end <= subtree_ends, (start, end, subtree_ends)
        is_root = start >= tree_ends
        tree_ends = max(tree_ends, subtree_ends)
        keys = slice(start, end)
        parts.append(Part(keys, keys, is_causal=True, is_first=is_root))
        if end < subtree_ends:
            parts.append(Part(slice(end, subtree_ends), keys, is_causal=False, is_first=is_root))
    return parts


class NodeAttention(torch.autograd.Function):
    """Softmax attention over the paths of a forest."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Sequence[Part], scale: float):
        """Return the attended values (1, H, T, D) of query (1, H, T, D), key and value (1, K, T, D), of one dtype.

        Keys and values are repeated for each query head, and are kept as they were.
        """
        _, num_heads, length, head_dim = query.shape
        every_key, every_value = _for_each_head(num_heads, key, value)
        output = query.new_empty(1, length, num_heads, head_dim).transpose(1, 2)
        log_sums = query.new_empty(1, length, num_heads, dtype=torch.float32).transpose(1, 2)
        for part in parts:
            heads = (query, every_key, every_value)
            own = [each[:, :, place] for each, place in zip(heads, _places(part), strict=True)]
            context, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *own, is_causal=part.is_causal, scale=scale
            )
            so_far, log_so_far = output[:, :, part.queries], log_sums[:, :, part.queries]
            if part.is_first:
                so_far.copy_(context), log_so_far.copy_(log_sum)
                continue
            weight = torch.sigmoid(log_sum - log_so_far)[..., None]
            so_far.copy_(torch.lerp(so_far.float(), context.float(), weight))
            log_so_far.copy_(torch.logaddexp(log_so_far, log_sum))
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        """Return the gradients of query, key and value."""
        query, kept_key, kept_value, output, log_sums = ctx.saved_tensors
        key, value = _for_each_head(query.shape[1], kept_key, kept_value)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for part in ctx.parts:
            queries, keys, _ = _places(part)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                output[:, :, queries],
                log_sums[:, :, queries],
                0.0,
                part.is_causal,
                scale=ctx.scale,
            )
            # A node's own queries come to its keys before all others.
            begins = (part.is_first, part.is_causal, part.is_causal)
            for grad, new, place, is_first in zip(grads, found, _places(part), begins, strict=True):
                (grad[:, :, place].copy_ if is_first else grad[:, :, place].add_)(new)
        grad_query, *grads = grads
        num_groups = kept_key.shape[1]
        return grad_query, *(grad.unflatten(1, (num_groups, -1)).sum(2) for grad in grads), None, None


def _for_each_head(num_heads: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return keys or values (1, K, T, D) repeated for each of the query heads, (1, H, T, D)."""
    repeats = num_heads // tensors[0].shape[1]
    return [tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in tensors]


def _places(part: Part) -> tuple[slice, slice, slice]:
    return part.queries, part.keys, part.keys
