"""Chatting on the CPU: tokens per second of one stream, seconds until ready, peak memory, and what fewer bits change.

    python -m benchmarks.generation --shape bloom-560m
    python -m benchmarks.generation --checkpoint output_dir/demo --data output_dir/demo_data

Every way answers greedily with the same random model and prompt, each in a process of its own, one after the other,
and all of them again in each round; llama.cpp also alone, without anything of this project. With a checkpoint and rows,
each way's distributions of the answers' tokens are compared with those of fp32, since a random model tells nothing
about quality. What only some of the ways need is imported late, since it counts in their seconds and their memory.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

from sft import IGNORE_INDEX
from sft.program import ArgumentParser, UserError, run_program

WAYS = {
    "fp32": "transformers, fp32",
    "bf16": "transformers, bf16",
    "q8_0": "`--quantize q8_0`",
    "llama.cpp q8_0": "llama.cpp alone, q8_0",
    "q4_k_m": "`--quantize q4_k_m`",
    "llama.cpp q4_k_m": "llama.cpp alone, q4_k_m",
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MAX_LENGTH = 2048
RESULTS = Path(__file__).parent / "results"
Probabilities = Callable[[list[int], list[int]], np.ndarray]
SMALLEST = 1e-12  # probability, below which llama.cpp's is not told apart from none


def save_model(shape: str, folder: Path) -> None:
    """Write a random model of a shape, with a small tokenizer for its family, once."""
    from sft.tools.random_model import read_texts, save_random_model

    if not (folder / "config.json").exists():
        save_random_model(shape, read_texts(str(Path(__file__).parent.parent / "data_proj" / "sample")), folder)


def answering(way: str, folder: str) -> Callable[[list[int], int], int]:
    """Load a model as a way does; return what generates after a prompt's ids and counts the new tokens."""
    from sft.chat.sampling import Sampling

    if way.startswith("llama.cpp"):
        return alone(folder)
    if way in DTYPES:
        from sft.chat.model import ChatModel, GeneratedReply

        chat = ChatModel.load(folder, "cpu", DTYPES[way])
        make = partial(GeneratedReply, chat.generate, chat.tokenizer)
    else:
        from sft.chat.load import load_chat

        make = load_chat(folder, quantization=way).stream

    def answer(ids: list[int], number: int) -> int:
        reply = make(ids, Sampling(max_new_tokens=number, temperature=0, top_k=0, top_p=1.0, seed=0))
        for _ in reply:
            pass
        return reply.num_tokens

    return answer


