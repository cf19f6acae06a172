"""The machine there is, and its memory: of each GPU, or of this host, or of cards that one names."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.program import UserError

GIB = 2**30
# CUDA's context and kernels, and what the allocator cannot use between its blocks.
CUDA_BYTES, CUDA_SHARE = GIB, 0.05
HEAP_SHARE = 0.15  # of a host's memory, for what glibc keeps of tensors that are gone


@dataclass(frozen=True)
class Machine:
    """One host: how many devices it has, the bytes of each and of the host, and what the devices are."""

    num_devices: int
    device_bytes: int
    host_bytes: int
    is_cuda: bool
    name: str

    @property
    def usable_bytes(self) -> int:
        """Return what tensors can have of a device; on a CPU the ranks share the host's memory."""
        if self.is_cuda:
            return int(self.device_bytes * (1 - CUDA_SHARE)) - CUDA_BYTES
        return int(self.host_bytes * (1 - HEAP_SHARE)) // self.num_devices


def find(plan_gpu: str | None, plan_ram: str | None, num_ranks: int | None, use_cpu: bool) -> Machine:
    """Return this machine, or the one that --plan_gpu and --plan_ram name; raise UserError if they name none."""
    host_bytes = _size(plan_ram, f"--plan_ram {plan_ram}", "128GB") if plan_ram else available_bytes()
    if plan_gpu:
        match = re.fullmatch(r"(\d+)x(.+)", plan_gpu)
        number, size = (int(match[1]), match[2]) if match else (1, plan_gpu)
        if not number:
            raise UserError(f"--plan_gpu {plan_gpu} is no card; leave it out to plan for this machine")
        device_bytes = _size(size, f"--plan_gpu {plan_gpu}", "2x24GB")
        return Machine(number, device_bytes, host_bytes, is_cuda=True, name=f"{number} x {size}")
    if use_cpu or not torch.cuda.is_available():
        return Machine(num_ranks or 1, host_bytes, host_bytes, is_cuda=False, name="the CPU")
    properties, number = torch.cuda.get_device_properties(0), num_ranks or torch.cuda.device_count()
    return Machine(number, properties.total_memory, host_bytes, is_cuda=True, name=f"{number} x {properties.name}")


def _size(text: str, given: str, example: str) -> int:
    """Return the bytes of a size such as 24GB; as of cards, a GB is 2^30 bytes here."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"{given} is no size; expected one such as {example}")
    return int(float(match[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[match[2].upper()])


def available_bytes() -> int:
    """Return the host's memory that this process can still have: what is free, within its control group's limit."""
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
        raise UserError("the host's free memory is not known here; name it: --plan_ram 64GB")
    return min(known)


def _held_bytes(used: Path) -> int:
    """Return what a control group holds without the files that it would let go of."""
    stat = used.with_name("memory.stat")
    lines = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    files = lines.get("inactive_file", lines.get("total_inactive_file", 0))
    return int(used.read_text()) - int(files) if used.exists() else 0


def processor() -> str:
    """Return the name of the CPU, and how many of its cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} cores"
