"""Fine-tune BLOOM, Falcon or another causal language model on instructions, with the loss on the answers only.

    python train_sft.py --model_name_or_path bigscience/bloom-560m --data_path data_proj/opendata \\
        --output_dir output_dir/bloom-560m [any flag of transformers.TrainingArguments]

Run the same command again to resume from the newest complete checkpoint in --output_dir.
Derived from Stanford Alpaca's train.py by way of chinese_bloom (see README.md); Apache-2.0.
"""

import sys
from functools import partial
from pathlib import Path

from sft.program import OneLineErrors, OneRankError, UserError, one_line, run_program

# isort: split
import torch
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
from sft.data.files import find_shards, skipped_in
from sft.data.load import hold_out, load_examples
from sft.data.packing import PackedSequences
from sft.data.report import NOTES, DataReport, print_data, write_data_report
from sft.data.sequences import SampleSequences, Sequences
from sft.data.streaming import StreamedSequences
from sft.model import lora, neftune, patch, quantized
from sft.model.download import locate
from sft.model.load import check_ids, load_config, load_model, load_tokenizer
from sft.plan import plan
from sft.training import arguments, disk, optimization, other_names, ownership, resume, summary, zero
from sft.training.arguments import DataArguments, ModelArguments, PlanArguments, TrainingArguments
from sft.training.model_card import model_card
from sft.training.trainer import Trainer

# ---------------------------------------------------------------------------------------------------------- arguments


class Parser(OneLineErrors, HfArgumentParser):
    """A parser of dataclasses with errors of one line."""


def parse_arguments() -> tuple[ModelArguments, DataArguments, PlanArguments, TrainingArguments]:
    """Read the command line; raise UserError on a flag or value that does not fit."""
    parser = Parser((ModelArguments, DataArguments, PlanArguments, TrainingArguments), allow_abbrev=False)
    other_names.check(sys.argv[1:], parser._option_string_actions)
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise UserError(f"{unknown[0]} belongs to no flag; put a value with spaces in quotes, or leave it out")
    return tuple(parsed)


# -------------------------------------------------------------------------------------------------------------- model


def make_model(
    location: str,
    config: PretrainedConfig,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | PeftModel:
    """Load the model for flat batches; weights that are trained are fp32, autocast or DeepSpeed computes in less."""
    if training_args.deepspeed:
        # ZeRO-3 splits the weights while they are read, so the ranks must know of each other by now.
        import deepspeed

        zero.check_launched()
        deepspeed.init_distributed(dist_backend="gloo" if training_args.use_cpu else "nccl")
        zero.size_buffers(training_args.hf_deepspeed_config.config, config, training_args.world_size)
    lora_config = model_args.lora_config
    dtype = training_args.compute_dtype if lora_config else torch.float32
    in_4_bits = lora.quantization(training_args.compute_dtype) if model_args.load_in_4bit else None
    model = load_model(location, dtype, training_args.cache_dir, in_4_bits)
    special_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(special_tokens)
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id, **special_tokens)
    patch.install(model)
    if training_args.neftune_noise_alpha:
        neftune.install(model, training_args.neftune_noise_alpha)
    if training_args.compile_blocks and not training_args.activation_checkpointing:
        patch.compile_blocks(model)
    if lora_config:
        return lora.add(model, lora_config, model_args.model_name_or_path, training_args.seed)
    return model


# ---------------------------------------------------------------------------------------------------------------- data


def make_data(
    data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequences, SampleSequences | None, dict[str, DataReport]]:
    """Return the sequences to train on, those held out (None without any), and a report on each file or folder."""
    load = partial(
        load_examples,
        tokenizer=tokenizer,
        cache_dir=training_args.cache_dir,
        dedup=data_args.dedup,
        num_workers=data_args.preprocessing_num_workers,
        columns=data_args.reads_by,
    )
    samples, held_out, reports = None, None, {}
    if not data_args.streaming:
        samples, reports["data"] = load(data_args.data_path)
    if data_args.eval_data_path:
        held_out, reports["held out"] = load(data_args.eval_data_path, flag="--eval_data_path")
    report_data(data_args, training_args, reports)
    if data_args.check_data and training_args.process_index == 0:
        print(*summary.telling_examples(tokenizer, samples, reports["data"]), sep="\n")
    if data_args.eval_fraction and not data_args.eval_data_path:
        samples, held_out = hold_out(samples, data_args.eval_fraction, training_args.seed)
    if data_args.streaming:
        train_dataset = stream(data_args, training_args, tokenizer)
    elif data_args.packing:
        length, seed = training_args.model_max_length, training_args.seed
        train_dataset = PackedSequences(samples, length, seed, data_args.share_prefixes)
    else:
        train_dataset = SampleSequences(samples, data_args.share_prefixes)
    return train_dataset, SampleSequences(held_out, data_args.share_prefixes) if held_out is not None else None, reports


