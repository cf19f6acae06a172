"""The shell scripts under the strictest sh at hand, and the set-up that they share."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT

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


@pytest.mark.parametrize("family", ["bloom", "falcon"])
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


def test_flags_after_the_scripts_own_reach_the_program(tmp_path):
    result = shell("base_run.sh", "--no_such_flag", "1", MODEL=tmp_path)
    assert result.returncode == 2 and "--no_such_flag" in result.stderr
    result = shell("base_run.sh", MODEL=tmp_path, DATA="data_proj/sample")
    assert result.returncode == 2 and f"{tmp_path} is a folder without config.json" in result.stderr


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
