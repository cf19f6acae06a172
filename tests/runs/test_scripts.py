"""The shell scripts under the strictest sh at hand, and the set-up that they share."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.project import PROJECT

SH = shutil.which("dash") or "sh"
SCRIPTS = ["base_run.sh", "ds_all.sh", "setup.sh", "tests/run.sh"]


def shell(*command: object, cwd: Path = PROJECT, **environment: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SH, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_plain_sh(script):
    text = (PROJECT / script).read_text()
    assert shell("-n", script).returncode == 0
    assert script == "setup.sh" or "set -eu" in text
    assert "pipefail" not in text and "[[" not in text


@pytest.mark.parametrize("family", ["bloom", pytest.param("falcon", marks=pytest.mark.slow)])
def test_the_demo_goes_the_whole_way(family, cache_dir, tmp_path):
    """One row of each set instead of twenty, learnt in 70 steps."""
    small = {"ROWS_PER_SET": 1, "FAMILY": family, "OUTPUT": tmp_path / "demo", "HF_DATASETS_CACHE": cache_dir}
    # From another folder, as a user may call it.
    result = shell(
        PROJECT / "base_run.sh", "--demo", "--num_train_epochs", 70, "--warmup_steps", 10, cwd=tmp_path, **small
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "3 of 3 answers are the trained ones" in result.stdout
    assert f"app.py --checkpoint {tmp_path / 'demo'}" in result.stdout
    assert (tmp_path / "demo" / "model.safetensors").exists()


def test_an_unknown_family_is_one_line_and_exit_code_2():
    result = shell("base_run.sh", "--demo", FAMILY="llama")
    assert (result.returncode, result.stderr) == (2, "error: FAMILY=llama; expected bloom or falcon\n")


@pytest.mark.parametrize("script", ["base_run.sh", "ds_all.sh"])
def test_a_script_finds_its_folder_through_a_link_and_beside_a_namesake(script, tmp_path):
    (tmp_path / "link.sh").symlink_to(PROJECT / script)
    (tmp_path / "elsewhere" / PROJECT.name).mkdir(parents=True)
    for path, cwd in ((tmp_path / "link.sh", tmp_path), (f"{PROJECT.name}/{script}", PROJECT.parent)):
        result = shell(path, "--no_such_flag", 1, cwd=cwd, CDPATH=tmp_path / "elsewhere", DEVICE="cpu")
        assert result.returncode == 2 and "--no_such_flag" in result.stderr, result.stderr


@pytest.mark.parametrize(("given", "shown"), [(None, "0"), ("3,1", "3"), ("GPU-8932f937,1", "GPU-8932f937"), ("", "")])
def test_one_gpu_is_shown_and_none_where_all_are_hidden(monkeypatch, given, shown):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = (PROJECT / "base_run.sh").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("CUDA_VISIBLE_DEVICES="))
    text = "\n".join(["set -eu", *lines[begin : begin + 2], 'echo "[$CUDA_VISIBLE_DEVICES]"'])
    assert shell("-c", text, **({} if given is None else {"CUDA_VISIBLE_DEVICES": given})).stdout == f"[{shown}]\n"


def test_flags_after_the_scripts_own_reach_the_program(tmp_path):
    result = shell("base_run.sh", "--no_such_flag", "1", MODEL=tmp_path)
    assert result.returncode == 2 and "--no_such_flag" in result.stderr
    result = shell("base_run.sh", MODEL=tmp_path, DATA="data_proj/sample")
    assert result.returncode == 2 and f"{tmp_path} is a folder without config.json" in result.stderr


@pytest.fixture
def shown(tmp_path):
    """A Python that satisfies the set-up and shows how it is called."""
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo "$0" || echo "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, "-m sft.training.launch --nnodes 1 --node_rank 0"),
        (
            {"NUM_GPUS": 4, "MASTER_PORT": 12345},
            "-m sft.training.launch --nnodes 1 --node_rank 0 --ranks 4 --master_port 12345",
        ),
        ({"DEVICE": "cpu"}, "-m sft.training.launch --nnodes 1 --node_rank 0 --cpu"),
        (
            {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1"},
            "-m sft.training.launch --nnodes 2 --node_rank 1 --master_addr 10.0.0.1",
        ),
        (
            {"HOSTFILE": "hosts", "NUM_GPUS": 8},
            "-m deepspeed.launcher.runner --hostfile hosts --no_local_rank --master_port 29500 --num_gpus 8",
        ),
    ],
)
def test_the_environment_chooses_how_ranks_are_launched(environment, launched, shown):
    result = shell("ds_all.sh", "--learning_rate", "1e-5", **environment, PYTHON=shown)
    command = result.stdout.splitlines()[-1]
    assert command.startswith(f"{launched} {PROJECT / 'train_sft.py'} "), result.stderr
    assert "ds_zero2_config.json --offload none" in command and command.endswith("--learning_rate 1e-5")
    assert ("--use_cpu True" in command) == ("DEVICE" in environment)


def test_stage_and_offload_reach_the_program(shown):
    settings = {"ZERO_STAGE": 3, "OFFLOAD": "all", "OFFLOAD_DIR": "a_disk", "OUTPUT": "here"}
    result = shell("ds_all.sh", **settings, PYTHON=shown)
    assert "--output_dir here" in result.stdout and "ds_zero3_config.json --offload all" in result.stdout
    assert "--offload_dir a_disk" in result.stdout


def test_ds_all_without_a_gpu_is_one_line_and_exit_code_2():
    result = shell("ds_all.sh", CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == ("error: no GPU is visible here; type DEVICE=cpu NUM_GPUS=2 for two ranks on the CPU\n")


def write_wheel(folder: Path) -> None:
    """Write a package "tiny" 1.0 that pip can install without an index."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")


def set_up(folder: Path, **environment: object) -> subprocess.CompletedProcess:
    code = 'set -eu; here=$PWD; . ./setup.sh; set_up "$here/requirements.txt"; echo "PYTHON is $PYTHON"'
    return shell("-c", code, cwd=folder, **environment)


def test_the_set_up_installs_once_and_then_does_nothing(tmp_path):
    write_wheel(tmp_path / "wheels")
    project = tmp_path / "a project"
    project.mkdir()
    shutil.copy(PROJECT / "setup.sh", project)
    (project / "requirements.txt").write_text("# a comment\ntiny==1.0\n")
    index = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path / "wheels"}
    python = project / ".venv" / "bin" / "python"

    first = set_up(project, **index)
    assert first.stdout.splitlines()[-1] == f"PYTHON is {python}", first.stderr
    assert "installing" in first.stdout
    made = python.lstat().st_mtime_ns
    second = set_up(project, PIP_NO_INDEX=1)
    assert second.stdout == f"PYTHON is {python}\n"
    assert python.lstat().st_mtime_ns == made

    (project / "requirements.txt").write_text("tiny==2.0\n")
    assert "installing" in set_up(project, **index).stdout, "a changed pin was not noticed"


def test_the_active_python_serves_where_it_holds_everything():
    result = set_up(PROJECT)
    assert result.stdout == f"PYTHON is {Path(sys.executable).parent.resolve() / Path(sys.executable).name}\n"


def test_a_python_that_is_too_old_is_named(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = set_up(PROJECT, PYTHON="", PATH=tmp_path)
    assert result.returncode == 2 and "no Python 3.11 or newer found" in result.stderr
