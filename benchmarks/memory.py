"""Peak memory of a forward and a backward against the length of the row: this project and the stock model.

    python -m benchmarks.memory --shape bloom-154m

One example fills the row and half of its tokens are labelled. Each point is a process of its own; what is counted is
the peak above the loaded model, so gradients are in it and weights are not.
"""

import argparse
import json
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


def table_of(result: dict) -> str:
    """Return the Markdown table of a saved result's lengths, in GiB."""

    def cell(point: dict) -> str:
        if point["bytes"] is None:
            return f"over {point['limit'] / measure.GIB:.0f} GiB"
        return f"{point['bytes'] / measure.GIB:.2f} GiB"

    rows = []
    for length, stock in result["points"]["stock"].items():
        ours = result["points"]["ours"][length]
        known = stock["bytes"] and ours["bytes"]
        ratio = f"{ours['bytes'] / stock['bytes']:.2f}" if known else ""
        rows.append([f"{int(length):,} tokens", cell(stock), cell(ours), ratio])
    return measure.markdown(["sequence", *WAYS.values(), "ratio"], rows)


def main() -> None:
    """Measure every way at every length, and print and save the results."""
    parser = ArgumentParser(description="Compare the peak memory of a forward and a backward.")
    parser.add_argument("--shape", default="bloom-154m", choices=SHAPES)
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
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
    result = {"command": command, **place, "points": points}
    measure.save(options.output, name, result, table_of(result))


if __name__ == "__main__":
    run_program(main)
