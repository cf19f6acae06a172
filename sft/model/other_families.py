"""Attention over flat batches in families that let it be chosen, such as Llama and Qwen2; their code stays as it is.

Shapes: T = tokens of the flat batch, H = heads, K = key-value heads (K divides H), D = size of a head.

transformers registers attention functions by name (https://huggingface.co/docs/transformers/attention_interface). Its
own would read the boundaries from the positions and hold a mask of (T, T).
"""

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig, PreTrainedModel

from sft.model.attention import FlatBatch, attend_heads, attend_split_blocks, has_flex_attention

NAME = "flat_batch"
# What a configuration may say of attention that is not over a whole path.
UNLIKE = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size", "attention_sinks")


def fits(config: PretrainedConfig) -> bool:
    """Tell whether a model lets its attention be chosen, and attends to all that comes before by plain softmax."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_plain = layers == {"full_attention"} and not any(getattr(config, name, None) for name in UNLIKE)
    return is_plain and bool(getattr(model_class, "_supports_attention_backend", False))


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    flat: FlatBatch,
    scaling: float | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Return the attended values (1, T, H, D) of query (1, H, T, D), key and value (1, K, T, D), and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotations in fp32 widen them
        query, key = query.to(value.dtype), key.to(value.dtype)
    attend_here = attend_split_blocks if has_flex_attention(query.device) else attend_heads
    return attend_here(query, key, value, flat, scale).unflatten(2, (query.shape[1], -1)), None


def choose(model: PreTrainedModel) -> None:
    """Let a model attend by this module until `give_back`."""
    AttentionInterface.register(NAME, attend)
    model.attention_before = model.config._attn_implementation
    model.config._attn_implementation = NAME


def is_chosen(module: nn.Module) -> bool:
    """Tell whether a module is a model that attends by this module."""
    return "attention_before" in module.__dict__


def give_back(model: PreTrainedModel) -> None:
    """Let a model attend as before `choose`."""
    model.config._attn_implementation = model.__dict__.pop("attention_before")
