"""DeepSpeed ZeRO: its configuration with offload, and what offload needs of the machine."""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root
from transformers import PretrainedConfig

from sft.program import UserError, one_line

SECONDS_TO_BUILD = 1800  # far more than one of DeepSpeed's extensions takes
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


def check_machine(offload: str, offload_dir: str | None) -> None:
    """Raise UserError if DeepSpeed cannot build what offload needs on this machine; the first build takes a minute."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    if offload_dir and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError("--offload_dir needs libaio; on Debian and Ubuntu: apt install libaio-dev")
    own_root = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(own_root).glob("*/lock") if own_root else Path(get_default_build_root()).glob("*/*/lock")
    for lock in locks:
        with suppress(FileNotFoundError):  # of a build that ends now
            if time.time() - lock.stat().st_mtime > SECONDS_TO_BUILD:
                raise UserError(
                    f"{lock} was left by a build that was killed, and every other build waits for it; delete it"
                )
    builders = [CPUAdamBuilder()] + ([AsyncIOBuilder()] if offload_dir else [])
    for builder in builders:
        try:
            builder.load(verbose=False)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
            reason = lines[1] if len(lines) > 1 else one_line(error)
            raise UserError(
                f"--offload {offload} needs DeepSpeed's {builder.name}, which cannot be built here: {reason}; "
                "install g++ and, with a GPU, the CUDA toolkit that torch was built for, or type --offload none"
            ) from None
