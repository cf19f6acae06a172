"""Room is known before it is used, and a full disk costs only the one being written."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import SaveStrategy

from sft.program import OneRankError, UserError
from sft.training import checkpoints, disk
from sft.training.arguments import Schedule
from support.disks import remount, small_disk

GIB = 2**30


def write_checkpoint(output_dir: Path, step: int, num_bytes: int = 0, complete: bool = True) -> Path:
    """Write a checkpoint whose optimizer state seems to have `num_bytes`."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    save_file({"weight": torch.ones(2, 3)}, folder / "model.safetensors")
    with (folder / "global_step" / "optimizer.pt").open("wb") as file:
        file.truncate(num_bytes)
    if complete:
        checkpoints.mark(folder, {}, ["model.safetensors", "global_step/optimizer.pt"])
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def args_with(output_dir: object = ".", strategy: str = "steps", **fields: object) -> SimpleNamespace:
    defaults = {"bf16": False, "fp16": False, "save_only_model": False, "save_steps": 10, "save_total_limit": None}
    defaults["load_best_model_at_end"] = False
    return SimpleNamespace(**{**defaults, **fields}, output_dir=str(output_dir), save_strategy=SaveStrategy(strategy))


def have_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let every disk have `num_bytes` free."""
    usage = shutil.disk_usage

    def pretended(path: object) -> SimpleNamespace:
        usage(path)
        return SimpleNamespace(free=num_bytes)

    monkeypatch.setattr(shutil, "disk_usage", pretended)


@pytest.fixture
def disk_of_4_mib(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 4 MiB, with room for files of 3 MB but not of 12."""
    with small_disk(tmp_path / "disk", "4m") as folder:
        yield folder


@pytest.mark.parametrize(
    ("zero_stage", "in_16_bits", "save_only_model", "bytes_each"),
    [
        (0, False, False, 12),
        (0, True, False, 12),
        (0, False, True, 4),
        (0, True, True, 4),
        (1, False, False, 20),
        (2, False, False, 20),
        (2, True, False, 16),
        (2, False, True, 4),
        (2, True, True, 2),
        (3, False, False, 16),
        (3, True, False, 14),
        (3, True, True, 2),
    ],
)
def test_a_checkpoint_has_weights_master_weights_and_moments(zero_stage, in_16_bits, save_only_model, bytes_each):
    assert disk.checkpoint_bytes(1000, zero_stage, in_16_bits, save_only_model) == 1000 * bytes_each


def test_the_size_of_a_folder_is_that_of_all_files_in_it(tmp_path: Path):
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "a").write_bytes(bytes(5))
    (tmp_path / "global_step5" / "b").write_bytes(bytes(7))
    assert disk.size_of(tmp_path) == 12


@pytest.mark.parametrize(
    ("strategy", "save_steps", "limit", "expected", "with_best"),
    [
        ("no", 10, None, 0, 1),
        ("no", 10, 1, 0, 1),
        ("steps", 10, None, 10, 11),
        ("steps", 10, 0, 10, 11),
        ("steps", 10, -1, 10, 11),
        ("steps", 10, 1, 2, 4),
        ("steps", 10, 2, 2, 4),
        ("steps", 10, 5, 5, 6),
        ("steps", 10, 50, 10, 11),
        ("steps", 30, None, 4, 5),
        ("steps", 50, 2, 2, 3),
        ("steps", 500, None, 1, 2),
        ("steps", 1, None, 95, 96),
        ("steps", 0.5, None, 2, 3),
        ("steps", 0.001, None, 95, 96),
        ("epoch", 10, None, 3, 4),
        ("epoch", 10, 2, 2, 4),
        ("best", 10, None, 95, 96),
        ("best", 10, 5, 5, 6),
    ],
)
def test_as_many_are_there_at_once_as_are_saved_or_kept(strategy, save_steps, limit, expected, with_best):
    fields = {"strategy": strategy, "save_steps": save_steps, "save_total_limit": limit}
    assert disk.num_at_once(args_with(**fields), Schedule(95, 2.1)) == expected
    assert disk.num_at_once(args_with(**fields, load_best_model_at_end=True), Schedule(95, 2.1)) == with_best


