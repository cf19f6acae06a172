"""What the Trainer does beside training: an end where going on is a waste, and what it keeps on the disk."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SAMPLE
from transformers import AutoModelForCausalLM

from sft import checkpoint
from sft.disk import checkpoint_bytes, size_of
from sft.program import WastedRunError
from sft.trainer import MAX_SKIPPED_STEPS, Watch, what_is_wasted


@pytest.fixture
def train(run, make_model) -> Callable[..., subprocess.CompletedProcess]:
    def train(output: Path, *flags: object) -> subprocess.CompletedProcess:
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", SAMPLE / "own_with_input.json"]
        return run("train_sft.py", *given, "--output_dir", output, "--learning_rate", "1e-2", *flags)

    return train


@pytest.mark.parametrize(
    ("loss", "num_skipped", "said"),
    [
        (1.5, 0, None),
        (1.5, MAX_SKIPPED_STEPS - 1, None),
        (math.nan, 0, "the loss is nan"),
        (math.inf, 0, "the loss is inf"),
        (0.0, 0, "the loss is exactly 0"),
        (1.5, MAX_SKIPPED_STEPS, "20 steps in a row were skipped"),
    ],
)
def test_what_is_a_waste(loss, num_skipped, said):
    happened = what_is_wasted(loss, num_skipped)
    assert (happened is None) if said is None else said in happened and "--fp16 False" in happened


def watch(losses: list[float], skipped: list[bool], output: Path) -> int:
    """Show a Watch some steps; return how many it let pass before it ended the run."""
    trainer = SimpleNamespace(step_loss=torch.zeros(()), accelerator=SimpleNamespace(reduce=lambda sums, how: sums))
    watching, control = Watch(trainer), SimpleNamespace(should_save=False, should_training_stop=False)
    for step, (loss, was_skipped) in enumerate(zip(losses, skipped, strict=True)):
        trainer.step_loss += loss
        trainer.accelerator.optimizer_step_was_skipped = was_skipped
        try:
            watching.on_step_end(SimpleNamespace(output_dir=str(output)), SimpleNamespace(global_step=step), control)
        except WastedRunError:
            return step
    return len(losses)


def test_the_loss_watched_is_that_of_one_step(tmp_path):
    assert watch([1.0, -1.0, 2.0], 3 * [False], tmp_path) == 3, "the losses of two steps were added up"
    assert watch([1.0, 0.0, 2.0], 3 * [False], tmp_path) == 1
    assert watch([1.0, math.nan], 2 * [False], tmp_path) == 1


def test_only_skipped_steps_in_a_row_end_a_run(tmp_path):
    row = (MAX_SKIPPED_STEPS - 1) * [True]
    skipped = [*row, False, *row, False, *row, True, True]
    assert watch(len(skipped) * [1.0], skipped, tmp_path) == 3 * MAX_SKIPPED_STEPS - 1


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_last_checkpoint(train, tmp_path):
    result = train(tmp_path, "--learning_rate", "1e30", "--save_steps", "1", "--max_steps", "20")
    assert result.returncode == 3, result.stderr[-2000:]
    stopped = [line for line in result.stderr.splitlines() if line.startswith("stopped: ")]
    assert len(stopped) == 1 and "Traceback" not in result.stderr
    step = int(stopped[0].split("at step ")[1].split()[0])
    newest = tmp_path / f"checkpoint-{step - 1}"
    assert "the loss is " in stopped[0] and "a lower --learning_rate" in stopped[0]
    assert f"the last checkpoint is {newest}; start from it: --model_name_or_path {newest}" in stopped[0]
    assert checkpoint.newest(str(tmp_path)) == newest and not (tmp_path / "model.safetensors").exists()


def test_optimizer_states_can_be_kept_for_the_last_checkpoint_alone(train, tmp_path):
    flags = ["--max_steps", "6", "--save_steps", "2", "--save_total_limit", "5", "--save_optimizer_limit", "1"]
    assert train(tmp_path, *flags).returncode == 0
    folders = checkpoint.folders_in(str(tmp_path))
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [checkpoint.can_go_on(folder) for folder in folders] == [False, False, True]
    assert all(checkpoint.fault_of(folder) is None for folder in folders)
    AutoModelForCausalLM.from_pretrained(folders[0])

    (folders[2] / "complete.json").unlink()
    again = train(tmp_path, *flags)
    assert again.returncode == 2 and f"{folders[1]} has weights but no optimizer state" in again.stderr
    assert f"--model_name_or_path {folders[1]} --output_dir" in again.stderr


def test_the_best_checkpoint_is_kept_and_is_the_result(train, tmp_path):
    flags = ["--eval_data_path", SAMPLE / "school_math_0.25M.json", "--load_best_model_at_end", "True"]
    flags += ["--save_steps", "2", "--eval_steps", "2", "--eval_strategy", "steps", "--save_total_limit", "2"]
    result = train(tmp_path, *flags, "--max_steps", "8", "--learning_rate", "0.3", "--lr_scheduler_type", "constant")
    assert result.returncode == 0, result.stderr[-2000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    del losses[0]  # of the base model, which no checkpoint has
    best = min(losses, key=losses.get)
    assert best != 8, "the last is the best, so the test shows nothing"
    assert {folder.name for folder in checkpoint.folders_in(str(tmp_path))} == {f"checkpoint-{best}", "checkpoint-8"}
    ours, expected = (
        AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, tmp_path / f"checkpoint-{best}")
    )
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in ours.state_dict().items())


def test_the_estimate_of_a_checkpoint_is_what_it_takes(train, tmp_path):
    assert train(tmp_path, "--max_steps", "2").returncode == 0
    settings = json.loads((tmp_path / "checkpoint-2" / "complete.json").read_text())["settings"]
    estimate = checkpoint_bytes(settings["parameters"], 0, in_16_bits=False)
    tokenizer_and_states = 120_000
    assert 0 <= size_of(tmp_path / "checkpoint-2") - estimate < tokenizer_and_states


def test_each_epoch_has_an_order_of_its_own(train, tmp_path):
    flags = ["--num_train_epochs", "2", "--learning_rate", "1e-30", "--logging_steps", "1", "--save_strategy", "no"]
    assert train(tmp_path, *flags).returncode == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [round(entry["loss"], 4) for entry in history if "loss" in entry]
    first, second = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert len(first) == len(second) and first != second