def alone(file: str) -> Callable[[list[int], int], int]:
    """Load a GGUF file into llama.cpp, as its package does by itself; return what generates after a prompt's ids."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = file, MAX_LENGTH, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = psutil.cpu_count(logical=False)
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def answer(ids: list[int], number: int) -> int:
        asked = {"prompt": ids, "max_tokens": number, "temperature": 0, "cache_prompt": False}
        return server.handle_completions(asked)["usage"]["completion_tokens"]

    return answer


def measure_way(way: str, options: argparse.Namespace) -> dict:
    """Answer in this process; return tokens/s after the first, seconds until it and until ready, and peak memory."""
    answer = answering(way, options.folder)
    answer([5], 1)
    ready = seconds_since_start()
    ids = np.random.default_rng(0).integers(20, 1000, options.prompt_tokens).tolist()
    seconds = {}
    for number in (1, options.new_tokens):
        start = time.perf_counter()
        found = answer(ids, number)
        seconds[number] = time.perf_counter() - start
        assert found == number, (way, found, number)
    return {
        "tokens_per_second": (options.new_tokens - 1) / (seconds[options.new_tokens] - seconds[1]),
        "seconds_to_first_token": seconds[1],
        "seconds_to_ready": ready,
        "bytes": peak_memory(),
    }


def seconds_since_start() -> float:
    """Return how long this process has been there (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
    """Return the most bytes that this process has had resident (Linux)."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure_quality(options: argparse.Namespace) -> dict[str, dict]:
    """Return each way's mean KL(fp32 || way) in nats, and top-1 agreement with fp32, over the rows' answer tokens."""
    from sft.data.encode import encode_samples
    from sft.data.files import find_shards
    from sft.data.formats import read_samples
    from sft.model.download import locate
    from sft.model.load import load_config, load_tokenizer

    checkpoint = locate(options.checkpoint)
    load_config(checkpoint)
    rows = [row for shard in find_shards(options.data, "--data") for row in islice(read_samples(shard), options.rows)]
    examples = list(encode_samples(rows[: options.rows], load_tokenizer(checkpoint, MAX_LENGTH)))
    expected: list[np.ndarray] = []
    found = {}
    for way in (way for way in WAYS if not way.startswith("llama.cpp")):
        probabilities = probabilities_of(checkpoint, way)
        given = [distributions(probabilities, example) for example in examples]
        expected = expected or given  # fp32 is the first
        pairs = [*zip(expected, given, strict=True)]
        divergence = sum((a * (np.log(a) - np.log(b))).sum() for a, b in pairs)
        agreed = sum((a.argmax(-1) == b.argmax(-1)).sum() for a, b in pairs)
        num_tokens = sum(map(len, expected))
        found[way] = {"kl": divergence / num_tokens, "agreement": agreed / num_tokens, "answer_tokens": num_tokens}
    return found


def distributions(probabilities: Probabilities, example: dict) -> np.ndarray:
    """Return the probabilities (answer tokens, V) with which each token of an example's answer is drawn."""
    places = [place for place, label in enumerate(example["labels"]) if label != IGNORE_INDEX]
    rows = np.maximum(probabilities(example["input_ids"], places), SMALLEST)
    return rows / rows.sum(-1, keepdims=True)


def probabilities_of(checkpoint: str, way: str) -> Probabilities:
    """Load a checkpoint as a way does; return what gives the probabilities (places, V) at some places of a text."""
    import torch

    from sft.chat.load import load_chat
    from sft.chat.model import ChatModel

    if way in DTYPES:
        model = ChatModel.load(checkpoint, "cpu", DTYPES[way]).model

        def of_transformers(ids: list[int], places: list[int]) -> np.ndarray:
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
            return logits[torch.tensor(places) - 1].double().softmax(-1).numpy()

        return of_transformers
    chat = load_chat(checkpoint, quantization=way)
    size = len(chat.encoder.tokenizer)

    def of_llama_cpp(ids: list[int], places: list[int]) -> np.ndarray:
        # A token is forced that is a whole character: beside part of one llama.cpp gives no probabilities.
        asked = {"max_tokens": 1, "temperature": 0, "logprobs": size, "logit_bias": [["a", 1000.0]]}
        rows = np.zeros((len(places), size))
        for row, place in zip(rows, places, strict=True):
            answer = chat.server.handle_completions({"prompt": ids[:place], **asked})
            for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[each["id"]] = np.exp(each["logprob"])
        return rows

    return of_llama_cpp


def merge(rounds: list[dict]) -> dict:
    """Return the rounds of one way as one result, the median of each number, and the rounds' own rates."""
    medians = {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}
    return {**medians, "rates_by_round": [result["tokens_per_second"] for result in rounds]}


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result: all ways, relative to fp32."""
    from benchmarks import measure

    results = saved["results"]
    header = ["way", "tokens/s", "ratio", "first token", "ready after", "peak memory"]
    with_quality = "kl" in results["fp32"]
    rows = []
    for way, result in results.items():
        rate = result["tokens_per_second"]
        cells = [f"{rate:.1f}", f"{rate / results['fp32']['tokens_per_second']:.2f}"]
        cells += [f"{result[name]:.1f} s" for name in ("seconds_to_first_token", "seconds_to_ready")]
        cells += [f"{result['bytes'] / measure.GIB:.2f} GiB"]
        quality = [f"{result['kl']:.2g}", f"{result['agreement']:.2%}"] if "kl" in result else ["", ""]
        rows.append([WAYS[way], *cells, *(quality if with_quality else [])])
    return measure.markdown([*header, *(["KL from fp32", "top-1 as fp32"] if with_quality else [])], rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Compare ways to chat on the CPU: tokens per second, memory, quality.")
    parser.add_argument("--shape", default="bloom-560m", help="the shape of the random model, as random_model has it")
    parser.add_argument("--prompt_tokens", type=int, default=60, help="random tokens before the first new one")
    parser.add_argument("--new_tokens", type=int, default=64, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3, help="how often all ways are measured, in turn")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--checkpoint", help="a trained model, to compare the ways' answers on")
    parser.add_argument("--data", help="rows to compare on, as train_sft.py takes them")
    parser.add_argument("--rows", type=int, default=40, help="how many of them, from the first")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for the JSON")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)  # the process of one way
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # and its model, or its file
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
    from benchmarks import measure

    quality = measure_quality(options) if options.checkpoint else {}
    folder = Path(tempfile.gettempdir(), f"benchmark_{options.shape}")
    save_model(options.shape, folder)
    given = ["--shape", options.shape, "--prompt_tokens", options.prompt_tokens, "--new_tokens", options.new_tokens]
    folders = {way: folder for way in options.ways} | convert_first(folder, options.ways)
    measured: dict[str, list[dict]] = {way: [] for way in options.ways}
    for turn in range(options.rounds):
        for way in options.ways:
            result = measure.run_apart("benchmarks.generation", *given, "--folder", folders[way], "--only", way)
            measured[way].append(result)
            print(f"round {turn + 1}  {way:18}{result['tokens_per_second']:8.1f} tokens/s", flush=True)
    results = {way: merge(rounds) | quality.get(way, {}) for way, rounds in measured.items()}
    written = [*map(str, given), "--rounds", str(options.rounds)]
    if options.checkpoint:
        names = [Path(path).name for path in (options.checkpoint, options.data)]
        written += ["--checkpoint", names[0], "--data", names[1], "--rows", str(options.rows)]
    command = f"python -m benchmarks.generation {' '.join(written)}"
    place = {"command": command, "processor": measure.processor(uses_gpu=False), "versions": measure.versions()}
    result = {**place, "results": results}
    measure.save(options.output, f"generation-{options.shape}-cpu", result, table_of(result))


def convert_first(folder: Path, ways: list[str]) -> dict[str, Path]:
    """Write the GGUF files, which stay in the cache: a second start is what is measured; return those of llama.cpp."""
    from sft.chat.llama_cpp_model import converted

    quantized = {way: way.removeprefix("llama.cpp ") for way in ways if way not in DTYPES}
    files = {way: converted(str(folder), quantization) for way, quantization in quantized.items()}
    return {way: file for way, file in files.items() if way.startswith("llama.cpp")}


if __name__ == "__main__":
    run_program(main)
