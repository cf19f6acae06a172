"""docs/results.md and the picture of the READMEs, written from benchmarks/results/*.json.

    python -m benchmarks.report

Every table of measurements in the project is made here, and no figure is copied by hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import (
    clients,
    data_size,
    generation,
    gpu,
    measure,
    memory,
    picture,
    plan,
    products,
    shared_prefixes,
    throughput,
    tokenise,
    trim_vocab,
)
from sft.program import ArgumentParser, UserError, run_program

PROJECT = Path(__file__).parent.parent


def demo_table_of(result: dict) -> str:
    """Return the Markdown table of whole runs."""
    header = ["run", "parameters", "rows x epochs", "first loss", "last loss", "result"]
    return measure.markdown(header, result["lines"])


def gpu_table_of(result: dict) -> str:
    """Return the Markdown table of what `benchmarks.gpu` has found."""
    shown = [
        (figure["item"], figure["what"], gpu.text_of({name: figure[name] for name in figure if name not in HEAD}))
        for figure in result["figures"]
    ]
    return measure.markdown(["item", "what", "figures"], shown)


HEAD = ("item", "what")


@dataclass(frozen=True)
class Section:
    """A section of the page: its title, what to know before its tables, and which results it shows."""

    title: str
    about: str
    tables: tuple[tuple[str, Callable[[dict], str]], ...]  # patterns of names in benchmarks/results, and their table


SECTIONS = (
    Section(
        "Fine-tuning: speed",
        "One step is 8 examples, or one packed sequence of 2,048 tokens. `bloom-154m` is BLOOM with 8 layers, hidden "
        "size 512, the full vocabulary of 250,880 entries and random weights, in fp32. The rows are the 1,000 of "
        "`alpaca_zh_demo.json`; "
        "they have 65 tokens each with a tokenizer trained on them, and 177 with one of 4,096 entries (the second "
        "table), where matrix products weigh more. Huge pages are what this project's scripts set. The leak is the "
        "largest error of a logit when two examples share a sequence, relative to the largest logit.",
        (("throughput-*", throughput.table_of),),
    ),
    Section(
        "Fine-tuning: shared prefixes",
        "The same ways with `--share_prefixes False`, before, and with what examples begin with computed once, after; "
        "for Llama, the plain recipe before. The 500 conversations have 1 to 8 replies, each an example of its own. "
        "Tokens are those of the examples, each counted in full. The loss and the optimizer cost the same both ways. "
        "The second table is a forward and backward over one conversation of `bloom-154m`.",
        (("shared-prefixes*", shared_prefixes.table_of),),
    ),
    Section(
        "Fine-tuning: products of matrices",
        "The three products of a linear layer in fp32, by the two libraries that PyTorch brings. MKL takes AVX2 on a "
        "processor that is not Intel's; on one with AVX-512, linear layers are trained with oneDNN here.",
        (("products", products.table_of),),
    ),
    Section(
        "Fine-tuning: memory",
        "Memory of one forward and backward above the loaded model: one example fills the sequence, and half of its "
        "tokens have labels.",
        (("memory-*", memory.table_of),),
    ),
    Section(
        "What fits",
        "The first way that certainly fits, then GiB per GPU / GiB of host memory, for one sequence of 2,048 tokens in "
        'bf16. "plain" is one process without DeepSpeed, "+" is activation checkpointing, "off" is offloading to the '
        "host. There is no release of bloom-13b, but people ask for its shape. The second table compares the plan with "
        "the peak of real runs on a CPU, above a process without a model, at 1,024 tokens per sequence.",
        (("plan", plan.table_of), ("plan-measured-*", plan.measured_table_of)),
    ),
    Section(
        "Tokenising",
        "The first table tokenises rows of 126 tokens with a tokenizer of 32,768 entries. Memory is that of the "
        "largest process, and of all processes together, where what they share counts in each. A second start finds "
        "the rows tokenised and only packs them again. The others compare this project with the original's way, in as "
        "many processes.",
        (("data-size", data_size.table_of), ("tokenise-*", tokenise.table_of)),
    ),
    Section(
        "A smaller vocabulary",
        "bloom-560m with random weights, whole and with a vocabulary of the size that Chinese needs, trained on packed "
        "sequences of 1,024 tokens.",
        (("trim-vocab-*", trim_vocab.table_of),),
    ),
    Section(
        "Generation on a CPU",
        "One stream with random weights and a prompt of 60 tokens, greedily. `--quantize` is llama.cpp within this "
        "project; alone it is llama.cpp's package with nothing beside it. Ready is a process's first answer, of a "
        "checkpoint that has been converted before. The last two columns are the mean KL divergence of the next-token "
        "distributions from those of fp32, in nats, and how often the most likely token is the same: over the answers "
        "of 40 rows by the demo model, which was trained on a third of them.",
        (("generation-*", generation.table_of),),
    ),
    Section(
        "In other programs",
        "How many of 24 greedy answers of up to 40 tokens are those of plain transformers 5.23, token by token. The "
        "models are small, and trained here on the sample rows: a BLOOM, a Falcon built as falcon-7b with Falcon's own "
        "tokenizer, the BLOOM with a vocabulary cut to 2,000 tokens, and a LoRA adapter merged into the BLOOM. 8-bit "
        "weights round, and change what is nearly as likely. llama.cpp's own converter knows a tokenizer by a hash of "
        "its ids, and refuses those that were trained or cut here "
        "([llama.cpp, pull request 6920](https://github.com/ggml-org/llama.cpp/pull/6920)); "
        "`python -m sft.tools.export` does not need to know them.",
        (("clients", clients.table_of),),
    ),
    Section(
        "Whole runs",
        "Random models of the demo's size with vocabularies of 4,096 tokens, in fp32. So the losses show that training "
        "works, not how good BLOOM is. The first loss is that of the first step, the last one the mean of the last "
        "logged steps. These commands make the third row; `falcon-demo` makes the fourth:\n\n```sh\n"
        "python -m sft.tools.random_model --shape bloom-demo --text alpaca_zh_demo.json --output output_dir/base\n"
        "python train_sft.py --model_name_or_path output_dir/base --data_path alpaca_zh_demo.json --output_dir "
        "output_dir/alpaca --num_train_epochs 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 "
        "--learning_rate 1e-3 --save_strategy no\n```",
        (("demo", demo_table_of),),
    ),
    Section("On a GPU", "Every item of `python -m benchmarks.gpu`.", (("gpu-*", gpu_table_of),)),
)

INTRODUCTION = """# Results

