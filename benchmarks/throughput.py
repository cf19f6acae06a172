"""Tokens per second and peak memory of fine-tuning: this project, the plain recipe, and TRL, in one run.

    python -m benchmarks.throughput --shape bloom-154m --data rows.json --rounds 2

Every way trains the same randomly initialised model on the same rows with the same optimizer and Trainer, each in a
process of its own, one after the other, and all of them again in each round. TRL is in benchmarks/requirements.txt.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks import measure
from sft import IGNORE_INDEX
from sft.data.collate import flatten, labels_of
from sft.data.files import find_shards
from sft.data.load import load_examples
from sft.data.packing import PackedSequences
from sft.model import patch
from sft.model.load import load_tokenizer
from sft.program import ArgumentParser, UserError, run_program
from sft.tools.random_model import SHAPES, build_model, read_texts, train_tokenizer

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # as base_run.sh and ds_all.sh set it
MOST_WARMUP = 20  # steps more, where kernels are still being compiled


@dataclass(frozen=True)
class Way:
    """One way to train."""

    title: str
    batch: tuple[int, int]  # rows, or packed sequences, a forward, and forwards a step
    packed: bool = False
    ours: bool = False
    shares: bool = False
    trl: bool = False
    environment: tuple = ()


OURS = {"ours": True, "environment": tuple(HUGE_PAGES.items())}
WAYS = {
    "plain": Way("plain recipe: one example per forward, 8 accumulated", (1, 8)),
    "plain-huge-pages": Way("the same with huge pages", (1, 8), environment=tuple(HUGE_PAGES.items())),
    "padded": Way("plain, padded to batches of 8", (8, 1)),
    "trl-padded": Way("TRL SFTTrainer, padded to batches of 8", (8, 1), trl=True),
    "ours-apart": Way("`--packing False --share_prefixes False`: 8 examples per batch", (8, 1), **OURS),
    "ours": Way("`--packing False`", (8, 1), shares=True, **OURS),
    "plain-packed": Way("plain forward over a packed sequence", (1, 1), packed=True),
    "trl-packed": Way("TRL SFTTrainer, packed", (1, 1), packed=True, trl=True),
    "ours-packed-apart": Way("`--packing True --share_prefixes False`", (1, 1), packed=True, **OURS),
    "ours-packed": Way("`--packing True`", (1, 1), packed=True, shares=True, **OURS),
}


class Meter(TrainerCallback):
    """Counts real tokens and labels of each step, and the seconds from step to step, once the warm-up is over.

    The warm-up goes on while kernels are still compiled. Counts stay on the device until they are asked for: to read
    one would make the host wait.
    """

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.steps, self.first_step = warmup, steps, None
        self.num_compilations, self.seconds = 0, 0.0
        self.loss, self.losses, self.counts = 0.0, [], {}

    def count(self, inputs: dict) -> None:
        """Add a batch: its examples' tokens, those computed, its labels, and the sum of its examples' squared lengths.

        Without padding; where examples share tokens, those computed and the squares are fewer.
        """
        labels, positions, mask = (inputs.get(name) for name in ("labels", "position_ids", "attention_mask"))
        computed = inputs["input_ids"].numel() if mask is None else mask.sum()
        counts = {"tokens": inputs.get("num_tokens", computed), "computed": computed, "squares": 0}
        counts["labels"] = labels.numel() if "label_positions" in inputs else (labels[:, 1:] != IGNORE_INDEX).sum()
        if positions is not None:
            counts["squares"] = (2 * positions + 1).sum()  # n * n for an example of n tokens: the sum of odd numbers
        elif mask is not None:
            counts["squares"] = mask.sum(1).square().sum()
        self.counts = {name: self.counts.get(name, 0) + number for name, number in counts.items()}

    def on_step_end(self, args, state, control, **unused):
        """Start the clock after a step that compiles nothing, and stop it, and the run, so many steps later."""
        self.losses.append(self.loss)
        self.loss, compiled = 0.0, measure.num_compilations()
        is_warm = state.global_step >= self.warmup and compiled == self.num_compilations
        self.num_compilations = compiled
        if self.first_step is None and (is_warm or state.global_step >= self.warmup + MOST_WARMUP):
            self.first_step, self.counts = state.global_step, {}
            measure.wait_for_gpu()
            self.start = time.perf_counter()
        elif self.first_step is not None and state.global_step == self.first_step + self.steps:
            measure.wait_for_gpu()
            self.seconds = time.perf_counter() - self.start
            control.should_training_stop = True

    def results(self) -> dict:
        """Return the counts and the seconds of the measured steps, and the loss of every step."""
        counts = {name: int(number) for name, number in self.counts.items()}
        return {**counts, "seconds": self.seconds, "losses": [float(loss) for loss in self.losses]}


def make_tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Return the tokenizer that is given, or one of the shape's family, trained on the rows and kept for later."""
    if options.tokenizer:
        return load_tokenizer(options.tokenizer, options.max_length)
    family, vocab_size = SHAPES[options.shape].model_type, options.vocab_size or SHAPES[options.shape].vocab_size
    rows = hashlib.sha256("".join(read_texts(options.data)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"benchmark_{family}_{vocab_size}_{rows}")
    if not folder.exists():
        train_tokenizer(family, read_texts(options.data), vocab_size).save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder), options.max_length)
    tokenizer.padding_side = "right"
    return tokenizer


