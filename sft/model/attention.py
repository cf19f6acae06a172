"""Attention over one flat batch: several examples, each attending only to itself, and what they share computed once.

Shapes: T = tokens of the flat batch, N = T / 128, H = heads, K = key-value heads (K divides H), D = size of a head.

transformers' own forwards know padding but no boundaries, so examples in one sequence would read one another. Here
each example is attended as if it were alone: causal, with positions from 0. Tokens that several examples begin with lie
in the batch once, before all that continues them. Nothing of size (T, T) is ever held.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton
from transformers import PreTrainedModel
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

from sft.model.node_attention import Node, NodeAttention, Part, parts_of

BLOCK_SIZE = 128  # FlexAttention works on squares of 128 queries and 128 keys
# Falcon-7b's backward would otherwise run one thread block per block of keys, which loops over 71 heads.
EXPANDS_KEYS = True
# Sizes and warps are FlexAttention's own. ROWS_GUARANTEED_SAFE would be wrong: a query whose example begins inside the
# first block of keys that it meets sees nothing of the keys before, and the maximum over nothing would be NaN.
KERNEL_OPTIONS: dict = {}
OLDEST_WITH_BLOCKS = (8, 0)  # compute capability of FlexAttention's GPUs
HEAD_ALIGNMENT = 8  # elements; GPU kernels without a (T, T) need a multiple of it as the size of a head

Rotations = tuple[torch.Tensor, torch.Tensor]  # RoPE's cosines and sines, each (1, T, D)


@dataclass
class FlatBatch:
    """What attention must know of a flat batch beside its hidden states; made once per forward, shared by all layers.

    `position_ids`, int64 (1, T), count from 0 in each example. `key_bias`, fp32 (H, T), is what ALiBi adds to the
    scaled score of each key; it is None if the model has RoPE. `subtree_ends`, int64 (1, T), is where the tokens end
    that continue each token, as `sft.data.trees` has it; by default examples lie end to end and share nothing.
    """

    position_ids: torch.Tensor
    key_bias: torch.Tensor | None = None
    subtree_ends: torch.Tensor | None = None

    def __post_init__(self):
        if self.subtree_ends is None:
            self.subtree_ends = ends_of_examples(self.position_ids)

    @cached_property
    def nodes(self) -> list[Node]:
        """Return the runs of tokens with one subtree's end, in the order of the batch: after those they continue."""
        ends = self.subtree_ends[0]
        starts = functional.pad(ends[1:] != ends[:-1], (1, 0), value=True).nonzero()[:, 0]
        starts, subtree_ends = torch.stack([starts, ends[starts]]).tolist()  # once, since it waits for the device
        return list(zip(starts, [*starts[1:], len(ends)], subtree_ends, strict=True))

    @cached_property
    def parts(self) -> list[Part]:
        """Return which queries attend to which keys, node by node."""
        return parts_of(self.nodes)

    @cached_property
    def paths(self) -> list[tuple[list[slice], int]]:
        """Return, for each node that nothing continues, the places of its path, and how many no path before it has."""
        paths, path, done = [], [], 0
        for node in self.nodes:
            start, end, subtree_ends = node
            path = [*(before for before in path if start < before[2]), node]
            if end == subtree_ends:
                paths.append(([slice(first, last) for first, last, _ in path], end - done))
                done = end
        return paths

    @cached_property
    def block_mask(self) -> BlockMask:
        """Return which blocks of keys each block of queries meets, and the reverse, from the subtrees' ends alone."""
        ends = self.subtree_ends[0]
        length = len(ends)
        # The unused tail of the last block is met by no query.
        blocks = functional.pad(ends, (0, -length % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
        starts = torch.arange(len(blocks), device=ends.device) * BLOCK_SIZE
        row, column = starts[:, None], starts[None, :]
        met = (column < row) & (blocks.amax(1) > row) | (column == row)
        # All queries continue all keys: the mask needs no look at single tokens.
        full = (column < row) & (blocks.amin(1) >= row + BLOCK_SIZE)
        partial = met & ~full
        kinds = torch.stack([partial, full, partial.T, full.T])  # by queries, and by keys for the backward
        counts = kinds.sum(2, dtype=torch.int32)[:, None, None]
        # BlockMask.from_kv_blocks would make the same in seven times the time.
        indices = kinds.byte().argsort(dim=2, descending=True, stable=True).int()[:, None, None]
        names = ("kv", "full_kv", "q", "full_q")
        named = {f"{name}_num_blocks": counts[kind] for kind, name in enumerate(names)}
        named |= {f"{name}_indices": indices[kind] for kind, name in enumerate(names)}
        size = (BLOCK_SIZE, BLOCK_SIZE)
        return BlockMask(seq_lengths=(length, length), BLOCK_SIZE=size, mask_mod=self.mask_mod, **named)

    @property
    def mask_mod(self):
        """Return FlexAttention's mask function: a query meets the keys that it continues, and its own."""
        ends = self.subtree_ends[0]

        def mask(batch, head, query, key):
            return (key <= query) & (query < ends[key])

        return mask

    @property
    def score_mod(self):
        """Return FlexAttention's score function, which adds ALiBi in fp32; None without ALiBi."""
        key_bias = self.key_bias
        if key_bias is None:
            return None

        def add_bias(score, batch, head, query, key):
            return score + key_bias[head, key]

        return add_bias


@torch.compiler.disable  # where it is compiled, it is compiled by itself
def attend(packed: torch.Tensor, flat: FlatBatch, rotations: Rotations | None = None) -> torch.Tensor:
    """Return the attended values (1, T, H * D) of a packed projection (1, T, K, H / K + 2, D).

    Each of the K groups holds its queries, one key and one value. Scores are scaled by 1 / sqrt(D). `rotations` are
    RoPE's cosines and sines, None if the model has ALiBi.
    """
    if torch.is_autocast_enabled(packed.device.type):  # 4-bit projections return the dtype they were given, fp32
        packed = packed.to(torch.get_autocast_dtype(packed.device.type))
    attend_here = attend_by_blocks if has_flex_attention(packed.device) else attend_by_paths
    return attend_here(packed, flat, rotations)


@cache
def has_flex_attention(device: torch.device) -> bool:
    """Tell whether FlexAttention runs on a device: a GPU of compute capability 8.0 or newer, with Triton."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_WITH_BLOCKS and has_triton()


def split(packed: torch.Tensor, rotations: Rotations | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query (1, H, T, D), key and value (1, K, T, D) of a packed projection, rotated by RoPE if it is used."""
    query, key, value = packed.split([packed.shape[3] - 2, 1, 1], dim=3)
    query, key, value = (heads.flatten(2, 3).transpose(1, 2) for heads in (query, key, value))
    if rotations is not None:
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *rotations)
        # Under autocast the rotations are fp32 and the values are not; the kernels take one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
    return query, key, value


def attend_by_blocks(packed: torch.Tensor, flat: FlatBatch, rotations: Rotations | None = None) -> torch.Tensor:
    """Attend with one FlexAttention kernel; T must fill whole blocks.

    With a score function, its backward gives NaN in a last block that is not full (pytorch/pytorch issue 153799).
    """
    blocks = (1, -1, BLOCK_SIZE)
    if rotations is not None:
        rotations = tuple(each.view(*blocks, each.shape[-1]) for each in rotations)
    return _compiled_for_blocks()(packed.unflatten(1, blocks[1:]), rotations, flat.score_mod, flat.block_mask)


@cache
def _compiled_for_blocks():
    return torch.compile(_attend_blocks)


def _attend_blocks(packed: torch.Tensor, rotations: Rotations | None, score_mod, block_mask: BlockMask):
    """Attend inside the compiled function; packed is (1, N, BLOCK_SIZE, K, H / K + 2, D), rotations alike.

    Whole blocks come in and are split here, so that the compiler knows every stride, and that T is a multiple of a
    block: only then do its kernels load keys and values asynchronously.
    """
    if rotations is not None:
        rotations = tuple(each.flatten(1, 2) for each in rotations)
    return _flex(*split(packed.flatten(1, 2), rotations), score_mod, block_mask, None)


def attend_split_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, flat: FlatBatch, scale: float
) -> torch.Tensor:
    """Attend with one FlexAttention kernel to heads that are split already, as `attend_heads` does without."""
    blocks = [heads.transpose(1, 2).contiguous().unflatten(1, (-1, BLOCK_SIZE)) for heads in (query, key, value)]
    return _compiled_for_split_blocks()(*blocks, flat.block_mask, scale)


