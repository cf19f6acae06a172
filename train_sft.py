"""Fine-tune BLOOM, Falcon or another causal language model on instruction rows, all weights, loss on the answers only.

    python train_sft.py --model_name_or_path bigscience/bloom-560m --data_path data_proj/opendata \\
        --output_dir output_dir/bloom-560m [any flag of transformers.TrainingArguments]

Running the same command again goes on from the newest complete checkpoint in --output_dir.
Derived from Stanford Alpaca's train.py by way of chinese_bloom (see README.md); Apache-2.0.
"""

import difflib
from functools import partial
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sft.data.collate import flatten
from sft.data.encode import Encoder, check_length
from sft.data.load import hold_out, load_examples
from sft.data.packing import PackedSequences
from sft.data.report import NOTES, DataReport, print_data, write_data_report
from sft.data.sequences import SampleSequences, Sequences
from sft.data.shards import find_shards
from sft.data.streaming import StreamedSequences
from sft.model import lora, patch
from sft.model.load import load_config, load_model, load_tokenizer, locate
from sft.model.lora import LoraArguments
from sft.plan import plan
from sft.plan.plan import PlanArguments
from sft.program import OneLineErrors, OneRankError, UserError, one_line, run_program
from sft.training import arguments, disk, precision, resume, summary, zero
from sft.training.arguments import DataArguments, ModelArguments, TrainingArguments
from sft.training.model_card import model_card
from sft.training.trainer import Trainer

# ---------------------------------------------------------------------------------------------------------- arguments


# Flags of Alpaca-style commands that transformers has since renamed.
RENAMED_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps with the ratio, such as 0.03",
}


class Parser(OneLineErrors, HfArgumentParser):
    """A parser of dataclasses with errors of one line."""


def parse_arguments() -> tuple[ModelArguments, DataArguments, LoraArguments, PlanArguments, TrainingArguments]:
    """Read the command line; raise UserError on a flag or value that does not fit."""
    dataclasses = (ModelArguments, DataArguments, LoraArguments, PlanArguments, TrainingArguments)
    parser = Parser(dataclasses, allow_abbrev=False)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    except (ValueError, OSError) as error:
        raise UserError(f"the flags do not fit together: {one_line(error)}") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        close = [RENAMED_FLAGS[flag]] if flag in RENAMED_FLAGS else difflib.get_close_matches(flag, known, 1, 0.75)
        raise UserError(f"unknown flag {flag}; {f'type {close[0]}' if close else '--help lists every flag'}")
    return tuple(parsed)


# -------------------------------------------------------------------------------------------------------------- model


def make_model(
    location: str,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | PeftModel:
    """Load the model for flat rows, all that is trained in fp32; autocast or DeepSpeed computes in less."""
    if training_args.deepspeed:
        # ZeRO-3 splits the weights while they are read, so the ranks must know of each other by now.
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if training_args.use_cpu else "nccl")
    dtype, quantization = lora.weights_dtype(lora_args, training_args), lora.quantization(lora_args, training_args)
    model = load_model(location, dtype, training_args.cache_dir, quantization)
    special_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(special_tokens)
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id, **special_tokens)
    patch.install(model)
    if training_args.compile_blocks and not training_args.activation_checkpointing:
        patch.compile_blocks(model)
    return lora.add(model, lora_args, model_args.model_name_or_path, training_args.seed) if lora_args.lora_r else model


# ---------------------------------------------------------------------------------------------------------------- data


