"""Peak memory of a forward and a backward against the length of the row: this project and the stock model.

    python -m benchmarks.memory --shape bloom-154m

One example fills the row and half of its tokens are labelled. Each point is a process of its own; what is counted is
the peak above the loaded model, so gradients are in it and weights are not.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from benchmarks import measure
from sft import IGNORE_INDEX
from sft.model import patch
from sft.program import ArgumentParser, run_program
from sft.tools.random_model import SHAPES, build_model

LENGTHS = (512, 1024, 2048, 4096, 8192)
WAYS = {"stock": "stock forward and loss", "ours": "this project"}


def measure_point(way: str, shape: str, length: int) -> dict:
    """Return the bytes above the loaded model that one way needs for one length, None where they are not there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = build_model(shape)
        input_ids = torch.randint(model.config.vocab_size, (1, length))
        position_ids = torch.arange(length)[None]
    labels = input_ids.masked_fill(position_ids < length // 2, IGNORE_INDEX)
    inputs = {"input_ids": input_ids, "labels": labels}
    if way == "ours":
        patch.install(model)
        inputs["position_ids"] = position_ids
    limit = measure.limit_memory()
    measure.reset_peak_memory()
    before = measure.memory(peak=False)
    try:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**inputs).loss
        loss.backward()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return {"bytes": None, "limit": limit}
    return {"bytes": measure.memory() - before, "limit": limit}


def table_of(points: dict[str, dict[int, dict]]) -> str:
    """Return the Markdown table of all lengths, in GiB."""

    def cell(point: dict) -> str:
        if point["bytes"] is None:
            return f"over {point['limit'] / measure.GIB:.0f} GiB"
        return f"{point['bytes'] / measure.GIB:.2f} GiB"

    rows = []
    for length in LENGTHS:
        stock, ours = points["stock"][length], points["ours"][length]
        known = stock["bytes"] and ours["bytes"]
        ratio = f"{ours['bytes'] / stock['bytes']:.2f}" if known else ""
        rows.append([f"{length:,} tokens", cell(stock), cell(ours), ratio])
    return measure.markdown(["row", *WAYS.values(), "ratio"], rows)


def plot(points: dict[str, dict[int, dict]], title: str, path: Path) -> None:
    """Draw memory over length, both axes logarithmic, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for way, label in WAYS.items():
        known = {length: point["bytes"] / measure.GIB for length, point in points[way].items() if point["bytes"]}
        axes.plot(known.keys(), known.values(), "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the row", ylabel="GiB above the loaded model", title=title)
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    lowest, highest = (math.log2(edge) for edge in axes.get_ylim())
    sizes = [2.0**power for power in range(math.ceil(lowest), math.floor(highest) + 1)]
    axes.set_yticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure every way at every length, and print, draw and save the results."""
    parser = ArgumentParser(description="Compare the peak memory of a forward and a backward.")
    parser.add_argument("--shape", default="bloom-154m", choices=SHAPES)
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for table, JSON and plot")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "LENGTH"), help=argparse.SUPPRESS)  # one point's process
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure_point(options.only[0], options.shape, int(options.only[1]))))
        return
    points: dict[str, dict[int, dict]] = {way: {} for way in WAYS}
    for way in WAYS:
        for length in LENGTHS:
            point = measure.run_apart("benchmarks.memory", "--shape", options.shape, "--only", way, length)
            points[way][length] = point
            print(f"{way:6}{length:6,} tokens  {(point['bytes'] or float('nan')) / measure.GIB:.2f} GiB", flush=True)
    name = f"memory-{options.shape}-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    place = {"processor": measure.processor(uses_gpu=torch.cuda.is_available()), "versions": measure.versions()}
    command = f"python -m benchmarks.memory --shape {options.shape}"
    measure.save(options.output, name, {"command": command, **place, "points": points}, table_of(points))
    plot(points, options.shape, options.output / f"{name}.png")


if __name__ == "__main__":
    run_program(main)