def report_data(data_args: DataArguments, training_args: TrainingArguments, reports: dict[str, DataReport]) -> None:
    """Print and write what became of the rows; raise UserError if too many are refused, or none is left."""
    notes = Path(training_args.output_dir, NOTES)
    if training_args.process_index == 0:
        try:
            write_data_report(reports.values(), notes)
        except OSError as error:
            raise OneRankError(
                f"{notes} cannot be written: {one_line(error)}; free disk space, or give another --output_dir"
            ) from None
        for name, report in reports.items():
            print_data(name, report)
        for path in filter(None, (data_args.data_path, data_args.eval_data_path)):
            for sentence in skipped_in(path):
                print(f"{'skipped':9}{sentence}")
    paths = {"data": f"--data_path {data_args.data_path}", "held out": f"--eval_data_path {data_args.eval_data_path}"}
    for name, report in reports.items():
        if wrong := report.what_is_wrong(data_args.max_bad_fraction):
            raise UserError(f"{paths[name]} {wrong}; {notes} lists what was refused")


def stream(
    data_args: DataArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> StreamedSequences:
    """Return this rank's sequences, tokenised while it trains on them."""
    check_length(tokenizer)
    return StreamedSequences(
        files=find_shards(data_args.data_path, cache_dir=training_args.cache_dir),
        encoder=Encoder(tokenizer),
        notes=Path(training_args.output_dir, NOTES),
        max_bad_fraction=data_args.max_bad_fraction,
        is_packed=data_args.packing,
        shares_prefixes=data_args.share_prefixes,
        shuffle=training_args.train_sampling_strategy == "random",
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        rank=training_args.process_index,
        world_size=training_args.world_size,
        columns=data_args.reads_by,
    )


def shares_batches(data_args: DataArguments, training_args: TrainingArguments, reports: dict[str, DataReport]) -> bool:
    """Tell whether a flat batch may hold more than one example."""
    batch_size = max(training_args.train_batch_size, training_args.eval_batch_size if data_args.holds_out else 1)
    have_turns = data_args.streaming or any(report.counts.conversations for report in reports.values())
    return data_args.packing or batch_size > 1 or have_turns


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Fine-tune as the command line says."""
    model_args, data_args, plan_args, training_args = parse_arguments()
    arguments.settle(data_args, training_args)
    arguments.check(model_args, data_args, plan_args, training_args)
    with ownership.claimed(training_args):
        location = locate(model_args.model_name_or_path, training_args.cache_dir)
        config = load_config(location, training_args.cache_dir)
        quantized.check_trainable(model_args.model_name_or_path, config)
        run = plan.Run(model_args, data_args, plan_args, training_args, config)
        if plan_args.plan:
            print(plan.show(run))
            return
        data_args.share_prefixes &= patch.can_share_prefixes(config)
        if data_args.packing and training_args.chooses_batch_size:
            training_args.set_batch_size(plan.batch_size(run))
        tokenizer = load_tokenizer(location, training_args.model_max_length, training_args.cache_dir)
        check_ids(tokenizer, config, model_args.model_name_or_path)
        train_dataset, eval_dataset, reports = make_data(data_args, training_args, tokenizer)
        if data_args.check_data:
            return

        fit = plan.fit(run, train_dataset.longest_batch(training_args.per_device_train_batch_size))
        if fit.needs_checkpointing:
            training_args.turn_on_checkpointing()
        schedule = training_args.schedule(train_dataset.num_sequences)
        settings = resume.settings_of(model_args, training_args, train_dataset, config, schedule.num_steps)
        optimization.check_schedule(training_args, schedule.num_steps)
        ownership.check_shared(training_args)
        resumed = resume.find(training_args, settings, schedule.num_steps)
        if resume.has_ended(training_args, resumed, schedule.num_steps):
            if training_args.process_index == 0:
                print(f"{training_args.output_dir} has made all its {schedule.num_steps:,} steps")
            return
        disk.check_room(training_args, settings, schedule, merges_lora=model_args.merge_lora)
        training_args.eval_on_start = data_args.holds_out and resumed is None  # the model card gives both losses

        model = make_model(location, config, model_args, training_args, tokenizer)
        trainer = Trainer(
            model=model,
            args=training_args,
            data_collator=partial(flatten, share_prefixes=data_args.share_prefixes),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            settings=settings,
            shares_batches=shares_batches(data_args, training_args, reports),
            merges_lora=model_args.merge_lora,
        )
        if trainer.is_world_process_zero():
            print(summary.header(trainer, resumed, fit.line), flush=True)
        trainer.train_to_the_end(resumed, schedule.num_steps)
        trainer.save_result()
        if trainer.is_world_process_zero():
            output_dir, data = Path(training_args.output_dir), reports.get("data", train_dataset)
            summary.plot_losses(trainer.state.log_history, output_dir / "loss_curve.png")
            card = model_card(model_args.model_name_or_path, data_args.data_path, data, trainer)
            (output_dir / "README.md").write_text(card, encoding="utf-8")
            print(summary.result_line(trainer))
    trainer.close()


if __name__ == "__main__":
    run_program(main)
