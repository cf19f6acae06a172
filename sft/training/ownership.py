"""An output folder belongs to one run at a time, and is one folder for all hosts of a run."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object

from sft.program import OneRankError, UserError
from sft.training import disk
from sft.training.arguments import TrainingArguments

IN_USE = ".in-use"
SECONDS_TO_DIE = 5  # for the ranks of a killed run


def check_shared(args: TrainingArguments) -> None:
    """Raise UserError if several hosts do not share the output folder: each would hold a part of a checkpoint.

    transformers' save_on_each_node does not help, since ZeRO-3 gathers the weights on the first rank alone.
    """
    if args.world_size == args.ranks_per_host:
        return
    probe = Path(args.output_dir, ".from-the-first-host")
    if args.process_index == 0:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    gather_object([None])  # until it is there
    is_shared = all(gather_object([probe.exists()]))
    if args.process_index == 0:
        probe.unlink()
    if not is_shared:
        raise UserError(
            f"--output_dir {args.output_dir} is a different folder on each host, and each would hold a part of "
            "a checkpoint; give a folder on a disk that the hosts share, such as NFS"
        )


def claim(output_dir: str) -> None:
    """Make the output folder and lock it for this process until it ends.

    A run that was killed just before may have ranks that die some seconds after its launcher: they are waited for.
    Raises OneRankError if another run has locked it: both would write and delete the same checkpoints.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS_TO_DIE
    while not lock(Path(output_dir, IN_USE)):
        if time.monotonic() > deadline:
            raise OneRankError(
                f"--output_dir {output_dir} is in use by another run; wait for it to end, or give another folder"
            )
        time.sleep(0.1)


def lock(file: Path) -> bool:
    """Lock a file until this process ends; return False if another process has locked it, or just deleted it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)  # stays open if locked
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = os.path.samestat(file.stat(), os.fstat(descriptor))
    except (BlockingIOError, FileNotFoundError):
        is_locked = False
    except OSError:
        is_locked = True  # a file system without locks
    if not is_locked:
        os.close(descriptor)
    return is_locked


def give_back(output_dir: str) -> None:
    """Delete the lock file of `claim`."""
    Path(output_dir, IN_USE).unlink(missing_ok=True)


@contextmanager
def claimed(args: TrainingArguments) -> Iterator[None]:
    """Keep the output folder for this run alone until it ends; the first rank claims it for all.

    A folder that was made for it is removed again if it stays empty. Raises UserError if it cannot be written to.
    """
    disk.check_writable(args.output_dir)
    if args.process_index:
        yield
        return
    is_new = not Path(args.output_dir).exists()
    claim(args.output_dir)
    try:
        yield
    finally:
        give_back(args.output_dir)
        if is_new and not any(Path(args.output_dir).iterdir()):
            Path(args.output_dir).rmdir()
