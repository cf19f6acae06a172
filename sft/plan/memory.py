"""What a run takes of GPU, host and disk, from a model's configuration alone.

States (weights, gradients, optimizer) are arithmetic, under ZeRO DeepSpeed's own estimators. What a forward keeps for
its backward is counted, not reckoned: one layer and two layers of the model, with weights that nobody has written, run
a few tokens on the CPU, and autograd says which tensors it keeps. All of it is linear in layers and in tokens.

Symbols: P = parameters, T = tokens of a row, V = vocabulary, H = hidden size.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from sft.model import attention, lora, patch
from sft.model.attention import FlatRow, Rotations, split
from sft.model.load import without_weights
from sft.model.lora import LoraArguments
from sft.model.loss import chunk_bytes
from sft.training import zero
from sft.training.precision import optimizer_bytes

PROBE_TOKENS = (32, 64)
PROBE_VOCABULARY = 256
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale for each 64 of them, and one for 256 of those
PROCESS_BYTES = 2**30  # a Python process with torch and transformers, before any model
# Of DeepSpeed's estimate for a parameter, gradients of 16 and of 32 bits: not there yet where activations are most.
LATE_BYTES = 2 + 4
ZERO2_BUCKET, ZERO3_LIVE = 200_000_000, 1_000_000_000  # elements, as in ds_zero2_config.json and ds_zero3_config.json


@dataclass(frozen=True)
class Strategy:
    """One way to train."""

    method: str  # "full", "LoRA" or "QLoRA"
    zero_stage: int = 0
    offload: str = "none"
    optim: str = "adamw_torch_fused"
    checkpointing: bool = False


@dataclass(frozen=True)
class Load:
    """What is trained, in rows of how many tokens: what a run has to hold beside the strategy."""

    config: PretrainedConfig
    lora_args: LoraArguments
    num_tokens: int
    accumulates: bool
    compute_dtype: torch.dtype
    is_gpu: bool
    attends_by_blocks: bool = True  # on a GPU: with FlexAttention, not example by example


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device at the peak of a step, and on the host."""

    device: int
    host: int


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    total: int
    trained: int
    embedding: int  # V x H
    largest: int  # of one module
    quantized: int  # in the linear layers that QLoRA holds in 4 bits
    num_layers: int


def sizes_of(config: PretrainedConfig, lora_args: LoraArguments, is_lora: bool) -> Sizes:
    """Return a model's numbers of parameters, from its configuration."""
    key = (config.to_json_string(), repr(lora_args), is_lora)
    if key not in _SIZES:
        _SIZES[key] = _count(config, lora_args, is_lora)
    return _SIZES[key]


_SIZES: dict[tuple, Sizes] = {}


def _count(config: PretrainedConfig, lora_args: LoraArguments, is_lora: bool) -> Sizes:
    model = without_weights(config)
    parameters, head = dict(model.named_parameters()), model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    total = sum(parameter.numel() for parameter in parameters.values())
    modules = [sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules()]
    return Sizes(
        total=total,
        trained=lora.count_trained(lora_args, config) if is_lora else total,
        embedding=model.get_input_embeddings().weight.numel(),
        largest=max(modules),
        quantized=sum(layer.weight.numel() for layer in linear),
        num_layers=config.num_hidden_layers,
    )


# ------------------------------------------------------------------------------------ what a forward keeps, by counting


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps: of each layer, by token and in all (16-bit copies of weights), and before them."""

    layer_by_token: float
    layer: float
    stem_by_token: float
    stream_by_token: float  # the hidden states between two layers


@dataclass(frozen=True)
class Numbers:
    """The dtypes of a forward: what weights are held in, what autocast computes in, if it does."""

    weights: torch.dtype
    autocast: torch.dtype | None


def numbers_of(strategy: Strategy, load: Load) -> Numbers:
    """Return a run's dtypes: DeepSpeed computes in what it holds, otherwise autocast keeps trained weights in fp32."""
    compute = load.compute_dtype
    if strategy.zero_stage or compute == torch.float32:
        return Numbers(compute, None)
    return Numbers(torch.float32 if strategy.method == "full" else compute, compute)


@cache
def _kept(probe: "Probe") -> Kept:
    fewer, more = PROBE_TOKENS
    one = [probe.count(1, tokens) for tokens in PROBE_TOKENS]
    two = [probe.count(2, tokens) for tokens in PROBE_TOKENS]
    layer_by_token = ((two[1] - one[1]) - (two[0] - one[0])) / (more - fewer)
    layer = two[0] - one[0] - layer_by_token * fewer
    stem_by_token = (one[1] - one[0]) / (more - fewer) - layer_by_token
    return Kept(layer_by_token, layer, max(0.0, stem_by_token), probe.stream_bytes())


