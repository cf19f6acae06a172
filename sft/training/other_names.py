"""What flags of other projects, and of older versions of transformers, are called here, or why they are not needed.

The names come from Stanford Alpaca, alpaca-lora, LLaMA-Factory, BELLE, Firefly, FastChat, DeepSpeed-Chat, TRL, axolotl,
and the scripts and older arguments of transformers.
"""

import difflib
from collections.abc import Iterable, Sequence

from sft.program import UserError

# What to do: the names, without dashes, that it answers.
ANSWERS = {
    "type --model_name_or_path": "base_model base_model_path model model_id model_name model_path pretrain "
    "pretrained_model_name_or_path",
    "type --data_path": "data data_dir data_file dataset dataset_dir dataset_mixer dataset_name dataset_path datasets "
    "train_data train_data_path train_dataset train_file train_file_dir training_data",
    "type --eval_data_path": "eval_dataset eval_file test_file val_data val_dataset valid_file validation_file "
    "validation_file_dir",
    "type --eval_fraction with the share of rows to hold out, such as 0.05": "eval_size split_dataset_ratio test_size "
    "val_set_size val_size validation_split_percentage",
    "type --output_dir": "export_dir out_dir output output_path save_dir save_path",
    "type --model_max_length": "block_size context_length cutoff_len max_input_length max_len max_length "
    "max_prompt_length max_seq_len max_seq_length max_source_length max_target_length seq_length sequence_len",
    "type --per_device_train_batch_size": "micro_batch_size micro_train_batch_size per_device_batch_size "
    "per_gpu_train_batch_size train_micro_batch_size_per_gpu",
    "type --per_device_train_batch_size and --gradient_accumulation_steps; their product, times the GPUs, is what a "
    "step trains on": "batch_size global_batch_size train_batch_size",
    "type --per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "type --gradient_accumulation_steps": "accumulation_steps grad_accum gradient_accumulation",
    "type --num_train_epochs": "epoch epochs max_epochs n_epochs num_epoch num_epochs",
    "type --max_steps, or give a smaller file": "max_samples max_train_samples num_samples",
    "type --learning_rate": "lr",
    "type --lr_scheduler_type": "lr_decay_style lr_scheduler scheduler",
    "type --warmup_steps with the ratio, such as 0.03": "lr_warmup_ratio warmup_proportion warmup_ratio",
    "type --warmup_steps": "lr_warmup_steps num_warmup_steps",
    "type --max_grad_norm": "clip_grad grad_clip gradient_clipping",
    "type --optim": "optimizer",
    "type --optim adafactor": "adafactor use_adafactor",
    "type --eval_strategy": "evaluate_during_training evaluation_strategy",
    "type --eval_strategy steps --eval_steps": "eval_interval eval_step evals_per_epoch evaluation_steps",
    "type --save_steps": "save_every save_interval save_step saves_per_epoch",
    "type --logging_steps": "log_interval log_steps logging_interval",
    "type --lora_r": "lora_dim lora_rank",
    "type --lora_target_modules": "lora_modules lora_module_name lora_target lora_target_linear target_modules",
    "type --lora_r, --lora_alpha, --lora_dropout and --lora_target_modules": "lora_config lora_hyperparams_file",
    "leave it out: all weights are trained, or LoRA with --lora_r 16": "adapter enable_lora finetuning_type lora "
    "lora_enable peft_type train_type tune_strategy use_lora use_peft",
    "type --lora_r 16 --load_in_4bit True": "bits q_lora qlora quant_bits quantization_bit use_qlora",
    "type --load_in_4bit True; there is no loading in 8 bits": "load_in_8bit use_8bit use_int8_training",
    "leave it out: --load_in_4bit is NF4 with double quantization": "bnb_4bit_compute_dtype bnb_4bit_quant_storage "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant double_quant double_quantization quant_type quantization_method "
    "quantization_type use_bnb_nested_quant",
    "merge the adapter first, python -m sft.tools.export ADAPTER FOLDER, then type --model_name_or_path FOLDER": (
        "adapter_model adapter_name_or_path load_lora_from lora_model_dir lora_path lora_weights peft_path"
    ),
    "type --bf16 True or --fp16 True for how products are computed; trained weights are always fp32": "dtype fp32 "
    "infer_dtype mixed_precision precision pure_bf16 torch_dtype upcast_layernorm upcast_lmhead_output",
    "leave it out: --bf16 True or --fp16 True says it all": "fp16_backend fp16_opt_level half_precision_backend",
    "leave it out: the same command resumes, and a new run takes a new --output_dir": "overwrite_output_dir",
    "leave it out: changed rows are tokenised again by themselves": "overwrite_cache",
    "type --cache_dir": "dataset_prepared_path tokenized_path",
    "set TENSORBOARD_LOGGING_DIR=FOLDER before the command": "logging_dir tensorboard_path",
    "type --use_cpu True": "cpu no_cuda",
    "leave it out: a GPU is used if there is one, and --use_cpu True forbids it": "device device_map gpu "
    "low_cpu_mem_usage place_model_on_device use_mps_device",
    "leave it out: one process uses one GPU, and sh ds_all.sh uses all of them": "gpus n_gpu n_gpus num_gpus",
    "set NUM_GPUS=2 before sh ds_all.sh": "nproc_per_node",
    "set MASTER_PORT=29501 before sh ds_all.sh": "main_process_port master_port",
    "set ZERO_STAGE=3 before sh ds_all.sh, or type --deepspeed ds_zero3_config.json": "zero_stage",
    "type --deepspeed": "deepspeed_config ds_config",
    "leave it out: ZERO_STAGE=3 sh ds_all.sh splits the weights over the GPUs, with DeepSpeed": "fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap parallelism_config sharded_ddp",
    "leave it out: no batch has padding": "group_by_length ignore_pad_token_for_loss length_column pad_to_max_length "
    "pad_to_multiple_of pad_to_sequence_len padding_free padding_side",
    "type --packing True": "eval_packing eval_sample_packing multipack neat_packing packing_strategy sample_packing",
    "leave it out: the loss is on every answer, and on nothing else": "assistant_only_loss completion_only_loss "
    "mask_history mask_prompt only_train_response train_on_inputs train_on_prompt",
    "leave it out: the prompt is Alpaca's, in training and in the chat": "chat_template chat_template_path "
    "conv_template conversation_template prompt_style prompt_template prompt_template_name template template_name",
    "type --columns instruction=KEY,output=KEY": "dataset_text_field history_column input_column instruction_column "
    "output_column prompt_column question_column response_column text_column",
    "type --preprocessing_num_workers": "dataset_num_proc dataset_processes num_proc preprocessing_workers",
    "type --dataloader_num_workers": "num_workers",
    "leave it out: rows are read in pieces, and --streaming True keeps none on the disk": "buffer_size "
    "lazy_preprocess preprocessing_batch_size",
    "leave it out: --seed decides the order, and --train_sampling_strategy sequential keeps that of the files": (
        "no_shuffle shuffle shuffle_dataset"
    ),
    "leave it out: attention over rows without padding is built in": "attn_implementation flash_attention flash_attn "
    "sdp_attention use_flash_attention use_flash_attention_2 use_flash_attn xformers_attention",
    "leave it out: the loss already holds no logits": "enable_liger_kernel liger_kernel_config loss_type use_liger "
    "use_unsloth",
    "type --activation_checkpointing True": "use_gradient_checkpointing use_reentrant_gc use_unsloth_gc",
    "type --activation_checkpointing False": "disable_gradient_checkpointing",
    "leave it out: code that comes with a model is never run": "trust_remote_code",
    "leave it out: the tokenizer is the model's own": "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path "
    "use_fast use_fast_tokenizer",
    "leave it out: the vocabulary stays the model's": "add_special_tokens add_tokens resize_vocab",
    "leave it out: every answer ends with the model's own eos": "add_eos_token eos_token pad_token",
    "leave it out: the family is read from the model's config.json": "config_name llama model_config model_type",
    "download the revision, hf download NAME --revision R --local-dir FOLDER, and type --model_name_or_path FOLDER": (
        "model_revision revision"
    ),
    "log in once: hf auth login": "hf_hub_token hf_token token use_auth_token",
    "after training type hf upload OWNER/NAME OUTPUT_DIR": "push_to_hub_model_id push_to_hub_organization "
    "push_to_hub_token",
    "set HF_HUB_OFFLINE=1 before the command": "local_files_only offline",
    "set HF_ENDPOINT before the command to a mirror of the hub": "use_modelscope_hub",
    "leave it out: this is supervised fine-tuning": "stage task task_type train_mode",
    "give each setting as a flag": "config config_file model_config_file train_args_file",
    "leave it out: loss_curve.png is always drawn": "plot_loss",
    "leave it out: weights are always saved as safetensors": "save_safetensors",
    "leave it out: the model card says the speed": "include_tokens_per_second",
    "type --report_to wandb, and set WANDB_PROJECT and others before the command": "use_wandb wandb_entity wandb_mode "
    "wandb_name wandb_project wandb_run_id wandb_run_name",
    "type --report_to swanlab": "swanlab_project swanlab_run_name use_swanlab",
    "type --load_best_model_at_end True, which keeps the best checkpoint": "early_stopping early_stopping_patience",
    "leave it out: it is not offered here": "badam_mode create_new_adapter dispatch_batches even_batches "
    "freeze_trainable_layers galore_rank include_inputs_for_metrics jit_mode_eval loraplus_lr_ratio "
    "mixture_of_depths mp_parameters past_index pissa_init ray_scope rope_scaling shift_attn split_batches torchdynamo "
    "tpu_metrics_debug tpu_num_cores use_apollo use_badam use_dora use_galore use_ipex use_llama_pro use_rslora "
    "xpu_backend",
}
BY_NAME = {name: answer for answer, names in ANSWERS.items() for name in names.split()}
EXAMPLE = "--model_name_or_path MODEL --data_path DATA --output_dir FOLDER"


def check(words: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError, with what to do about each, if there are flags that are not `known` or words that are no flags.

    A word that no flag takes can only be told from a value if it is the first one.
    """
    if words and not words[0].startswith("-"):
        raise UserError(f"{words[0]} is not a flag; settings are given as flags: {EXAMPLE}")
    known = set(known)
    flags = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--") and word != "--")
    unknown = {flag: _answer(flag, known) for flag in flags if flag not in known or _name(flag) in BY_NAME}
    if len(unknown) == 1:
        (flag, answer), *_ = unknown.items()
        raise UserError(f"unknown flag {flag}; {answer}")
    if unknown:
        raise UserError("unknown flags: " + "; ".join(f"{flag} ({answer})" for flag, answer in unknown.items()))


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _answer(flag: str, known: set[str]) -> str:
    """Return what to do about a flag that is not known: what its name is here, or what looks like it."""
    if answer := BY_NAME.get(_name(flag)):
        return answer
    close = difflib.get_close_matches(flag, known, 1, 0.75)
    return f"type {close[0]}" if close else "--help lists every flag"