@cache
def _compiled_for_split_blocks():
    return torch.compile(_attend_split_blocks)


def _attend_split_blocks(query, key, value, block_mask: BlockMask, scale: float) -> torch.Tensor:
    heads = (each.flatten(1, 2).transpose(1, 2) for each in (query, key, value))
    return _flex(*heads, None, block_mask, scale)


def _flex(query, key, value, score_mod, block_mask: BlockMask, scale: float | None) -> torch.Tensor:
    """Return the attended values (1, T, H * D) of query (1, H, T, D), key and value (1, K, T, D)."""
    num_heads, num_groups = query.shape[1], key.shape[1]
    if num_groups == 1 and EXPANDS_KEYS:
        key, value = (heads.expand(-1, num_heads, -1, -1) for heads in (key, value))
    context = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=num_heads != key.shape[1],
        kernel_options=KERNEL_OPTIONS,
    )
    return context.transpose(1, 2).flatten(2)


def attend_by_paths(packed: torch.Tensor, flat: FlatBatch, rotations: Rotations | None = None) -> torch.Tensor:
    """Attend with PyTorch's causal kernels, whose memory is linear in T."""
    query, key, value = split(packed, rotations)
    return attend_heads(query, key, value, flat, 1 / math.sqrt(query.shape[-1]))


