"""How every program runs and ends: a user's mistake is exit code 2 and one line, never a traceback."""

import argparse
import atexit
import ctypes
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from tqdm import tqdm

KEYBOARD_INTERRUPT = 130  # the exit code of Ctrl-C: 128 plus the signal number


class EarlyEndError(Exception):
    """The end of a program that did not do what it was asked to, with a message and an exit code."""

    exit_code = 1
    word = "stopped"


class UserError(EarlyEndError):
    """A user's mistake; the message says what was given, what was expected and what to type."""

    exit_code = 2
    word = "error"


class OneRankError(UserError):
    """A mistake, or a full disk, that other ranks may not see; the rank that does prints it."""


class WastedRunError(EarlyEndError):
    """Training that is wasted: what happened, at which step, what is left, what to change."""

    exit_code = 3


class InterruptedRunError(EarlyEndError):
    """A run that was asked to stop and has saved a checkpoint; the same command resumes (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class OneLineErrors:
    """For parsers: an error is a `UserError`, one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse found."""
        raise UserError(f"{message}; --help lists every flag")


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser with errors of one line, which takes no flag by its beginning."""

    def __init__(self, *args, **keywords):
        """Take what argparse's parser takes."""
        super().__init__(*args, allow_abbrev=False, **keywords)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, to put into a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_program(main: Callable[[], None]) -> None:
    """Run `main`; print an `EarlyEndError` as one line on standard error and exit with its code.

    Every rank of a distributed run makes the same mistake, so only the first rank of each host prints it.
    """
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # not every terminal has every character
        outlive_readers(stream)
    # DeepSpeed, imported by accelerate, warns on every machine without a GPU; our own header names the device.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # DeepSpeed uses a name that torch has since changed, and every rank would say so at every save.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    if "LOCAL_RANK" in os.environ:
        end_with_parent()
    try:
        main()
        if "LOCAL_RANK" in os.environ:
            atexit._run_exitfuncs()  # of trackers such as wandb
            _leave_at_once(0)
    except EarlyEndError as end:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(end, OneRankError):
            for bar in tuple(tqdm._instances):  # so that the message is the last line, on a line of its own
                bar.close()
            print(f"{end.word}: {' '.join(str(end).split())}", file=sys.stderr, flush=True)
        _leave(end)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one, from a launcher, would print a traceback
        sys.exit(KEYBOARD_INTERRUPT)


def expand_home(argument: str) -> str:
    """Return an argument with the home folder for ~, which a shell leaves in --flag=~/folder and after a comma."""
    return re.sub(r"(?:^|(?<=[=,]))~(?=/)", lambda tilde: str(Path.home()), argument)


def outlive_readers(stream: TextIO) -> None:
    """Let a program go on where its output can no longer be written.

    A terminal that closed, a pipe whose reader ended, or a log on a full disk must not cost a run. What is printed from
    then on is lost.
    """
    if isinstance(stream.write, partial):
        return
    for name in ("write", "flush"):
        setattr(stream, name, partial(_or_drop, getattr(stream, name), stream))


def _or_drop(write: Callable, stream: TextIO, *given):
    try:
        return write(*given)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # also for what libraries and child processes write
        os.close(nowhere)


def end_with_parent() -> None:
    """Let Linux kill this process if its parent is killed; a rank would otherwise go on beside its successor."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _leave(end: EarlyEndError) -> NoReturn:
    """Exit with the code of `end`; an open process group would abort, and closing it could wait forever."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        _leave_at_once(end.exit_code)
    sys.exit(end.exit_code)


def _leave_at_once(exit_code: int) -> NoReturn:
    """Exit without the cleanup of Python and C++, which can abort on threads of ranks whose work is done."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(exit_code)
