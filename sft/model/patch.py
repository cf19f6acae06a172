"""A model patched to train on flat batches, (1, T), of several examples: attention, loss, and a check of both.

`install` replaces forwards of a loaded model, on the instance only: classes, configuration and weights stay as they
are, so a saved folder is a plain one. `remove` takes the patch off again, to generate.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.bloom.modeling_bloom import BloomBlock, BloomGelu
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer, FalconLinear

from sft.model import attention, neftune, other_families, products
from sft.model.attention import FlatBatch
from sft.model.loss import TiedEmbedding, TiedGradient, next_token_loss
from sft.program import UserError

# Largest difference of two logits, relative to the largest logit. A leak moves logits by a tenth or more; rounding in
# 16 bits, with another order of summation, by up to a few hundredths.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
LINEAR = (nn.Linear, FalconLinear)
BLOCKS = (BloomBlock, FalconDecoderLayer)
REPLACED = ("forward", "_compiled_call_impl")  # attributes of an instance that override its class's forward
CHECKED_LENGTHS = (23, 17, 9)  # tokens of the examples that are checked; the third also begins as the first does
NUM_SHARED = 11
OWN_FAMILIES = ("bloom", "falcon")
FAMILIES = "use a bloom, falcon, llama or qwen2 model"


def install(model: PreTrainedModel) -> None:
    """Patch a loaded model to train on flat batches: `model(input_ids, position_ids, labels)` returns the loss.

    BLOOM and Falcon get the attention of `sft.model.attention`, other families that of `sft.model.other_families`.
    Those that it does not fit read the boundaries from `position_ids` themselves, or fail `check`. Raises UserError if
    the model has attention dropout, or a bias in its head.
    """
    if dropout := getattr(model.config, "attention_dropout", 0):
        raise UserError(
            f"attention_dropout is {dropout} in config.json, and is not supported in flat batches; set it to 0.0"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"{model.config.model_type} has a bias in its head, which the loss here does not support; {FAMILIES}"
        )
    for module in model.modules():
        if stand_in := attention.FORWARDS.get(type(module)):
            module.forward = MethodType(stand_in, module)
        elif type(module) in LINEAR and module is not head and products.is_faster():
            module.forward = MethodType(products.linear, module)
        elif isinstance(module, BloomGelu):  # the same formula in one kernel, where BLOOM's takes seven
            module.forward = nn.GELU(approximate="tanh").forward
    head.forward, head.tied = MethodType(_loss_or_logits, head), None
    if embeddings.weight is head.weight and embeddings.padding_idx is None:
        embeddings.forward = MethodType(partial(_embed, head=head), embeddings)
    model.forward = MethodType(forward, model)
    if other_families.fits(model.config):
        other_families.choose(model)


def can_share_prefixes(config: PretrainedConfig) -> bool:
    """Tell whether a model computes what examples begin with in common once for all of them."""
    return config.model_type in OWN_FAMILIES or other_families.fits(config)


def compile_blocks(model: nn.Module) -> None:
    """Compile what surrounds attention and loss, on the instance: norms, GELU, residuals.

    Attention and loss keep kernels of their own, so each layer falls into four parts, each compiled once for all
    layers.
    """
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.compile()


def remove(model: PreTrainedModel) -> None:
    """Take the patch off a model."""
    for module in model.modules():
        for name in REPLACED:
            module.__dict__.pop(name, None)
        if other_families.is_chosen(module):
            other_families.give_back(module)


@contextmanager
def removed(model: PreTrainedModel) -> Iterator[None]:
    """Take the patch off for a while; forwards that others put on top of it are put back too."""
    replaced = [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in REPLACED
        if name in module.__dict__
    ]
    chosen = [module for module in model.modules() if other_families.is_chosen(module)]
    remove(model)
    try:
        yield
    finally:
        for module, name, own in replaced:
            module.__dict__[name] = own
        for module in chosen:
            other_families.choose(module)


def forward(
    self,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    label_positions: torch.Tensor | None = None,
    subtree_ends: torch.Tensor | None = None,
    **unused,
) -> CausalLMOutput:
    """Stand in for the forward of a causal language model: the loss of a flat batch, or its logits without `labels`.

    `input_ids`, `position_ids` (from 0 in each example) and `subtree_ends` are int64 (1, T), as `sft.data.trees` has
    them; without `subtree_ends`, examples lie end to end. `labels`, int64 (1, N), are what the places of
    `label_positions`, (1, N), should predict; without `label_positions`, they are (1, T), as transformers has them. The
    loss is summed and divided by `num_items_in_batch`, by default the number of labels; the logits are (1, T, V).
    """
    length = input_ids.shape[1]
    if attention.has_flex_attention(input_ids.device):
        # Whole blocks for FlexAttention, and few shapes to compile for: up to 127 more tokens, each its own example.
        missing = -length % attention.BLOCK_SIZE
        input_ids, position_ids = (functional.pad(ids, (0, missing)) for ids in (input_ids, position_ids))
        if subtree_ends is not None:
            alone = torch.arange(length, length + missing, device=input_ids.device) + 1
            subtree_ends = torch.cat([subtree_ends, alone[None]], 1)
    neftune.tell_lengths(self, position_ids)
    base, head = self.base_model, self.get_output_embeddings()
    if self.config.model_type in OWN_FAMILIES:
        hidden_states = attention.hidden_states_of(base, input_ids, position_ids, subtree_ends)
    else:
        own = {"flat": FlatBatch(position_ids, subtree_ends=subtree_ends)} if other_families.is_chosen(self) else {}
        hidden_states = base(input_ids=input_ids, position_ids=position_ids, use_cache=False, **own)[0]
    hidden_states = hidden_states[:, :length]
    if labels is None:
        return CausalLMOutput(logits=head(hidden_states))
    positions = None if label_positions is None else label_positions[0]
    return CausalLMOutput(loss=head(hidden_states, labels, num_items_in_batch, positions))


def _loss_or_logits(self, hidden_states: torch.Tensor, labels=None, num_items=None, positions=None) -> torch.Tensor:
    """Stand in for the head's forward; inside it the weight is complete, even where ZeRO-3 splits it over the ranks."""
    if labels is None:
        return type(self).forward(self, hidden_states)
    return next_token_loss(hidden_states, self.weight, labels, num_items, self.tied, positions)