@pytest.mark.parametrize("free", [4 * GIB - 1, 4 * GIB], ids=["too little", "just enough"])
def test_the_checkpoints_to_come_need_room_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int):
    output_dir = tmp_path / "not" / "there"
    have_free(monkeypatch, free)
    said = "has 4.0 GiB free and needs 4.0 GiB: 2 checkpoints at once of about 2.0 GiB; give"
    with nullcontext() if free == 4 * GIB else pytest.raises(UserError, match=f"--output_dir {output_dir} {said}"):
        disk.check_free(args_with(output_dir), Schedule(20, 1), 2 * GIB)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "said", "fewer_would_do"),
    [
        ({"save_total_limit": 5}, "7.5 GiB: 5 checkpoints at once of about 1.5 GiB", True),
        ({"save_total_limit": 1, "load_best_model_at_end": True}, "6.0 GiB: 4 checkpoints at once of", False),
        ({"strategy": "epoch"}, "4.5 GiB: 3 checkpoints at once of", True),
        ({"strategy": "no", "save_total_limit": 5}, "1.5 GiB: 1 checkpoint of about 1.5 GiB", False),
    ],
    ids=["those kept", "the best and the result too", "one an epoch", "the result"],
)
def test_both_figures_are_in_the_message(tmp_path, monkeypatch, fields, said, fewer_would_do):
    have_free(monkeypatch, 50 * 2**20)
    with pytest.raises(UserError, match=f"has 50.0 MiB free and needs {said}") as caught:
        disk.check_free(args_with(tmp_path, **fields), Schedule(100, 2.1), 3 * GIB // 2)
    assert ("type --save_total_limit 2, or --save_only_model True," in str(caught.value)) == fewer_would_do


def test_room_that_checkpoints_have_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step, size in ((9, GIB // 2), (10, GIB), (11, GIB)):
        write_checkpoint(tmp_path, step, size)
    have_free(monkeypatch, GIB)
    disk.check_free(args_with(tmp_path), Schedule(30, 1), GIB)
    with pytest.raises(UserError, match=r"has 1\.0 GiB free and needs 2\.0 GiB: 2 checkpoints at once of"):
        disk.check_free(args_with(tmp_path, save_total_limit=2), Schedule(30, 1), 2 * GIB)


def test_a_new_folder_in_a_writable_one_passes_and_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for output_dir in (tmp_path / "not" / "there" / "yet", tmp_path, "output_dir/new"):
        disk.check_writable(str(output_dir))
        assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["", "new/er"])
def test_a_read_only_disk_is_refused(disk_of_4_mib: Path, name: str):
    remount(disk_of_4_mib, "ro")
    with pytest.raises(UserError) as caught:
        disk.check_writable(str(disk_of_4_mib / name))
    assert f"--output_dir {disk_of_4_mib / name} cannot be written to: [Errno 30] Read-only" in str(caught.value)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be no longer root, who may enter and write to every folder, for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


@pytest.fixture
def closed() -> Iterator[Path]:
    """Return a folder with one in it, to be closed; unlike pytest's own, the one above is open to everybody."""
    with TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        Path(above, "closed", "there").mkdir(parents=True)
        yield Path(above, "closed")


@pytest.mark.parametrize(
    ("mode", "name"),
    [(0o555, ""), (0o555, "new"), *((mode, name) for mode in (0, 0o444) for name in ("", "new", "there", "there/new"))],
)
def test_a_folder_that_one_may_not_write_to_or_enter_is_refused(closed: Path, mode: int, name: str):
    closed.chmod(mode)
    said = rf"^--output_dir {closed / name} cannot be written to: \[Errno 13\] [^\n]*$"
    with as_nobody(), pytest.raises(UserError, match=said):
        disk.check_writable(str(closed / name))


@pytest.mark.parametrize("name", ["new", "there", "there/new"])
def test_the_room_below_a_folder_that_one_may_not_enter_is_known(closed, monkeypatch, name):
    closed.chmod(0)
    have_free(monkeypatch, 2 * GIB)
    said = f"^--output_dir {closed / name} has 2.0 GiB free and [^\\n]*$"
    with as_nobody(), pytest.raises(UserError, match=said):
        disk.check_free(args_with(closed / name), Schedule(20, 1), 2 * GIB)


def test_a_folder_inside_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; expected a folder"):
        disk.check_writable(str(tmp_path / "file" / "new"))


@pytest.mark.parametrize(
    ("kept", "best", "left"),
    [
        *((kept, None, [8, 9, 10]) for kept in (None, 0, 4)),
        *((kept, None, [10]) for kept in (1, 2)),
        (3, None, [9, 10]),
        *((kept, "elsewhere/checkpoint-8", [8, 10]) for kept in (1, 2, 3)),
    ],
)
def test_room_is_made_for_one_more_and_the_newest_and_the_best_stay(tmp_path, kept, best, left):
    for step in (8, 9, 10):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 7, complete=False)
    write_checkpoint(tmp_path / "unfinished", 11)
    disk.make_room(str(tmp_path), "checkpoint-11", 1, kept, best)
    assert checkpoints.complete_steps(str(tmp_path)) == left
    assert names_in(tmp_path) == sorted(["unfinished", *(f"checkpoint-{step}" for step in left)])
    assert names_in(tmp_path / "unfinished") == []


def test_the_first_one_finds_its_folder(tmp_path: Path):
    disk.make_room(str(tmp_path / "new" / "run"), "checkpoint-1", 1, 1, best=None)
    assert names_in(tmp_path / "new" / "run") == ["unfinished"]


def test_too_little_room_is_refused_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path, 9)
    have_free(monkeypatch, 2 * GIB)
    disk.make_room(str(tmp_path), "checkpoint-10", 2 * GIB, 1, best=None)
    with pytest.raises(UserError) as caught:
        disk.make_room(str(tmp_path), "checkpoint-10", 3 * GIB, 1, best=None)
    assert str(caught.value) == (
        f"checkpoint-10 needs about 3.0 GiB and {tmp_path} has 2.0 GiB free; {tmp_path}/checkpoint-9 is complete; free "
        "disk space and type the same command again"
    )
    assert checkpoints.complete_steps(str(tmp_path)) == [9]