class Probe:
    """A model of one layer or two that runs a few tokens, to count what autograd keeps of it."""

    def __init__(self, strategy: Strategy, load: Load):
        self.method, self.load, self.numbers = strategy.method, load, numbers_of(strategy, load)
        self.key = (
            load.config.to_json_string(),
            repr(load.lora_args) if strategy.method != "full" else "",
            load.is_gpu,
            load.attends_by_blocks,
            strategy.method,
            self.numbers,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def count(self, num_layers: int, num_tokens: int) -> int:
        """Return the bytes that a forward over so many layers and tokens keeps for the backward, weights apart."""
        model = self._model(num_layers)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, so that no other tensor takes its place
            # Nothing goes back into the graph: it would hold its own outputs, and never be let go of.

        input_ids = torch.zeros((1, num_tokens), dtype=torch.long)
        positions = torch.arange(num_tokens)[None]
        autocast = torch.autocast("cpu", self.numbers.autocast or torch.bfloat16, enabled=bool(self.numbers.autocast))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing), autocast, self._attention():
            output = model(input_ids=input_ids, position_ids=positions).logits
        assert output.shape[1] == num_tokens, output.shape
        return sum(storage.nbytes() for storage in kept.values())

    def stream_bytes(self) -> float:
        """Return the bytes of a token's hidden states between layers; BLOOM's first norm makes them fp32 again."""
        is_wide = self.numbers.weights == torch.float32
        if self.numbers.autocast and self.load.config.model_type == "bloom":
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
        model = model.to(self.numbers.weights).to_empty(device="cpu").train()
        model.tie_weights()
        patch.install(model)
        if self.load.is_gpu and self.numbers.autocast:
            for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
                norm.forward = MethodType(_norm_as_autocast_on_a_gpu, norm)
        if self.method == "full":
            return model
        if self.method == "QLoRA":
            for layer in model.base_model.modules():
                if isinstance(layer, nn.Linear):  # layers of 4 bits give back the dtype that they were given
                    layer.register_forward_hook(lambda module, inputs, output: output.to(inputs[0].dtype))
        model = lora.add(model, self.load.lora_args, "", seed=0)
        if self.numbers.autocast is None:  # DeepSpeed makes all of one dtype
            model.to(self.numbers.weights)
        return model

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Attend as on the GPU: FlexAttention keeps query, key, value and output, and has no wider heads."""
        own = attention.attend
        if self.load.is_gpu and self.load.attends_by_blocks:
            attention.attend = _attend_as_flex
        try:
            yield
        finally:
            attention.attend = own


def _norm_as_autocast_on_a_gpu(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """Stand in for LayerNorm.forward: CUDA's autocast casts its input to fp32, the CPU's does not."""
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if each is None else each.float() for each in (self.weight, self.bias))
        return functional.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)


def _attend_as_flex(packed: torch.Tensor, row: FlatRow, rotations: Rotations | None = None) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        packed = packed.to(torch.get_autocast_dtype("cpu"))
    query, key, value = split(packed, rotations)
    grouped = query.shape[1] != key.shape[1]
    context = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return context.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------------- the whole run


def footprint(strategy: Strategy, load: Load, num_devices: int, num_hosts: int = 1) -> Footprint:
    """Return what a strategy takes of each of `num_devices` devices of a host, and of the host, at its peak."""
    sizes = sizes_of(load.config, load.lora_args, strategy.method != "full")
    numbers = numbers_of(strategy, load)
    activations, step = _activations(strategy, load, sizes, numbers)
    if strategy.zero_stage:
        device, host = _zero_states(strategy, load, sizes, num_devices, num_hosts)
        late = (4 if load.accumulates else LATE_BYTES) * sizes.trained / (num_devices * num_hosts)
        device = max(device + step, device - (late if strategy.offload == "none" else 0) + activations)
    else:
        device, host = _states(strategy, load, sizes, numbers, activations, step), 0
    # Where a configuration does not say, the files are 16-bit, as BLOOM's and Falcon's are.
    loaded_bytes = load.config.dtype.itemsize if isinstance(load.config.dtype, torch.dtype) else 2
    loading = sizes.total * max(loaded_bytes, numbers.weights.itemsize) * (num_devices if strategy.zero_stage else 1)
    if strategy.zero_stage == 3:
        loading = sizes.total * loaded_bytes * num_devices  # transformers reads all files on each rank
    ranks = num_devices if strategy.zero_stage else 1
    return Footprint(int(device), int(max(host, loading) + ranks * PROCESS_BYTES))


def _states(strategy: Strategy, load: Load, sizes: Sizes, numbers: Numbers, activations: float, step: float) -> float:
    """Return the peak of a process by itself: at the loss, at the end of the backward, or in the optimizer's step."""
    state = optimizer_bytes(strategy.optim)
    assert state is not None, f"{strategy.optim} has no known size"
    trained, frozen = sizes.trained, sizes.total if strategy.method != "full" else 0
    optimizer = state * trained
    if state == 2 and strategy.method == "full":
        optimizer += 6 * sizes.embedding  # transformers keeps those of embeddings in 32 bits
    weights = 4 * trained + frozen * numbers.weights.itemsize
    if strategy.method == "QLoRA":
        weights += sizes.quantized * (NF4_BYTES - numbers.weights.itemsize)
    gradients = 4 * trained
    held = weights + optimizer
    at_step = held + gradients + (2 * 4 * sizes.largest if strategy.optim == "adafactor" else 0)
    return max(held + activations + (gradients if load.accumulates else 0), held + gradients + step, at_step)


