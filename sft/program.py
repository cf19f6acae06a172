"""How every program here runs and ends: a user's mistake is exit code 2 and one line, never a traceback."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user's; the message says what was given, what was expected and what to type."""


class OneLineErrors:
    """For parsers: an error is a `UserError`, one line without the lines of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse found."""
        raise UserError(f"{message}; --help lists every flag")


class ArgumentParser(OneLineErrors, argparse.ArgumentParser):
    """argparse's parser with errors of one line."""


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_program(main: Callable[[], None]) -> None:
    """Run `main`; on a `UserError` print it as one line on standard error and exit with code 2.

    Every rank of a distributed run meets the same mistake, so only the first rank of each host prints it.
    """
    # DeepSpeed, imported by accelerate, warns on every machine without a GPU; our own header names the device.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