Written by `python -m benchmarks.report` from `benchmarks/results/*.json`. Back to the [README](../README.md);
[exactness.md](exactness.md) says how the figures come about and how to measure them yourself.
"""


def read_results(folder: Path) -> dict[str, dict]:
    """Return every saved result by its name; raise UserError if one belongs to no section or there is none."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    patterns = [pattern for section in SECTIONS for pattern, _ in section.tables]
    for name in results:
        if not any(_belongs(name, pattern) for pattern in patterns):
            raise UserError(f"{folder / name}.json belongs to no table; expected a name such as {', '.join(patterns)}")
    if not results:
        raise UserError(f"{folder} has no results; run a benchmark first, such as python -m benchmarks.plan")
    return results


def _belongs(name: str, pattern: str) -> bool:
    return Path(name).match(pattern)


def page_of(results: dict[str, dict]) -> str:
    """Return docs/results.md; sections without results are left out."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        shown = [
            block_of(result, table_of)
            for pattern, table_of in section.tables
            for name, result in results.items()
            if _belongs(name, pattern)
        ]
        if shown:
            parts += [f"## {section.title}\n\n{section.about}\n", *shown]
    return "\n".join(parts)


def block_of(result: dict, table_of: Callable[[dict], str]) -> str:
    """Return the table of one result, with the command, the hardware, the versions and the date that it has."""
    made = "; ".join(result[name] for name in ("processor", "versions", "date") if name in result)
    note = f" {result['note']}" if "note" in result else ""
    return f"`{result['command']}`\n\n{made}.{note}\n\n{table_of(result)}\n"


def main() -> None:
    """Write the page and the pictures."""
    parser = ArgumentParser(description="Write docs/results.md and the pictures of the READMEs from measured results.")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="the folder of JSON results")
    parser.add_argument("--output", type=Path, default=PROJECT, help="the folder whose docs/ and images/ are written")
    options = parser.parse_args()
    results = read_results(options.results)
    files = {"docs/results.md": page_of(results)}
    if picture.RESULT in results:
        files |= {f"images/{name}": svg for name, svg in picture.pictures_of(results[picture.RESULT]).items()}
    for name, text in files.items():
        path = options.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
