"""Rows tokenised a second: this project beside the original's way, on the same rows by as many processes, in one run.

    python -m benchmarks.tokenise --data rows.json --rows 20000 --processes 2 --rounds 2
    python -m benchmarks.tokenise ... --family falcon      with Falcon's own tokenizer

Both read one file of JSON Lines and write Arrow, each in a process of its own, one after the other, and both again in
each round. The rows are spliced from the clauses of --data, so that no text stands twice.
"""

import argparse
import copy
import gzip
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from transformers import PreTrainedTokenizerBase

from benchmarks import measure
from sft import IGNORE_INDEX
from sft.data.cache import tokenised
from sft.data.files import find_shards
from sft.data.formats import Sample, read_all
from sft.model.load import load_tokenizer
from sft.program import ArgumentParser, UserError, run_program
from sft.prompts import build_prompt
from sft.tools.random_model import read_texts, train_tokenizer

FALCON_TOKENIZER = Path(__file__).parent / "falcon_tokenizer"
VOCAB_SIZE = 32_768  # entries of a tokenizer that is trained
CLAUSE = re.compile(r"[^。，！？；：\n]+[。，！？；：\n]*")


def write_rows(path: Path, data: str, number: int, seed: int = 0) -> None:
    """Write so many rows as long as those of `data`, each clause the first half of one of theirs and the second of
    another."""
    rows = [row for shard in find_shards(data, "--data") for row in read_all(shard) if isinstance(row, Sample)]
    if not rows:
        raise UserError(f"--data {data} has no rows; give instruction rows such as those of data_proj/sample")
    clauses = [clause for row in rows for clause in CLAUSE.findall(row.instruction + row.output)]
    generator = random.Random(seed)

    def spliced(length: int) -> str:
        text = ""
        while len(text) < length:
            first, second = generator.choices(clauses, k=2)
            text += first[: generator.randint(1, len(first))] + second[generator.randrange(len(second)) :]
        return text[:length] or "问"

    with path.open("w", encoding="utf-8") as lines:
        for _ in range(number):
            row = generator.choice(rows)
            texts = {"instruction": len(row.instruction), "input": len(row.input), "output": len(row.output)}
            record = {name: spliced(length) if length else "" for name, length in texts.items()}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def save_falcon_tokenizer(folder: Path) -> None:
    """Save Falcon's own tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = (FALCON_TOKENIZER / "tokenizer.json.gz").read_bytes()
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed))
    shutil.copy(FALCON_TOKENIZER / "tokenizer_config.json", folder)


def make_tokenizer(data: str, family: str, vocab_size: int | None, folder: Path) -> None:
    """Save a tokenizer of a family, trained on the rows of `data`; without a size, Falcon's is its own."""
    if family == "falcon" and vocab_size is None:
        save_falcon_tokenizer(folder)
    else:
        train_tokenizer(family, read_texts(data), vocab_size or VOCAB_SIZE).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------- the original's way


def original_way(rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[torch.Tensor]]:
    """Tokenise a batch as chinese_bloom did: one text a call, the prompt alone and once more before its answer."""
    columns = zip(rows["instruction"], rows["input"], rows["output"], strict=True)
    prompts_and_answers = [(build_prompt(instruction, input), output) for instruction, input, output in columns]
    input_ids, labels = [], []
    for prompt, answer in prompts_and_answers:
        whole, asked = (
            tokenizer(
                text, return_tensors="pt", padding="longest", max_length=tokenizer.model_max_length, truncation=True
            ).input_ids[0]
            for text in (prompt + answer + tokenizer.eos_token, prompt)
        )
        input_ids.append(whole)
        labels.append(copy.deepcopy(whole))
        labels[-1][: asked.ne(tokenizer.pad_token_id).sum().item()] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def tokenise_as_the_original(path: Path, tokenizer: PreTrainedTokenizerBase, cache: str, processes: int) -> None:
    """Read, map and write the rows by `datasets`, in batches of its own size."""
    disable_progress_bars()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    rows.map(
        original_way,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=processes if processes > 1 else None,
        remove_columns=rows.column_names,
    )


def measure_way(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds from the file of rows to Arrow."""
    tokenizer = load_tokenizer(str(folder), options.max_length)
    rows = folder / "rows.jsonl"
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        if name == "original":
            tokenise_as_the_original(rows, tokenizer, cache, options.processes)
        else:
            tokenised([rows], tokenizer, cache, options.processes)
        return {"seconds": time.perf_counter() - start}


WAYS = {"original": "one text per call, each prompt twice", "ours": "this project"}


def table_of(result: dict) -> str:
    """Return the Markdown table of a saved result: both ways, relative to the original's."""
    rates = {name: result["rows"] / statistics.mean(each) for name, each in result["seconds"].items()}
    lines = [[title, f"{rates[name]:,.0f}", f"{rates[name] / rates['original']:.2f}"] for name, title in WAYS.items()]
    return measure.markdown(["way", "rows/s", "ratio"], lines)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose what `make_tokenizer` makes."""
    parser.add_argument("--family", choices=("bloom", "falcon"), default="bloom", help="whose tokenizer")
    parser.add_argument(
        "--vocab_size",
        type=int,
        help=f"entries of a tokenizer trained on --data; by default {VOCAB_SIZE:,}, or Falcon's own tokenizer",
    )


def tokenizer_arguments(options: argparse.Namespace) -> list[str]:
    """Return those arguments as given."""
    size = [] if options.vocab_size is None else ["--vocab_size", str(options.vocab_size)]
    return ["--family", options.family, *size]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Compare how fast rows are tokenised.")
    parser.add_argument("--data", required=True, help="rows from whose clauses the measured rows are made")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to tokenise")
    parser.add_argument("--processes", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is measured")
    add_tokenizer_arguments(parser)
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a row at most")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # the process of one way: its name and folder
    return parser.parse_args()


def main() -> None:
    """Measure both ways in every round, and print and save the table."""
    options = parse_arguments()
    if options.only:
        print(json.dumps(measure_way(options.only[0], Path(options.only[1]), options)))
        return
    names = ("data", "rows", "processes", "rounds", "max_length")
    given = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    given += tokenizer_arguments(options)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.jsonl"), options.data, options.rows)
        make_tokenizer(options.data, options.family, options.vocab_size, Path(folder))
        load_tokenizer(folder)
        for turn in range(options.rounds):
            for name in WAYS:
                result = measure.run_apart("benchmarks.tokenise", *given, "--only", name, folder)
                seconds[name].append(result["seconds"])
                print(f"round {turn + 1}  {name:10}{options.rows / result['seconds']:10,.0f} rows/s", flush=True)
    command = f"python -m benchmarks.tokenise {' '.join(given)}".replace(options.data, Path(options.data).name)
    result = {
        "command": command,
        "processor": measure.processor(uses_gpu=False),
        "versions": measure.versions(),
        "rows": options.rows,
        "seconds": seconds,
    }
    measure.save(options.output, f"tokenise-{options.family}-{options.processes}", result, table_of(result))


if __name__ == "__main__":
    run_program(main)