def make_data(
    data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequences, SampleSequences | None, dict[str, DataReport]]:
    """Return the rows to train on, the examples held out (None without any), and a report on each file or folder."""
    load = partial(
        load_examples,
        tokenizer=tokenizer,
        cache_dir=training_args.cache_dir,
        dedup=data_args.dedup,
        num_workers=data_args.preprocessing_num_workers,
    )
    reports, train_dataset, eval_dataset = {}, None, None
    if not data_args.streaming:
        train_dataset, reports["data"] = load(data_args.data_path)
    if data_args.eval_data_path:
        eval_dataset, reports["held out"] = load(data_args.eval_data_path, flag="--eval_data_path")
    tell_of_data(data_args, training_args, reports)
    if data_args.streaming:
        train_sequences = stream_rows(data_args, training_args, tokenizer)
    else:
        if data_args.eval_fraction and not data_args.eval_data_path:
            train_dataset, eval_dataset = hold_out(train_dataset, data_args.eval_fraction, training_args.seed)
        packed = partial(PackedSequences, max_length=training_args.model_max_length, seed=training_args.seed)
        train_sequences = (packed if data_args.packing else SampleSequences)(train_dataset)
    if eval_dataset is None:
        return train_sequences, None, reports
    if training_args.eval_strategy == "no":
        training_args.eval_strategy = transformers.IntervalStrategy.EPOCH
    return train_sequences, SampleSequences(eval_dataset), reports


def tell_of_data(data_args: DataArguments, training_args: TrainingArguments, reports: dict[str, DataReport]) -> None:
    """Print and write what became of the rows; raise UserError if too many are refused, or none is left."""
    notes = Path(training_args.output_dir, NOTES)
    if training_args.process_index == 0:
        try:
            write_data_report(reports.values(), notes)
        except OSError as error:
            raise OneRankError(
                f"{notes} cannot be written: {one_line(error)}; free the disk, or give another --output_dir"
            ) from None
        for name, data_report in reports.items():
            print_data(name, data_report)
    paths = {"data": ("--data_path", data_args.data_path), "held out": ("--eval_data_path", data_args.eval_data_path)}
    for name, data_report in reports.items():
        if wrong := data_report.what_is_wrong(data_args.max_bad_fraction):
            raise UserError(f"{' '.join(paths[name])} {wrong}; {notes} lists what was refused")


