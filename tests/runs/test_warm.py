"""The stand-in for Python that starts tests' programs warm ends as Python does, and leaves to it what it cannot do."""

import os
import signal
import subprocess
import sys

import pytest

from support.project import PROJECT
from support.warm_python import is_warm, network


def test_a_warm_program_has_its_own_arguments_streams_and_exit_code(run, tmp_path):
    result = run("train_sft.py", "--model_name_or_path", tmp_path, "--data_path", "x", "--output_dir", tmp_path / "o")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_a_warm_program_and_is_how_it_ends(warm_python, make_model, tmp_path, number):
    command = [warm_python, "-m", "sft.chat", make_model("bloom-tiny")]
    program = subprocess.Popen(
        command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert program.stdout.read(1), "it never asked for a question"
    program.send_signal(number)
    rest, _ = program.communicate(timeout=60)  # ends only when the fork, too, has closed its output
    assert program.returncode == -number, rest


def test_only_programs_that_find_all_as_it_was_are_warm(monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    settings = {"project": str(PROJECT), "network": network(), "environment": dict(os.environ)}
    assert is_warm(["train_sft.py", "--x"], settings) and is_warm(["-m", "sft.chat"], settings)
    assert not is_warm(["-c", "pass"], settings) and not is_warm(["tests/run.py"], settings)
    assert not is_warm(["train_sft.py"], settings | {"network": "another host's"})
    monkeypatch.setenv("PYTHONPATH", sys.prefix)
    assert not is_warm(["train_sft.py"], settings)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    assert is_warm(["train_sft.py"], settings)
    monkeypatch.chdir("/")
    assert not is_warm(["train_sft.py"], settings)