def _zero_states(strategy: Strategy, load: Load, sizes: Sizes, num_devices: int, num_hosts: int) -> tuple[float, float]:
    """Return DeepSpeed's estimates of states on each device and on the host, its buffers and frozen weights added."""
    itemsize, stage = load.compute_dtype.itemsize, strategy.zero_stage
    device, host = zero.state_bytes(stage, strategy.offload, sizes.trained, sizes.largest, num_devices, num_hosts)
    if stage == 3:
        device += itemsize * min(ZERO3_LIVE, sizes.total)
    else:
        device += itemsize * min(ZERO2_BUCKET, sizes.trained)
    if strategy.method == "full":
        return device, host
    frozen = sizes.total * itemsize
    if strategy.method == "QLoRA":
        frozen += sizes.quantized * (NF4_BYTES - itemsize)
    if stage == 3 and strategy.offload == "all":
        return device, host + frozen / num_hosts
    return device + frozen / (num_devices * num_hosts if stage == 3 else 1), host


def _activations(strategy: Strategy, load: Load, sizes: Sizes, numbers: Numbers) -> tuple[float, float]:
    """Return the bytes of activations where they are most, and those at the end of the backward.

    They are most when the loss is taken, or when the backward through the last layer begins.
    """
    kept, tokens, hidden = _kept(Probe(strategy, load)), load.num_tokens, load.config.hidden_size
    layer = kept.layer_by_token * tokens + kept.layer
    stream = kept.stream_by_token * tokens
    forward = kept.stem_by_token * tokens + sizes.num_layers * (stream if strategy.checkpointing else layer)
    loss, left_by_loss = _loss_bytes(strategy, load, numbers, kept.stream_by_token / hidden)
    # The gradients of the MLP's inner states, 4 H, of what its activation makes of them, and of the stream.
    moving = 9 * stream
    recomputed = layer if strategy.checkpointing else 0
    return forward + max(loss, left_by_loss + recomputed + moving), kept.stem_by_token * tokens + layer + moving


def _loss_bytes(strategy: Strategy, load: Load, numbers: Numbers, stream_itemsize: float) -> tuple[float, float]:
    """Return what `sft.model.loss` holds at its peak and what it leaves to the backward, every token being labelled."""
    vocab_size, hidden, compute = load.config.vocab_size, load.config.hidden_size, load.compute_dtype.itemsize
    matrix, states = vocab_size * hidden, load.num_tokens * hidden
    most = max(1, chunk_bytes("cuda" if load.is_gpu else "cpu") // (4 * vocab_size))
    is_rounded = compute < 4
    logits = min(most, load.num_tokens) * vocab_size * (4 + (compute if is_rounded else 0))
    inputs = states * (2 * stream_itemsize + (compute if is_rounded else 0))
    copied = matrix * compute if numbers.weights.itemsize != compute else 0
    trains_head = strategy.method == "full"
    gradient = matrix * 4 * (2 if is_rounded else 1) if trains_head else 0
    return logits + inputs + copied + gradient, states * stream_itemsize + (matrix * 4 if trains_head else 0)
