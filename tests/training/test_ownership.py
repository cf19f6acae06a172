"""One run at a time owns an output folder, and all hosts of the run share it."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft.program import UserError
from sft.training import ownership


def args_with(output_dir: Path, process_index: int = 0, save_on_each_node: bool = False) -> SimpleNamespace:
    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 2)
    return SimpleNamespace(
        output_dir=str(output_dir),
        world_size=2,
        ranks_per_host=ranks_per_host,
        process_index=process_index,
        save_on_each_node=save_on_each_node,
    )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class AskedError(Exception):
    """The end of a rank that asks the others."""


def ask(objects: list) -> list:
    raise AskedError


@pytest.mark.parametrize(
    ("variable", "value", "asks"),
    [
        ("LOCAL_WORLD_SIZE", "2", False),
        ("LOCAL_WORLD_SIZE", "1", True),
        ("LOCAL_SIZE", "2", False),
        ("LOCAL_SIZE", "1", True),
        ("NEITHER", "1", False),
    ],
)
def test_one_host_asks_no_other(tmp_path, monkeypatch, variable, value, asks):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(ownership, "gather_object", ask)
    with pytest.raises(AskedError) if asks else nullcontext():
        ownership.check_shared(args_with(tmp_path / "new"))
    assert names_in(tmp_path) == (["new"] if asks else [])


def let_another_host_answer(monkeypatch: pytest.MonkeyPatch, answer: bool, probe: Path, makes_probe: bool) -> list:
    """Let a second host say whether it sees the probe; return what this one told, filled while it is asked."""
    told: list[object] = []

    def gather(mine: list) -> list:
        if makes_probe:
            probe.touch()
        told.append((mine[0], probe.exists()))
        return [*mine, answer]

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(ownership, "gather_object", gather)
    return told


@pytest.mark.parametrize(("is_shared", "on_each_node"), [(True, False), (False, False), (False, True)])
def test_hosts_must_share_the_output_folder(tmp_path, monkeypatch, is_shared, on_each_node):
    output_dir = tmp_path / "new" / "run"
    told = let_another_host_answer(monkeypatch, is_shared, output_dir / ".from-the-first-host", makes_probe=False)
    said = (
        f"--output_dir {output_dir} is a different folder on each host, .* give a folder on a disk that the hosts share"
    )
    with nullcontext() if is_shared else pytest.raises(UserError, match=said):
        ownership.check_shared(args_with(output_dir, save_on_each_node=on_each_node))
    assert told == [(None, True), (True, True)]
    assert names_in(output_dir) == []


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_second_host_looks_for_the_probe_of_the_first(tmp_path, monkeypatch, is_shared):
    probe = tmp_path / ".from-the-first-host"
    told = let_another_host_answer(monkeypatch, True, probe, makes_probe=is_shared)
    with nullcontext() if is_shared else pytest.raises(UserError, match="is a different folder"):
        ownership.check_shared(args_with(tmp_path, process_index=1))
    assert told == [(None, is_shared), (is_shared, is_shared)]
    assert probe.exists() == is_shared


HOLDER = """
import fcntl, sys, time
fcntl.flock(file := open(sys.argv[1], "w"), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read(1)
time.sleep(1)
"""


def test_a_folder_is_waited_for_while_its_last_run_dies(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path / ownership.IN_USE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        holder.stdin.write(b" "), holder.stdin.flush()
        ownership.claim(str(tmp_path))
        assert holder.wait() == 0
    assert not ownership.lock(tmp_path / ownership.IN_USE)


def test_a_lock_file_that_its_owner_deletes_is_not_held(tmp_path, monkeypatch):
    locks = ownership.fcntl.flock

    def delete_and_lock(descriptor: int, operation: int) -> None:
        (tmp_path / "locked").unlink()
        locks(descriptor, operation)

    monkeypatch.setattr(ownership.fcntl, "flock", delete_and_lock)
    assert not ownership.lock(tmp_path / "locked")
