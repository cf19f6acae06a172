"""What a run prints before it starts, and the loss curve it leaves behind."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sft import IGNORE_INDEX
from sft.data.collate import labels_of
from sft.data.load import telling_rows
from sft.data.report import DataReport
from sft.data.sequences import Sequences
from sft.data.shards import NUM_NAMED
from sft.machine import processor
from sft.model.lora import ADAPTER
from sft.training.arguments import INITIAL_LOSS_SCALE, TrainingArguments
from sft.training.resume import RunSettings

if TYPE_CHECKING:
    from sft.training.trainer import Trainer

RECIPE_EXAMPLES = 8  # of a step, in the original recipe


def header(trainer: "Trainer", resumed: Path | None, memory: str) -> str:
    """Return what a run is about to do, and one example as the model sees it, a line for each."""
    args, data = trainer.args, trainer.train_dataset
    num_held_out = trainer.eval_dataset.num_samples if trainer.eval_dataset is not None else 0
    lines = {
        "model": model_line(trainer.model.config, trainer.settings),
        "examples": f"{data.samples_line()}, {num_held_out:,} held out",
        "packing": data.sequences_line(),
        "shared": shared_line(args, data),
        "steps": steps_line(args, data),
        "rate": rate_line(args, data),
        "device": device_line(args, trainer.is_lora),
        "memory": memory,
        "output": f"{args.output_dir}, {f'resuming from {resumed}' if resumed else 'a new run'}",
        "example": marked_example(trainer.processing_class, data.first()),
    }
    return "\n".join(f"{name:9}{text}" for name, text in lines.items() if text)


def shared_line(args: TrainingArguments, data: Sequences) -> str:
    """Return how many tokens examples share; nothing if they share none, or if that is not known."""
    if not (part := data.shared_part(args.per_device_train_batch_size)):
        return ""
    return f"{part:.1%} of the tokens, which examples of a batch begin with in common, are computed once for all"


def model_line(config: PretrainedConfig, settings: RunSettings) -> str:
    """Return the family, the number of parameters, and the share of them that LoRA trains beside them."""
    line = f"{config.model_type}, {settings.num_parameters:,} parameters"
    if not settings.is_lora:
        return line
    bits = " in 4 bits" if settings.load_in_4bit else ""
    share = settings.num_trained / settings.num_parameters
    return f"{line}, frozen{bits}; LoRA trains {settings.num_trained:,} beside them ({share:.2%})"


def marked_example(tokenizer: PreTrainedTokenizerBase, example: dict, max_characters: int = 1000) -> str:
    """Return an example as the model sees it, decoded from its ids, with the trained parts between ⟦ and ⟧.

    The middle of a longer text is left out.
    """
    text = ""
    tokens = zip(example["input_ids"], labels_of(example), strict=True)
    for is_trained, run in groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX):
        piece = tokenizer.decode([token_id for token_id, _ in run])
        text += f"⟦{piece}⟧" if is_trained else piece
    left_out = len(text) - max_characters
    if left_out <= 0:
        return text
    half = max_characters // 2
    return f"{text[:half]} ... [{left_out:,} characters] ... {text[-half:]}"


def telling_examples(tokenizer: PreTrainedTokenizerBase, examples: Dataset, report: DataReport) -> Iterator[str]:
    """Yield a line for each of up to three rows of each file, as the model sees them."""
    for file, rows in islice(telling_rows(examples).items(), NUM_NAMED):
        for row in rows:
            example = examples[row]
            text = marked_example(tokenizer, example, max_characters=600)
            yield f"{'example':9}{report.place(file, example['row'])}: {text}"


def steps_line(args: TrainingArguments, data: Sequences) -> str:
    """Return the arithmetic of a run: examples per step, steps, epochs, learning rate."""
    schedule = args.schedule(data.num_sequences)
    if data.num_sequences is None:
        what = "packed sequences" if data.is_packed else "examples"
        return (
            f"{args.sequences_per_step} {what} per step; {schedule.num_steps:,} steps; "
            f"learning rate {args.learning_rate:g}"
        )
    per_sequence = data.num_samples / data.num_sequences
    per_step = f"{args.sequences_per_step * per_sequence:.0f} examples per step = "
    if data.is_packed:
        per_step = f"about {per_step}{per_sequence:.1f} per sequence x "
    processes = "process" if args.world_size == 1 else "processes"
    epochs = "epoch" if schedule.num_epochs == 1 else "epochs"
    return (
        f"{per_step}{args.train_batch_size} per device x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} {processes}; {schedule.num_steps:,} steps = {schedule.num_epochs:g} {epochs}; "
        f"learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}"
    )


def rate_line(args: TrainingArguments, data: Sequences) -> str:
    """Return what the learning rate means where the batch size was chosen here; "" where a flag gives it."""
    if not data.is_packed or not data.num_sequences or not args.chooses_batch_size or args.train_batch_size == 1:
        return ""
    examples = args.sequences_per_step * data.num_samples / data.num_sequences
    as_much = args.learning_rate * math.sqrt(examples / RECIPE_EXAMPLES)
    return (
        f"a step of Adam moves the weights by about {args.learning_rate:g}, however many examples it has; the "
        f"original recipe has {RECIPE_EXAMPLES} per step. For {examples:.0f} the square root rule gives "
        f"--learning_rate {as_much:.2g}; --per_device_train_batch_size 1 makes more and smaller steps, and is slower"
    )


def device_line(args: TrainingArguments, is_lora: bool) -> str:
    """Return where a run computes, and the dtypes of its weights and of its matrix products."""
    own = args.device.type != "cpu" and getattr(torch.get_device_module(args.device), "get_device_name", None)
    name = own(args.device) if own else processor()
    ranks = f"{args.world_size} x " if args.world_size > 1 else ""
    sharing = ", each with the whole model" if ranks else ""
    if args.zero_stage:
        sharing = f", ZeRO-{args.zero_stage}"
    offload = {"none": "", "optimizer": ", optimizer states offloaded", "all": ", all states offloaded"}[args.offload]
    where = f" to {args.offload_dir}" if args.offload_dir else ""
    compiled = ", layers compiled" if args.compile_blocks and not args.activation_checkpointing else ""
    return f"{ranks}{name} ({args.device.type}){sharing}{offload}{where}{compiled}; {precision_line(args, is_lora)}"


def precision_line(args: TrainingArguments, is_lora: bool) -> str:
    """Return the dtypes of a run in words."""
    computed = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[args.compute_dtype]
    held = f"fp32 for what is trained, {computed} for the frozen weights" if is_lora else "fp32 weights"
    scaled = f", the loss scaled by {INITIAL_LOSS_SCALE:,} at first" if args.fp16 else ""
    return f"{held}, computed in {computed}{scaled}"


def saved_in(output_dir: Path, is_lora: bool, merges_lora: bool) -> list[str]:
    """Return the folders that hold a run's result: the model, and LoRA's adapter."""
    if not is_lora:
        return [str(output_dir)]
    return ([f"{output_dir} (merged)"] if merges_lora else []) + [f"{output_dir / ADAPTER} (adapter)"]


def result_line(trainer: "Trainer") -> str:
    """Return the first and the last loss, and where the result is; "" if nothing was logged."""
    if not (logged := losses(trainer.state.log_history)):
        return ""
    folders = " and ".join(saved_in(Path(trainer.args.output_dir), trainer.is_lora, trainer.merges_lora))
    steps = trainer.state.global_step
    return f"loss {logged[0][1]:.4f} -> {logged[-1][1]:.4f} in {steps:,} steps; saved in {folders}"


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
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", ylim=(0, None))
    if path.parent.name.isascii():  # matplotlib's own font has no Chinese characters
        axes.set_title(path.parent.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
