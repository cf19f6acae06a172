"""What is deleted, what is stripped and what becomes the result, whenever the run is killed."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft.training import checkpoints

SETTINGS = {"--seed": 7, "rows a step": 16}
KEPT = ["config.json", "model.safetensors", "tokenizer.json", "trainer_state.json"]
OPTIMIZER = ["optimizer.pt", "scaler.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth"]
DEEPSPEED = ["latest", "zero_to_fp32.py", "global_step5/model_states.pt", "global_step5/0/optim.pt"]


class KilledError(BaseException):
    """The end of a process in the middle of its work."""


def kill(*args, **kwargs) -> None:
    raise KilledError


def refuse(*args) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def killed_after(number: int, work: Callable) -> Callable:
    """Return `work` that is done `number` times, and then is the end."""
    numbers = iter(range(number))
    return lambda *args, **kwargs: kill() if next(numbers, None) is None else work(*args, **kwargs)


def fill(folder: Path, names: Iterable[str] = (*KEPT, *OPTIMIZER, *DEEPSPEED)) -> Path:
    """Write what Trainer and DeepSpeed together would."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * number)
        if name.endswith(".safetensors"):
            save_file({"weight": torch.full((2, 3), float(number))}, folder / name)
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def write_checkpoint(output_dir: Path, step: int = 5, **names: Iterable[str]) -> Path:
    folder = fill(output_dir / f"checkpoint-{step}", **names)
    checkpoints.mark(folder, SETTINGS, files_in(folder))
    return folder


def steps_in(output_dir: Path) -> list[int]:
    return [checkpoints.step_of(folder) for folder in checkpoints.folders_in(str(output_dir))]


@pytest.mark.parametrize(
    ("complete", "incomplete", "kept", "best", "left"),
    [
        ([2, 3, 9, 10], [], 2, None, [9, 10]),
        ([2, 3, 9, 10], [], 1, None, [10]),
        *(([2, 3, 9, 10], [], kept, None, [2, 3, 9, 10]) for kept in (4, None, 0, -1)),
        ([2, 3, 9, 10], [], None, 3, [2, 3, 9, 10]),
        ([2, 3, 9, 10], [], 1, 3, [3, 10]),
        ([2, 3, 9, 10], [], 2, 3, [3, 10]),
        ([2, 3, 9, 10], [], 3, 2, [2, 9, 10]),
        ([2, 3, 9, 10], [], 4, 2, [2, 3, 9, 10]),
        ([2, 3, 9, 10], [], 3, 3, [3, 9, 10]),
        ([2, 3, 9, 10], [], 1, 10, [10]),
        ([2, 3, 9, 10], [], 2, 10, [9, 10]),
        ([2, 3, 9, 10], [], 2, 9, [9, 10]),
        ([2, 3, 9, 10], [], 2, 4, [9, 10]),
        ([2, 9, 10], [3], 2, 3, [9, 10]),
        ([2, 9], [1, 3, 10], None, None, [2, 9, 10]),
        ([2, 9, 10], [1, 3, 11], 2, None, [9, 10, 11]),
        ([2, 9, 10], [1, 3, 11], 2, 2, [2, 10, 11]),
        ([], [1, 2], 1, None, [1, 2]),
        ([], [1, 2], 1, 1, [1, 2]),
    ],
)
def test_the_newest_are_kept_and_the_best_among_them(tmp_path, complete, incomplete, kept, best, left):
    for step in complete:
        write_checkpoint(tmp_path, step, names=["model.safetensors"])
    for step in incomplete:
        fill(tmp_path / f"checkpoint-{step}")
    checkpoints.drop_older(str(tmp_path), kept, best and f"elsewhere/checkpoint-{best}")
    assert steps_in(tmp_path) == left
    assert checkpoints.complete_steps(str(tmp_path)) == [step for step in left if step in complete]


def test_one_that_is_half_deleted_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(KilledError):
        checkpoints.drop_older(str(tmp_path), 1)
    assert checkpoints.complete_steps(str(tmp_path)) == [2]


def assert_weights_alone(folder: Path) -> None:
    assert checkpoints.fault_of(folder) is None and not checkpoints.has_optimizer_state(folder)
    marker = json.loads((folder / checkpoints.MARKER).read_text())
    assert sorted(marker["files"]) == KEPT and marker["settings"] == SETTINGS


