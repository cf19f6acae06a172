"""Disk space and the right to write, before a run and before each save."""

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft.machine import gib
from sft.model.folder import make_portable
from sft.program import OneRankError, UserError, one_line
from sft.training.arguments import Schedule, TrainingArguments
from sft.training.checkpoints import UNFINISHED, drop_older, fault_of, folders_in, what_is_left
from sft.training.resume import RunSettings

SHARED_MEMORY = Path("/dev/shm")  # where processes that build batches put them
BYTES_PER_TOKEN = 64  # of a batch: ids, labels, positions and what attention needs, with some to spare
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
    """Yield a hidden folder to write a model into, then move its files to `output`, all or none.

    Raises UserError if `output` is not a new or empty folder, or cannot be written to.
    """
    check_writable(output, flag="the output folder")
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output} already exists; give a new folder")
    unfinished = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    make_portable(unfinished)
    target.mkdir(exist_ok=True)
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(target / file.name)  # last, since without it no folder is a model
    unfinished.rmdir()


@contextmanager
def new_model_file(output: str) -> Iterator[Path]:
    """Yield a hidden file to write a model into, then give it its name, `output`.

    Raises UserError if `output` exists, or cannot be written to.
    """
    target = Path(output).resolve()
    if target.exists():
        raise UserError(f"{output} already exists; give a new file")
    check_writable(str(target.parent), flag="the output folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}.unfinished"
    try:
        yield unfinished
        unfinished.rename(target)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {one_line(error)}; give a file on a larger disk") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _nearest(output_dir: str) -> Path:
    """Return the output folder, or the nearest one above it that is there and can be looked into."""
    folder = Path(output_dir).absolute()
    return next(parent for parent in (folder, *folder.parents) if os.access(parent, os.F_OK))


def num_at_once(args: TrainingArguments, schedule: Schedule) -> int:
    """Return how many checkpoints are on the disk at once, with the one being written, the best and the result."""
    num_steps, num_epochs = schedule.num_steps, schedule.num_epochs
    steps_between = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(num_steps * args.save_steps))
    by_strategy = {"no": 0, "steps": math.ceil(num_steps / steps_between), "epoch": math.ceil(num_epochs)}
    saved = by_strategy.get(args.save_strategy.value, num_steps)
    limit, has_best = args.save_total_limit, args.load_best_model_at_end
    if limit and limit > 0:
        saved = min(saved, max(limit, 2) + (has_best and limit <= 2))
    return saved + has_best


def check_room(args: TrainingArguments, settings: RunSettings, schedule: Schedule, merges_lora: bool) -> None:
    """Raise UserError if the disk has no room for a run's checkpoints and for LoRA's merged model."""
    check_shared_memory(args)
    itemsize = args.compute_dtype.itemsize
    num_bytes = checkpoint_bytes(settings.num_trained, args.zero_stage, itemsize < 4, args.save_only_model)
    check_free(args, schedule, num_bytes, settings.num_parameters * itemsize if settings.is_lora and merges_lora else 0)


def check_shared_memory(args: TrainingArguments) -> None:
    """Raise UserError if processes that build batches cannot hand them over: PyTorch would wait for ever."""
    if not args.dataloader_num_workers or not SHARED_MEMORY.exists():
        return
    ahead = args.dataloader_num_workers * ((args.dataloader_prefetch_factor or 2) + 1)
    needed = args.ranks_per_host * ahead * args.train_batch_size * args.model_max_length * BYTES_PER_TOKEN
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"--dataloader_num_workers {args.dataloader_num_workers} needs about {gib(needed)} of {SHARED_MEMORY}, "
            f"which has {gib(free)} free; type --dataloader_num_workers 0, or start the container with --shm-size 1g"
        )


def check_free(args: TrainingArguments, schedule: Schedule, num_bytes: int, merged_bytes: int = 0) -> None:
    """Raise UserError if the disk has no room for a run's checkpoints of `num_bytes` each and `merged_bytes` on top.

    Checkpoints that are already there count as room. A run that saves none needs room for the result.
    """
    at_once = max(1, num_at_once(args, schedule))
    there = sum(size_of(folder) for folder in folders_in(args.output_dir)[-at_once:])
    free, needed = shutil.disk_usage(_nearest(args.output_dir)).free, num_bytes * at_once - there + merged_bytes
    if free < needed:
        fewer = "--save_total_limit 2, or " if at_once > 2 and (args.save_total_limit or at_once) > 2 else ""
        raise UserError(
            f"--output_dir {args.output_dir} has {gib(free)} free and needs {gib(needed)}: "
            f"{at_once} {'checkpoint' if at_once == 1 else 'checkpoints at once'} of about {gib(num_bytes)}"
            f"{f' and the merged model of {gib(merged_bytes)}' if merged_bytes else ''}; give a folder on a larger "
            f"disk, or type {fewer}--save_only_model True, from which no run can resume"
        )


def make_room(output_dir: str, name: str, num_bytes: int, kept: int | None, best: str | None) -> None:
    """Prepare the disk for one more checkpoint, of about `num_bytes`; one complete checkpoint always stays.

    Raises UserError if there is no room for it.
    """
    shutil.rmtree(Path(output_dir, UNFINISHED), ignore_errors=True)
    drop_older(output_dir, max(1, kept - 1) if kept and kept > 0 else None, best)
    Path(output_dir, UNFINISHED).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if free < num_bytes:
        raise UserError(
            f"{name} needs about {gib(num_bytes)} and {output_dir} has {gib(free)} free; {what_is_left(output_dir)}; "
            "free disk space and type the same command again"
        )


@contextmanager
def writing(output_dir: str, name: str) -> Iterator[None]:
    """Write to the output folder; if the disk is full, raise OneRankError and leave nothing of checkpoint `name`."""
    try:
        yield
    except Exception as error:  # torch, safetensors and DeepSpeed raise their own where the disk is full
        if not no_room(error, output_dir):
            raise
        shutil.rmtree(Path(output_dir, UNFINISHED), ignore_errors=True)
        remedy = "raise ulimit -f, or give a disk for large files," if is_too_large(error) else "free disk space"
        folder = Path(output_dir, name)
        if fault_of(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise OneRankError(
            f"{name} cannot be written to {output_dir}: {one_line(error)}; {what_is_left(output_dir)}; "
            f"{remedy} and type the same command again"
        ) from None


def is_too_large(error: BaseException) -> bool:
    """Tell whether a file is larger than ulimit -f, or than the disk's file system can hold, such as 4 GiB on FAT32."""
    return getattr(error, "errno", None) == errno.EFBIG or "File too large" in str(error)


def no_room(error: BaseException, output_dir: str) -> bool:
    """Tell whether a full or read-only disk caused an error; libraries wrap it in errors of their own."""
    texts = ("No space left", "Disk quota", "Read-only file system")
    return (
        is_too_large(error)
        or getattr(error, "errno", None) in NO_ROOM
        or any(text in str(error) for text in texts)
        or shutil.disk_usage(_nearest(output_dir)).free < 2**20
    )
