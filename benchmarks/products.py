"""Products of fp32 matrices on a CPU: PyTorch's own, by MKL, and oneDNN's, forward and backward of a linear layer.

python -m benchmarks.products
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure
from sft.model.products import product
from sft.program import ArgumentParser, run_program

SIZES = ((1000, 512, 2048), (1000, 1024, 4096), (300, 1024, 4096), (1000, 960, 3840), (4000, 576, 1536))
NUM_CALLS = 20


def seconds_of(call: Callable[[], torch.Tensor]) -> float:
    """Return the median time of a call."""
    taken = []
    for _ in range(NUM_CALLS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rates_of(rows: int, inputs: int, outputs: int) -> dict[str, float]:
    """Return the fp32 operations a second of a layer's three products, by each library."""
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    pairs = ((x, weight.T), (gradient, weight), (gradient.T, x))
    operations = 2 * rows * inputs * outputs * len(pairs)
    ways = {"MKL": torch.mm, "oneDNN": product}
    return {
        name: operations / sum(seconds_of(lambda pair=pair, way=way: way(*pair)) for pair in pairs)
        for name, way in ways.items()
    }


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result."""
    header = ["rows x inputs x outputs", "MKL, GFLOP/s", "oneDNN, GFLOP/s", "ratio"]
    rows = [
        [size, *(f"{rates[name] / 1e9:,.0f}" for name in ("MKL", "oneDNN")), f"{rates['oneDNN'] / rates['MKL']:.2f}"]
        for size, rates in saved["rates"].items()
    ]
    return measure.markdown(header, rows)


def main() -> None:
    """Measure every size; print and save the table."""
    parser = ArgumentParser(description="Compare the libraries that multiply fp32 matrices on a CPU.")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    options = parser.parse_args()
    rates = {" x ".join(map(str, size)): rates_of(*size) for size in SIZES}
    place = {"processor": measure.processor(uses_gpu=False), "versions": measure.versions()}
    result = {"command": "python -m benchmarks.products", **place, "rates": rates}
    measure.save(options.output, "products", result, table_of(result))


if __name__ == "__main__":
    run_program(main)
