"""The defaults beside a GPU, and what is left of them where something else is asked for."""

from pathlib import Path

import pytest
import torch
import transformers

from sft import machine
from sft.training import arguments, precision
from sft.training.arguments import TrainingArguments
from support.plain_loop import FIXED, logged


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arguments be made as beside a GPU, without what transformers would ask it."""
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 1)
    monkeypatch.setattr(machine, "accelerator", lambda use_cpu: None if use_cpu else torch.device("cuda"))
    monkeypatch.setattr(precision, "choose", lambda device: (device is not None, False))


@pytest.mark.usefixtures("gpu")
def test_beside_a_gpu_two_processes_join_rows_and_no_copy_is_waited_for(tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path))
    assert (args.dataloader_num_workers, args.accelerator_config) == (2, {"non_blocking": True})
    args = TrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=0, dataloader_pin_memory=False)
    assert (args.dataloader_num_workers, args.accelerator_config, args.workers_are_open) == (0, None, False)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.dataloader_num_workers, args.accelerator_config, args.workers_are_open) == (0, None, True)


@pytest.mark.usefixtures("gpu")
def test_a_stream_is_read_by_the_process_that_trains(tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to=[])
    data_args = arguments.DataArguments(data_path="rows", streaming=True)
    monkeyed = {"device": torch.device("cpu"), "world_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in monkeyed.items():
            patch.setattr(transformers.TrainingArguments, name, value)
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