def one_reply_a_row(rows: dict[str, list]) -> dict[str, list]:
    """Return the examples of some rows each alone, as all ways can train on them, with the labels that others need."""
    columns = {"input_ids": [], "lengths": [], "length": [], "labels": []}
    for input_ids, lengths in zip(rows["input_ids"], rows["lengths"], strict=True):
        start = 0
        for prompt, answer in zip(lengths[::2], lengths[1::2], strict=True):
            row = {"input_ids": input_ids[start : start + prompt + answer], "lengths": [prompt, answer]}
            row |= {"length": prompt + answer, "labels": labels_of(row)}
            for name, column in columns.items():
                column.append(row[name])
            start += prompt + answer
    return columns


def trainer_settings(way: Way, options: argparse.Namespace) -> dict[str, object]:
    """Return the Trainer's arguments of a way to train; all have the same optimizer and learning rate."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": options.warmup + MOST_WARMUP + options.steps,
        "per_device_train_batch_size": options.rows if way.packed else min(way.batch[0], options.batch),
        "gradient_accumulation_steps": way.batch[1],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": options.checkpointing,
        "torch_compile": options.torch_compile and way.ours,
        "train_sampling_strategy": "random" if way.packed else "sequential",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def make_trainer(
    way: Way, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> Trainer:
    """Return the Trainer of a way to train; all have the same order of rows."""
    rows, _ = load_examples(options.data, tokenizer)
    examples = rows.map(one_reply_a_row, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
    settings = trainer_settings(way, options)
    if way.trl:
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**settings, packing=way.packed, max_length=options.max_length)
        rows = examples.select_columns(["input_ids", "labels"])
        return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)
    if way.ours:
        patch.install(model)
    if way.ours and options.compile_blocks:
        patch.compile_blocks(model)
    collate = partial(flatten, share_prefixes=way.shares) if way.ours else join if way.packed else pad
    arguments = TrainingArguments(**settings, remove_unused_columns=False)
    if way.packed:
        data = PackedSequences(rows, options.max_length, shares_prefixes=way.shares)
    else:
        data = rows if way.ours else examples.select_columns(["input_ids", "labels"])
    trainer = Trainer(model=model, args=arguments, data_collator=collate, train_dataset=data)
    trainer._loss_shifts_labels = not way.ours
    return trainer


def join(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Return sequences end to end as transformers' own forward takes them: the labels of all tokens, unshifted."""
    batch = {name: flatten(rows)[name] for name in ("input_ids", "position_ids")}
    return {**batch, "labels": torch.tensor([[label for row in rows for label in labels_of(row)]])}


def counted(training_step: Callable, meter: Meter) -> Callable:
    """Return a Trainer's training step that shows each batch and its loss to the meter."""

    def step(model, inputs, *args, **kwargs):
        meter.count(inputs)
        loss = training_step(model, inputs, *args, **kwargs)
        meter.loss += loss
        return loss

    return step


def metered(trainer: Trainer, options: argparse.Namespace) -> dict:
    """Train; return counts and seconds of the measured steps, the loss of every step, and peak memory in bytes."""
    meter = Meter(options.warmup, options.steps)
    trainer.add_callback(meter)
    trainer.training_step = counted(trainer.training_step, meter)
    measure.reset_peak_memory()
    trainer.train()
    return {**meter.results(), "peak_bytes": measure.memory()}


def measure_way(name: str, options: argparse.Namespace) -> dict:
    """Train one way in this process; return its counts, seconds, losses, and peak memory in bytes."""
    way = WAYS[name]
    tokenizer = make_tokenizer(options)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = build_model(options.shape)
    leak = patch.measure_leak(model).packed if way.packed and not way.ours else None
    set_seed(0)
    trainer = make_trainer(way, model, tokenizer, options)
    if way.packed and way.ours:
        leak = max(patch.measure_leak(model))
    return {**metered(trainer, options), "leak": leak}


