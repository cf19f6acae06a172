"""Runs that are killed, told to end, or find a full disk: what they leave, and how the same command goes on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from support import disks
from support.project import PROJECT, SAMPLE

FLAGS = ["--learning_rate", "1e-2", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
ZERO_2 = ["--use_cpu", "True", "--deepspeed", str(PROJECT / "ds_zero2_config.json")]
LAUNCHER = ["-m", "sft.training.launch", "--cpu", "--ranks", "2"]
STOPPING = (signal.SIGTERM, signal.SIGHUP)  # a scheduler's, and that of a terminal that closes
STEPS_TO_LIVE = 35  # at the most, of a killed run


@pytest.fixture
def start(make_model, cache_dir, warm_python) -> Callable[..., subprocess.Popen]:
    """Return a function that starts a run into an output folder, of one process or of two ranks, and returns it."""

    def start(
        output: Path, *flags: object, launcher: Sequence[str] = (), python: str = warm_python
    ) -> subprocess.Popen:
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", SAMPLE / "own_with_input.json"]
        command = [python, *launcher, "train_sft.py", *given, "--output_dir", output, *FLAGS, *flags]
        settings = {
            "HF_DATASETS_CACHE": str(cache_dir),
            "DS_ACCELERATOR": "cpu",
            "PYTHON_EXEC": python,
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=PROJECT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(run: subprocess.Popen) -> str:
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stdout[-2000:] + stderr[-2000:]
    return stdout + stderr


def wait_for_training(run: subprocess.Popen, line_start: str = "checked") -> None:
    for line in run.stdout:
        if line.startswith(line_start):
            return
    pytest.fail(f"ended before it trained: {run.stderr.read()[-2000:]}")


def wait_for_a_moment(run: subprocess.Popen, moments: random.Random) -> None:
    """Wait for some steps of a run and a part of the next one, or of its save."""
    for _ in range(moments.randint(1, STEPS_TO_LIVE)):
        wait_for_training(run, "{'loss'")
    time.sleep(moments.uniform(0, 0.2))


def kill(victim: psutil.Process, run: subprocess.Popen) -> None:
    """Kill a process of a run by SIGKILL; with the launcher all others end at once, with a rank soon."""
    ranks = psutil.Process(run.pid).children()
    victim.kill()
    _, alive = psutil.wait_procs(ranks, timeout=30 if victim.pid == run.pid else 60)
    assert not alive, f"{alive} went on"
    run.communicate()


@pytest.mark.slow
def test_killed_at_random_moments_equals_never_interrupted(request, start, tmp_path):
    """Bit for bit, in one process; moments while a checkpoint is written are among them."""
    kills, moments = request.config.getoption("--kills"), random.Random(request.config.getoption("--kills"))
    flags = ["--max_steps", 60 + 60 * kills]
    finish(start(tmp_path / "whole", *flags))
    while_saving = 0
    for _ in range(kills):
        run = start(tmp_path / "killed", *flags)
        wait_for_a_moment(run, moments)
        assert run.poll() is None, "ended before it could be killed"
        run.kill()
        run.communicate()
        while_saving += (tmp_path / "killed" / "unfinished").exists()
    printed = finish(start(tmp_path / "killed", *flags))
    print(f"killed {kills} times, {while_saving} of them while saving; then: {re.search(r'output .*', printed)[0]}")
    whole, killed = tmp_path / "whole" / "model.safetensors", tmp_path / "killed" / "model.safetensors"
    assert whole.read_bytes() == killed.read_bytes()


@pytest.mark.slow
def test_two_ranks_killed_at_random_moments_equal_never_interrupted(request, start, tmp_path):
    """The launcher or one rank is killed; the others end by themselves."""
    kills = request.config.getoption("--rank_kills")
    moments = random.Random(kills)
    flags = [*ZERO_2, "--max_steps", 60 + 40 * kills]
    finish(start(tmp_path / "whole", *flags, launcher=LAUNCHER))
    for number in range(kills):
        # Cold, so that the ranks are the launcher's own children.
        run = start(tmp_path / "killed", *flags, launcher=LAUNCHER, python=sys.executable)
        wait_for_a_moment(run, moments)
        launcher = psutil.Process(run.pid)
        kill(launcher.children()[moments.randrange(2)] if number % 2 else launcher, run)
    finish(start(tmp_path / "killed", *flags, launcher=LAUNCHER))
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.allclose(whole[name], killed[name], rtol=0, atol=1e-6) for name in whole)


@pytest.mark.parametrize(
    ("ranks", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGHUP), *(pytest.param(2, each, marks=pytest.mark.slow) for each in STOPPING)],
)
def test_a_signal_saves_at_the_next_step_and_the_same_command_goes_on(ranks, number, start, tmp_path):
    more = {"launcher": LAUNCHER} if ranks == 2 else {}
    flags = [*(ZERO_2 if ranks == 2 else []), "--max_steps", "400", "--save_steps", "300"]
    if ranks == 1:  # nothing of what an epoch ends with may come after the save
        flags += ["--eval_data_path", SAMPLE / "train_2M_CN.json"]
    run = start(tmp_path, *flags, **more)
    wait_for_training(run, "{'loss'")  # of the first step
    everyone = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=120)
    assert not [process for process in everyone if process.is_running()]
    assert run.returncode == 75
    said = r"^stopped: SIGTERM or SIGHUP received; saved \S+/checkpoint-(\d+) after step \1 of 400;"
    told = re.search(said, stderr, re.M)
    step = int(told[1])
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    steps_an_epoch = 27
    assert stdout.count("eval_loss") <= (ranks == 1) + step // steps_an_epoch  # the first before the first step

    if ranks == 2:
        return
    # Not a step of this one is left to make, so only the checkpoint can have come in.
    flags = [step if flag == "400" else flag for flag in flags]
    printed = finish(start(tmp_path, *flags, **more))
    assert f"checkpoint-{step} is the last one: all {step:,} steps are done" in printed
    assert (tmp_path / "model.safetensors").stat().st_size == (
        tmp_path / f"checkpoint-{step}" / "model.safetensors"
    ).stat().st_size


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of a given size; a checkpoint of the tiny model takes 2.0 MiB and is thought to take 1.9."""
    with disks.small_disk(tmp_path, request.param):
        yield tmp_path