def stream_rows(
    data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> StreamedSequences:
    """Return this rank's rows, read while it trains on them."""
    check_length(tokenizer)
    return StreamedSequences(
        files=find_shards(data_args.data_path),
        encoder=Encoder(tokenizer),
        notes=Path(training_args.output_dir, NOTES),
        max_bad_fraction=data_args.max_bad_fraction,
        is_packed=data_args.packing,
        shuffle=training_args.train_sampling_strategy == "random",
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        rank=training_args.process_index,
        world_size=training_args.world_size,
    )


def examples_share_rows(
    data_args: DataArguments, training_args: TrainingArguments, reports: dict[str, DataReport]
) -> bool:
    """Tell whether a flat row may hold more than one example."""
    is_evaluated = data_args.eval_data_path or data_args.eval_fraction
    batch_size = max(training_args.train_batch_size, training_args.eval_batch_size if is_evaluated else 1)
    have_turns = data_args.streaming or any(data_report.counts.conversations for data_report in reports.values())
    return data_args.packing or batch_size > 1 or have_turns


# ------------------------------------------------------------------------------------------------------------- the run


def prepare_run(
    training_args: TrainingArguments, lora_args: LoraArguments, config: PretrainedConfig, sequences: Sequences
) -> tuple[dict, Path | None]:
    """Return the run's settings, kept with its checkpoints, and the checkpoint that it goes on from, if any.

    Raises UserError if that one was made with others, or the disk has no room for those to come.
    """
    disk.check_shared(training_args)
    stage, (num_steps, num_epochs) = zero.stage_of(training_args), summary.count_steps(training_args, sequences)
    model_settings = lora.settings_of(lora_args, config)
    settings = resume.settings_of(training_args, sequences, stage, model_settings)
    resumed = resume.find(training_args, settings, num_steps)
    in_16_bits, num_trained = training_args.bf16 or training_args.fp16, model_settings["trained parameters"]
    num_bytes = disk.checkpoint_bytes(num_trained, stage, in_16_bits, training_args.save_only_model)
    merged_bytes = lora.merged_bytes(lora_args, training_args, model_settings["parameters"])
    disk.check_room(training_args, num_steps, num_epochs, num_bytes, merged_bytes)
    return settings, resumed


def print_header(trainer: Trainer, resumed: Path | None, memory: str) -> None:
    """Print what this run is about to do, and one example as the model sees it."""
    args, model = trainer.args, trainer.model
    num_held_out = len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0
    lines = {
        "model": summary.model_line(model.config, trainer.settings),
        "examples": f"{trainer.train_dataset.samples_line()}, {num_held_out:,} held out",
        "rows": trainer.train_dataset.sequences_line(),
        "steps": summary.steps_line(args, trainer.train_dataset),
        **summary.rate_line(args, trainer.train_dataset),
        "device": summary.device_line(args, trainer.is_lora),
        "memory": memory,
        "output": f"{args.output_dir}, " + (f"going on from {resumed}" if resumed else "a new run"),
        "example": summary.marked_example(trainer.processing_class, trainer.train_dataset.first()),
    }
    for name, text in lines.items():
        print(f"{name:9}{text}", flush=True)


def describe(trainer: Trainer, base: str, data_path: str, data: DataReport | StreamedSequences) -> None:
    """Write the loss curve and the model card beside the saved model."""
    output_dir, history = Path(trainer.args.output_dir), trainer.state.log_history
    summary.plot_losses(history, output_dir / "loss_curve.png")
    card = model_card(base, data_path, data, trainer)
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    if logged := summary.losses(history):
        steps = trainer.state.global_step
        saved = " and ".join(summary.saved_in(output_dir, trainer.is_lora, trainer.merges_lora))
        print(f"loss {logged[0][1]:.4f} -> {logged[-1][1]:.4f} in {steps:,} steps; saved in {saved}")


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Fine-tune as the command line says."""
    model_args, data_args, lora_args, plan_args, training_args = parse_arguments()
    arguments.check(model_args, data_args, plan_args, training_args)
    precision.check_optimizer(training_args)
    lora.check(lora_args, training_args)
    with disk.claimed(training_args):
        location = locate(model_args.model_name_or_path, training_args.cache_dir)
        config = load_config(location, training_args.cache_dir)
        paths = (model_args.model_name_or_path, data_args.data_path, training_args.output_dir)
        run = plan.Run(training_args, lora_args, plan_args, config, *paths)
        if plan_args.plan:
            print(plan.show(run))
            return
        if data_args.packing and training_args.batch_size_is_open:
            plan.choose_batch_size(run)
        tokenizer = load_tokenizer(location, training_args.model_max_length, training_args.cache_dir)
        train_dataset, eval_dataset, reports = make_data(data_args, training_args, tokenizer)
        if data_args.check_data:
            return
        memory = plan.prepare(run, train_dataset.longest_batch(training_args.per_device_train_batch_size))
        settings, resumed = prepare_run(training_args, lora_args, config, train_dataset)
        training_args.eval_on_start = eval_dataset is not None and resumed is None  # the model card says both losses
        zero.size_buffers(training_args, config)
        model = make_model(location, model_args, lora_args, training_args, tokenizer)
        trainer = Trainer(
            model=model,
            args=training_args,
            data_collator=flatten,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            settings=settings,
            examples_share_rows=examples_share_rows(data_args, training_args, reports),
            merges_lora=lora_args.merge_lora,
        )
        if trainer.is_world_process_zero():
            print_header(trainer, resumed, memory)
        trainer.train_to_the_end(resumed, summary.count_steps(training_args, train_dataset)[0])
        trainer.save_result()
        if trainer.is_world_process_zero():
            describe(trainer, model_args.model_name_or_path, data_args.data_path, reports.get("data", train_dataset))
    # A process group still open at exit can abort a rank whose work is done.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