def write_plainly(folder: Path) -> None:
    with (folder / "rng_state.pth").open("wb") as file:
        file.write(bytes(12_000_000))


def write_with_torch(folder: Path) -> None:
    torch.save(torch.ones(3_000_000), folder / "optimizer.pt")


def write_with_safetensors(folder: Path) -> None:
    save_file({"weight": torch.ones(3_000_000)}, folder / "model.safetensors")


@pytest.mark.parametrize("write", [write_plainly, write_with_torch, write_with_safetensors])
def test_a_full_disk_costs_only_the_one_being_written(disk_of_4_mib: Path, write: Callable[[Path], None]):
    write_checkpoint(disk_of_4_mib, 1, 2**20)
    unfinished = disk_of_4_mib / "unfinished" / "checkpoint-2"
    unfinished.mkdir(parents=True)
    with pytest.raises(OneRankError) as caught, disk.writing(str(disk_of_4_mib), "checkpoint-2"):
        write(unfinished)
    message = str(caught.value)
    assert message.startswith(f"checkpoint-2 cannot be written to {disk_of_4_mib}: ") and "\n" not in message
    assert f"; {disk_of_4_mib}/checkpoint-1 is complete; free disk space" in message
    assert names_in(disk_of_4_mib) == ["checkpoint-1"]
    assert checkpoints.complete_steps(str(disk_of_4_mib)) == [1]


def test_a_disk_that_turns_read_only_is_told_as_well(disk_of_4_mib: Path):
    write_checkpoint(disk_of_4_mib, 1)
    remount(disk_of_4_mib, "ro")
    with pytest.raises(OneRankError, match="Read-only"), disk.writing(str(disk_of_4_mib), "checkpoint-2"):
        write_with_safetensors(disk_of_4_mib)
    assert checkpoints.complete_steps(str(disk_of_4_mib)) == [1]


@pytest.mark.parametrize(
    ("complete", "left"), [(True, "checkpoint-2 is complete"), (False, "there is no complete checkpoint")]
)
def test_only_one_without_its_marker_goes_when_the_disk_is_full(tmp_path: Path, complete: bool, left: str):
    write_checkpoint(tmp_path, 2, complete=complete)
    with pytest.raises(OneRankError, match=left), disk.writing(str(tmp_path), "checkpoint-2"):
        raise OSError(errno.ENOSPC, "No space")
    assert names_in(tmp_path) == (["checkpoint-2"] if complete else [])
    assert checkpoints.complete_steps(str(tmp_path)) == ([2] if complete else [])


@pytest.mark.parametrize(
    "error", [ValueError("odd"), RuntimeError("unexpected pos 704"), OSError(errno.EACCES, "no")], ids=repr
)
def test_other_errors_pass_through_unchanged(tmp_path: Path, error: Exception):
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(type(error)) as caught, disk.writing(str(tmp_path), "checkpoint-2"):
        raise error
    assert caught.value is error and type(caught.value) is not OneRankError
    assert names_in(tmp_path) == ["unfinished"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_disk_is_known_by_its_number_or_its_words(tmp_path: Path, number: int):
    assert disk.no_room(OSError(number, "something"), str(tmp_path))
    assert disk.no_room(RuntimeError(f"I/O error: {os.strerror(number)}"), str(tmp_path))


@pytest.mark.parametrize(("free", "expected"), [(2**20 - 1, True), (2**20, False)])
@pytest.mark.parametrize("name", ["", "gone/too", "closed", "closed/there", "closed/new"])
def test_a_full_disk_is_known_by_its_free_room(closed, monkeypatch, free, expected, name):
    have_free(monkeypatch, free)
    closed.chmod(0)
    with as_nobody():
        assert disk.no_room(RuntimeError("unexpected pos 704"), str(closed.parent / name)) == expected
