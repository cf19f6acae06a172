"""DeepSpeed ZeRO: its configuration with offload, and what offload needs of the machine."""

import json
import math
import os
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.cpp_extension import _get_build_directory
from transformers import PretrainedConfig

from sft.program import UserError, one_line

SECONDS_TO_BUILD = 600  # more than one of DeepSpeed's extensions takes
OFFLOADS = ("none", "optimizer", "all")


def read_configuration(path: str, offload: str, offload_dir: str | None, pin_memory: bool) -> dict:
    """Return a DeepSpeed configuration file as a dictionary, with optimizer states or all states offloaded.

    They go to the host's memory, or to files under `offload_dir`, an NVMe disk. Raises UserError if the file cannot be
    read, or its stage cannot offload what is asked for.
    """
    try:
        configuration = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = configuration["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--deepspeed {path} is not a DeepSpeed configuration with a ZeRO stage: {one_line(error)}; give "
            "ds_zero2_config.json or ds_zero3_config.json"
        ) from None
    if offload_dir and offload == "none":
        raise UserError(
            f"--offload_dir {offload_dir} would stay empty, since nothing is offloaded; type OFFLOAD=optimizer or "
            "OFFLOAD=all"
        )
    if stage != 3 and (offload == "all" or (offload != "none" and offload_dir)):
        what = "weights" if offload == "all" else "anything to a disk"
        raise UserError(f"ZeRO-{stage} cannot offload {what}; type ZERO_STAGE=3 (--deepspeed ds_zero3_config.json)")
    target = {"device": "cpu", "pin_memory": pin_memory}
    if offload_dir:
        target = {"device": "nvme", "nvme_path": offload_dir, "pin_memory": pin_memory}
    if offload != "none":
        configuration["zero_optimization"]["offload_optimizer"] = dict(target)
    if offload == "all":
        configuration["zero_optimization"]["offload_param"] = dict(target)
    return configuration


def size_buffers(configuration: dict, config: PretrainedConfig, world_size: int) -> None:
    """Make DeepSpeed's buffers for weights on a disk, of 1e8 weights, hold a rank's part of the embeddings."""
    offload = configuration["zero_optimization"].get("offload_param", {})
    if offload.get("device") == "nvme":
        largest = math.ceil(config.vocab_size * config.hidden_size / world_size)
        offload["buffer_size"] = max(largest, 100_000_000)


def check_machine(offload: str, offload_dir: str | None, on_the_cpu: bool, tell: bool) -> None:
    """Build what DeepSpeed needs here, which takes minutes at first; raise UserError if that cannot be.

    Ranks on the CPU share memory by an extension of its own; `tell` prints what is built.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    if offload_dir and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError("--offload_dir needs libaio; on Debian and Ubuntu: apt install libaio-dev")
    wanted = [(ShareMemCommBuilder(), "--deepspeed on a CPU", "leave it out")] if on_the_cpu else []
    for builder, is_wanted in ((CPUAdamBuilder(), offload != "none"), (AsyncIOBuilder(), offload_dir)):
        wanted += [(builder, f"--offload {offload}", "type --offload none")] if is_wanted else []
    for builder, flag, instead in wanted:
        folder = Path(_get_build_directory(builder.name, verbose=False))
        check_lock(folder / "lock", tell)
        if tell and not _is_built(folder / f"{builder.name}.so"):
            print(f"building DeepSpeed's {builder.name}, some minutes, once, into {folder}", flush=True)
        try:
            builder.load(verbose=False)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
            reason = lines[1] if len(lines) > 1 else one_line(error)
            raise UserError(
                f"{flag} needs DeepSpeed's {builder.name}, which cannot be built here: {reason}; install g++ and, with "
                f"a GPU, the CUDA toolkit that torch was built for, or {instead}"
            ) from None


def _is_built(library: Path) -> bool:
    """Tell whether an extension was built for the torch that is installed now."""
    return library.exists() and library.stat().st_mtime > Path(torch.version.__file__).stat().st_mtime


def check_launched() -> None:
    """Raise UserError if no launcher has told this process its rank; DeepSpeed would look for MPI."""
    if "RANK" not in os.environ and not find_spec("mpi4py"):
        raise UserError(
            "--deepspeed needs a launcher, which tells each process its rank; type sh ds_all.sh, or python -m "
            "sft.training.launch --ranks 1 train_sft.py with the same flags"
        )


def check_lock(lock: Path, tell: bool) -> None:
    """Wait while a lock says that another process builds; delete one that a killed build left behind.

    Who builds on this host holds the lock open. Another host cannot be seen, so a lock that nobody here holds is only
    deleted once it is old. `tell` prints what is waited for.
    """
    told = False
    while lock.exists() and not _is_held(lock):
        with suppress(FileNotFoundError):  # of a build that ends now
            if time.time() - lock.stat().st_mtime > SECONDS_TO_BUILD:
                lock.unlink()
                if tell:
                    print(f"deleted {lock}, which a killed build left behind", flush=True)
                return
        if tell and not told:
            print(
                f"waiting for {lock}, which no process here holds; if no other host is building, delete it", flush=True
            )
        told = True
        time.sleep(1)


def _is_held(lock: Path) -> bool:
    """Tell whether a process of this host has a file open, or may have, where that cannot be seen."""
    if not Path("/proc/self/fd").is_dir():
        return True
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # of a process that ends now, or of another user
            if descriptor.readlink() == lock.resolve():
                return True
    return False
