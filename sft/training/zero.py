"""DeepSpeed ZeRO: its configuration with offload, what that asks of the machine, and the memory it takes."""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root
from transformers import PretrainedConfig, TrainingArguments

from sft.program import UserError, one_line

SECONDS_TO_BUILD = 1800  # of one of DeepSpeed's extensions, which takes minutes
OFFLOADS = ("none", "optimizer", "all")


def read_configuration(path: str, offload: str, offload_dir: str | None, pin_memory: bool) -> dict:
    """Return a DeepSpeed configuration file as a dictionary, with optimizer states or all states offloaded.

    They go to the host's memory, or to files under `offload_dir`, an NVMe disk. Raises UserError if the file cannot be
    read, or its stage does not offload so.
    """
    try:
        configuration = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = configuration["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--deepspeed {path} is no DeepSpeed configuration with a ZeRO stage: {one_line(error)}; give "
            "ds_zero2_config.json or ds_zero3_config.json"
        ) from None
    if offload_dir and offload == "none":
        raise UserError(f"--offload_dir {offload_dir} is given and nothing is offloaded; type OFFLOAD=optimizer or all")
    if stage != 3 and (offload == "all" or (offload != "none" and offload_dir)):
        what = "weights" if offload == "all" else "anything to a disk"
        raise UserError(f"ZeRO-{stage} does not offload {what}; type ZERO_STAGE=3 (--deepspeed ds_zero3_config.json)")
    target = {"device": "cpu", "pin_memory": pin_memory}
    if offload_dir:
        target = {"device": "nvme", "nvme_path": offload_dir, "pin_memory": pin_memory}
    if offload != "none":
        configuration["zero_optimization"]["offload_optimizer"] = dict(target)
    if offload == "all":
        configuration["zero_optimization"]["offload_param"] = dict(target)
    return configuration


def size_buffers(args: TrainingArguments, config: PretrainedConfig) -> None:
    """Make DeepSpeed's buffers for weights on a disk, of 1e8 weights, hold the largest of them, the embeddings."""
    if args.offload == "all" and args.offload_dir:
        largest = math.ceil(config.vocab_size * config.hidden_size / args.world_size)
        offload = args.hf_deepspeed_config.config["zero_optimization"]["offload_param"]
        offload["buffer_size"] = max(largest, 100_000_000)


def stage_of(args: TrainingArguments) -> int:
    """Return the run's ZeRO stage, 0 without DeepSpeed."""
    return args.deepspeed["zero_optimization"]["stage"] if args.deepspeed else 0


def check_machine(args: TrainingArguments) -> None:
    """Raise UserError if DeepSpeed cannot build here what offload needs; the first build takes a minute."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    if args.offload_dir and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError("--offload_dir needs libaio; on Debian and Ubuntu: apt install libaio-dev")
    own_root = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(own_root).glob("*/lock") if own_root else Path(get_default_build_root()).glob("*/*/lock")
    for lock in locks:
        with suppress(FileNotFoundError):  # of a build that ends now
            if time.time() - lock.stat().st_mtime > SECONDS_TO_BUILD:
                raise UserError(f"{lock} is what a killed build left, and others wait for it for ever; delete it")
    builders = [CPUAdamBuilder()] + ([AsyncIOBuilder()] if args.offload_dir else [])
    for builder in builders:
        try:
            builder.load(verbose=False)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
            reason = lines[1] if len(lines) > 1 else one_line(error)
            raise UserError(
                f"--offload {args.offload} needs DeepSpeed's {builder.name}, which cannot be built here: {reason}; "
                "install g++ and, with a GPU, the CUDA toolkit that torch was built for, or type --offload none"
            ) from None


def ranks_a_host(args: TrainingArguments) -> int:
    """Return how many of the run's processes are on this host, as its launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or args.world_size)


def state_bytes(
    stage: int, offload: str, num_trained: int, largest: int, num_devices: int, num_hosts: int
) -> tuple[int, int]:
    """Return the bytes of weights, gradients and AdamW's states on each device of a host, and on the host.

    They are DeepSpeed's own estimates, made for computing in 16 bits; `largest` is the largest module's number of
    parameters.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    ranks = {"num_gpus_per_node": num_devices, "num_nodes": num_hosts}
    if stage == 3:
        offloads = {"cpu_offload": offload != "none", "cpu_offload_params": offload == "all"}
        on_host, on_device, _ = estimate_zero3_model_states_mem_needs(num_trained, largest, **ranks, **offloads)
    else:
        on_host, on_device = estimate_zero2_model_states_mem_needs(num_trained, **ranks, cpu_offload=offload != "none")
    return on_device, on_host
