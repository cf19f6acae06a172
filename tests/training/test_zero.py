"""Offload in DeepSpeed's configuration, and machines that cannot build it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from sft.program import UserError
from sft.training import zero
from sft.training.zero import (
    check_machine,
    read_configuration,
    size_buffers,
)
from support.project import PROJECT

CPU = {"device": "cpu", "pin_memory": False}


def shipped(stage: int) -> str:
    return str(PROJECT / f"ds_zero{stage}_config.json")


def offloads_of(configuration: dict) -> dict[str, dict]:
    return {name: value for name, value in configuration["zero_optimization"].items() if name.startswith("offload_")}


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_a_shipped_file_is_read_as_it_is(stage, pin_memory):
    configuration = read_configuration(shipped(stage), "none", None, pin_memory)
    assert configuration == json.loads(Path(shipped(stage)).read_text())
    assert offloads_of(configuration) == {}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_optimizer_states_go_to_the_hosts_memory(stage, pin_memory):
    configuration = read_configuration(shipped(stage), "optimizer", None, pin_memory)
    assert offloads_of(configuration) == {"offload_optimizer": {"device": "cpu", "pin_memory": pin_memory}}
    del configuration["zero_optimization"]["offload_optimizer"]
    assert configuration == read_configuration(shipped(stage), "none", None, pin_memory)


def test_all_states_go_to_the_hosts_memory():
    configuration = read_configuration(shipped(3), "all", None, False)
    assert offloads_of(configuration) == {"offload_optimizer": CPU, "offload_param": CPU}


@pytest.mark.parametrize(
    ("offload", "names"), [("optimizer", {"offload_optimizer"}), ("all", {"offload_optimizer", "offload_param"})]
)
def test_states_go_to_files_in_a_folder(offload, names):
    found = offloads_of(read_configuration(shipped(3), offload, "/nvme/here", True))
    target = {"device": "nvme", "nvme_path": "/nvme/here", "pin_memory": True}
    assert found == dict.fromkeys(names, target)


@pytest.mark.parametrize(
    ("offload", "folder", "said"),
    [
        ("all", None, "cannot offload weights"),
        ("all", "/nvme", "cannot offload weights"),
        ("optimizer", "/nvme", "cannot offload anything to a disk"),
    ],
)
def test_stage_2_refuses_what_it_cannot_offload(offload, folder, said):
    with pytest.raises(UserError) as caught:
        read_configuration(shipped(2), offload, folder, False)
    assert str(caught.value).startswith(f"ZeRO-2 {said}") and "type ZERO_STAGE=3" in str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_folder_for_nothing_that_is_offloaded_is_refused(stage):
    with pytest.raises(UserError, match="^--offload_dir /nvme would stay empty, since nothing is offloaded; type OFF"):
        read_configuration(shipped(stage), "none", "/nvme", False)


@pytest.mark.parametrize(
    "content", [None, "", "{bad", "[]", "{}", '{"zero_optimization": {}}', '{"zero_optimization": 3}', b"\xff\xfe{"]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_configuration(str(file), "none", None, False)
    assert str(caught.value).startswith(f"--deepspeed {file} is not a DeepSpeed configuration")
    assert "ds_zero2_config.json or ds_zero3_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab_size", "world_size", "buffer_size"),
    [(250_880, 4, 256_901_120), (250_880, 3, 342_534_827), (65_024, 4, 100_000_000)],
)
def test_buffers_for_weights_on_a_disk_hold_a_ranks_share_of_the_embeddings(vocab_size, world_size, buffer_size):
    configuration = read_configuration(shipped(3), "all", "/nvme", False)
    size_buffers(configuration, SimpleNamespace(vocab_size=vocab_size, hidden_size=4096), world_size)
    assert offloads_of(configuration)["offload_param"]["buffer_size"] == buffer_size
    assert "buffer_size" not in offloads_of(configuration)["offload_optimizer"]


@pytest.mark.parametrize(
    ("offload", "folder"), [("none", None), ("optimizer", None), ("optimizer", "/nvme"), ("all", None)]
)
def test_other_offload_needs_no_larger_buffers(offload, folder):
    configuration = read_configuration(shipped(3), offload, folder, False)
    before = json.dumps(configuration)
    size_buffers(configuration, SimpleNamespace(vocab_size=250_880, hidden_size=4096), world_size=1)
    assert json.dumps(configuration) == before


# ------------------------------------------------------------------------------------------------------------- machine

# What ninja says where a header is not there, its command lines cut short.
NINJA = """Error building extension 'cpu_adam': [1/3] c++ -MMD -I/usr/include -O3 -c x.cpp
FAILED: cpu_adam.o
c++ -MMD -MF cpu_adam.o.d -DTORCH_EXTENSION_NAME=cpu_adam -I/usr/include -fPIC -O3 -c cpu_adam.cpp -o cpu_adam.o
    cpu_adam.cpp:7:10: fatal error: cpu_adam.h: No such file or directory
    7 | #include "cpu_adam.h"
