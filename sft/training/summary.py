"""What a run says of itself: the header before it, the loss curve after it."""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from sft import IGNORE_INDEX
from sft.data.collate import labels_of
from sft.data.sequences import Sequences
from sft.machine import processor
from sft.model.lora import ADAPTER
from sft.training import precision, zero

RECIPE_EXAMPLES = 8  # of a step, in the original


def model_line(config: PretrainedConfig, settings: dict[str, object]) -> str:
    """Return the family, the number of parameters, and the share of them that LoRA trains beside them."""
    line = f"{config.model_type}, {settings['parameters']:,} parameters"
    if not settings["--lora_r"]:
        return line
    trained, bits = settings["trained parameters"], " in 4 bits" if settings["--load_in_4bit"] else ""
    return f"{line}, frozen{bits}; LoRA trains {trained:,} beside them ({trained / settings['parameters']:.2%})"


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


def count_steps(args: TrainingArguments, sequences: Sequences) -> tuple[int, float]:
    """Return how many optimizer steps a run makes, and how many epochs they are; a stream has one."""
    if sequences.num_sequences is None:
        return args.max_steps, 1.0
    batches = math.ceil(sequences.num_sequences / (args.train_batch_size * args.world_size))
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return num_steps, num_steps / steps_per_epoch


def steps_line(args: TrainingArguments, sequences: Sequences) -> str:
    """Return the arithmetic of a run: examples per step, steps, epochs, learning rate."""
    num_steps, num_epochs = count_steps(args, sequences)
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if sequences.num_sequences is None:
        what = "packed rows" if sequences.is_packed else "examples"
        return f"{rows_a_step} {what} a step; {num_steps:,} steps; learning rate {args.learning_rate:g}"
    examples_a_row, packed = sequences.num_samples / sequences.num_sequences, sequences.is_packed
    return (
        f"{'about ' if packed else ''}{rows_a_step * examples_a_row:.0f} examples a step = "
        f"{f'{examples_a_row:.1f} a row x ' if packed else ''}"
        f"{args.train_batch_size} per device x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} {'process' if args.world_size == 1 else 'processes'}; {num_steps:,} steps = "
        f"{num_epochs:g} {'epoch' if num_epochs == 1 else 'epochs'}; "
        f"learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}"
    )


def rate_line(args: TrainingArguments, sequences: Sequences) -> dict[str, str]:
    """Return what the learning rate means where no flag says how many rows a step has; nothing where one does."""
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    is_chosen = args.batch_size_is_open and args.train_batch_size > 1
    if not is_chosen or not sequences.is_packed or sequences.num_sequences is None:
        return {}
    examples *= sequences.num_samples / sequences.num_sequences
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
