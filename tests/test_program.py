"""Every end of a program is an exit code and at most one line."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft import program
from sft.program import (
    ArgumentParser,
    EarlyEndError,
    InterruptedRunError,
    OneRankError,
    UserError,
    WastedRunError,
    one_line,
    run_program,
)
from support.project import PROJECT

CPU_LINE = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """Take back what run_program changes in a process, which usually ends with it; give what it asked Linux for."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    calls: list[tuple] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *asked: calls.append(asked)))
    logger, handler = logging.getLogger("DeepSpeed"), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(logger, "filters", list(logger.filters))
    with warnings.catch_warnings():
        yield calls
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def ended(capfd: pytest.CaptureFixture) -> Callable[[BaseException], tuple[int, str]]:
    """Return a function that gives exit code and standard error of a program that raises."""

    def ended(end: BaseException) -> tuple[int, str]:
        def main() -> None:
            raise end

        with pytest.raises(SystemExit) as caught:
            run_program(main)
        printed = capfd.readouterr()
        assert printed.out == ""
        return caught.value.code, printed.err

    return ended


@pytest.mark.parametrize(
    ("end", "code", "word"),
    [
        (EarlyEndError, 1, "stopped"),
        (UserError, 2, "error"),
        (OneRankError, 2, "error"),
        (WastedRunError, 3, "stopped"),
        (InterruptedRunError, 75, "stopped"),
    ],
)
def test_an_early_end_is_one_line_and_its_exit_code(ended, end, code, word):
    assert ended(end("what; type this")) == (code, f"{word}: what; type this\n")


