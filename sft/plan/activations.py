"""What a forward keeps for its backward: counted, not estimated.

One layer and two layers of the model, with uninitialised weights, run a few tokens on the CPU, and autograd says which
tensors it keeps. All of it is linear in layers and in tokens.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from sft.model import attention, lora, other_families, patch
from sft.model.attention import FlatBatch, Rotations, split

PROBE_TOKENS = (32, 64)
PROBE_VOCABULARY = 256


@dataclass(frozen=True)
class Strategy:
    """One way to train."""

    method: str  # "full", "LoRA" or "QLoRA"
    zero_stage: int = 0
    offload: str = "none"
    optim: str = "adamw_torch_fused"
    checkpointing: bool = False

    @property
    def is_lora(self) -> bool:
        """Tell whether the model's own weights are frozen."""
        return self.method != "full"


@dataclass(frozen=True, eq=False)
class Load:
    """What is trained and on what: all that a run has to hold beside the strategy. Equal only to itself."""

    config: PretrainedConfig
    lora_config: LoraConfig
    accumulates: bool
    compute_dtype: torch.dtype
    is_gpu: bool
    attends_by_blocks: bool = True  # on a GPU: with FlexAttention, not example by example


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps: of each layer, per token and in all (16-bit copies of weights), and before them."""

    layer_by_token: float
    layer: float
    stem_by_token: float
    stream_by_token: float  # the hidden states between two layers


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a forward: what weights are held in, and what autocast computes in, None without it."""

    weights: torch.dtype
    autocast: torch.dtype | None


def dtypes_of(strategy: Strategy, load: Load) -> Dtypes:
    """Return a run's dtypes: DeepSpeed computes in what it holds; otherwise autocast keeps trained weights in fp32."""
    compute = load.compute_dtype
    if strategy.zero_stage or compute == torch.float32:
        return Dtypes(compute, None)
    return Dtypes(compute if strategy.is_lora else torch.float32, compute)


@cache
def kept_by(load: Load, method: str, dtypes: Dtypes) -> Kept:
    """Return what autograd keeps of a model, trained by a method; the strategy decides nothing else of it."""
    probe = Probe(load, method, dtypes)
    fewer, more = PROBE_TOKENS
    one = [probe.count(1, tokens) for tokens in PROBE_TOKENS]
    two = [probe.count(2, tokens) for tokens in PROBE_TOKENS]
    layer_by_token = ((two[1] - one[1]) - (two[0] - one[0])) / (more - fewer)
    layer = two[0] - one[0] - layer_by_token * fewer
    stem_by_token = (one[1] - one[0]) / (more - fewer) - layer_by_token
    return Kept(layer_by_token, layer, max(0.0, stem_by_token), probe.stream_bytes())


@dataclass(frozen=True)
class Probe:
    """A model of one layer or two that runs a few tokens, to count what autograd keeps of it."""

    load: Load
    method: str
    dtypes: Dtypes

    def count(self, num_layers: int, num_tokens: int) -> int:
        """Return the bytes that a forward over so many layers and tokens keeps for the backward, without weights."""
        model = self._model(num_layers)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, so that no other tensor takes its place
            # Nothing goes back into the graph: it would hold its own outputs, and never be freed.

        input_ids = torch.zeros((1, num_tokens), dtype=torch.long)
        positions = torch.arange(num_tokens)[None]
        autocast = torch.autocast("cpu", self.dtypes.autocast or torch.bfloat16, enabled=bool(self.dtypes.autocast))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing), autocast, self._attention():
            output = model(input_ids=input_ids, position_ids=positions).logits
        assert output.shape[1] == num_tokens, output.shape
        return sum(storage.nbytes() for storage in kept.values())

    def stream_bytes(self) -> float:
        """Return the bytes of a token's hidden states between layers; BLOOM's first norm makes them fp32 again."""
        is_wide = self.dtypes.weights == torch.float32
        if self.dtypes.autocast and self.load.config.model_type == "bloom":
            is_wide = True
        return self.load.config.hidden_size * (4 if is_wide else 2)

    def _model(self, num_layers: int) -> PreTrainedModel | PeftModel:
        config = copy.deepcopy(self.load.config)
        config.num_hidden_layers, config.vocab_size = num_layers, PROBE_VOCABULARY
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, 0)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        model = model.to(self.dtypes.weights).to_empty(device="cpu").train()
        model.tie_weights()
        patch.install(model)
        if self.load.is_gpu and self.dtypes.autocast:
            for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
                norm.forward = MethodType(_norm_as_autocast_on_a_gpu, norm)
        if self.method == "full":
            return model
        if self.method == "QLoRA":
            for layer in model.base_model.modules():
                if isinstance(layer, nn.Linear):  # layers of 4 bits give back the dtype that they were given
                    layer.register_forward_hook(lambda module, inputs, output: output.to(inputs[0].dtype))
        model = lora.add(model, self.load.lora_config, "", seed=0)
        if self.dtypes.autocast is None:  # DeepSpeed makes all of one dtype
            model.to(self.dtypes.weights)
        return model

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Attend as on the GPU: FlexAttention keeps query, key, value and output, and has no wider heads."""
        own = attention.attend, attention.attends_by_nodes, other_families.attend_heads
        if self.load.is_gpu:
            attention.attends_by_nodes = lambda device: False
        if self.load.is_gpu and self.load.attends_by_blocks:
            attention.attend, other_families.attend_heads = _attend_as_flex, _attend_heads_as_flex
        try:
            yield
        finally:
            attention.attend, attention.attends_by_nodes, other_families.attend_heads = own


def _norm_as_autocast_on_a_gpu(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """Stand in for LayerNorm.forward: CUDA's autocast casts its input to fp32, the CPU's does not."""
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if each is None else each.float() for each in (self.weight, self.bias))
        return functional.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)


def _attend_as_flex(packed: torch.Tensor, row: FlatBatch, rotations: Rotations | None = None) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        packed = packed.to(torch.get_autocast_dtype("cpu"))
    return _attend_heads_as_flex(*split(packed, rotations), row, None)


def _attend_heads_as_flex(query, key, value, row: FlatBatch, scale: float | None) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    context = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return context.transpose(1, 2).flatten(2)
