"""What fits, what to type, and runs that are refused or get activation checkpointing."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Trainer

from sft.plan.plan import Run, batch_size, fit
from sft.program import UserError
from sft.tools.random_model import SHAPES
from sft.training.arguments import DataArguments, ModelArguments, PlanArguments, TrainingArguments
from support.project import PROJECT


@pytest.fixture
def plan(run: Callable, make_model: Callable, data: Path, tmp_path: Path) -> Callable:
    """Return a function that runs train_sft.py on a tiny BLOOM with flags."""

    def plan(*flags: object, code: int = 0):
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", data, "--output_dir", tmp_path / "o"]
        result = run("train_sft.py", *given, "--use_cpu", "True", *flags)
        assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
        return result

    return plan


def test_the_table_names_commands_that_are_there(plan):
    printed = plan("--plan", "--plan_gpu", "2x24GB", "--plan_ram", "128GB", "--model_max_length", "256").stdout
    lines = printed.splitlines()
    assert "2 x 24GB of 24 GiB, 128 GiB of host memory; sequences of 256 tokens" in lines[0]
    for method, script in (("full", "ds_all.sh"), ("LoRA", "ds_all.sh"), ("QLoRA", "base_run.sh")):
        [line] = [line for line in lines if re.match(rf"{method} +MODEL=", line)]
        words = shlex.split(line)
        assert words[words.index("sh") + 1] == script and (PROJECT / script).exists()
        assert ("--lora_r" in words) == (method != "full") and ("--load_in_4bit" in words) == (method == "QLoRA")
        assert "--model_max_length" in words


def test_the_shell_is_told_stage_offload_and_checkpointing(plan):
    printed = plan("--plan", "True", "--plan_for_shell", "True", "--plan_ranks", "2").stdout
    assert printed.split() == ["2", "none", "False"]
    stderr = plan("--plan", "True", "--plan_for_shell", "True", "--plan_gpu", "2x1200MB", "--plan_ram", "1GB", code=2)
    assert "ZERO_STAGE=auto finds no stage that fits 2 x 1200MB" in stderr.stderr


def test_a_run_that_cannot_fit_is_refused_before_the_model_is_loaded(plan, tmp_path):
    result = plan("--plan_ram", "1000MB", "--max_steps", 1, code=2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "full, one process with" in result.stderr and "--check_fit False" in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    assert (
        "loss" in plan("--plan_ram", "1000MB", "--max_steps", 1, "--check_fit", "False", "--save_strategy", "no").stdout
    )


def run_of(shape: str, args: TrainingArguments, **plan_flags: object) -> Run:
    return Run(ModelArguments("m"), DataArguments("d"), PlanArguments(**plan_flags), args, SHAPES[shape])


def test_activation_checkpointing_is_on_where_the_run_fits_only_with_it(make_model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
    # A GPU that surely leaves 23 MiB, between the 18 that tiny BLOOM takes with activation checkpointing and the 29
    # without; 94 MiB in all.
    run = run_of("bloom-tiny", args, plan_gpu="1x1177MB", plan_ram="64GB")
    assert fit(run, 512).line.endswith("according to --plan") and not fit(run, 512).needs_checkpointing
    tight = fit(run, 2048)
    assert tight.line.endswith("; activation checkpointing is on, without which it might not fit")
    assert tight.needs_checkpointing and not args.activation_checkpointing
    args.turn_on_checkpointing()
    model = AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny"))
    Trainer(model, args, train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8).train()
    assert model.is_activation_checkpointing


def test_what_a_flag_decides_is_not_changed_but_told(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing=False)
    told = fit(run_of("bloom-tiny", args, plan_gpu="1x1177MB", plan_ram="64GB"), 2048)
    assert told.line.endswith("; unproven: it leaves little for what no plan can foresee")
    assert not told.needs_checkpointing
    with pytest.raises(UserError, match="--activation_checkpointing True"):
        fit(run_of("bloom-tiny", args, plan_gpu="1x1102MB", plan_ram="64GB"), 2048)  # of 22 MiB in all


@pytest.mark.parametrize(
    ("gpu", "shape", "expected"),
    [("1x80GB", "bloom-560m", 8), ("1x24GB", "bloom-560m", 4), ("1x16GB", "bloom-560m", 1), ("1x24GB", "bloom-7b1", 1)],
)
def test_a_gpus_batch_has_as_many_sequences_as_make_16384_tokens_and_fit(gpu, shape, expected, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.chooses_batch_size
    assert batch_size(run_of(shape, args, plan=True, plan_gpu=gpu, plan_ram="256GB")) == expected
    assert batch_size(run_of(shape, args)) == 1, "on a CPU"


def test_the_header_says_what_the_run_takes(plan):
    printed = plan("--max_steps", 1, "--save_strategy", "no").stdout
    assert re.search(
        r"^memory   about 0\.\d GiB on each process \(of \d+\.\d\) and \d+\.\d GiB on the host \(of \d+\.\d\), "
        r"according to --plan$",
        printed,
        re.M,
    )


@pytest.mark.slow
def test_the_script_runs_the_stage_that_the_plan_chose(make_model, data, cache_dir, warm_python, tmp_path):
    variables = {"MODEL": make_model("bloom-tiny"), "DATA": data, "OUTPUT": tmp_path / "o", "DEVICE": "cpu"}
    variables |= {"ZERO_STAGE": "auto", "NUM_GPUS": 2, "PYTHON": sys.executable, "PYTHON_EXEC": warm_python}
    variables |= {"HF_DATASETS_CACHE": cache_dir}
    result = subprocess.run(
        ["sh", PROJECT / "ds_all.sh", "--max_steps", "1", "--save_strategy", "no"],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "ZERO_STAGE=2 OFFLOAD=none, activation checkpointing False: the fastest that fits" in result.stdout
    assert ", ZeRO-2; fp32 weights" in result.stdout and (tmp_path / "o" / "model.safetensors").exists()