def test_weights_alone_are_complete_but_nothing_to_go_on_from(tmp_path: Path):
    folder = write_checkpoint(tmp_path)
    assert checkpoints.has_optimizer_state(folder)
    for _ in range(2):  # a run does so again after each later save
        checkpoints.keep_weights_alone(folder)
        assert [path.name for path in sorted(folder.iterdir())] == sorted([*KEPT, checkpoints.MARKER])
        assert_weights_alone(folder)


@pytest.mark.parametrize("number", range(len([*OPTIMIZER, *DEEPSPEED])))
def test_one_that_is_half_stripped_is_weights_alone_already(tmp_path, monkeypatch, number):
    folder = write_checkpoint(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(os, "unlink", killed_after(number, os.unlink))
        checkpoints.keep_weights_alone(folder)
    assert len(files_in(folder)) == len([*KEPT, *OPTIMIZER, *DEEPSPEED, checkpoints.MARKER]) - number
    assert_weights_alone(folder)
    checkpoints.keep_weights_alone(folder)
    assert files_in(folder) == sorted([*KEPT, checkpoints.MARKER])
    assert_weights_alone(folder)


def test_one_that_is_about_to_be_stripped_can_be_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path)
    monkeypatch.setattr(Path, "rename", kill)
    with pytest.raises(KilledError):
        checkpoints.keep_weights_alone(folder)
    assert checkpoints.fault_of(folder) is None and checkpoints.has_optimizer_state(folder)
    assert {*KEPT, *OPTIMIZER, *DEEPSPEED} < set(files_in(folder))


@pytest.mark.parametrize(
    ("listed", "expected"), [("optimizer.pt", True), ("latest", True), ("scheduler.pt", False), ("config.json", False)]
)
def test_one_that_lists_an_optimizer_of_either_kind_can_be_gone_on_from(tmp_path: Path, listed: str, expected: bool):
    folder = fill(tmp_path / "checkpoint-5")
    checkpoints.mark(folder, SETTINGS, ["model.safetensors", listed])
    assert checkpoints.has_optimizer_state(folder) == expected


def test_the_result_is_linked_weights_and_copies_of_the_rest(tmp_path: Path):
    weights = {"extra.safetensors", "model.safetensors"}
    folder = write_checkpoint(tmp_path, names=[*KEPT, *weights])
    for name in ("chat_template.jinja", "model.safetensors.part"):
        (folder.parent / name).write_text("of an earlier run")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    published = {"chat_template.jinja", "config.json", "tokenizer.json", *weights}
    for _ in range(2):
        checkpoints.publish(folder, str(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} == {*published, "checkpoint-5"}
        for name in published:
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
            assert (tmp_path / name).samefile(folder / name) == (name in weights)


def test_weights_are_copied_where_the_disk_knows_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        checkpoints.publish(folder, str(tmp_path))
        assert not (tmp_path / "model.safetensors").samefile(folder / "model.safetensors")
        assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert not list(tmp_path.glob("*.part"))


def shards(number: int) -> list[str]:
    names = [f"model-{shard:05d}-of-{number:05d}.safetensors" for shard in range(1, number + 1)]
    return ["config.json", *names, "model.safetensors.index.json"]


ONE_FILE = ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [(shards(2), ONE_FILE), (shards(2), shards(3)), (shards(3), shards(2)), (ONE_FILE, shards(2)), (ONE_FILE,) * 2],
    ids=["to one file", "to more", "to fewer", "from one file", "as before"],
)
def test_no_weights_of_an_earlier_result_are_left(tmp_path: Path, earlier: list[str], later: list[str]):
    others = fill(tmp_path, ["adapter.safetensors", "generation_config.json", "notes.txt"])
    names = files_in(others)
    before = write_checkpoint(tmp_path, 4, names=earlier)
    checkpoints.publish(before, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted([*names, *earlier])
    (tmp_path / f"{earlier[1]}.part").write_text("of a killed run")
    after = write_checkpoint(tmp_path, names=later)
    checkpoints.publish(after, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted([*names, *later])
    assert all((tmp_path / name).read_bytes() == (after / name).read_bytes() for name in later)
    assert checkpoints.fault_of(before) is None and checkpoints.fault_of(after) is None


def test_a_kill_while_a_file_is_published_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("before")
    ends = ((shutil, "copyfile", lambda _, to: (Path(to).write_text("ha"), kill())), (Path, "replace", kill))
    for owner, name, end in ends:
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(owner, name, end)
            checkpoints.publish(folder, str(tmp_path))
        assert (tmp_path / "config.json").read_text() == "before"
