"""What `--plan` says of the common models on common cards, and how near it is to what runs take here.

    python -m benchmarks.plan                               what fits, computed in a minute
    python -m benchmarks.plan --measure                     real runs on this CPU beside their plan

A measured run is train_sft.py itself, three steps on packed rows, each one long answer, so that nearly every token is
trained, as the plan takes them to be. What counts is the peak of a process's resident memory (VmRSS, 20 times a second)
above that of the same command with --check_data, which ends before the model is loaded. glibc is told to give every
tensor back at once, as it does not by itself: what it keeps for later would be counted as well.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PretrainedConfig

from benchmarks import measure
from sft.machine import GIB, Machine
from sft.plan.activations import Load, Strategy
from sft.plan.memory import Footprint, footprint
from sft.plan.options import choose, fits, name_of, options
from sft.program import ArgumentParser, run_program
from sft.tools.random_model import SHAPES, bloom, read_texts

MODELS = {name: SHAPES[name] for name in ("bloom-560m", "bloom-1b1", "bloom-1b7", "bloom-3b", "bloom-7b1")}
MODELS["bloom-13b"] = bloom(5120, 36, 40)  # no release; a shape that people ask for
MODELS["falcon-7b"] = SHAPES["falcon-7b"]
CARDS = {"1 x 24 GB": (1, 24, 64), "2 x 24 GB": (2, 24, 128), "1 x 80 GB": (1, 80, 256), "8 x 80 GB": (8, 80, 1024)}
NUM_TOKENS = 2048
MEASURED_SHAPES = ("bloom-154m", "falcon-174m", "bloom-560m")
SECONDS_BETWEEN = 0.05
SAMPLE = "data_proj/sample"


# ------------------------------------------------------------------------------------------------------- what fits


def load_of(config: PretrainedConfig, compute_dtype: torch.dtype, is_gpu: bool) -> Load:
    """Return what is trained on, with LoRA of rank 16 where a strategy has it."""
    config = copy.deepcopy(config)
    config.dtype = torch.float16 if is_gpu else torch.float32  # of the files
    return Load(config, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"), False, compute_dtype, is_gpu)


def short_name(strategy: Strategy | None, needs: Footprint | None, here: Machine) -> str:
    """Return the cell of a strategy: what it is, and GiB of each GPU and of the host."""
    if strategy is None:
        return "no"
    name = name_of(strategy).removeprefix(f"{strategy.method}, ").replace("one process, ", "")
    name = {"one process": "plain"}.get(name, name).replace(" on the host", " off")
    unproven = "" if fits(needs, here, strategy.zero_stage, is_proven=True) else ", unproven"
    return (
        f"{name}{' +' if strategy.checkpointing else ''}: {needs.device / GIB:.0f} / {needs.host / GIB:.0f}{unproven}"
    )


def cells_of(config: PretrainedConfig, here: Machine) -> list[str]:
    """Return for each method the strategy that --plan chooses on a machine."""
    load = load_of(config, torch.bfloat16, is_gpu=True)
    found, cells = options(load, NUM_TOKENS, here), []
    for method in ("full", "LoRA", "QLoRA"):
        chosen = choose(found, here, method)
        cells.append(short_name(chosen, chosen and footprint(chosen, load, NUM_TOKENS, here.num_devices), here))
    return cells


def table_of(result: dict) -> str:
    """Return the Markdown table of a saved plan."""
    return measure.markdown(["model", "GPUs", "host", "all weights", "LoRA", "QLoRA"], result["rows"])


def print_table(output: Path) -> None:
    """Print and save what fits, for every model and card."""
    rows = []
    for model, config in MODELS.items():
        for card, (number, size, ram) in CARDS.items():
            here = Machine(number, size * GIB, ram * GIB, is_gpu=True, name=card)
            rows.append([model, card, f"{ram:,} GB", *cells_of(config, here)])
            print(*rows[-1], sep="  ", flush=True)
    place = {"processor": "computed, not measured", "versions": measure.versions()}
    result = {"command": "python -m benchmarks.plan", **place, "rows": rows}
    measure.save(output, "plan", result, table_of(result))


# ------------------------------------------------------------------------------------------------------- real runs here


@dataclass(frozen=True)
class Point:
    """A way to run on a CPU: its strategy, and the flags and ranks that make it."""

    strategy: Strategy
    flags: tuple[str, ...] = ()
    ranks: int = 1
    bf16: bool = False


WAYS = {
    "all weights": Point(Strategy("full")),
    "all weights, checkpointed": Point(Strategy("full", checkpointing=True), ("--activation_checkpointing", "True")),
    "LoRA": Point(Strategy("LoRA"), ("--lora_r", "16", "--merge_lora", "False")),
    "Adafactor": Point(Strategy("full", optim="adafactor"), ("--optim", "adafactor")),
    "ZeRO-2, 2 ranks, bf16": Point(
        Strategy("full", 2), ("--deepspeed", "ds_zero2_config.json", "--bf16", "True"), 2, True
    ),
    "ZeRO-3, 2 ranks, bf16": Point(
        Strategy("full", 3), ("--deepspeed", "ds_zero3_config.json", "--bf16", "True"), 2, True
    ),
}


def resident_bytes(pid: int) -> int:
    """Return the memory that a process has now, frozen weights that are mapped from their file included."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def descendants(pid: int) -> list[int]:
    """Return a process and all that it has started, as far as they live."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(found for child in children for found in descendants(int(child)))]


def peak_of(command: list[str]) -> int:
    """Run a command; return the largest memory that one of its processes has had.

    Raises RuntimeError with the end of its output if it fails.
    """
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        process, peak = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), 0
        while process.poll() is None:
            peak = max(peak, *map(resident_bytes, descendants(process.pid)))
            time.sleep(SECONDS_BETWEEN)
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {log.read()[-2000:]}")
    return peak


def measure_point(folder: str, data: str, num_tokens: int, point: Point, scratch: Path) -> int:
    """Return the bytes that a real run takes of its process above what is there before the model."""
    launch = (
        [sys.executable] if point.ranks == 1 else [sys.executable, "-m", "sft.training.launch", "--cpu", "--ranks", "2"]
    )
    flags = (
        f"--model_name_or_path {folder} --data_path {data} --output_dir {scratch / 'out'} --packing True --use_cpu True"
    )
    flags += f" --model_max_length {num_tokens} --per_device_train_batch_size 1 --max_steps 3 --save_strategy no"
    command = [*launch, "train_sft.py", *flags.split(), *point.flags, "--check_fit", "False"]
    return peak_of(command) - peak_of([*command, "--check_data"])


def write_rows(path: Path, num_tokens: int) -> str:
    """Write rows whose answers are longer than `num_tokens`, made of the sample's; return the path."""
    texts = list(read_texts(SAMPLE))
    answers = ["".join(texts[start:])[: 10 * num_tokens] for start in range(8)]
    rows = [{"instruction": "写", "input": "", "output": answer} for answer in answers]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def measured_table_of(result: dict) -> str:
    """Return the Markdown table of saved runs beside their plan."""
    rows = []
    for point in result["points"]:
        planned, measured = point["planned"], point["measured"]
        sizes = [f"{size / GIB:.2f} GiB" for size in (planned, measured)]
        rows.append([f"{point['shape']}, {point['way']}", *sizes, f"{planned / measured:.2f}"])
    return measure.markdown(["run", "planned", "measured", "ratio"], rows)