def _embed(self, input_ids: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Stand in for the forward of embeddings tied to the head."""
    head.tied = TiedGradient()
    return TiedEmbedding.apply(input_ids, self.weight, head.tied)


class Leak(NamedTuple):
    """How far a patched model's logits are from its own forward's on each example alone, relative to the largest."""

    alone: float  # one example in a flat batch
    packed: float  # two
    shared: float  # two that begin alike, with what they begin with there once; 0 if the model cannot share


@torch.no_grad()
def measure_leak(model: PreTrainedModel) -> Leak:
    """Measure a patched model on three random examples, of which two begin alike."""
    generator = torch.Generator().manual_seed(0)
    one, other, third = (
        torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
        for length in CHECKED_LENGTHS
    )
    third = torch.cat([one[:, :NUM_SHARED], third], 1)
    with removed(model):
        own = [model(input_ids=example, use_cache=False).logits.float() for example in (one, other, third)]
    positions = [torch.arange(example.shape[1], device=model.device)[None] for example in (one, other, third)]
    scale = max(logits.abs().max() for logits in own)

    def difference(parts: Sequence[torch.Tensor], *numbers: int) -> float:
        expected = torch.cat([own[number] for number in numbers], 1)
        return ((torch.cat(parts, 1) - expected).abs().max() / scale).item()

    def logits(*parts: torch.Tensor, places: Sequence[torch.Tensor], **keywords) -> torch.Tensor:
        return model(input_ids=torch.cat(parts, 1), position_ids=torch.cat(places, 1), **keywords).logits.float()

    alone = [logits(one, places=positions[:1]), logits(other, places=positions[1:2])]
    packed = logits(one, other, places=positions[:2])
    shared = 0.0
    if can_share_prefixes(model.config):
        length, total = one.shape[1], one.shape[1] + third.shape[1] - NUM_SHARED
        ends = torch.full((1, total), total, device=model.device)
        ends[:, NUM_SHARED:length] = length
        places = (positions[0], positions[2][:, NUM_SHARED:])
        both = logits(one, third[:, NUM_SHARED:], places=places, subtree_ends=ends)
        shared = difference([both[:, :length], both[:, :NUM_SHARED], both[:, length:]], 0, 2)
    return Leak(difference(alone, 0, 1), difference([packed], 0, 1), shared)


def check(model: PreTrainedModel, dtype: torch.dtype, shares_batches: bool, shares_prefixes: bool = False) -> float:
    """Return how far packed logits are from those of each example alone, relative to the largest.

    Raises UserError with the figures if that is too far for `dtype`, in which the model computes. If examples do not
    share flat batches, only one example in a batch must agree; if they do not share prefixes, only two apart.
    """
    was_training = model.training
    model.eval()
    leak = measure_leak(model)
    model.train(was_training)
    family, limit = model.config.model_type, TOLERANCE[dtype]
    if math.isnan(leak.alone):
        in_fp32 = "" if dtype == torch.float32 else ", or compute in fp32: --fp16 False --bf16 False"
        raise UserError(
            "the model's logits are nan or infinite before any training; if its files are damaged, download them again"
            f", or give a checkpoint from before the loss was nan{in_fp32}"
        )
    if not leak.alone <= limit:
        raise UserError(
            f"{family} cannot be trained here: its logits in a flat batch are off by {leak.alone:.2g} of the largest, "
            f"and rounding explains at most {limit:g}; {FAMILIES}"
        )
    if shares_batches and not leak.packed <= limit:
        raise UserError(
            f"{family} cannot be packed: with two examples in a batch its logits are off by {leak.packed:.2g} of the "
            f"largest, and rounding explains at most {limit:g}, so one example reads another; type --packing False "
            "--per_device_train_batch_size 1 --per_device_eval_batch_size 1"
        )
    if shares_batches and shares_prefixes and not leak.shared <= limit:
        raise UserError(
            f"{family} cannot share what examples begin with: its logits after it are off by {leak.shared:.2g} of the "
            f"largest, and rounding explains at most {limit:g}; type --share_prefixes False"
        )
    return max(leak.packed, leak.shared if shares_prefixes else 0) if shares_batches else leak.alone
