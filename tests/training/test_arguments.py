"""Defaults with a GPU and without, what flags decide for one another, and how long a run is."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer

from sft import machine
from sft.training import arguments
from sft.training.arguments import TrainingArguments
from support.plain_loop import FIXED, logged
from support.project import PROJECT


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arguments be made as beside a GPU, without what transformers would ask it."""
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 1)
    monkeypatch.setattr(machine, "accelerator", lambda use_cpu: None if use_cpu else torch.device("cuda"))
    monkeypatch.setattr(machine, "choose_precision", lambda device: (device is not None, False))


@pytest.mark.usefixtures("gpu")
def test_beside_a_gpu_two_processes_join_rows_and_no_copy_is_waited_for(tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path))
    assert (args.dataloader_num_workers, args.accelerator_config) == (2, {"non_blocking": True})
    args = TrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=0, dataloader_pin_memory=False)
    assert (args.dataloader_num_workers, args.accelerator_config, args.chooses_workers) == (0, None, False)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.dataloader_num_workers, args.accelerator_config, args.chooses_workers) == (0, None, True)


@pytest.mark.usefixtures("gpu")
def test_a_stream_is_read_by_the_process_that_trains(tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to=[])
    data_args = arguments.DataArguments(data_path="rows", streaming=True)
    monkeyed = {"device": torch.device("cpu"), "world_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in monkeyed.items():
            patch.setattr(transformers.TrainingArguments, name, value)
        arguments.settle(data_args, args)
        arguments.check(arguments.ModelArguments("m"), data_args, arguments.PlanArguments(), args)
    assert args.dataloader_num_workers == 0


@pytest.mark.parametrize("packing", [False, True])
def test_rows_joined_by_other_processes_are_the_same_rows(packing: bool, run, make_model, data, tmp_path):
    losses = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", data, "--output_dir", output]
        given += [*FIXED[:2], *FIXED[4:], "--packing", packing, "--model_max_length", 400, "--num_train_epochs", 2]
        result = run("train_sft.py", *given, "--dataloader_num_workers", workers)
        assert result.returncode == 0, result.stderr[-2000:]
        losses.append(logged(output))
    assert len(losses[0]) >= 4 and losses[0] == losses[1]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_precision_follows_the_gpu(has_bf16, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A T4 emulates bf16, slowly; asked without emulation it has none.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert machine.choose_precision(torch.device("cuda")) == (has_bf16, not has_bf16)
    assert machine.choose_precision(None) == (False, False)
    for fields, expected in (
        ({}, (has_bf16, not has_bf16)),
        ({"bf16": False}, (False, False)),
        ({"fp16": True}, (False, True)),
        ({"use_cpu": True}, (False, False)),
    ):
        args = TrainingArguments(output_dir="o", **fields)
        assert (args.bf16, args.fp16) == expected


def test_deepspeed_starts_with_the_same_loss_scale():
    for stage in (2, 3):
        fp16 = json.loads((PROJECT / f"ds_zero{stage}_config.json").read_text())["fp16"]
        assert 2 ** fp16["initial_scale_power"] == arguments.INITIAL_LOSS_SCALE


@pytest.mark.parametrize("num_examples", [1, 7, 24, 25])
@pytest.mark.parametrize(("batch", "accumulated"), [(1, 1), (2, 4), (3, 8)])
@pytest.mark.parametrize("length", [{"num_train_epochs": 2}, {"num_train_epochs": 0.5}, {"max_steps": 5}])
def test_steps_are_counted_as_the_trainer_counts_them(num_examples, batch, accumulated, length, make_model, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        use_cpu=True,
        **length,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny")), args, train_dataset=[{}] * num_examples
    )
    _, steps_per_epoch, *_, max_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert args.schedule(num_examples) == arguments.Schedule(max_steps, max_steps / steps_per_epoch)


def test_a_stream_is_one_epoch_of_its_steps(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=7)
    assert args.schedule(None) == arguments.Schedule(7, 1.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_stage_is_that_of_the_configuration(stage, tmp_path):
    file = str(PROJECT / f"ds_zero{stage}_config.json")
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True, deepspeed=file).zero_stage == stage
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).zero_stage == 0


@pytest.mark.parametrize(
    ("environment", "a_host"), [({}, 4), ({"LOCAL_SIZE": "2"}, 2), ({"LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "4"}, 2)]
)
def test_the_ranks_of_a_host_are_those_its_launcher_says(monkeypatch, environment, a_host, tmp_path):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(TrainingArguments, "world_size", 4)
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).ranks_per_host == a_host