def print_measured(shapes: list[str], ways: list[str], num_tokens: int, output: Path) -> None:
    """Print and save the peak of real runs on this CPU beside the plan's."""
    points = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(Path(scratch, "base"))
            data = write_rows(Path(scratch, "rows.json"), num_tokens)
            arguments = ["--shape", shape, "--text", SAMPLE, "--output", folder]
            subprocess.run([sys.executable, "-m", "sft.tools.random_model", *arguments], check=True)
            for way in ways:
                point = WAYS[way]
                load = load_of(SHAPES[shape], torch.bfloat16 if point.bf16 else torch.float32, is_gpu=False)
                planned = footprint(point.strategy, load, num_tokens, point.ranks).device
                found = measure_point(folder, data, num_tokens, point, Path(scratch))
                points.append({"shape": shape, "way": way, "planned": planned, "measured": found})
                print(f"{shape}, {way}  {planned / GIB:.2f} GiB  {found / GIB:.2f} GiB", flush=True)
    command = f"python -m benchmarks.plan --measure --num_tokens {num_tokens}"
    place = {"processor": measure.processor(uses_gpu=False), "versions": measure.versions()}
    result = {"command": command, **place, "points": points}
    measure.save(output, "plan-measured-cpu", result, measured_table_of(result))


def main() -> None:
    """Print the table, or measure, as the command line says."""
    parser = ArgumentParser(description="Compute what fits, or compare the plan with real runs.")
    parser.add_argument("--measure", action="store_true", help="run on this CPU and compare")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=MEASURED_SHAPES, help="what to measure")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="how to train it")
    parser.add_argument("--num_tokens", type=int, default=1024, help="tokens of a packed sequence")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    given = parser.parse_args()
    if given.measure:
        print_measured(given.shapes, given.ways, given.num_tokens, given.output)
    else:
        print_table(given.output)


if __name__ == "__main__":
    run_program(main)
