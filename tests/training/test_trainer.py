"""What the Trainer does beside training: an end where going on is a waste, and what it keeps on the disk."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import train_sft
from sft.model import neftune
from sft.program import UserError, WastedRunError
from sft.training import callbacks, checkpoints
from sft.training.callbacks import MAX_SKIPPED_STEPS, Watch, what_is_wasted
from sft.training.disk import checkpoint_bytes, size_of
from sft.training.trainer import Trainer, loading_told
from support.project import SAMPLE


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


def watch(losses: list[float], skipped: list[bool], output: Path, lag: int = 0, saved: tuple[int, ...] = ()) -> int:
    """Show a Watch some steps; return how many it let pass before it ended the run."""
    trainer = SimpleNamespace(step_loss=torch.zeros(()), accelerator=SimpleNamespace(reduce=lambda sums, how: sums))
    trainer.args = SimpleNamespace(output_dir=str(output), world_size=1)
    watching = Watch(trainer, torch.device("cpu"))
    watching.lag = lag
    for step, (loss, was_skipped) in enumerate(zip(losses, skipped, strict=True)):
        trainer.step_loss += loss
        trainer.accelerator.optimizer_step_was_skipped = was_skipped
        control = SimpleNamespace(should_save=step in saved, should_evaluate=False, should_training_stop=False)
        try:
            watching.on_step_end(trainer.args, SimpleNamespace(global_step=step), control)
        except WastedRunError as end:
            assert f"at step {step - lag if step not in saved else step} " in str(end)
            return step
    return len(losses)


def test_the_loss_watched_is_that_of_one_step(tmp_path):
    assert watch([1.0, -1.0, 2.0], 3 * [False], tmp_path) == 3, "the losses of two steps were added up"
    assert watch([1.0, 0.0, 2.0], 3 * [False], tmp_path) == 1
    assert watch([1.0, math.nan], 2 * [False], tmp_path) == 1


def test_a_device_that_runs_ahead_is_judged_a_step_later_but_before_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "Event", lambda device: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    assert watch([1.0, math.nan, 2.0, 3.0], 4 * [False], tmp_path, lag=1) == 2
    assert watch([1.0, math.nan, 2.0, 3.0], 4 * [False], tmp_path, lag=1, saved=(1,)) == 1
    assert watch([1.0, 2.0, math.nan], 3 * [False], tmp_path, lag=1) == 3, "left to the end of the epoch"
    assert callbacks.runs_ahead(torch.device("cpu")) is False


def test_a_wish_to_end_is_met_at_once_when_it_is_read_and_the_steps_on_the_way_are_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "Event", lambda device: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    trainer = SimpleNamespace(step_loss=torch.zeros(()), accelerator=SimpleNamespace(reduce=lambda sums, how: sums))
    trainer.args = SimpleNamespace(output_dir=str(tmp_path), world_size=1)
    trainer.accelerator.optimizer_step_was_skipped = False
    watching = Watch(trainer, torch.device("cpu"))
    watching.lag, watching.is_told = 1, True
    saves = []
    for step in range(2):
        trainer.step_loss += 1.0
        control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
        watching.on_step_end(trainer.args, SimpleNamespace(global_step=step), control)
        saves.append((control.should_save, control.should_training_stop, len(watching.outcomes)))
    assert saves == [(False, False, 1), (True, True, 0)]


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["in a terminal", "under nohup"])
def test_a_terminal_that_closes_ends_a_run_unless_nohup_has_it_ignored(before):
    watching = Watch(SimpleNamespace(), torch.device("cpu"))
    handler = signal.signal(signal.SIGHUP, before)
    try:
        watching.on_train_begin(None, None, None)
        has_own_handler = signal.getsignal(signal.SIGHUP) != before
        watching.on_train_end(None, None, None)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert has_own_handler == (before == signal.SIG_DFL)


class KillsItself(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_that_builds_batches_is_told_in_one_line():
    with pytest.raises(UserError, match=r"SIGKILL|Killed|exited unexpectedly") as caught, loading_told():
        next(iter(torch.utils.data.DataLoader(KillsItself(), num_workers=1)))
    assert "type --dataloader_num_workers 0 " in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="odd"), loading_told():
        raise RuntimeError("odd")


def test_tokens_per_second_are_by_the_time_from_step_to_step_without_evaluations_and_saves(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    trainer = SimpleNamespace(step_loss=torch.ones(()), accelerator=SimpleNamespace(reduce=lambda sums, how: sums))
    trainer.args = SimpleNamespace(output_dir=str(tmp_path), world_size=1)
    trainer.accelerator.optimizer_step_was_skipped = False
    watching, state = Watch(trainer, torch.device("cpu")), SimpleNamespace(global_step=1)
    watching.on_train_begin(trainer.args, state, None)
    control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    for seconds_of_loading, seconds_of_step, what_follows in (
        (2, 3, watching.on_save),
        (4, 1, watching.on_evaluate),
        (3, 2, watching.on_save),
    ):
        now[0] += seconds_of_loading + seconds_of_step
        trainer.step_loss += 1.0
        watching.num_tokens += 50
        watching.on_step_end(trainer.args, state, control)
        now[0] += 1000
        what_follows(trainer.args, state, control)
    watching.on_train_end(trainer.args, state, control)
    assert watching.tokens_per_second == 150 / 15


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
    assert checkpoints.newest(str(tmp_path)) == newest and not (tmp_path / "model.safetensors").exists()


def test_optimizer_states_can_be_kept_for_the_last_checkpoint_alone(train, tmp_path):
    flags = ["--max_steps", "6", "--save_steps", "2", "--save_total_limit", "5", "--save_optimizer_limit", "1"]
    assert train(tmp_path, *flags).returncode == 0
    folders = checkpoints.folders_in(str(tmp_path))
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert [checkpoints.has_optimizer_state(folder) for folder in folders] == [False, False, True]
    assert all(checkpoints.fault_of(folder) is None for folder in folders)
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
    assert {folder.name for folder in checkpoints.folders_in(str(tmp_path))} == {f"checkpoint-{best}", "checkpoint-8"}
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


def test_the_noise_of_transformers_own_is_not_added_to_ours(make_model, cache_dir, tmp_path, monkeypatch):
    """Train in this process, where what transformers would do can be caught."""
    monkeypatch.setattr("transformers.trainer.activate_neftune", lambda *given: pytest.fail("added by transformers"))
    installed, install = [], neftune.install
    monkeypatch.setattr(neftune, "install", lambda model, alpha: installed.append(alpha) or install(model, alpha))
    flags = {"--model_name_or_path": make_model("bloom-tiny"), "--data_path": SAMPLE / "own_with_input.json"}
    flags |= {"--output_dir": tmp_path, "--cache_dir": cache_dir, "--neftune_noise_alpha": 5, "--max_steps": 1}
    flags |= {"--save_strategy": "no", "--use_cpu": True}
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *(str(word) for flag in flags.items() for word in flag)])
    train_sft.main()
    assert installed == [5.0]


def test_an_optimizer_that_cannot_be_made_is_one_line(monkeypatch):
    def fail(self):
        raise ValueError("No target modules found\nfor it")

    trainer = object.__new__(Trainer)
    trainer.args = SimpleNamespace(optimizer_name="galore_adamw")
    monkeypatch.setattr(transformers.Trainer, "create_optimizer", fail)
    with pytest.raises(UserError, match="--optim galore_adamw cannot be used: No target modules found; type --optim"):
        trainer.create_optimizer()
