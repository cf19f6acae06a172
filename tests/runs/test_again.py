"""The same command again, or almost the same: what is done is not done anew, and no schedule is bent."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file

from support.project import SAMPLE

DATA, HELD_OUT = SAMPLE / "own_with_input.json", SAMPLE / "school_math_0.25M.json"
# The held-out rows are of another kind, so that more epochs make their loss worse.
BEST = [
    "--load_best_model_at_end",
    "True",
    "--save_strategy",
    "epoch",
    "--eval_strategy",
    "epoch",
    "--eval_data_path",
    HELD_OUT,
]


@pytest.fixture
def train(run: Callable, make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., CompletedProcess]:
    """Return a function that trains into tmp_path/run, some steps an epoch."""

    def train(*flags: object) -> CompletedProcess:
        given = [
            "--model_name_or_path",
            make_model("bloom-tiny"),
            "--data_path",
            DATA,
            "--output_dir",
            tmp_path / "run",
        ]
        return run("train_sft.py", *given, "--learning_rate", "3e-2", "--per_device_train_batch_size", 4, *flags)

    return train


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_whose_best_checkpoint_alone_is_left_is_not_made_again(train, tmp_path):
    flags = [*BEST, "--save_total_limit", 1, "--num_train_epochs", 3]
    assert train(*flags).returncode == 0
    output = tmp_path / "run"
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    [kept] = output.glob("checkpoint-*")
    assert kept.name == f"checkpoint-{state['global_step'] // 3}" == Path(state["best_model_checkpoint"]).name
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*.safetensors")}
    again = train(*flags)
    assert again.returncode == 0, again.stderr
    assert f"{output} has made all its {state['global_step']} steps\n" in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*.safetensors")}
    assert are_equal(weights_of(output), weights_of(kept))


def test_a_run_that_ended_before_its_result_was_there_publishes_the_best_checkpoint(train, tmp_path, make_model):
    flags = [*BEST, "--save_total_limit", 2, "--num_train_epochs", 3]
    assert train(*flags).returncode == 0
    output = tmp_path / "run"
    for name in ("model.safetensors", "trainer_state.json"):
        (output / name).unlink()
    assert train(*flags).returncode == 0
    best, last = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert are_equal(weights_of(output), weights_of(best))
    assert not are_equal(weights_of(output), weights_of(last))
    assert not are_equal(weights_of(output), weights_of(make_model("bloom-tiny")))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_epochs_than_before_would_bend_the_schedule_and_are_refused(train, tmp_path, schedule):
    flags = ["--save_strategy", "epoch", "--lr_scheduler_type", schedule]
    assert train(*flags, "--num_train_epochs", 1).returncode == 0
    [folder] = (tmp_path / "run").glob("checkpoint-*")
    steps = int(folder.name.split("-")[1])
    refused = train(*flags, "--num_train_epochs", 2)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"was made with steps {steps}, and this command has {2 * steps}; resume with the same" in refused.stderr
    assert "--num_train_epochs and --max_steps" in refused.stderr
    [start] = re.findall(r"--model_name_or_path (\S+) --output_dir ANOTHER", refused.stderr)
    assert start == str(folder)
    assert "all its" not in train(*flags, "--num_train_epochs", 1).stderr


def test_a_constant_learning_rate_goes_on_for_more_epochs(train, tmp_path):
    flags = ["--save_strategy", "epoch", "--lr_scheduler_type", "constant", "--logging_steps", 1]
    assert train(*flags, "--num_train_epochs", 1).returncode == 0
    longer = train(*flags, "--num_train_epochs", 2)
    assert longer.returncode == 0, longer.stderr
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    shutil.rmtree(tmp_path / "run")
    assert train(*flags, "--num_train_epochs", 2).returncode == 0
    whole = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [[each["loss"] for each in of["log_history"] if "loss" in each] for of in (state, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == whole["global_step"]


def test_noise_on_embeddings_is_a_setting_and_changes_the_losses(train, tmp_path):
    flags = ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    losses = []
    for noise in ([], ["--neftune_noise_alpha", 15]):
        assert train(*flags, *noise).returncode == 0
        state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
        losses.append([each["loss"] for each in state["log_history"] if "loss" in each])
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")
        refused = train(*flags, "--neftune_noise_alpha", 3)
        assert refused.returncode == 2 and "was made with --neftune_noise_alpha" in refused.stderr
        shutil.rmtree(tmp_path / "run")
    assert losses[0] != losses[1]
