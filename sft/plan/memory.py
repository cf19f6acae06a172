"""What a run takes of GPU and host, from a model's configuration alone.

States (weights, gradients, optimizer) are arithmetic, under ZeRO DeepSpeed's own estimates. What a forward keeps for
its backward is counted in `activations`.

Symbols: P = parameters, T = tokens of a flat batch, V = vocabulary, H = hidden size.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from sft.model import lora
from sft.model.load import without_weights
from sft.model.loss import chunk_bytes
from sft.plan.activations import Dtypes, Load, Strategy, dtypes_of, kept_by

# Bytes of state per trained parameter, by how --optim begins; Adafactor keeps a row and a column of each matrix.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0, "sgd": 0}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale for each 64 of them, and one for 256 of those
PROCESS_BYTES = 2**30  # a Python process with torch and transformers, before any model
# Of DeepSpeed's estimate per parameter, gradients of 16 and of 32 bits: not there yet when activations are largest.
LATE_BYTES = 2 + 4
ZERO2_BUCKET, ZERO3_LIVE = 200_000_000, 1_000_000_000  # elements, as in ds_zero2_config.json and ds_zero3_config.json


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


@cache
def sizes_of(load: Load, is_lora: bool) -> Sizes:
    """Return a model's numbers of parameters, from its configuration."""
    model = without_weights(load.config)
    parameters, head = dict(model.named_parameters()), model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    total = sum(parameter.numel() for parameter in parameters.values())
    modules = [sum(weight.numel() for weight in module.parameters(recurse=False)) for module in model.modules()]
    return Sizes(
        total=total,
        trained=lora.count_trained(load.config, load.lora_config) if is_lora else total,
        embedding=model.get_input_embeddings().weight.numel(),
        largest=max(modules),
        quantized=sum(layer.weight.numel() for layer in linear),
        num_layers=load.config.num_hidden_layers,
    )


def optimizer_bytes(optim: str) -> int | None:
    """Return the bytes of state per trained parameter under `--optim`, None for an optimizer not known here."""
    return next((size for name, size in OPTIMIZER_BYTES.items() if optim.startswith(name)), None)


def zero_bytes(
    stage: int, offload: str, num_trained: int, largest: int, num_devices: int, num_hosts: int
) -> tuple[float, float]:
    """Return the bytes of weights, gradients and AdamW's states on each device of a host, and on the host.

    They are DeepSpeed's own estimates, made for computing in 16 bits; `largest` is the largest module's number of
    parameters.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    ranks = {"num_gpus_per_node": num_devices, "num_nodes": num_hosts}
    if stage == 3:
        offloads = {"cpu_offload": offload != "none", "cpu_offload_params": offload == "all"}
        on_host, on_device, _ = estimate_zero3_model_states_mem_needs(num_trained, largest, **ranks, **offloads)
    else:
        on_host, on_device = estimate_zero2_model_states_mem_needs(num_trained, **ranks, cpu_offload=offload != "none")
    return on_device, on_host


def footprint(strategy: Strategy, load: Load, num_tokens: int, num_devices: int, num_hosts: int = 1) -> Footprint:
    """Return what flat batches of so many tokens take at their peak of each device of a host, and of the host."""
    sizes, dtypes = sizes_of(load, strategy.is_lora), dtypes_of(strategy, load)
    activations, step = _activations(strategy, load, num_tokens, sizes, dtypes)
    if strategy.zero_stage:
        device, host = _zero_states(strategy, load, sizes, num_devices, num_hosts)
        late = (4 if load.accumulates else LATE_BYTES) * sizes.trained / (num_devices * num_hosts)
        device = max(device + step, device - (late if strategy.offload == "none" else 0) + activations)
    else:
        device, host = _states(strategy, load, sizes, dtypes, activations, step), 0
    # If a configuration does not say, the files are taken to be 16-bit, as BLOOM's and Falcon's are.
    loaded_bytes = load.config.dtype.itemsize if isinstance(load.config.dtype, torch.dtype) else 2
    loading = sizes.total * max(loaded_bytes, dtypes.weights.itemsize) * (num_devices if strategy.zero_stage else 1)
    if strategy.zero_stage == 3:
        loading = sizes.total * loaded_bytes * num_devices  # transformers reads all files on each rank
    ranks = num_devices if strategy.zero_stage else 1
    return Footprint(int(device), int(max(host, loading) + ranks * PROCESS_BYTES))


def _states(strategy: Strategy, load: Load, sizes: Sizes, dtypes: Dtypes, activations: float, step: float) -> float:
    """Return the peak of a process by itself: at the loss, at the end of the backward, or in the optimizer's step."""
    state = optimizer_bytes(strategy.optim)
    assert state is not None, f"{strategy.optim} has no known size"
    trained, frozen = sizes.trained, sizes.total if strategy.is_lora else 0
    optimizer = state * trained
    if state == 2 and strategy.method == "full":
        optimizer += 6 * sizes.embedding  # transformers keeps those of embeddings in 32 bits
    weights = 4 * trained + frozen * dtypes.weights.itemsize
    if strategy.method == "QLoRA":
        weights += sizes.quantized * (NF4_BYTES - dtypes.weights.itemsize)
    gradients = 4 * trained
    held = weights + optimizer
    at_step = held + gradients + (2 * 4 * sizes.largest if strategy.optim == "adafactor" else 0)
    return max(held + activations + (gradients if load.accumulates else 0), held + gradients + step, at_step)


