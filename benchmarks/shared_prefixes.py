"""What it saves to compute once what examples begin with in common: single turns, conversations, another family.

    python -m benchmarks.shared_prefixes --data rows.json --rounds 2

Each measurement trains in a process of its own, with and without `--share_prefixes`, one after the other, and all of
them again in each round. Tokens are those of the examples, each counted in full.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import measure, throughput
from benchmarks.tokenise import save_falcon_tokenizer
from sft.data.collate import flatten
from sft.data.encode import Encoder
from sft.data.formats import read_samples
from sft.model import patch
from sft.program import ArgumentParser, run_program
from sft.tools.random_model import build_model

NUM_CONVERSATIONS = 500
MOST_REPLIES = 8
SMALL = "bloom-154m"  # for the seconds by replies, which are many measurements
LONG = 500  # tokens of an example, about, where another family is compared
WAYS = ("ours-apart", "ours", "ours-packed-apart", "ours-packed")
PICTURE = Path(__file__).parent.parent / "images" / "replies.svg"


def pairs_of(data: str) -> list[tuple[str, str]]:
    """Return the question and answer of each row."""
    return [(f"{row.instruction}\n{row.input}".strip(), row.output) for row in read_samples(Path(data))]


def conversations(data: str, seed: int = 0) -> Iterator[dict]:
    """Yield conversations of 1 to MOST_REPLIES replies, each the questions and answers of random rows."""
    generator, pairs = random.Random(seed), pairs_of(data)
    for _ in range(NUM_CONVERSATIONS):
        yield conversation(generator.sample(pairs, generator.randint(1, MOST_REPLIES)))


def conversation(pairs: list[tuple[str, str]]) -> dict:
    """Return a record of one conversation."""
    turns = [({"role": "user", "content": asked}, {"role": "assistant", "content": reply}) for asked, reply in pairs]
    return {"messages": [message for turn in turns for message in turn]}


def long_rows(data: str) -> Iterator[dict]:
    """Yield rows of several answers each, LONG tokens or so together."""
    pairs, characters = pairs_of(data), 0
    part: list[tuple[str, str]] = []
    for pair in pairs:
        part.append(pair)
        characters += len(pair[1])
        if characters > 2 * LONG:
            asked, replies = zip(*part, strict=True)
            yield {"instruction": "\n".join(asked), "output": "\n".join(replies)}
            part, characters = [], 0


def trained(data: Path | str, way: str, options: argparse.Namespace, **given: object) -> dict:
    """Train one way in a process of its own; return what `benchmarks.throughput` measures."""
    flags = [f"--{name}={value}" for name, value in {"data": data, "steps": options.steps, **given}.items()]
    environment = dict(throughput.WAYS[way].environment)
    return measure.run_apart("benchmarks.throughput", *flags, "--warmup", 2, "--only", way, **environment)


def compare(name: str, data: Path | str, options: argparse.Namespace, ways: tuple[str, ...] = WAYS, **given) -> dict:
    """Return the results of some ways to train on one kind of data, by way, all rounds together."""
    measured: dict[str, list[dict]] = {way: [] for way in ways}
    for number in range(options.rounds):
        for way in ways:
            measured[way].append(result := trained(data, way, options, **given))
            rate = result["tokens"] / result["seconds"]
            print(f"round {number + 1}  {name:32}{way:20}{rate:8,.0f} tokens/s", flush=True)
    return {way: throughput.merge(results) for way, results in measured.items()}


def seconds_by_replies(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a forward and backward over one conversation, by the number of its replies, both ways."""
    torch.manual_seed(0)
    given = {"shape": SMALL, "data": options.data, "max_length": 8192, "tokenizer": None, "vocab_size": None}
    tokenizer = throughput.make_tokenizer(argparse.Namespace(**given))
    model, encoder = build_model(SMALL).train(), Encoder(tokenizer)
    patch.install(model)
    records = [conversation(random.Random(0).sample(pairs_of(options.data), n)) for n in range(1, MOST_REPLIES + 1)]
    found: dict[str, list[float]] = {"apart": [], "shared": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        for examples in encoder.encode(list(read_samples(file))):
            row = {"input_ids": [], "lengths": []}
            for example in examples:
                row["input_ids"] += example.prompt + example.answer
                row["lengths"] += [len(example.prompt), len(example.answer)]
            for name in found:
                found[name].append(seconds_of(model, flatten([row], share_prefixes=name == "shared"), options.steps))
    return found


def seconds_of(model: torch.nn.Module, batch: dict, repeats: int) -> float:
    """Return the fastest of some forwards and backwards over a flat batch."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        taken.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return min(taken)


def plot(seconds: dict[str, list[float]], file: Path) -> None:
    """Draw the seconds by the number of replies."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    replies = range(1, MOST_REPLIES + 1)
    for name, label in (("apart", "--share_prefixes False"), ("shared", "--share_prefixes True")):
        axes.plot(replies, seconds[name], marker="o", label=label)
    axes.set_xlabel("replies of the conversation")
    axes.set_ylabel("seconds, forward and backward")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result: both ways of each kind of data, and the conversations' seconds."""
    rows = []
    for name, results in saved["results"].items():
        for apart, shared in zip(list(results)[::2], list(results)[1::2], strict=True):
            rates = [results[way]["tokens"] / results[way]["seconds"] for way in (apart, shared)]
            peaks = [results[way]["peak_bytes"] / measure.GIB for way in (apart, shared)]
            part = 1 - results[shared]["computed"] / results[shared]["tokens"]
            rows.append(
                [
                    name,
                    throughput.WAYS[shared].title,
                    f"{part:.1%}",
                    *(f"{rate:,.0f}" for rate in rates),
                    f"{rates[1] / rates[0]:.2f}",
                    f"{peaks[0]:.2f} and {peaks[1]:.2f} GiB",
                ]
            )
    header = ["data", "way", "tokens shared", "tokens/s before", "after", "ratio", "peak memory"]
    seconds = saved["seconds_by_replies"]
    curve = [[str(n + 1), *(f"{seconds[name][n]:.2f}" for name in seconds)] for n in range(MOST_REPLIES)]
    table = measure.markdown(header, rows)
    return table + "\n\n" + measure.markdown(["replies", "seconds before", "after"], curve)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Compare training with and without shared prefixes.")
    parser.add_argument("--shape", default="bloom-560m", choices=throughput.SHAPES)
    parser.add_argument("--data", required=True, help="instruction rows, as train_sft.py takes them")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each way and round")
    parser.add_argument("--rounds", type=int, default=1, help="how often all ways are measured, in turn")
    parser.add_argument("--vocab_size", type=int, help="entries of the trained tokenizer; by default the shape's")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the plot of seconds by replies")
    return parser.parse_args()


def main() -> None:
    """Measure all kinds of data; print and save the table and the plot."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, records in (("conversations", conversations(options.data)), ("long", long_rows(options.data))):
            files[name] = Path(folder, f"{name}.jsonl")
            files[name].write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        given = {"shape": options.shape, **({"vocab_size": options.vocab_size} if options.vocab_size else {})}
        measured = partial(compare, options=options)
        falcon_tokenizer = Path(folder, "falcon_tokenizer")
        save_falcon_tokenizer(falcon_tokenizer)
        results = {
            "single turns": measured("single turns", options.data, **given),
            "conversations": measured("conversations", files["conversations"], batch=2, **given),
            "single turns, Falcon's tokenizer": measured(
                "single turns, Falcon's tokenizer", options.data, shape="falcon-174m", tokenizer=falcon_tokenizer
            ),
            "Llama of 135M, long rows": measured(
                "Llama of 135M, long rows", files["long"], ways=("plain", "ours"), shape="llama-135m"
            ),
        }
    seconds = seconds_by_replies(options)
    plot(seconds, options.picture)
    command = f"python -m benchmarks.shared_prefixes --data {Path(options.data).name} --rounds {options.rounds}"
    place = {"command": command, "processor": measure.processor(torch.cuda.is_available())}
    result = {**place, "versions": measure.versions(), "results": results, "seconds_by_replies": seconds}
    measure.save(options.output, "shared-prefixes", result, table_of(result))


if __name__ == "__main__":
    run_program(main)