def attend_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, flat: FlatBatch, scale: float
) -> torch.Tensor:
    """Return the attended values (1, T, H * D) of query (1, H, T, D), key and value (1, K, T, D).

    PyTorch's kernels take a bias only with a mask of (T, T), so ALiBi goes in as one more dimension of the head: 1 in
    every query, the bias of the key by `scale` in every key. Keys and values are repeated for each query head: on older
    GPUs PyTorch has no such kernel for grouped ones, and would hold scores of (H, T, T).
    """
    dtype, head_dim = query.dtype, query.shape[-1]
    by_nodes = attends_by_nodes(query.device)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and (flat.key_bias is not None or not by_nodes):
        key, value = (heads.repeat_interleave(repeats, 1) for heads in (key, value))
    if flat.key_bias is not None:
        bias = (flat.key_bias / scale)[None, :, :, None]
        query, key = functional.pad(query.float(), (0, 1), value=1.0), torch.cat([key.float(), bias], dim=-1)
        if query.device.type != "cpu":
            query, key = (functional.pad(heads, (0, HEAD_ALIGNMENT - 1)) for heads in (query, key))
        value = functional.pad(value.float(), (0, query.shape[-1] - head_dim))
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the bias to 16 bits
        if by_nodes:
            context = NodeAttention.apply(query, key, value, flat.parts, scale)
        else:
            context = torch.cat([_end_of_path(query, key, value, *path, scale) for path in flat.paths], dim=2)
    return context[..., :head_dim].to(dtype).transpose(1, 2).flatten(2)


def attends_by_nodes(device: torch.device) -> bool:
    """Tell whether a device has the kernel of `sft.model.node_attention`."""
    return device.type == "cpu"


def _end_of_path(query, key, value, path: list[slice], num_tokens: int, scale: float) -> torch.Tensor:
    """Return the attended values of the last `num_tokens` tokens of a path, (1, H, num_tokens, D)."""
    heads = (query, key, value)
    if len(path) > 1:
        heads = (torch.cat([each[:, :, part] for part in path], dim=2) for each in heads)
    else:
        heads = (each[:, :, path[0]] for each in heads)
    return functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)[:, :, -num_tokens:]


def bloom_attention(self, hidden_states: torch.Tensor, residual: torch.Tensor, attention_mask: FlatBatch, **unused):
    """Stand in for BloomAttention.forward; hidden states and residual are (1, T, H * D)."""
    packed = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, self.head_dim))
    output = self.dense(attend(packed, attention_mask))
    return modeling_bloom.dropout_add(output, residual, self.hidden_dropout, self.training), None


def falcon_attention(self, hidden_states: torch.Tensor, attention_mask: FlatBatch, position_embeddings=None, **unused):
    """Stand in for FalconAttention.forward; hidden states are (1, T, H * D).

    For each key-value head the fused projection holds its queries, the key and the value. Falcon-7b has one such
    group, Falcon-40b several, rw shapes one per head.
    """
    packed = self.query_key_value(hidden_states).unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
    rotations = position_embeddings if attention_mask.key_bias is None else None
    return self.dense(attend(packed, attention_mask, rotations)), None


FORWARDS = {
    modeling_bloom.BloomAttention: bloom_attention,
    modeling_falcon.FalconAttention: falcon_attention,
}


def key_bias(model: PreTrainedModel, position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return what ALiBi adds to the scaled scores of each key, fp32 (H, T); None for a model without ALiBi.

    The values are transformers' own, Falcon's rounding to bf16 included. BLOOM adds them to the scaled scores; Falcon
    adds them first and scales both.
    """
    config = model.config
    ones = torch.ones_like(position_ids)
    if config.model_type == "bloom":
        alibi = modeling_bloom.build_alibi_tensor(ones, config.n_head, torch.float32)
    elif config.alibi:
        alibi = modeling_falcon.build_alibi_tensor(ones, config.num_attention_heads, torch.float32)
        alibi = alibi / math.sqrt(config.head_dim)
    else:
        return None
    return alibi[:, 0, position_ids[0]]


def ends_of_examples(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the subtrees' ends, int64 (1, T), of examples end to end, whose positions start from 0."""
    length = position_ids.shape[1]
    starts = torch.arange(length, device=position_ids.device).masked_fill(position_ids[0] != 0, length)
    return functional.pad(starts[1:], (0, 1), value=length).flip(0).cummin(0).values.flip(0)[None]


def hidden_states_of(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    subtree_ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the last hidden states (1, T, H * D) of BloomModel or FalconModel over a flat batch.

    `input_ids`, `position_ids` and `subtree_ends` are int64 (1, T). The attention of this module must be installed.
    """
    hidden_states = model.word_embeddings(input_ids)
    if model.config.model_type == "bloom":
        hidden_states, rotations = model.word_embeddings_layernorm(hidden_states), None
    else:
        rotations = model.rotary_emb(hidden_states, position_ids=position_ids)
    flat = FlatBatch(position_ids, key_bias(model, position_ids), subtree_ends)
    for block in model.h:
        hidden_states, _ = block(hidden_states, alibi=None, attention_mask=flat, position_embeddings=rotations)
    return model.ln_f(hidden_states)