@pytest.mark.parametrize(("rank", "num_lines"), [("0", 1), ("1", 0), ("7", 0)])
@pytest.mark.parametrize("end", [EarlyEndError, UserError, WastedRunError, InterruptedRunError])
def test_the_first_rank_of_a_host_speaks_for_all(ended, monkeypatch, end, rank, num_lines):
    monkeypatch.setenv("LOCAL_RANK", rank)
    code, printed = ended(end("what"))
    assert (code, printed.count("\n"), printed.count("what")) == (end.exit_code, num_lines, num_lines)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_alone_is_at_fault_says_so_itself(ended, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert ended(OneRankError("its disk is full")) == (2, "error: its disk is full\n")


def test_lines_of_a_message_become_one(ended):
    assert ended(UserError("first\n   second\r\n\tthird  fourth\n")) == (2, "error: first second third fourth\n")


def test_control_c_is_exit_code_130_without_a_word(ended):
    assert ended(KeyboardInterrupt()) == (130, "")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_program_that_succeeds_ends_without_a_word(capfd):
    run_program(lambda: print("done"))
    assert capfd.readouterr() == ("done\n", "")


@pytest.mark.parametrize("end", [ValueError("a bug"), SystemExit(9)])
def test_anything_else_is_left_as_it_is(end):
    def main() -> None:
        raise end

    with pytest.raises(type(end)) as caught:
        run_program(main)
    assert caught.value is end


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An open process group, and the exit codes with which the process was left at once."""
    codes: list[int] = []
    opened = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch.distributed", opened)

    def leave(code: int) -> None:
        codes.append(code)
        sys.exit(code)

    monkeypatch.setattr(os, "_exit", leave)
    return codes


@pytest.mark.parametrize("end", [UserError, OneRankError, WastedRunError, InterruptedRunError])
def test_a_process_group_is_left_open_and_without_waiting(ended, group, end):
    assert ended(end("what"))[0] == end.exit_code
    assert group == [end.exit_code]


@pytest.mark.parametrize(("is_available", "is_initialized"), [(False, True), (True, False)])
def test_without_a_process_group_the_end_is_an_ordinary_one(ended, group, monkeypatch, is_available, is_initialized):
    closed = SimpleNamespace(is_available=lambda: is_available, is_initialized=lambda: is_initialized)
    monkeypatch.setitem(sys.modules, "torch.distributed", closed)
    assert ended(UserError("what"))[0] == 2
    assert group == []


def test_what_was_printed_and_the_exit_code_outlive_an_open_group(tmp_path):
    code = (
        "import sys, torch.distributed as ranks; from sft.program import OneRankError, run_program\n"
        "def main():\n"
        "    print('before', end='')\n"
        "    ranks.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)\n"
        "    raise OneRankError('its disk is full')\n"
        "run_program(main)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, cwd=PROJECT, env=buffered, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (2, "before", "error: its disk is full\n")


@pytest.mark.parametrize(
    ("rank", "printed"), [("0", "done tracker\n"), ("1", "done tracker\n"), (None, "done waited tracker\n")]
)
def test_a_rank_whose_work_is_done_leaves_its_threads_behind(rank, printed):
    code = (
        "import atexit, threading; from sft.program import run_program\n"
        "def main():\n"
        "    atexit.register(print, 'tracker')\n"
        "    threading.Thread(target=lambda: (threading.main_thread().join(), print('waited', end=' '))).start()\n"
        "    print('done', end=' ')\n"
        "run_program(main)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    environment |= {"LOCAL_RANK": rank} if rank else {}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (0, printed, "")


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize(("rank", "calls"), [(None, []), ("0", [(1, signal.SIGKILL)]), ("1", [(1, signal.SIGKILL)])])
def test_a_rank_and_no_other_program_is_killed_with_its_launcher(as_before, ended, monkeypatch, rank, calls):
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    ended(UserError("one"))
    assert as_before == calls


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n first\n second"), "first"),
        (ValueError(""), "ValueError"),
        (KeyError("stage"), "'stage'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_error_has_a_line_for_messages_of_ours(error, line):
    assert one_line(error) == line


def test_a_parsers_error_is_one_line(ended):
    parser = ArgumentParser(prog="program")
    parser.add_argument("--number", type=int)
    with pytest.raises(UserError) as caught:
        parser.parse_args(["--number", "x"])
    code, printed = ended(caught.value)
    assert code == 2 and printed.count("\n") == 1
    assert printed.startswith("error: argument --number: ") and printed.endswith("--help lists every flag\n")


def test_deepspeeds_word_on_a_missing_gpu_is_left_out_and_no_other():
    run_program(lambda: None)
    logger = logging.getLogger("DeepSpeed")
    said = [logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, text, None, None) for text in (CPU_LINE, "other")]
    assert [bool(logger.filter(record)) for record in said] == [False, True]


def test_torchs_word_on_a_renamed_function_is_left_out_and_no_other():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_program(lambda: None)
        warnings.warn("`_all_gather_base` is now all_gather_into_tensor", FutureWarning, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


SPEAKS = """
import os, sys, time
from sft.program import run_program
def main():
    for number in range(3):
        print("step", number, flush=True)
        print("bar", number, file=sys.stderr)
        time.sleep(0.2)
    os.system("echo from a child")
    open(sys.argv[1], "w").close()
run_program(main)
"""


@pytest.mark.parametrize("output", ["a reader that ended", "a full disk", "a terminal that closed"])
def test_a_program_outlives_whoever_reads_its_output(tmp_path, output):
    command = [sys.executable, "-c", SPEAKS, str(tmp_path / "done")]
    if output == "a full disk":
        with Path("/dev/full").open("w") as full:
            code = subprocess.run(command, cwd=PROJECT, stdout=full, stderr=full, timeout=60).returncode
    else:
        reading, writing = os.openpty() if output == "a terminal that closed" else os.pipe()
        started = subprocess.Popen(command, cwd=PROJECT, stdout=writing, stderr=writing, start_new_session=True)
        os.close(writing)
        os.read(reading, 4)
        os.close(reading)
        code = started.wait(timeout=60)
    assert code == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("~/models/a", "HOME/models/a"),
        ("--data=~/a.json,~/b.json", "--data=HOME/a.json,HOME/b.json"),
        ("--output_dir=runs~/a", "--output_dir=runs~/a"),
        ("a,b ~/c", "a,b ~/c"),
        ("~", "~"),
    ],
)
def test_the_home_folder_is_meant_where_a_shell_leaves_a_tilde(monkeypatch, given, taken):
    monkeypatch.setenv("HOME", "/home/a b")
    monkeypatch.setattr(sys, "argv", ["program", given])
    program.run_program(lambda: None)
    assert sys.argv == ["program", taken.replace("HOME", "/home/a b")]
