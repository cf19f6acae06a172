"""What a run says of itself: what became of its rows, the header before it, the loss curve after it."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from sft import IGNORE_INDEX
from sft.data.load import DataReport, labels_of, lengths_of
from sft.data.packing import PackedDataset, examples_of
from sft.data.shards import NUM_NAMED, size_of
from sft.data.streaming import StreamedRows
from sft.machine import processor
from sft.model.lora import ADAPTER
from sft.training import precision, zero

RECIPE_EXAMPLES = 8  # of a step, in the original
NOTES = "data_report.jsonl"  # in the output folder


def model_line(config: PretrainedConfig, settings: dict[str, object]) -> str:
    """Return the family, the number of parameters, and the share of them that LoRA trains beside them."""
    line = f"{config.model_type}, {settings['parameters']:,} parameters"
    if not settings["--lora_r"]:
        return line
    trained, bits = settings["trained parameters"], " in 4 bits" if settings["--load_in_4bit"] else ""
    return f"{line}, frozen{bits}; LoRA trains {trained:,} beside them ({trained / settings['parameters']:.2%})"


def data_line(report: DataReport | StreamedRows) -> str:
    """Return rows read, kept, cut and refused, and their tokens, as one line."""
    if isinstance(report, StreamedRows):
        return f"{report.num_rows:,} rows read while training, {report.num_refused:,} refused"
    counts = report.counts
    duplicates = f", {len(report.duplicates):,} duplicates" if len(report.duplicates) else ""
    return (
        f"{counts.rows:,} rows read: {report.kept:,} kept ({counts.cut:,} of them cut), {counts.refused:,} refused"
        f"{duplicates}; {report.tokens:,} tokens, {report.labelled_tokens:,} of them trained; "
        f"longest {report.longest:,}"
    )


def print_data(name: str, report: DataReport) -> None:
    """Print what became of the rows, the shapes and encodings they were read in, and the first that were refused."""
    print(f"{name:9}{data_line(report)}")
    files = Counter((file["shape"], file["form"], file["encoding"]) for file in report.counts.files)
    for (shape, form, encoding), number in files.most_common(NUM_NAMED):
        notice = "" if encoding == "utf-8" else f", read as {encoding}, not as UTF-8"
        print(f"{'shape':9}{shape} in {number:,} {'file' if number == 1 else 'files'} ({form}{notice})")
    for entry in report.refused(NUM_NAMED):
        print(f"{'refused':9}{entry['place']}: {entry['note'].removeprefix('refused: ')}")
    if (left := report.counts.refused - NUM_NAMED) > 0:
        print(f"{'refused':9}{left:,} more")


def write_data_report(reports: Iterable[DataReport], path: Path) -> None:
    """Write one JSON line for every row that was refused, cut or a duplicate: its file and line, and why."""
    with path.open("w", encoding="utf-8") as lines:
        for report in reports:
            lines.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in report.entries())


def marked_example(tokenizer: PreTrainedTokenizerBase, example: dict, max_characters: int = 1000) -> str:
    """Return an example as the model sees it, decoded from its ids, the trained parts between ⟦ and ⟧.

    Of a longer text the middle is left out.
    """
    text = ""
    tokens = zip(example["input_ids"], labels_of(example), strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX):
        piece = tokenizer.decode([token_id for token_id, _ in run])
        text += f"⟦{piece}⟧" if trained else piece
    left_out = len(text) - max_characters
    if left_out <= 0:
        return text
    half = max_characters // 2
    return f"{text[:half]} ... [{left_out:,} characters] ... {text[-half:]}"


def count_steps(args: TrainingArguments, rows: Sequence | StreamedRows) -> tuple[int, float]:
    """Return how many optimizer steps a run makes, and how many epochs they are; a stream has one."""
    if isinstance(rows, StreamedRows):
        return args.max_steps, 1.0
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return num_steps, num_steps / steps_per_epoch


def longest_row(args: TrainingArguments, rows: Sequence | StreamedRows) -> int:
    """Return the tokens of the longest flat row that training may make; of a stream, one row's limit."""
    if isinstance(rows, StreamedRows):
        return args.model_max_length * (args.per_device_train_batch_size if rows.packing else 1)
    if isinstance(rows, PackedDataset):
        return args.model_max_length * min(args.per_device_train_batch_size, len(rows))
    return int(np.sort(lengths_of(rows))[-args.per_device_train_batch_size :].sum())