compilation terminated.
ninja: build stopped: subcommand failed.
"""


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder that torch builds extensions in."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, builds: Path) -> Callable[..., list[str]]:
    """Return a function that checks a machine whose builders end so, and gives the names of those that were built."""

    def build(
        offload_dir: str | None = None, has_libaio: bool = True, on_the_cpu: bool = False, **errors: BaseException
    ) -> list[str]:
        built = []

        def load(builder: CPUAdamBuilder | AsyncIOBuilder | ShareMemCommBuilder, verbose: bool = True) -> None:
            built.append(builder.name)
            if builder.name in errors:
                raise errors[builder.name]

        for builder in (CPUAdamBuilder, AsyncIOBuilder, ShareMemCommBuilder):
            monkeypatch.setattr(builder, "load", load)
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda builder, verbose=True: has_libaio)
        check_machine("optimizer", offload_dir, on_the_cpu, tell=True)
        return built

    return build


def test_a_machine_that_builds_everything_passes(build):
    assert build() == ["cpu_adam"]
    assert build("/nvme") == ["cpu_adam", "async_io"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(NINJA), "cpu_adam.cpp:7:10: fatal error: cpu_adam.h: No such file or directory"),
        (RuntimeError("Ninja is required to load C++ extensions\nmore"), "Ninja is required to load C++ extensions"),
        (OSError("CUDA_HOME environment variable is not set"), "CUDA_HOME environment variable is not set"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_build_that_fails_is_one_line_with_the_compilers_own(build, error, reason):
    with pytest.raises(UserError) as caught:
        build(cpu_adam=error)
    message = str(caught.value)
    assert message.startswith(f"--offload optimizer needs DeepSpeed's cpu_adam, which cannot be built here: {reason};")
    assert "install g++" in message and "or type --offload none" in message
    assert "\n" not in message and len(message) < 400


def test_a_build_that_fails_for_the_disk_names_its_builder(build):
    with pytest.raises(UserError, match="needs DeepSpeed's async_io, which cannot be built here: no aio;"):
        build("/nvme", async_io=RuntimeError("no aio"))


def test_a_disk_without_libaio_names_the_package(build):
    with pytest.raises(UserError, match="--offload_dir needs libaio; .* apt install libaio-dev"):
        build("/nvme", has_libaio=False)
    assert build(has_libaio=False) == ["cpu_adam"]


def test_ranks_on_the_cpu_build_what_they_share_memory_by(build):
    assert build(on_the_cpu=True) == ["deepspeed_shm_comm", "cpu_adam"]


def test_a_first_build_is_told_before_it_begins_and_a_later_one_is_not(build, builds, capfd):
    build()
    assert capfd.readouterr().out == f"building DeepSpeed's cpu_adam, some minutes, once, into {builds / 'cpu_adam'}\n"
    library = builds / "cpu_adam" / "cpu_adam.so"
    library.touch()
    build()
    assert capfd.readouterr().out == ""
    os.utime(library, (Path(torch.version.__file__).stat().st_mtime - 1,) * 2)  # torch was upgraded since
    build()
    assert "building DeepSpeed's cpu_adam" in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------------------- locks


@pytest.fixture
def lock(builds: Path) -> Path:
    path = builds / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def make_old(lock: Path) -> None:
    os.utime(lock, (time.time() - zero.SECONDS_TO_BUILD - 1,) * 2)


def test_an_old_lock_that_a_killed_build_left_is_deleted_with_a_line(build, lock, capfd):
    make_old(lock)
    assert build() == ["cpu_adam"] and not lock.exists()
    assert f"deleted {lock}, which a killed build left behind\n" in capfd.readouterr().out


def test_a_young_lock_that_no_process_holds_is_named_at_once_and_waited_for(build, lock, capfd, monkeypatch):
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            lock.unlink()

    monkeypatch.setattr(zero.time, "sleep", sleep)
    assert build() == ["cpu_adam"] and sum(waited) < 10
    said = capfd.readouterr().out
    assert said.count(f"waiting for {lock}, which no process here holds; if no other host is building, delete it") == 1


def test_a_lock_that_is_held_open_is_left_to_the_one_who_builds(build, lock, capfd):
    make_old(lock)
    with lock.open():
        assert build() == ["cpu_adam"]
    assert lock.exists() and f"{lock}," not in capfd.readouterr().out


def test_a_lock_that_a_killed_process_held_is_held_no_more(build, lock, capfd):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"f = open({str(lock)!r}); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    make_old(lock)
    build()
    assert lock.exists()
    holder.kill()
    holder.wait()
    build()
    assert not lock.exists()