@pytest.mark.parametrize("small_disk", ["6m"], indirect=True)
def test_a_disk_that_is_too_small_is_refused_before_the_weights_are_loaded(start, small_disk):
    run = start(small_disk / "run", "--save_total_limit", "4", "--max_steps", "20")
    stdout, stderr = run.communicate(timeout=120)
    # What became of the data is said by now, but nothing of the model.
    assert run.returncode == 2 and [line.split()[0] for line in stdout.splitlines()] == ["data", "shape"]
    assert re.search(r"^error: --output_dir \S+ has 6.0 MiB free and needs 7\.\d MiB: 4 checkpoints", stderr)


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["6m"], indirect=True)
def test_a_disk_that_another_fills_up_leaves_the_older_checkpoint_whole(start, small_disk):
    flags = ["--save_steps", "40", "--lr_scheduler_type", "constant"]  # which may end sooner than it began to
    run = start(small_disk / "run", "--max_steps", "400", *flags)
    while not (small_disk / "run" / "checkpoint-40" / "complete.json").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "another file").write_bytes(bytes(int(free - 1.5 * 2**20)))
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 2
    expected = r"^error: checkpoint-80 needs about 2.0 MiB and \S+ has 1.5 MiB free; \S+/checkpoint-40 is complete; "
    assert re.search(expected, stderr, re.MULTILINE), stderr

    (small_disk / "another file").unlink()
    printed = finish(start(small_disk / "run", "--max_steps", "42", *flags))
    assert "resuming from" in printed and "in 42 steps" in printed


@pytest.mark.parametrize("small_disk", ["1960k"], indirect=True)
def test_a_disk_that_is_full_in_the_middle_of_a_save_is_told_of_and_left_clean(start, small_disk):
    run = start(small_disk / "run", "--max_steps", "4", "--save_steps", "4")
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 2
    expected = r"^error: checkpoint-4 cannot be written to \S+: .*; there is no complete checkpoint; free disk"
    assert re.search(expected, stderr, re.MULTILINE), stderr
    assert not list(small_disk.rglob("*.safetensors"))


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_goes_on(start, tmp_path):
    first = start(tmp_path, "--max_steps", "2000", "--save_strategy", "no")
    wait_for_training(first)
    _, stderr = start(tmp_path, "--max_steps", "4").communicate(timeout=120)
    assert first.poll() is None, "ended too early to be in the way"
    assert re.search(r"^error: --output_dir \S+ is in use by another run", stderr, re.MULTILINE), stderr
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_damaged_checkpoints_are_left_aside_and_an_older_one_serves(start, tmp_path):
    flags = ["--max_steps", "8", "--save_total_limit", "10"]
    finish(start(tmp_path, *flags))
    result = (tmp_path / "model.safetensors").read_bytes()
    truncated, emptied, unmarked = (tmp_path / f"checkpoint-{step}" for step in (8, 6, 4))
    os.truncate(truncated / "optimizer.pt", 1000)
    os.truncate(emptied / "model.safetensors", 0)
    (unmarked / "complete.json").unlink()
    hollow = tmp_path / "checkpoint-9"
    hollow.mkdir()
    (hollow / "complete.json").write_text(json.dumps({"files": {}, "settings": {}}))
    printed = finish(start(tmp_path, *flags))
    for folder, reason in (
        (truncated, "optimizer.pt has 1,000 of its"),
        (emptied, "model.safetensors has 0 of its"),
        (unmarked, "it has no complete.json"),
        (hollow, "it has no weights"),
    ):
        assert f"{folder} is incomplete and skipped: {reason}" in printed
    assert "resuming from" in printed and "checkpoint-2\n" in printed
    assert not (tmp_path / ".in-use").exists()
    assert (tmp_path / "model.safetensors").read_bytes() == result
