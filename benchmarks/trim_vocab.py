"""What a vocabulary of the data's own tokens saves: parameters, time and memory of fine-tuning, in one run.

    python -m benchmarks.trim_vocab --shape bloom-560m --rounds 2

The same randomly initialised model trains on the same packed rows whole and after
`sft.tools.trim_vocab.trim_model`, each in a process of its own, in turn. The rows are written in
the tokens that both have.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

from benchmarks import measure
from benchmarks.throughput import HUGE_PAGES, WAYS, make_tokenizer, make_trainer, merge, metered
from sft.data.files import find_shards
from sft.program import ArgumentParser, UserError, run_program
from sft.tools.random_model import SHAPES, build_model
from sft.tools.trim_vocab import trim_model

# What LLMPruner keeps of BLOOM's 250,880 tokens for Chinese is 46,145; here the next multiple of 64.
CHINESE_TOKENS = 46_208
MODELS = ("whole", "trimmed")


def measure_model(name: str, options: argparse.Namespace) -> dict:
    """Train one of the models in this process; return its parameters, counts, seconds, losses and peak bytes."""
    tokenizer = make_tokenizer(options)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = build_model(options.shape)
        if name == "trimmed":
            trim_model(model, range(options.vocab_size))
    set_seed(0)
    trainer = make_trainer(WAYS["ours-packed"], model, tokenizer, options)
    return {"parameters": model.num_parameters(), **metered(trainer, options)}


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result: both models, relative to the whole one."""
    whole, rows = saved["results"]["whole"], []
    for name, result in saved["results"].items():
        rate = result["tokens"] / result["seconds"]
        rows.append(
            [
                f"{name}: {saved['vocabulary'][name]:,} tokens",
                f"{result['parameters']:,}",
                f"{result['parameters'] / whole['parameters']:.1%}",
                f"{rate:,.1f}",
                f"{rate / (whole['tokens'] / whole['seconds']):.2f}",
                f"{result['peak_bytes'] / measure.GIB:.2f} GiB",
            ]
        )
    return measure.markdown(["model", "parameters", "of the whole", "tokens/s", "ratio", "peak memory"], rows)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; raise UserError if the smaller vocabulary is none."""
    parser = ArgumentParser(description="Compare fine-tuning with the whole vocabulary and with a smaller one.")
    parser.add_argument("--shape", default="bloom-560m", choices=SHAPES)
    parser.add_argument("--data", default="data_proj/sample", help="instruction rows, as train_sft.py takes them")
    parser.set_defaults(tokenizer=None)
    parser.add_argument("--vocab_size", type=int, default=CHINESE_TOKENS, help="tokens of the smaller vocabulary")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each model and round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, not measured")
    parser.add_argument("--rounds", type=int, default=1, help="how often both are measured, in turn")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a packed sequence")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, for both")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--only", choices=MODELS, help=argparse.SUPPRESS)  # the process of one model
    parser.set_defaults(rows=1, compile_blocks=False, torch_compile=False)
    options = parser.parse_args(given)
    if not 512 <= options.vocab_size < SHAPES[options.shape].vocab_size:
        raise UserError(
            f"--vocab_size {options.vocab_size} must be from 512 to {SHAPES[options.shape].vocab_size - 1:,}, "
            f"fewer than {options.shape} has; type --vocab_size {SHAPES[options.shape].vocab_size // 2}"
        )
    return options


def main() -> None:
    """Measure both models in every round, and print and save the table."""
    options = parse_arguments()
    if options.only:
        print(json.dumps(measure_model(options.only, options)))
        return
    find_shards(options.data, "--data")
    given = ["--shape", options.shape, "--data", options.data, "--vocab_size", options.vocab_size]
    given += ["--steps", options.steps, "--warmup", options.warmup, "--max_length", options.max_length]
    given += ["--checkpointing"] if options.checkpointing else []
    measured: dict[str, list[dict]] = {name: [] for name in MODELS}
    for turn in range(options.rounds):
        for name in MODELS:
            measured[name].append(measure.run_apart("benchmarks.trim_vocab", *given, "--only", name, **HUGE_PAGES))
            result = measured[name][-1]
            print(f"round {turn + 1}  {name:8}{result['tokens'] / result['seconds']:10,.1f} tokens/s", flush=True)
    results = {name: merge(rounds) for name, rounds in measured.items()}
    command = f"python -m benchmarks.trim_vocab {' '.join(map(str, given))} --rounds {options.rounds}"
    place = {
        "command": command,
        "processor": measure.processor(uses_gpu=torch.cuda.is_available()),
        "versions": measure.versions(),
    }
    vocabulary = {"whole": SHAPES[options.shape].vocab_size, "trimmed": options.vocab_size}
    result = {**place, "vocabulary": vocabulary, "results": results}
    name = f"trim-vocab-{options.shape}-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    measure.save(options.output, name, result, table_of(result))


if __name__ == "__main__":
    run_program(main)
