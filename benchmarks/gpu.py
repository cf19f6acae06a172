"""Everything that only a GPU can say, in minutes: is it exact, how fast, how much memory, against others and the plan.

    python -m benchmarks.gpu --minutes 10                    all of it, the most telling first
    python -m benchmarks.gpu --minutes 6 --part 2            the second half
    python -m benchmarks.gpu --items attention_exact speed

It needs no network and no data: models are random, rows are the project's sample or those of --data. Each figure is
printed when it is there, and written as JSON under the card's name. What fails is said, and the rest goes on: the items
run in a process of their own, and in a new one after an error that leaves the GPU unusable. Without a GPU it runs on
the CPU with tiny shapes, to show that it works.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import gpu_kernels, gpu_runs, measure
from benchmarks.measure import Given
from sft import machine
from sft.data.files import find_shards
from sft.program import ArgumentParser, run_program

PARTS = {
    1: ["machine", "attention_exact", "loss_exact", "train", "speed", "profiled", "loss_speed", "attention_speed"],
    2: ["memory", "large", "zero", "chat", "qlora"],
}
ITEMS = {name: getattr(module, name) for module in (gpu_kernels, gpu_runs) for name in vars(module)}
ITEMS = {name: ITEMS[name] for part in PARTS.values() for name in part}
SAMPLE = Path(__file__).parent.parent / "data_proj" / "sample"
SAMPLE_REPEATS = 12  # of 378 rows: twenty steps of 16,384 tokens; one is enough for tiny shapes
MOST_COMPILED = (
    64  # times that a function is compiled anew: for each shape, and each length with a gradient and without
)
SECONDS_TO_END = 5  # of the time given, for what comes after the last item


# ----------------------------------------------------------------------------------------- the process that does items


def work(options: argparse.Namespace) -> None:
    """Do the items in this process; print each figure as a line of JSON."""
    torch._dynamo.config.recompile_limit = MOST_COMPILED
    device = machine.accelerator() or torch.device("cpu")
    given = Given(device, device.type == "cpu", options.data, options.scratch)
    for name in options.items:
        emit(item=name, event="begins")
        try:
            for what, figures in ITEMS[name](given):
                emit(item=name, event="found", what=what, figures=figures)
        except Exception as error:  # an item's failure is a figure, too
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            reason = f"{type(error).__name__}: {str(error).strip()[:400]}"
            emit(item=name, event="found", what="FAILED", figures={"reason": reason, "where": where})
            if "CUDA error" in str(error):
                sys.exit(1)  # no later item could use the GPU
        emit(item=name, event="ends")


def emit(**line: object) -> None:
    """Print a line for the process that waits for it."""
    print(json.dumps(line), flush=True)


# --------------------------------------------------------------------------------------------- the process that reports


def start_worker(items: list[str], data: str, scratch: Path) -> subprocess.Popen:
    """Start the process that does items, in a group of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--scratch", scratch, "--data", data]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    with (scratch / "errors").open("a") as errors:
        streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        return subprocess.Popen(
            [*map(str, command), "--items", *items], env=environment, start_new_session=True, **streams
        )


def figures_of(options: argparse.Namespace, scratch: Path) -> Iterator[dict]:
    """Yield each figure as it comes, until all items are done or the time is over."""
    deadline, left = time.monotonic() + 60 * options.minutes - SECONDS_TO_END, list(options.items)
    while left and time.monotonic() < deadline:
        worker = start_worker(left, options.data, scratch)
        # With all that it has started.
        killer = threading.Timer(max(1, deadline - time.monotonic()), os.killpg, (worker.pid, signal.SIGKILL))
        killer.start()
        for line in worker.stdout:
            if not line.startswith('{"item"'):
                continue
            told = json.loads(line)
            if told["event"] == "ends":
                left.remove(told["item"])
            elif told["event"] == "found":
                yield told
        worker.wait()
        killer.cancel()
        if left and worker.returncode and time.monotonic() < deadline:
            reason = (scratch / "errors").read_text()[-300:]
            yield {"item": left[0], "what": "FAILED", "figures": {"exit code": worker.returncode, "reason": reason}}
            left.pop(0)
    for name in left:
        yield {"item": name, "what": "left out, or not finished: the time was over", "figures": {}}


def text_of(figures: dict) -> str:
    """Return figures as a table's cell."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def report(options: argparse.Namespace, scratch: Path) -> None:
    """Print and save every figure; the JSON is whole after each of them."""
    uses_gpu = torch.cuda.is_available()
    place = {"processor": measure.processor(uses_gpu), "versions": measure.versions()}
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if uses_gpu else "cpu"
    part = f"-part-{options.part}" if options.part else ""
    path = options.output / f"gpu-{card}{part}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    command, found, start = f"python -m benchmarks.gpu --minutes {options.minutes:g}", [], time.monotonic()
    command += f" --part {options.part}" if options.part else ""
    print(f"{place['processor']}; {place['versions']}")
    for told in figures_of(options, scratch):
        found.append({"item": told["item"], "what": told["what"], **told["figures"]})
        path.write_text(json.dumps({"command": command, **place, "figures": found}, indent=1) + "\n", encoding="utf-8")
        passed = time.monotonic() - start
        print(f"{passed:5.0f} s  {told['item']:16} {told['what']:58} {text_of(told['figures'])}", flush=True)
    print(f"saved as {path}")


def repeated_sample(path: Path) -> str:
    """Write the sample's rows again and again, so that no measured step is short of rows; return the path."""
    rows = "".join(file.read_text(encoding="utf-8") for file in sorted(SAMPLE.glob("*.json")))
    path.write_text((SAMPLE_REPEATS if machine.accelerator() else 1) * rows, encoding="utf-8")
    return str(path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Measure all that only a GPU can say, the most telling first.")
    parser.add_argument("--minutes", type=float, default=10, help="stop after so many minutes, even if items are left")
    parser.add_argument("--part", type=int, choices=PARTS, help="one half of the items")
    parser.add_argument("--items", nargs="+", choices=ITEMS, help="these items, in this order")
    parser.add_argument("--data", help="rows to train on; by default the project's sample")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # the process that does items
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = [options.part] if options.part else list(PARTS)
    options.items = options.items or [name for part in parts for name in PARTS[part]]
    return options


def main() -> None:
    """Do the items, or have them done."""
    options = parse_arguments()
    if options.worker:
        work(options)
        return
    if options.data:
        find_shards(options.data, "--data")
    scratch = Path(tempfile.mkdtemp(prefix="benchmarks_gpu_"))
    options.data = options.data or repeated_sample(scratch / "rows.json")
    try:
        report(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    run_program(main)
