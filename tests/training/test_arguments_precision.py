"""Numbers that follow the card, optimizers by their bytes, and the header's words for them."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from sft.training.precision import INITIAL_LOSS_SCALE, OPTIMIZER_BYTES, choose, line, optimizer_bytes
from support.project import PROJECT
from train_sft import TrainingArguments


@pytest.mark.parametrize("has_bf16", [True, False])
def test_precision_follows_the_card(has_bf16, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A T4 emulates bf16, slowly; asked without emulation it has none.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert choose(torch.device("cuda")) == (has_bf16, not has_bf16)
    assert choose(None) == (False, False)
    for fields, expected in (
        ({}, (has_bf16, not has_bf16)),
        ({"bf16": False}, (False, False)),
        ({"fp16": True}, (False, True)),
        ({"use_cpu": True}, (False, False)),
    ):
        arguments = TrainingArguments(output_dir="o", **fields)
        assert (arguments.bf16, arguments.fp16) == expected


@pytest.mark.parametrize(
    ("bf16", "fp16", "is_lora", "expected"),
    [
        (False, False, False, "fp32 weights, computed in fp32"),
        (True, False, False, "fp32 weights, computed in bf16"),
        (False, True, False, "fp32 weights, computed in fp16, the loss scaled by 4,096 at first"),
        (True, False, True, "fp32 for what is trained, bf16 for the frozen weights, computed in bf16"),
    ],
)
def test_the_header_names_the_numbers(bf16, fp16, is_lora, expected):
    assert line(SimpleNamespace(bf16=bf16, fp16=fp16), is_lora) == expected


def test_deepspeed_begins_with_the_same_loss_scale():
    for stage in (2, 3):
        fp16 = json.loads((PROJECT / f"ds_zero{stage}_config.json").read_text())["fp16"]
        assert 2 ** fp16["initial_scale_power"] == INITIAL_LOSS_SCALE


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
