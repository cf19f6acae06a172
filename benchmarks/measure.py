"""What the benchmarks share: one process for each measurement, its peak memory, and results as JSON."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch._dynamo.utils import compilation_time_metrics

from sft import machine

GIB = 2**30
RESULTS = Path(__file__).parent / "results"
MOST_CALLS = 10  # to be rid of compilations
LIBRARIES = ("torch", "transformers", "trl", "accelerate")


def processor(uses_gpu: bool) -> str:
    """Return the name of the GPU, or of the CPU with its cores: of what was measured, whatever else is there."""
    return torch.cuda.get_device_name() if uses_gpu else machine.processor()


# Dense bf16 products, TFLOP/s, from the makers' data sheets; a form with slower memory or less power comes first.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops() -> float | None:
    """Return the GPU's dense bf16 operations a second from PEAK_TFLOPS, None where the card is not in it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next(
        (1e12 * tflops for card, tflops in PEAK_TFLOPS.items() if all(part in name for part in card.split())), None
    )


def num_compilations() -> int:
    """Return how many phases of a compilation this process has been through, forward or backward."""
    return sum(map(len, compilation_time_metrics.values()))


def versions() -> str:
    """Return Python's version and those of the libraries that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def reset_peak_memory() -> None:
    """Count the peak from now on: of the GPU's allocations, or of this process's resident memory (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory(peak: bool = True) -> int:
    """Return the bytes in use, at their peak or now: allocated on the GPU, or resident (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def limit_memory() -> int:
    """Let allocations beyond nine tenths of the free memory fail in this process; return that many bytes."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = int(0.9 * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


@dataclass(frozen=True)
class Given:
    """What the items of `benchmarks.gpu` are given: the device, whether shapes are tiny, rows, and a folder."""

    device: torch.device
    is_tiny: bool
    data: str
    scratch: Path

    def shapes(self, *names: str) -> list[str]:
        """Return names of shapes, or those of their families' tiny ones, each once."""
        return list(dict.fromkeys(f"{name.split('-')[0]}-tiny" if self.is_tiny else name for name in names))


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call, once no call compiles any more."""
    for _ in range(MOST_CALLS):
        compiled = num_compilations()
        function()
        if num_compilations() == compiled:
            break
    times = []
    for _ in range(repeats):
        wait_for_gpu()
        start = time.perf_counter()
        function()
        wait_for_gpu()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def wait_for_gpu() -> None:
    """Wait until the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_apart(module: str, *arguments: object, **environment: str) -> dict:
    """Run `python -m module arguments` as a process of its own; return the JSON object that its last line is.

    Raises RuntimeError with the end of its output if it fails.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(folder: Path, name: str, result: dict, table: str) -> None:
    """Write a result as JSON into a folder, with today's date, and print its table with how it was made."""
    folder.mkdir(parents=True, exist_ok=True)
    dated = {"date": date.today().isoformat(), **result}
    (folder / f"{name}.json").write_text(json.dumps(dated, indent=1) + "\n", encoding="utf-8")
    print(f"\n{result['command']}\n\n{result['processor']}; {result['versions']}.\n\n{table}\n")
    print(f"saved as {folder / name}.json")
