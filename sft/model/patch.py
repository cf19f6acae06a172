"""A model patched to train on flat batches, (1, T), of several examples: attention, loss, and a check of both.

`install` replaces forwards of a loaded model, on the instance only: classes, configuration and weights stay as they
are, so a saved folder is a plain one. `remove` takes the patch off again, to generate.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.bloom.modeling_bloom import BloomBlock, BloomGelu
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from sft.model import attention, neftune
from sft.model.loss import TiedEmbedding, TiedGradient, next_token_loss
from sft.program import UserError

# Largest difference of two logits, relative to the largest logit. A leak moves logits by a tenth or more; rounding in
# 16 bits, with another order of summation, by up to a few hundredths.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
BLOCKS = (BloomBlock, FalconDecoderLayer)
REPLACED = ("forward", "_compiled_call_impl")  # attributes of an instance that override its class's forward
CHECKED_LENGTHS = (23, 17)  # tokens of the two examples that are checked
FAMILIES = "use a bloom, falcon, llama or qwen2 model"


def install(model: PreTrainedModel) -> None:
    """Patch a loaded model to train on flat batches: `model(input_ids, position_ids, labels)` returns the loss.

    BLOOM and Falcon get the attention of `sft.model.attention`; other families read the boundaries from `position_ids`
    themselves, or fail `check`. Raises UserError if the model has attention dropout, or a bias in its head.
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
        elif isinstance(module, BloomGelu):  # the same formula in one kernel, where BLOOM's takes seven
            module.forward = nn.GELU(approximate="tanh").forward
    head.forward, head.tied = MethodType(_loss_or_logits, head), None
    if embeddings.weight is head.weight and embeddings.padding_idx is None:
        embeddings.forward = MethodType(partial(_embed, head=head), embeddings)
    model.forward = MethodType(forward, model)


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


@contextmanager
def removed(model: PreTrainedModel) -> Iterator[None]:
    """Take the patch off for a while; forwards that others put on top of it are put back too."""
    replaced = [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in REPLACED
        if name in module.__dict__
    ]
    remove(model)
    try:
        yield
    finally:
        for module, name, own in replaced:
            module.__dict__[name] = own


def forward(
    self,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    label_positions: torch.Tensor | None = None,
    **unused,
) -> CausalLMOutput:
    """Stand in for the forward of a causal language model: the loss of a flat batch, or its logits without `labels`.

    `input_ids`, `position_ids` (from 0 in each example) and `labels` are int64 (1, T). `label_positions`, (1, N), are
    the positions whose next token has a label; found here if they are not given. The loss is summed and divided by
    `num_items_in_batch`, by default the number of labels; the logits are (1, T, V).
    """
    length = input_ids.shape[1]
    if attention.has_flex_attention(input_ids.device):
        # Whole blocks for FlexAttention, and few shapes to compile for: up to 127 more tokens, each its own example.
        missing = -length % attention.BLOCK_SIZE
        input_ids, position_ids = (functional.pad(ids, (0, missing)) for ids in (input_ids, position_ids))
    neftune.tell_lengths(self, position_ids)
    base, head = self.base_model, self.get_output_embeddings()
    if self.config.model_type in ("bloom", "falcon"):
        hidden_states = attention.hidden_states_of(base, input_ids, position_ids)
    else:
        hidden_states = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
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


@torch.no_grad()
def measure_leak(model: PreTrainedModel) -> tuple[float, float]:
    """Return how far a patched model's logits are from its own forward's: one example in a flat batch, and two in one.

    Both are the largest difference, relative to the largest logit of the model's own forward on each example alone.
    """
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(model.config.vocab_size, (1, n), generator=generator) for n in CHECKED_LENGTHS]
    examples = [example.to(model.device) for example in examples]
    with removed(model):
        own = [model(input_ids=example, use_cache=False).logits.float() for example in examples]
    positions = [torch.arange(example.shape[1], device=model.device)[None] for example in examples]
    alone = [model(input_ids=e, position_ids=p).logits.float() for e, p in zip(examples, positions, strict=True)]
    packed = model(input_ids=torch.cat(examples, 1), position_ids=torch.cat(positions, 1)).logits.float()
    scale = max(logits.abs().max() for logits in own)

    def difference(logits: torch.Tensor) -> float:
        return ((logits - torch.cat(own, 1)).abs().max() / scale).item()

    return difference(torch.cat(alone, 1)), difference(packed)


def check(model: PreTrainedModel, dtype: torch.dtype, shares_batches: bool) -> float:
    """Return how far packed logits are from those of each example alone, relative to the largest.

    Raises UserError with the figures if that is too far for `dtype`, in which the model computes. If examples do not
    share flat batches, only one example in a batch must agree.
    """
    was_training = model.training
    model.eval()
    alone, packed = measure_leak(model)
    model.train(was_training)
    family, limit = model.config.model_type, TOLERANCE[dtype]
    if math.isnan(alone):
        in_fp32 = "" if dtype == torch.float32 else ", or compute in fp32: --fp16 False --bf16 False"
        raise UserError(
            "the model's logits are nan or infinite before any training; if its files are damaged, download them again"
            f", or give a checkpoint from before the loss was nan{in_fp32}"
        )
    if not alone <= limit:
        raise UserError(
            f"{family} cannot be trained here: its logits in a flat batch are off by {alone:.2g} of the largest, and "
            f"rounding explains at most {limit:g}; {FAMILIES}"
        )
    if shares_batches and not packed <= limit:
        raise UserError(
            f"{family} cannot be packed: with two examples in a batch its logits are off by {packed:.2g} of the "
            f"largest, and rounding explains at most {limit:g}, so one example reads another; type --packing False "
            "--per_device_train_batch_size 1 --per_device_eval_batch_size 1"
        )
    return packed if shares_batches else alone