def _zero_states(strategy: Strategy, load: Load, sizes: Sizes, num_devices: int, num_hosts: int) -> tuple[float, float]:
    """Return DeepSpeed's estimates of states on each device and on the host, its buffers and frozen weights added."""
    itemsize, stage = load.compute_dtype.itemsize, strategy.zero_stage
    device, host = zero_bytes(stage, strategy.offload, sizes.trained, sizes.largest, num_devices, num_hosts)
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


def _activations(strategy: Strategy, load: Load, num_tokens: int, sizes: Sizes, dtypes: Dtypes) -> tuple[float, float]:
    """Return the bytes of activations at their peak, and those at the end of the backward.

    They peak when the loss is computed, or when the backward through the last layer begins.
    """
    kept, hidden = kept_by(load, strategy.method, dtypes), load.config.hidden_size
    layer = kept.layer_by_token * num_tokens + kept.layer
    stream = kept.stream_by_token * num_tokens
    stem = kept.stem_by_token * num_tokens
    forward = stem + sizes.num_layers * (stream if strategy.checkpointing else layer)
    loss, left_by_loss = _loss_bytes(strategy, load, num_tokens, dtypes, kept.stream_by_token / hidden)
    # The gradients of the MLP's inner states, 4 H, of what its activation makes of them, and of the stream.
    moving = 9 * stream
    recomputed = layer if strategy.checkpointing else 0
    return forward + max(loss, left_by_loss + recomputed + moving), stem + layer + moving


def _loss_bytes(
    strategy: Strategy, load: Load, num_tokens: int, dtypes: Dtypes, stream_itemsize: float
) -> tuple[float, float]:
    """Return what the loss holds at its peak and what it leaves to the backward, if every token is labelled."""
    vocab_size, hidden, compute = load.config.vocab_size, load.config.hidden_size, load.compute_dtype.itemsize
    matrix, states = vocab_size * hidden, num_tokens * hidden
    most = max(1, chunk_bytes("cuda" if load.is_gpu else "cpu") // (4 * vocab_size))
    is_rounded = compute < 4
    logits = min(most, num_tokens) * vocab_size * (4 + (compute if is_rounded else 0))
    inputs = states * (2 * stream_itemsize + (compute if is_rounded else 0))
    copied = matrix * compute if dtypes.weights.itemsize != compute else 0
    trains_head = not strategy.is_lora
    gradient = matrix * 4 * (2 if is_rounded else 1) if trains_head else 0
    return logits + inputs + copied + gradient, states * stream_itemsize + (matrix * 4 if trains_head else 0)
