"""Room on the disk, before a run and before each save, and what a full or foreign disk looks like."""

import errno
import fcntl
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainingArguments

from sft.machine import gib
from sft.program import OneRankError, UserError, one_line
from sft.training import zero
from sft.training.checkpoints import UNFINISHED, drop_older, fault_of, folders_in, what_is_left

IN_USE = ".in-use"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def checkpoint_bytes(num_parameters: int, zero_stage: int, in_16_bits: bool, save_only_model: bool = False) -> int:
    """Estimate a checkpoint: weights, fp32 master weights where DeepSpeed has them, two fp32 moments of AdamW.

    ZeRO-2 saves the weights twice: for plain transformers and in DeepSpeed's own file.
    """
    weight_bytes = 2 if zero_stage and in_16_bits else 4
    if save_only_model:
        return num_parameters * weight_bytes
    copies = 2 if zero_stage in (1, 2) else 1
    return num_parameters * (copies * weight_bytes + (12 if zero_stage else 8))


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_writable(output_dir: str, flag: str = "--output_dir") -> None:
    """Raise UserError if the output folder, given by `flag`, cannot be made or written to; leave no trace."""
    existing = _nearest(output_dir)
    if existing.is_file():
        raise UserError(f"{flag} {existing} is a file; expected a folder, new or of an earlier run")
    probe = existing / f".written-by-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {output_dir} cannot be written to: {one_line(error)}; give a folder on a writable disk"
        ) from None


@contextmanager
def new_model_folder(output: str) -> Iterator[Path]:
    """Give the path of a hidden folder to write a model into; then move all of it to `output`, whole or not at all.

    Raises UserError if `output` is no new or empty folder, or cannot be written to.
    """
    check_writable(output, flag="the output folder")
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output} is there already; give a new folder")
    unfinished = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    target.mkdir(exist_ok=True)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(target / file.name)  # the one without which no folder is a model, last
    unfinished.rmdir()


def _nearest(output_dir: str) -> Path:
    """Return the output folder, or the nearest one above it that is there and can be looked into."""
    folder = Path(output_dir).absolute()
    return next(parent for parent in (folder, *folder.parents) if os.access(parent, os.F_OK))


def check_shared(args: TrainingArguments) -> None:
    """Raise UserError if several hosts have not one output folder: each would hold a part of a checkpoint.

    transformers' save_on_each_node is no way out, since ZeRO-3 gathers the weights on the first rank alone.
    """
    if args.world_size == zero.ranks_a_host(args):
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
            f"--output_dir {args.output_dir} is not one folder for all hosts, and each would hold a part of a "
            "checkpoint; give a folder on a disk that the hosts share, such as NFS"
        )


def claim(output_dir: str) -> None:
    """Make the output folder and take it for this process until it ends.

    Raises OneRankError if another run has it, which would write and delete the same checkpoints.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(output_dir, IN_USE), os.O_RDWR | os.O_CREAT)  # stays open
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OneRankError(
            f"--output_dir {output_dir} is in use by another run; let that end, or give another folder"
        ) from None
    except OSError:
        return  # a disk that knows no locks


def give_back(output_dir: str) -> None:
    """Take the sign of `claim` out of an output folder."""
    Path(output_dir, IN_USE).unlink(missing_ok=True)


@contextmanager
def claimed(args: TrainingArguments) -> Iterator[None]:
    """Have the output folder for this run alone until it ends; the first rank claims it for all.

    A folder that is made for it goes again if nothing came into it.
    """
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


def num_at_once(args: TrainingArguments, num_steps: int, num_epochs: float) -> int:
    """Return how many checkpoints a run has on the disk at once: the one being written, the best and the result too."""
    steps_between = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(num_steps * args.save_steps))
    by_strategy = {"no": 0, "steps": math.ceil(num_steps / steps_between), "epoch": math.ceil(num_epochs)}
    saved = by_strategy.get(args.save_strategy.value, num_steps)
    limit, has_best = args.save_total_limit, args.load_best_model_at_end
    if limit and limit > 0:
        saved = min(saved, max(limit, 2) + (has_best and limit <= 2))
    return saved + has_best


def check_room(
    args: TrainingArguments, num_steps: int, num_epochs: float, num_bytes: int, merged_bytes: int = 0
) -> None:
    """Raise UserError if the disk has no room for a run's checkpoints of `num_bytes` each, those there counted.

    Without checkpoints there must be room for one, of the result; `merged_bytes` come on top.
    """
    at_once = max(1, num_at_once(args, num_steps, num_epochs))
    there = sum(size_of(folder) for folder in folders_in(args.output_dir)[-at_once:])
    free, needed = shutil.disk_usage(_nearest(args.output_dir)).free, num_bytes * at_once - there + merged_bytes
    if free < needed:
        raise UserError(
            f"--output_dir {args.output_dir} has {gib(free)} free, and {gib(needed)} are needed: "
            f"{at_once} {'checkpoint' if at_once == 1 else 'checkpoints at once'} of about {gib(num_bytes)}"
            f"{f' and the merged model of {gib(merged_bytes)}' if merged_bytes else ''}; give a "
            "folder on a larger disk, or type --save_total_limit 1, or --save_only_model True, from which no run can "
            "go on"
        )


def make_room(output_dir: str, name: str, num_bytes: int, kept: int | None, best: str | None) -> None:
    """Prepare the disk for one more checkpoint, of about `num_bytes`; one complete checkpoint stays in any case.

    Raises UserError if there is no room for it.
    """
    shutil.rmtree(Path(output_dir, UNFINISHED), ignore_errors=True)
    drop_older(output_dir, max(1, kept - 1) if kept and kept > 0 else None, best)
    Path(output_dir, UNFINISHED).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if free < num_bytes:
        raise UserError(
            f"{name} needs about {gib(num_bytes)} and {output_dir} has {gib(free)} free; {what_is_left(output_dir)}; "
            "free the disk and type the same command again"
        )


@contextmanager
def writing(output_dir: str, name: str) -> Iterator[None]:
    """Write to the output folder; where the disk is full, raise OneRankError and leave nothing of checkpoint `name`."""
    try:
        yield
    except Exception as error:  # torch, safetensors and DeepSpeed raise their own where the disk is full
        if not no_room(error, output_dir):
            raise
        shutil.rmtree(Path(output_dir, UNFINISHED), ignore_errors=True)
        folder = Path(output_dir, name)
        if fault_of(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise OneRankError(
            f"{name} cannot be written to {output_dir}: {one_line(error)}; {what_is_left(output_dir)}; "
            "free the disk and type the same command again"
        ) from None


def no_room(error: BaseException, output_dir: str) -> bool:
    """Tell whether an error while saving came from a full or read-only disk; libraries hide it in errors of theirs."""
    texts = ("No space left", "Disk quota", "Read-only file system")
    return (
        getattr(error, "errno", None) in NO_ROOM
        or any(text in str(error) for text in texts)
        or shutil.disk_usage(_nearest(output_dir)).free < 2**20
    )
