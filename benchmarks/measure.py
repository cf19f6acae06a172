"""What the benchmarks share: one process for each measurement, its peak memory, and tables of the results."""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sft import machine

GIB = 2**30
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "trl", "accelerate")


def processor() -> str:
    """Return the name of the GPU, or of the CPU where there is none, with its cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor()


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
    """Write a result as JSON, and its table with how it was made as Markdown, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"{result['command']}\n\n{result['processor']}; {result['versions']}.\n\n{table}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nsaved as {folder / name}.json and .md")