def model_flops(shape: str, result: dict) -> float:
    """Return the floating-point operations of a result's tokens, forward and backward, nothing computed twice.

    6 for each weight of the layers and each token, 6 for each weight of the head and each label, and for attention
    12 * layers * hidden size for each pair of a token and one it sees, which are half the squares of the lengths.
    """
    config = SHAPES[shape]
    with torch.device("meta"):
        num_parameters = build_model(shape).num_parameters()
    head = config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers * config.hidden_size
    by_token = (num_parameters - head) * result["computed"]
    return 6 * (by_token + head * result["labels"] + layers * result["squares"])


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result: all ways, relative to the plain recipe."""
    results, peak = saved["results"], saved.get("peak_flops")
    header = ["way", "tokens/s", "labels/s", "ratio", "peak memory", "last loss", "leak: logits off by"]
    first = results["plain"]["tokens"] / results["plain"]["seconds"] if "plain" in results else None
    rows = []
    for name, result in results.items():
        rate = result["tokens"] / result["seconds"]
        rows.append(
            [
                WAYS[name].title,
                f"{rate:,.0f}",
                f"{result['labels'] / result['seconds']:,.0f}",
                f"{rate / first:.2f}" if first else "",
                f"{result['peak_bytes'] / measure.GIB:.2f} GiB",
                f"{result['losses'][-1]:.4f}",
                "" if result["leak"] is None else f"{result['leak']:.1g}",
                *([f"{model_flops(saved['shape'], result) / result['seconds'] / peak:.1%}"] if peak else []),
            ]
        )
    return measure.markdown([*header, *(["model FLOPs used"] if peak else [])], rows)


def merge(rounds: Sequence[dict]) -> dict:
    """Return the rounds of one way as one result: sums of tokens and seconds, the largest peak."""
    names = ("tokens", "computed", "labels", "squares", "seconds")
    sums = {name: sum(result[name] for result in rounds) for name in names}
    return {
        **rounds[0],
        **sums,
        "peak_bytes": max(result["peak_bytes"] for result in rounds),
        "seconds_by_round": [result["seconds"] for result in rounds],
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Compare ways to fine-tune: tokens per second and peak memory.")
    parser.add_argument("--shape", default="bloom-154m", choices=SHAPES)
    parser.add_argument("--data", required=True, help="instruction rows, as train_sft.py takes them")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each way and round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, not measured")
    parser.add_argument("--rounds", type=int, default=1, help="how often all ways are measured, in turn")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a packed sequence")
    parser.add_argument("--rows", type=int, default=1, help="packed sequences per step")
    parser.add_argument("--batch", type=int, default=8, help="most rows per step where they are not packed")
    parser.add_argument("--compile_blocks", action="store_true", help="compile the layers of this project's ways")
    parser.add_argument("--torch_compile", action="store_true", help="compile the whole model of this project's ways")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, for all ways")
    parser.add_argument("--vocab_size", type=int, help="entries of the trained tokenizer; by default the shape's")
    parser.add_argument("--tokenizer", help="a tokenizer's folder; by default one is trained on the rows")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)  # the process of one way
    return parser.parse_args()


def main() -> None:
    """Measure every way in every round, and print and save the table."""
    options = parse_arguments()
    if options.only:
        print(json.dumps(measure_way(options.only, options)))
        return
    find_shards(options.data, "--data")
    if any(WAYS[name].trl for name in options.ways) and not find_spec("trl"):
        raise UserError("TRL is not installed; pip install -r benchmarks/requirements.txt, or type --ways plain ours")
    given = ["--shape", options.shape, "--data", options.data, "--steps", options.steps, "--warmup", options.warmup]
    given += ["--max_length", options.max_length, "--rows", options.rows]
    given += ["--batch", options.batch] if options.batch != 8 else []
    given += [f"--{name}" for name in ("checkpointing", "compile_blocks", "torch_compile") if getattr(options, name)]
    for name in ("vocab_size", "tokenizer"):
        given += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    measured: dict[str, list[dict]] = {name: [] for name in options.ways}
    for turn in range(options.rounds):
        for name in options.ways:
            result = measure.run_apart("benchmarks.throughput", *given, "--only", name, **dict(WAYS[name].environment))
            measured[name].append(result)
            rate = result["tokens"] / result["seconds"]
            print(f"round {turn + 1}  {name:18}{rate:10,.1f} tokens/s  loss {result['losses'][-1]:.4f}", flush=True)
    results = {name: merge(rounds) for name, rounds in measured.items()}
    written = [*map(str, given), "--rounds", str(options.rounds)]
    command = f"python -m benchmarks.throughput {' '.join(written)}".replace(options.data, Path(options.data).name)
    place = {
        "command": command,
        "shape": options.shape,
        "peak_flops": measure.peak_flops(),
        "processor": measure.processor(uses_gpu=torch.cuda.is_available()),
        "versions": measure.versions(),
    }
    name = f"throughput-{options.shape}-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    result = {**place, "results": results}
    measure.save(options.output, name, result, table_of(result))


if __name__ == "__main__":
    run_program(main)
