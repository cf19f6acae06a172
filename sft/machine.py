"""The machine: its accelerator, the memory of each device and of the host; or GPUs only named."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import is_torch_bf16_gpu_available

from sft.program import UserError

GIB = 2**30
# CUDA's context and kernels, and what the allocator loses between its blocks.
CUDA_BYTES, CUDA_SHARE = GIB, 0.05
HEAP_SHARE = 0.15  # of a host's memory, for what glibc keeps of freed tensors
# Of a GPU's memory, for fragmentation and workspaces of cuBLAS. Plans that need it are unproven.
UNPROVEN_SHARE = 0.06
OLDEST_CAPABILITY = "7.5 (Turing)"  # of the GPUs that PyTorch's own builds support


@dataclass(frozen=True)
class Machine:
    """One host: how many devices it has, the bytes of each and of the host, and what the devices are.

    `is_gpu` tells that devices have a memory of their own; `capability` is CUDA's compute capability.
    """

    num_devices: int
    device_bytes: int
    host_bytes: int
    is_gpu: bool
    name: str
    capability: tuple[int, int] = (8, 0)

    @property
    def usable_bytes(self) -> int:
        """Return how much of a device tensors can use; on a CPU the ranks share the host's memory."""
        if self.is_gpu:
            return int(self.device_bytes * (1 - CUDA_SHARE)) - CUDA_BYTES
        return int(self.host_bytes * (1 - HEAP_SHARE)) // self.num_devices

    @property
    def proven_bytes(self) -> int:
        """Return how much of a device a plan may use for the run to fit surely."""
        return self.usable_bytes - (int(self.device_bytes * UNPROVEN_SHARE) if self.is_gpu else 0)


def accelerator(use_cpu: bool = False) -> torch.device | None:
    """Return the accelerator that runs compute on, a GPU or what PyTorch names; None for the CPU."""
    if use_cpu:
        return None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def choose_precision(device: torch.device | None) -> tuple[bool, bool]:
    """Return whether to compute in bf16, and whether in fp16: what the accelerator has; neither on a CPU, None.

    A GPU before Ampere has fp16. How well other devices do in fp16 is unknown here, so they compute in fp32.
    """
    if device is None:
        return False, False
    if device.type != "cuda":
        return is_torch_bf16_gpu_available(), False
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16, not bf16


def has_own_memory(device: torch.device | None) -> bool:
    """Tell whether a device has its own memory; Apple's GPUs share the host's."""
    return device is not None and device.type not in ("cpu", "mps")


def check_kernels(on_the_cpu: str) -> None:
    """Raise UserError if the installed PyTorch does not support this process's GPU; `on_the_cpu` is what to type."""
    built_for = [int(name.split("_")[1].rstrip("af")) for name in torch.cuda.get_arch_list()]
    index = int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())
    major, minor = torch.cuda.get_device_capability(index)
    if built_for and 10 * major + minor < min(built_for):
        oldest = "{}.{}".format(*divmod(min(built_for), 10))
        raise UserError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and PyTorch "
            f"{torch.__version__} supports {oldest} and newer; choose a newer GPU with CUDA_VISIBLE_DEVICES, install a "
            f"PyTorch that was built for this one, or type {on_the_cpu}"
        )


def find(plan_gpu: str | None, plan_ram: str | None, num_ranks: int | None, use_cpu: bool) -> Machine:
    """Return this machine, or the one that --plan_gpu and --plan_ram describe; raise UserError if they are invalid."""
    host_bytes = _size(plan_ram, f"--plan_ram {plan_ram}", "128GB") if plan_ram else available_bytes()
    if plan_gpu:
        match = re.fullmatch(r"(\d+)x(.+)", plan_gpu)
        number, size = (int(match[1]), match[2]) if match else (1, plan_gpu)
        if not number:
            raise UserError(f"--plan_gpu {plan_gpu} names no GPU; leave it out to plan for this machine")
        device_bytes = _size(size, f"--plan_gpu {plan_gpu}", "2x24GB")
        return Machine(number, device_bytes, host_bytes, is_gpu=True, name=f"{number} x {size}")
    device = accelerator(use_cpu)
    if not has_own_memory(device):
        name = "the CPU" if device is None else f"{device.type} with the host's memory"
        return Machine(num_ranks or 1, host_bytes, host_bytes, is_gpu=False, name=name)
    devices = torch.get_device_module(device)
    properties, number = devices.get_device_properties(0), num_ranks or devices.device_count()
    capability = torch.cuda.get_device_capability(0) if device.type == "cuda" else (0, 0)
    name = f"{number} x {properties.name}"
    return Machine(number, properties.total_memory, host_bytes, is_gpu=True, name=name, capability=capability)


def _size(text: str, given: str, example: str) -> int:
    """Return the bytes of a size such as 24GB; as for GPUs, a GB is 2^30 bytes here."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"{given} is not a valid size; expected something like {example}")
    return int(float(match[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[match[2].upper()])


def available_bytes() -> int:
    """Return how much of the host's memory this process can still get, within its control group's limit."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and (text := Path(limit).read_text().strip()).isdigit():
            known.append(max(0, int(text) - _held_bytes(Path(used))))
    if not known:
        raise UserError("cannot tell the host's free memory; type it: --plan_ram 64GB")
    return min(known)


def _held_bytes(used: Path) -> int:
    """Return what a control group uses, without cached files that it would give up."""
    stat = used.with_name("memory.stat")
    lines = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    files = lines.get("inactive_file", lines.get("total_inactive_file", 0))
    return int(used.read_text()) - int(files) if used.exists() else 0


def gib(num_bytes: float) -> str:
    """Return a size in GiB, or in MiB below a tenth of one."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def processor() -> str:
    """Return the name of the CPU, and how many of its cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} cores"