def examples_line(rows: Sequence | StreamedRows) -> str:
    """Return how many rows of the data are trained on."""
    if isinstance(rows, StreamedRows):
        num_bytes = sum(map(size_of, rows.files))
        return f"streamed from {len(rows.files):,} files of {gib(num_bytes)}"
    return f"{len(examples_of(rows)):,} trained on"


def rows_line(rows: Sequence | StreamedRows, max_length: int) -> str:
    """Return how examples share the rows that the model trains on."""
    if isinstance(rows, StreamedRows) and rows.packing:
        return f"packed of up to {max_length:,} tokens while training"
    if not isinstance(rows, PackedDataset):
        return "each batch of examples is one row, end to end, without padding"
    return (
        f"{len(rows):,} packed of up to {max_length:,} tokens, {rows.fill_rate:.1%} full, "
        f"{len(rows.examples) / len(rows):.1f} examples each"
    )


def steps_line(args: TrainingArguments, rows: Sequence | StreamedRows) -> str:
    """Return the arithmetic of a run: examples per step, steps, epochs, learning rate."""
    num_steps, num_epochs = count_steps(args, rows)
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(rows, StreamedRows):
        what = "packed rows" if rows.packing else "examples"
        return f"{rows_a_step} {what} a step; {num_steps:,} steps; learning rate {args.learning_rate:g}"
    examples_a_row = len(examples_of(rows)) / len(rows)
    packed = isinstance(rows, PackedDataset)
    return (
        f"{'about ' if packed else ''}{rows_a_step * examples_a_row:.0f} examples a step = "
        f"{f'{examples_a_row:.1f} a row x ' if packed else ''}"
        f"{args.train_batch_size} per device x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} {'process' if args.world_size == 1 else 'processes'}; {num_steps:,} steps = "
        f"{num_epochs:g} {'epoch' if num_epochs == 1 else 'epochs'}; "
        f"learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}"
    )


def rate_line(args: TrainingArguments, rows: Sequence | StreamedRows) -> dict[str, str]:
    """Return what the learning rate means where no flag says how many rows a step has; nothing where one does."""
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if not isinstance(rows, PackedDataset) or not args.batch_size_is_open or args.train_batch_size == 1:
        return {}
    examples *= len(rows.examples) / len(rows)
    as_much = args.learning_rate * math.sqrt(examples / RECIPE_EXAMPLES)
    return {
        "rate": f"at {args.learning_rate:g} Adam moves the weights about as far in a step of any size; the original's "
        f"steps had {RECIPE_EXAMPLES} examples. For {examples:.0f} the square root rule gives --learning_rate "
        f"{as_much:.2g}; --per_device_train_batch_size 1 makes more steps, of fewer examples, and is slower"
    }


def device_line(args: TrainingArguments, is_lora: bool) -> str:
    """Return where a run computes, and the dtypes of its weights and of its products."""
    own = args.device.type != "cpu" and getattr(torch.get_device_module(args.device), "get_device_name", None)
    name = own(args.device) if own else processor()
    ranks = f"{args.world_size} x " if args.world_size > 1 else ""
    sharing = f", ZeRO-{stage}" if (stage := zero.stage_of(args)) else ", each with the whole model" if ranks else ""
    offload = {"none": "", "optimizer": ", optimizer states offloaded", "all": ", all states offloaded"}[args.offload]
    where = f" to {args.offload_dir}" if args.offload_dir else ""
    compiled = ", layers compiled" if args.compile_blocks and not args.activation_checkpointing else ""
    return f"{ranks}{name} ({args.device.type}){sharing}{offload}{where}{compiled}; {precision.line(args, is_lora)}"


def gib(num_bytes: float) -> str:
    """Return a size in GiB, or in MiB below a tenth of one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def saved_in(output_dir: Path, is_lora: bool, merges_lora: bool) -> list[str]:
    """Return the folders that a run's result is in: of the model, and of LoRA's adapter."""
    if not is_lora:
        return [str(output_dir)]
    return ([f"{output_dir} (merged)"] if merges_lora else []) + [f"{output_dir / ADAPTER} (adapter)"]


def losses(log_history: Sequence[dict], name: str = "loss") -> list[tuple[int, float]]:
    """Return (step, value) of every logged value of `name`, nats per labelled token for the losses."""
    return [(entry["step"], entry[name]) for entry in log_history if name in entry]


def plot_losses(log_history: Sequence[dict], path: Path) -> None:
    """Draw the training loss, and the eval loss if there is one, over the steps, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")  # a server has no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        if points := losses(log_history, name):
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None), title=path.parent.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
