"""How much memory, time and disk many rows take: tokenised, packed, and found again by a second start.

    python -m benchmarks.data_size --data rows.json --rows 5000000

The rows are those of benchmarks.tokenise. Memory is resident memory, of the largest process and of all together (pages
that processes share are counted in each), looked at five times a second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from datasets import Dataset

from benchmarks import measure
from benchmarks.tokenise import add_tokenizer_arguments, make_tokenizer, tokenizer_arguments, write_rows
from sft.data.load import load_examples
from sft.data.packing import PackedSequences
from sft.model.load import load_tokenizer
from sft.program import ArgumentParser, run_program


def load(folder: Path, num_workers: int) -> dict[str, float]:
    """Load and pack the rows as a run does; return the seconds of both, tokens, and packed rows."""
    tokenizer = load_tokenizer(str(folder), 2048)
    start = time.perf_counter()
    examples, report = load_examples(str(folder / "rows.jsonl"), tokenizer, str(folder), num_workers=num_workers)
    loaded = time.perf_counter()
    assert isinstance(examples, Dataset), type(examples)
    packed = PackedSequences(examples, 2048)
    done = time.perf_counter()
    return {
        "load_seconds": loaded - start,
        "pack_seconds": done - loaded,
        "rows": report.kept,
        "refused": report.counts.refused,
        "tokens": report.tokens,
        "packed_rows": len(packed),
        "fill_rate": float(packed.fill_rate),
    }


def watch(command: list[str]) -> dict[str, float]:
    """Run a process; return the JSON object it prints, its seconds, and the peak memory of it and all it starts."""
    start, largest, together = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        for each in [tree, *_children(tree)]:
            try:
                sizes.append(each.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        largest, together = max(largest, *sizes, 0), max(together, sum(sizes))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    result = json.loads(process.stdout.read().splitlines()[-1])
    return {**result, "seconds": time.perf_counter() - start, "largest": largest, "together": together}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def measure_size(rows: int, options: argparse.Namespace) -> list[str]:
    """Return the figures of so many rows as a line of the table."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.data, rows)
        make_tokenizer(options.data, options.family, options.vocab_size, folder)
        command = [sys.executable, "-m", "benchmarks.data_size", "--data", options.data, "--rows", str(rows)]
        command += ["--processes", str(options.processes), "--only", name]
        first, second = watch(command), watch(command)
        cache = sum(file.stat().st_size for file in (folder / "tokenised").rglob("*") if file.is_file())
        print(json.dumps({"first": first, "second": second}), flush=True)
        return [
            f"{rows:,}",
            f"{(folder / 'rows.jsonl').stat().st_size / measure.GIB:.2f} GiB",
            f"{first['load_seconds']:,.0f} s",
            f"{rows / first['load_seconds']:,.0f}",
            f"{first['pack_seconds']:.1f} s",
            f"{first['largest'] / measure.GIB:.2f} GiB",
            f"{first['together'] / measure.GIB:.2f} GiB",
            f"{cache / measure.GIB:.2f} GiB",
            f"{second['load_seconds'] + second['pack_seconds']:.1f} s",
        ]


def table_of(result: dict) -> str:
    """Return the Markdown table of a saved result."""
    return measure.markdown(HEADER, result["lines"])


HEADER = ["rows", "file", "tokenised in", "rows/s", "packed in", "largest process", "all", "cache", "second start"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Measure what many rows take.")
    parser.add_argument("--data", required=True, help="rows from whose clauses the measured rows are made")
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000], help="numbers of rows to measure")
    parser.add_argument("--processes", type=int, default=2, help="processes that tokenise")
    add_tokenizer_arguments(parser)
    parser.add_argument("--scratch", type=Path, help="a folder for the temporary rows and their cache")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # the process that loads: its folder
    return parser.parse_args()


def main() -> None:
    """Measure every number of rows, and print and save the table."""
    options = parse_arguments()
    if options.only:
        print(json.dumps(load(options.only, options.processes)))
        return
    lines = [measure_size(rows, options) for rows in options.rows]
    given = f"--rows {' '.join(map(str, options.rows))} --processes {options.processes}"
    given += f" {' '.join(tokenizer_arguments(options))}"
    command = f"python -m benchmarks.data_size --data {Path(options.data).name} {given}"
    result = {
        "command": command,
        "processor": measure.processor(uses_gpu=False),
        "versions": measure.versions(),
        "lines": lines,
    }
    name = "data-size" if options.family == "bloom" else f"data-size-{options.family}"
    measure.save(options.output, name, result, table_of(result))


if __name__ == "__main__":
    run_program(main)
