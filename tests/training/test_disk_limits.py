"""Limits that are not the disk's free room: the size of a file, and the memory that processes share."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.program import OneRankError, UserError
from sft.training import disk
from sft.training.arguments import TrainingArguments


def test_a_file_that_is_too_large_is_told_with_another_remedy(tmp_path: Path):
    with pytest.raises(OneRankError) as caught, disk.writing(str(tmp_path), "checkpoint-2"):
        raise RuntimeError("I/O error: File too large (os error 27)")
    assert "; raise ulimit -f, or give a disk for large files, and type the same command again" in str(caught.value)


@pytest.mark.parametrize(("num_workers", "free", "fits"), [(0, 0, True), (2, 12_582_911, False), (2, 12_582_912, True)])
def test_processes_that_build_batches_need_shared_memory(monkeypatch, num_workers, free, fits):
    args = TrainingArguments(
        output_dir="unused", use_cpu=True, report_to=[], model_max_length=4096, per_device_train_batch_size=8
    )
    args.dataloader_num_workers = num_workers
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with nullcontext() if fits else pytest.raises(UserError, match="needs about .* MiB of /dev/shm, which has .* free"):
        disk.check_shared_memory(args)
