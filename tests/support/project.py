"""Where things are in the project, the shapes that tests go over, and a script run in a fork of a warm process."""

import os
import runpy
import sys
import traceback
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SAMPLE = PROJECT / "data_proj" / "sample"
TINY_SHAPES = ["bloom-tiny", "bloom-tiny-6-heads", "falcon-tiny", "falcon-tiny-40b", "falcon-tiny-rw"]


def run_as_program(arguments: list[str], output: str, errors: str) -> None:
    """Run a script in this process, a fork that has imported what it needs, and exit with its exit code."""
    for name, stream in ((output, 1), (errors, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, encoding="utf-8") for stream in (1, 2))
    os.chdir(PROJECT)
    sys.argv, code = arguments, 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
