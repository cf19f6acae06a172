"""Memory of every way to train: arithmetic that must hold, whatever the model."""

from dataclasses import replace

import pytest
import torch
import transformers
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from sft.machine import GIB
from sft.model.load import count_parameters
from sft.plan.activations import Strategy
from sft.plan.memory import OPTIMIZER_BYTES, footprint, optimizer_bytes, sizes_of, zero_bytes
from sft.tools.random_model import SHAPES
from support.loads import load_of


@pytest.mark.parametrize("shape", ["bloom-tiny", "falcon-tiny", "bloom-560m", "bloom-7b1", "falcon-7b"])
def test_sizes_are_the_models(shape):
    sizes = sizes_of(load_of(shape), is_lora=False)
    assert sizes.total == sizes.trained == count_parameters(SHAPES[shape])
    assert sizes.embedding == SHAPES[shape].vocab_size * SHAPES[shape].hidden_size


def test_states_of_all_weights_are_sixteen_bytes_each_and_eight_bits_ten():
    load, total = load_of("bloom-7b1"), count_parameters(SHAPES["bloom-7b1"])
    embedding = SHAPES["bloom-7b1"].vocab_size * SHAPES["bloom-7b1"].hidden_size
    for optim, states in (("adamw_torch_fused", 16 * total), ("adamw_bnb_8bit", 10 * total + 6 * embedding)):
        needs = footprint(Strategy("full", optim=optim, checkpointing=True), load, 1, 1).device
        assert states <= needs < 1.05 * states + 2 * GIB


@pytest.mark.parametrize("shape", ["bloom-560m", "falcon-7b"])
def test_more_tokens_take_more_and_checkpointing_and_lora_less(shape):
    load = load_of(shape)

    def needs(strategy: Strategy, num_tokens: int = 2048) -> int:
        return footprint(strategy, load, num_tokens, 1).device

    full, checkpointed = Strategy("full"), Strategy("full", checkpointing=True)
    assert needs(full, 4096) > needs(full, 512) and needs(checkpointed, 4096) < needs(full, 4096)
    assert needs(Strategy("QLoRA")) < needs(Strategy("LoRA")) < needs(full)
    first, second, third = (needs(full, num_tokens) for num_tokens in (8192, 16384, 24576))
    assert second - first == pytest.approx(third - second, rel=1e-3)


def test_a_gpu_that_attends_by_examples_keeps_the_wider_heads():
    strategy, load = Strategy("full"), load_of("bloom-560m")
    turing = replace(load, attends_by_blocks=False)
    assert footprint(strategy, turing, 2048, 1).device > footprint(strategy, load, 2048, 1).device


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_divides_and_offload_moves_to_the_host(stage):
    load = load_of("bloom-7b1")
    few, many = (footprint(Strategy("full", stage), load, 2048, number) for number in (2, 8))
    offloaded = footprint(Strategy("full", stage, "optimizer"), load, 2048, 2)
    assert many.device < few.device and offloaded.device < few.device and offloaded.host > few.host


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_an_optimizer_keeps_as_many_bytes_as_it_is_said_to(optim, tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1024, 1024))
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    create, keywords = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = create([weight], **keywords)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert sum(tensor.nbytes for tensor in kept) / weight.numel() == pytest.approx(optimizer_bytes(optim), abs=0.01)


def test_transformers_has_every_optimizer_with_a_known_size():
    names = [optim.value for optim in transformers.training_args.OptimizerNames]
    assert {name for name in OPTIMIZER_BYTES if name not in names} == {"adamw_bnb_8bit"} - set(names)
    assert optimizer_bytes("adamw_torch_fused") == 8 and optimizer_bytes("galore_adamw") is None


def test_the_arithmetic_of_two_hosts_with_four_devices_each():
    # The largest module's weights in 32 bits and an eighth of 18 bytes a parameter; 1.5 times 4 gathered ones a host.
    assert zero_bytes(3, "none", 1430, 1000, 4, 2) == (4 * 1000 + 18 * 1430 // 8, 4 * 4 * 1000 * 1.5)
    # The weights in 16 bits; 16 bytes a parameter, halved over two hosts, and half as much again.
    assert zero_bytes(3, "optimizer", 1430, 1000, 4, 2) == (4000 + 2 * 1430 // 8, 16 * 1430 / 2 * 1.5)
    assert zero_bytes(3, "all", 1430, 1000, 4, 2) == (4000, 18 * 1430 / 2 * 1.5)


def test_zero_takes_what_deepspeed_estimates():
    on_host, on_device, _ = estimate_zero3_model_states_mem_needs(1430, 1000, 8, 2, True, True)
    assert zero_bytes(3, "all", 1430, 1000, 8, 2) == (on_device, on_host)
    on_host, on_device = estimate_zero2_model_states_mem_needs(1430, 8, 2, cpu_offload=False)
    assert zero_bytes(2, "none", 1430, 1000, 8, 2) == (on_device, on_host)
