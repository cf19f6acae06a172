"""Two CPU ranks against one process: ds_all.sh with its two configurations, and plain data parallelism."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, SAMPLE
from safetensors import safe_open
from transformers import AutoModelForCausalLM

FLAGS = ["--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2", "--save_strategy", "no"]
FLAGS += ["--activation_checkpointing", "False", "--warmup_steps", "0"]
FLAGS += ["--eval_data_path", str(SAMPLE / "train_2M_CN.json"), "--per_device_eval_batch_size", "5"]
# With Adam's usual 1e-8, a gradient that is zero but for rounding moves its weight by the whole learning rate.
FLAGS += ["--adam_epsilon", "1e-3"]


def logged(output: Path, name: str = "loss") -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def tensors_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def environment(make_model, cache_dir) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "MODEL": str(make_model("bloom-tiny")),
        "DATA": str(SAMPLE / "own_with_input.json"),
        "HF_DATASETS_CACHE": str(cache_dir),
    }


PACKED = ["--packing", "True", "--model_max_length", "512"]
APART = ["--packing", "False"]


@pytest.fixture(scope="module")
def one_process(environment, tmp_path_factory) -> Callable[[list[str]], Path]:
    """Return a function that gives the folder one process makes, packed or not, with twice a rank's accumulation."""

    @cache
    def train(*packing: str) -> Path:
        output = tmp_path_factory.mktemp("one") / "model"
        command = ["sh", PROJECT / "base_run.sh", "--gradient_accumulation_steps", "4", *FLAGS, *packing]
        subprocess.run(command, env={**environment, "OUTPUT": str(output)}, check=True, capture_output=True)
        return output

    return train


def run_two_ranks(kind: str, environment: dict[str, str], output: Path, packing: list[str]) -> str:
    flags = ["--gradient_accumulation_steps", "2", *FLAGS, *packing]
    if kind == "DDP":
        given = ["--model_name_or_path", environment["MODEL"], "--data_path", environment["DATA"]]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        command += ["train_sft.py", *given, "--output_dir", output, "--use_cpu", "True", "--weight_decay", "0"]
        command += ["--num_train_epochs", "3", "--per_device_train_batch_size", "1", *flags]
    else:
        command = ["sh", PROJECT / "ds_all.sh", *flags]
    changed = {"OUTPUT": str(output), "DEVICE": "cpu", "NUM_GPUS": "2", "ZERO_STAGE": kind[-1]}
    command = list(map(str, command))
    settings = {"cwd": PROJECT, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, env={**environment, **changed}, **settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    ("kind", "packing"), [("ZeRO-2", APART), ("ZeRO-3", APART), ("ZeRO-3", PACKED), ("DDP", PACKED)]
)
def test_two_ranks_equal_one_process_with_twice_the_accumulation(kind, packing, environment, one_process, tmp_path):
    printed = run_two_ranks(kind, environment, tmp_path, packing)
    assert "1 per device x 2 accumulated x 2 processes" in printed
    assert printed.count("examples a step") == 1, "both ranks printed the header"
    assert ("a row x" in printed) == (packing is PACKED)
    expected_folder = one_process(*packing)
    assert logged(tmp_path) == pytest.approx(logged(expected_folder), rel=1e-5)
    assert logged(tmp_path, "eval_loss") == pytest.approx(logged(expected_folder, "eval_loss"), rel=1e-5)
    expected, trained = weights(expected_folder), weights(tmp_path)
    assert all(torch.allclose(expected[name], trained[name], atol=1e-4) for name in expected)
    assert tensors_in(tmp_path) == tensors_in(expected_folder), "the tied head was saved twice, or not at all"


def test_launching_ranks_that_do_not_join_is_refused(run, make_model, tmp_path):
    given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", SAMPLE, "--output_dir", tmp_path / "o"]
    result = run("train_sft.py", *given, WORLD_SIZE="2", RANK="0")
    assert result.returncode == 2 and "add --use_cpu True" in result.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configuration_leaves_to_the_trainer_what_is_the_trainers(stage):
    config = json.loads((PROJECT / f"ds_zero{stage}_config.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "gradient_clipping"):
        assert config[name] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # Races in overlapped reductions gave bloomz-7b1 another loss at every run (DeepSpeed issue 2867).
    assert config["zero_optimization"]["overlap_comm"] is False
    assert not {"train_batch_size", "optimizer", "scheduler"} & set(config)
    if stage == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
