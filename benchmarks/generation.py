"""Tokens per second of one stream on the CPU, and the weights' memory: fp32, bf16 and int8, in one run.

    python -m benchmarks.generation --shape bloom-560m
    python -m benchmarks.generation --checkpoint output_dir/demo --data output_dir/demo_data

Every way generates greedily from the same random model and prompt, each in a process of its own, one after the other,
and all of them again in each round. With a checkpoint and rows, each way's distributions of the answers' tokens are
also compared with those of fp32, since a random model tells nothing about quality.
"""

import argparse
import json
import os
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from sft.model.int8 import quantize, weights_in_bytes
from transformers import PreTrainedModel, StoppingCriteria

from benchmarks import measure
from sft import IGNORE_INDEX
from sft.data.encode import encode_samples
from sft.data.files import find_shards
from sft.data.formats import read_samples
from sft.model.download import locate
from sft.model.load import load_config, load_model, load_tokenizer
from sft.program import ArgumentParser, UserError, run_program
from sft.tools.random_model import SHAPES, build_model

WAYS = {"fp32": "stock fp32", "bf16": "stock bf16", "int8": "`--quantize int8`"}
MAX_LENGTH = 2048
WARMUP_TOKENS = 4


class Clock(StoppingCriteria):
    """Notes when each token is there, and ends nothing."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused) -> torch.Tensor:
        """Note the time of a token, and return False for each stream, bool (batch)."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def convert(model: PreTrainedModel, way: str) -> PreTrainedModel:
    """Return an fp32 model with its weights as a way has them; the model itself is changed."""
    if way == "int8":
        return quantize(model)
    return model.eval().to(torch.bfloat16 if way == "bf16" else torch.float32)


def measure_way(way: str, options: argparse.Namespace) -> dict:
    """Generate in this process; return tokens/s after the first, seconds until it, and bytes of weights."""
    model = build_model(options.shape)
    start = time.perf_counter()
    model = convert(model, way)  # not in inference mode, in which bf16 weights are multiplied more slowly
    seconds_to_convert = time.perf_counter() - start
    input_ids = torch.randint(model.config.vocab_size, (1, options.prompt_tokens))
    for new_tokens in (WARMUP_TOKENS, options.new_tokens):
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=[],  # no token ends the text early
                pad_token_id=0,
                stopping_criteria=[clock],
            )
        assert len(clock.times) == new_tokens, (len(clock.times), new_tokens)
    return {
        "tokens_per_second": (options.new_tokens - 1) / (clock.times[-1] - clock.times[0]),
        "seconds_to_first_token": clock.times[0] - start,
        "seconds_to_convert": seconds_to_convert,
        "bytes": weights_in_bytes(model),
    }


@torch.inference_mode()
def measure_quality(options: argparse.Namespace) -> dict[str, dict]:
    """Return each way's mean KL(fp32 || way) in nats, and top-1 agreement with fp32, over the rows' answer tokens."""
    checkpoint = locate(options.checkpoint)
    load_config(checkpoint)
    rows = [row for shard in find_shards(options.data, "--data") for row in islice(read_samples(shard), options.rows)]
    examples = list(encode_samples(rows[: options.rows], load_tokenizer(checkpoint, MAX_LENGTH)))
    models = {way: convert(load_model(checkpoint), way) for way in WAYS}
    divergence, agreed, num_tokens = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0), 0
    for example in examples:
        input_ids, labels = (torch.tensor(example[name])[None] for name in ("input_ids", "labels"))
        answer = labels[0, 1:] != IGNORE_INDEX
        logits = {way: model(input_ids).logits[0, :-1][answer].float() for way, model in models.items()}
        expected = logits["fp32"].double().log_softmax(-1)
        num_tokens += len(expected)
        for way in WAYS:
            given = logits[way].double().log_softmax(-1)
            divergence[way] += (expected.exp() * (expected - given)).sum().item()
            agreed[way] += (expected.argmax(-1) == given.argmax(-1)).sum().item()
    return {
        way: {"kl": divergence[way] / num_tokens, "agreement": agreed[way] / num_tokens, "answer_tokens": num_tokens}
        for way in WAYS
    }


def merge(rounds: list[dict]) -> dict:
    """Return the rounds of one way as one result, the median of each number, and the rounds' own rates."""
    medians = {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}
    return {**medians, "rates_by_round": [result["tokens_per_second"] for result in rounds]}


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result: all ways, relative to fp32."""
    results = saved["results"]
    header = ["way", "tokens/s", "ratio", "first token", "weights", "loaded in"]
    with_quality = "kl" in results["fp32"]
    rows = []
    for way, result in results.items():
        rate = result["tokens_per_second"]
        cells = [f"{rate:.1f}", f"{rate / results['fp32']['tokens_per_second']:.2f}"]
        cells += [f"{result['seconds_to_first_token']:.2f} s", f"{result['bytes'] / measure.GIB:.2f} GiB"]
        cells += [f"+{result['seconds_to_convert']:.1f} s"]
        quality = [f"{result['kl']:.2g}", f"{result['agreement']:.2%}"] if with_quality else []
        rows.append([WAYS[way], *cells, *quality])
    return measure.markdown([*header, *(["KL from fp32", "top-1 as fp32"] if with_quality else [])], rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Compare fp32, bf16 and int8 weights: tokens per second on the CPU, quality.")
    parser.add_argument("--shape", default="bloom-560m", choices=SHAPES)
    parser.add_argument("--prompt_tokens", type=int, default=60, help="random tokens before the first new one")
    parser.add_argument("--new_tokens", type=int, default=64, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3, help="how often all ways are measured, in turn")
    parser.add_argument("--checkpoint", help="a trained model, to compare the ways' answers on")
    parser.add_argument("--data", help="rows to compare on, as train_sft.py takes them")
    parser.add_argument("--rows", type=int, default=100, help="how many of them, from the first")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)  # the process of one way
    return parser.parse_args()


def main() -> None:
    """Measure every way in every round, and print and save the table."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options = parse_arguments()
    if min(options.prompt_tokens, options.rounds, options.rows, options.new_tokens - 1) < 1:
        raise UserError("--prompt_tokens, --rounds and --rows must be at least 1, --new_tokens at least 2")
    if (options.checkpoint is None) != (options.data is None):
        raise UserError("--checkpoint and --data belong together, a trained model and rows; give both or neither")
    if options.only:
        print(json.dumps(measure_way(options.only, options)))
        return
    quality = measure_quality(options) if options.checkpoint else {}
    given = ["--shape", options.shape, "--prompt_tokens", options.prompt_tokens, "--new_tokens", options.new_tokens]
    measured: dict[str, list[dict]] = {way: [] for way in WAYS}
    for turn in range(options.rounds):
        for way in WAYS:
            measured[way].append(measure.run_apart("benchmarks.generation", *given, "--only", way))
            print(f"round {turn + 1}  {way:6}{measured[way][-1]['tokens_per_second']:8.1f} tokens/s", flush=True)
    results = {way: merge(rounds) | quality.get(way, {}) for way, rounds in measured.items()}
    written = [*map(str, given), "--rounds", str(options.rounds)]
    if options.checkpoint:
        names = [Path(path).name for path in (options.checkpoint, options.data)]
        written += ["--checkpoint", names[0], "--data", names[1], "--rows", str(options.rows)]
    command = f"python -m benchmarks.generation {' '.join(written)}"
    place = {"command": command, "processor": measure.processor(uses_gpu=False), "versions": measure.versions()}
    result = {**place, "results": results}
    measure.save(options.output, f"generation-{options.shape}-cpu", result, table_of(result))


if __name__ == "__main__":
    run_program(main)
