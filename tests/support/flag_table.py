"""Every flag of transformers' arguments with values that a user would type, and what is right for each.

`WORKS` is a run to its end; other texts are what the one line of a refusal says. Each choice of an enum is in here.
"""

from transformers.training_args import OptimizerNames

WORKS, WORKS_ALONE = "", None  # the latter is slow, or does not go with the others in one command
HELD = "--eval_fraction 0.2"
EACH_STEP = f"--eval_strategy steps --eval_steps 1 {HELD}"
UPLOAD = "hf upload OWNER/NAME OUTPUT_DIR"
WITH_DEEPSPEED = "ZERO_STAGE=3 sh ds_all.sh"
NO_ROWS = "has no rows to evaluate on; add --eval_data_path FILE or --eval_fraction 0.05"
FOR_WORKERS = "add --dataloader_num_workers 2"
KWARGS = "--lr_scheduler_kwargs"

OPTIMIZERS = {
    **{f"--optim {each.value}": "needs bitsandbytes; type pip install" for each in OptimizerNames},
    "--optim adamw_torch": WORKS,
    "--optim adamw_torch_fused": WORKS,
    "--optim adafactor": WORKS,
    "--optim sgd": WORKS,
    "--optim adagrad": WORKS,
    "--optim rmsprop": WORKS,
    "--optim adamw_torch_4bit": "type --optim adamw_bnb_8bit",
    "--optim adamw_torch_8bit": "type --optim adamw_bnb_8bit",
    "--optim adamw_torch_xla": "is for TPUs, on which nothing runs here; type --optim adamw_torch_fused",
    "--optim adamw_torch_npu_fused": "needs torch_npu; type pip install torch_npu",
    "--optim adamw_anyprecision": "type --optim adamw_torch_fused",
    "--optim lomo": "type --optim adafactor",
    "--optim adalomo": "type --optim adafactor",
    "--optim grokadamw": "type pip install grokadamw, or --optim adafactor",
    "--optim stable_adamw": "type pip install torch-optimi",
    **{f"--optim schedule_free_{each}": "type pip install schedulefree" for each in ("radam", "adamw", "sgd")},
    **{f"--optim apollo_adamw{each}": "updates weights" if each else "pip install" for each in ("", "_layerwise")},
    **{
        f"--optim galore_{each.value.removeprefix('galore_')}": (
            "updates weights" if "layerwise" in each.value else "type pip install galore-torch"
        )
        for each in OptimizerNames
        if each.value.startswith("galore_")
    },
    "--optim adam": "invalid choice: 'adam'",
}
SCHEDULERS = {
    "--lr_scheduler_type linear --warmup_steps 1": WORKS,
    "--lr_scheduler_type cosine --warmup_steps 0.3": WORKS,
    f"--lr_scheduler_type cosine_with_restarts {KWARGS} '{{\"num_cycles\": 2}}'": WORKS,
    f"--lr_scheduler_type polynomial {KWARGS} '{{\"power\": 2}}'": WORKS,
    "--lr_scheduler_type constant": WORKS,
    "--lr_scheduler_type constant_with_warmup --warmup_steps 2": WORKS,
    "--lr_scheduler_type inverse_sqrt --warmup_steps 2": WORKS,
    f"--lr_scheduler_type reduce_lr_on_plateau {EACH_STEP}": WORKS,
    f"--lr_scheduler_type greedy {EACH_STEP} {KWARGS} '{{\"min_lr\": 1e-6}}'": WORKS,
    f"--lr_scheduler_type cosine_with_min_lr {KWARGS} '{{\"min_lr_rate\": 0.1}}'": WORKS,
    f"--lr_scheduler_type cosine_warmup_with_min_lr {KWARGS} '{{\"min_lr\": 1e-6}}'": WORKS,
    f"--lr_scheduler_type warmup_stable_decay {KWARGS} '{{\"num_decay_steps\": 2}}'": WORKS,
    "--lr_scheduler_type cosine_with_min_lr": f"type, for example, {KWARGS} '{{\"min_lr_rate\": 0.1}}'",
    "--lr_scheduler_type cosine_warmup_with_min_lr": f"type, for example, {KWARGS}",
    "--lr_scheduler_type warmup_stable_decay": f"type, for example, {KWARGS} '{{\"num_decay_steps\": 100}}'",
    "--lr_scheduler_type reduce_lr_on_plateau": "needs a held-out loss; add --eval_strategy epoch",
    "--lr_scheduler_type greedy": "needs a held-out loss; add --eval_strategy epoch",
    f"--lr_scheduler_type greedy {EACH_STEP}": "its least rate, min_lr, is above --learning_rate",
    "--lr_scheduler_type constant --warmup_steps 2": "type --lr_scheduler_type constant_with_warmup",
    f"--lr_scheduler_type reduce_lr_on_plateau --warmup_steps 0.1 {EACH_STEP}": "type --warmup_steps 0",
    "--lr_scheduler_type cosin": "invalid choice: 'cosin'",
}
TRACKERS = ("azure_ml", "comet_ml", "mlflow", "neptune", "trackio", "wandb", "codecarbon", "clearml", "dagshub")
TRACKERS += ("flyte", "dvclive", "swanlab", "kubeflow")

TABLE = {
    "output_dir": {"--output_dir": "expected one argument"},
    "per_device_train_batch_size": {
        "--per_device_train_batch_size 2": WORKS,
        "--per_device_train_batch_size 0": "1 or",
    },
    "num_train_epochs": {
        "--num_train_epochs 0.5": WORKS,
        "--num_train_epochs 0": "--num_train_epochs 0.0 is out of range; expected a number above 0",
    },
    "max_steps": {
        "--max_steps 3": WORKS,
        "--max_steps 0": "type 1 or more, or leave it out",
        "--max_steps -2": "type 1",
    },
    "learning_rate": {
        "--learning_rate 3e-4": WORKS,
        "--learning_rate -1": "expected 0 or more",
        "--learning_rate nan": "expected 0 or more",
        "--learning_rate 2e-5,": "invalid float value",
    },
    "lr_scheduler_type": SCHEDULERS,
    "lr_scheduler_kwargs": {
        f"{KWARGS} min_lr=1e-6": "is not a JSON object",
        f"{KWARGS} '{{min_lr: 1}}'": "is not a JSON object",
        f"{KWARGS} '{{\"min_lr\": 1e-6}}'": "has no effect on --lr_scheduler_type linear; leave it out",
        f"--lr_scheduler_type cosine {KWARGS} '{{\"cycles\": 2}}'": "unexpected keyword argument 'cycles'; type, for",
        f"--lr_scheduler_type polynomial {KWARGS} '{{\"lr_end\": 1}}'": "must be smaller than initial lr",
    },
    "warmup_steps": {
        "--warmup_steps 4": WORKS,
        "--warmup_steps 5": "--warmup_steps 5 is beyond the last step, 4, so",
        "--warmup_steps -1": "expected 0 or more",
        "--warmup_steps 1.5": "type 30, or 0.03",
    },
    "optim": OPTIMIZERS,
    "optim_args": {
        "--optim sgd --optim_args momentum=0.9,nesterov=True": WORKS,
        "--optim_args eps=1e-3": "has no effect on --optim adamw_torch_fused; leave it out",
        "--optim sgd --optim_args momentun=0.9": "type NAME=VALUE,NAME=VALUE with names among momentum, damp",
        "--optim sgd --optim_args momentum": "type NAME=VALUE",
        "--optim sgd --optim_args momentum=much": "type NAME=VALUE",
    },
    "weight_decay": {"--weight_decay 0.1": WORKS, "--weight_decay -0.1": "expected 0 or more"},
    "adam_beta1": {"--adam_beta1 0.8": WORKS, "--adam_beta1 1": "expected 0 or more, and below 1"},
    "adam_beta2": {"--adam_beta2 0.95": WORKS, "--adam_beta2 1.5": "expected 0 or more, and below 1"},
    "adam_epsilon": {"--adam_epsilon 1e-6": WORKS, "--adam_epsilon -1": "expected 0 or more"},
    "optim_target_modules": {"--optim_target_modules all-linear": "is for GaLore and APOLLO, not for --optim"},
    "gradient_accumulation_steps": {
        "--gradient_accumulation_steps 2": WORKS,
        "--gradient_accumulation_steps 0": "expected 1 or more",
    },
    "average_tokens_across_devices": {"--average_tokens_across_devices False": WORKS},
    "max_grad_norm": {"--max_grad_norm 0": WORKS, "--max_grad_norm -1": "expected 0 or more"},
    "label_smoothing_factor": {"--label_smoothing_factor 0.1": "which the loss here never holds; leave it out"},
    "bf16": {"--bf16 --use_cpu True": WORKS, "--bf16": "leave it out, or add --use_cpu True"},
    "fp16": {"--fp16 --bf16 False": WORKS, "--fp16 True --bf16 True": "leave one of them out"},
    "bf16_full_eval": {"--bf16_full_eval True": "type --bf16 True"},
    "fp16_full_eval": {"--fp16_full_eval True": "type --fp16 True"},
    "tf32": {"--tf32 False": WORKS, "--tf32 True": "leave it out"},
    "activation_checkpointing": {"--activation_checkpointing": WORKS},
    "activation_checkpointing_kwargs": {
        "--activation_checkpointing True --activation_checkpointing_kwargs '{\"every_n_layers\": 2}'": WORKS,
        "--activation_checkpointing True --activation_checkpointing_kwargs '{\"use_reentrant\": true}'": WORKS,
        "--activation_checkpointing True --activation_checkpointing_kwargs '{\"offload\": true}'": "leave offload out",
        "--activation_checkpointing True --activation_checkpointing_kwargs '{\"layers\": 2}'": "has layers; expected",
        "--activation_checkpointing_kwargs offload": "is not a JSON object",
    },
    "gradient_checkpointing": {"--gradient_checkpointing": WORKS},
    "gradient_checkpointing_kwargs": {
        "--gradient_checkpointing --gradient_checkpointing_kwargs '{\"use_reentrant\": false}'": WORKS,
        "--gradient_checkpointing_kwargs '{\"reentrant\": false}'": "has reentrant; expected",
    },
    "torch_compile": {"--torch_compile True": WORKS_ALONE},
    "torch_compile_backend": {
        "--torch_compile_backend eager": WORKS_ALONE,
        "--torch_compile_backend fast": "type inductor",
    },
    "torch_compile_mode": {"--torch_compile_mode fast": "type default"},
    "use_liger_kernel": {
        "--use_liger_kernel True": "the loss here holds no logits either",
        "--use_liger_kernel no": WORKS,
    },
    "liger_kernel_config": {
        "--liger_kernel_config '{\"rope\": true}'": "leave it out: the loss already holds no logits"
    },
    "use_cache": {"--use_cache True": "the saved model generates with its cache", "--use_cache False": WORKS},
    "neftune_noise_alpha": {"--neftune_noise_alpha much": "invalid float value"},
    "torch_empty_cache_steps": {
        "--torch_empty_cache_steps 2": WORKS,
        "--torch_empty_cache_steps 0": "must be an integer bigger than 0",
    },
    "auto_find_batch_size": {"--auto_find_batch_size True": "type --plan True to see what fits"},
    "logging_strategy": {
        "--logging_strategy no": WORKS,
        "--logging_strategy epoch": WORKS,
        "--logging_strategy steps": WORKS,
    },
    "logging_steps": {
        "--logging_steps 0.5": WORKS,
        "--logging_steps 0": "expected a number above 0",
        "--logging_steps inf": "expected a number above 0",
        "--logging_steps 1.5": "must be an integer if bigger than 1",
    },
    "logging_first_step": {"--logging_first_step False": WORKS, "--no_logging_first_step": WORKS},
    "log_on_each_node": {"--log_on_each_node False": WORKS},
    "logging_nan_inf_filter": {"--logging_nan_inf_filter True": WORKS},
    "include_num_input_tokens_seen": {
        "--include_num_input_tokens_seen True": WORKS,
        "--include_num_input_tokens_seen non_padding": "Truthy value expected",
    },
    "log_level": {
        **{f"--log_level {each}": WORKS for each in ("debug", "info", "warning", "error", "critical", "passive")},
        "--log_level detail": WORKS,
        "--log_level loud": "invalid choice: 'loud'",
    },
    "log_level_replica": {
        **{
            f"--log_level_replica {each}": WORKS
            for each in ("debug", "info", "warning", "error", "critical", "passive")
        },
        "--log_level_replica detail": WORKS,
    },
    "disable_tqdm": {"--disable_tqdm True": WORKS},
    "report_to": {
        "--report_to tensorboard": WORKS,
        "--report_to all": WORKS,
        "--report_to none": WORKS,
        **{f"--report_to {each}": f"{each} is not installed; pip install it, or use: tensorboard" for each in TRACKERS},
        "--report_to tensorboar": "--report_to tensorboar is not one of azure_ml",
        "--report_to tensorboard wandb": "wandb belongs to no flag",
    },
    "run_name": {"--run_name mine": WORKS},
    "project": {"--project mine": "is for trackio alone; add --report_to trackio, or leave it out"},
    "trackio_space_id": {"--trackio_space_id me/runs": "is for trackio alone"},
    "trackio_bucket_id": {"--trackio_bucket_id me/runs": "is for trackio alone"},
    "trackio_static_space_id": {"--trackio_static_space_id me/runs": "is for trackio alone"},
    "eval_strategy": {
        f"--eval_strategy steps {HELD}": WORKS,
        f"--eval_strategy epoch {HELD}": WORKS,
        "--eval_strategy no": WORKS,
        "--eval_strategy steps": f"--eval_strategy steps {NO_ROWS}",
        "--eval_strategy epoch": f"--eval_strategy epoch {NO_ROWS}",
        "--eval_strategy best": "invalid choice: 'best'",
    },
    "eval_steps": {
        f"--eval_strategy steps --eval_steps 0.5 {HELD}": WORKS,
        "--eval_steps 2": f"--eval_steps 2.0 {NO_ROWS}",
        f"--eval_steps 2 {HELD}": "add --eval_strategy steps",
        f"--eval_strategy steps --eval_steps -2 {HELD}": "expected 0 or more",
    },
    "eval_delay": {f"--eval_delay 1 {HELD}": WORKS, "--eval_delay -1": "expected 0 or more"},
    "per_device_eval_batch_size": {
        f"--per_device_eval_batch_size 3 {HELD}": WORKS,
        "--per_device_eval_batch_size 0": "expected 1 or more",
    },
    "prediction_loss_only": {f"--prediction_loss_only True {HELD}": WORKS},
    "eval_on_start": {f"--eval_on_start True {HELD}": WORKS, "--eval_on_start True": NO_ROWS},
    "eval_do_concat_batches": {f"--eval_do_concat_batches False {HELD}": WORKS},
    "eval_use_gather_object": {f"--eval_use_gather_object True {HELD}": WORKS},
    "eval_accumulation_steps": {
        f"--eval_accumulation_steps 1 {HELD}": WORKS,
        "--eval_accumulation_steps 0": "expected 1 or more",
    },
    "include_for_metrics": {"--include_for_metrics inputs loss": "only the loss is measured here; leave it out"},
    "batch_eval_metrics": {"--batch_eval_metrics True": "only the loss is measured here; leave it out"},
    "save_only_model": {"--save_only_model True": WORKS},
    "save_strategy": {
        "--save_strategy no": WORKS,
        "--save_strategy epoch": WORKS,
        "--save_strategy steps": WORKS,
        f"--save_strategy best {EACH_STEP}": WORKS,
        "--save_strategy best": "needs a held-out loss; add --eval_strategy epoch",
        "--save_strategy never": "invalid choice: 'never'",
    },
    "save_steps": {"--save_steps 0.5": WORKS, "--save_steps 0": "a number above 0", "--save_steps -5": "above 0"},
    "save_on_each_node": {"--save_on_each_node True": "share the output folder"},
    "save_total_limit": {"--save_total_limit 1": WORKS, "--save_total_limit 0": WORKS},
    "enable_jit_checkpoint": {"--enable_jit_checkpoint True": "is built in"},
    "push_to_hub": {"--push_to_hub": UPLOAD, "--push_to_hub False": WORKS},
    "hub_token": {
        "--hub_token hf_secret": f"--hub_token is not done while training; leave it out, and afterwards type {UPLOAD}"
    },
    "hub_private_repo": {"--hub_private_repo True": "is for trackio alone"},
    "hub_model_id": {"--hub_model_id me/mine": UPLOAD},
    "hub_strategy": {
        "--hub_strategy every_save": WORKS,
        **{f"--hub_strategy {each}": UPLOAD for each in ("end", "checkpoint", "all_checkpoints")},
        "--hub_strategy sometimes": "invalid choice: 'sometimes'",
    },
    "hub_always_push": {"--hub_always_push True": UPLOAD},
    "hub_revision": {"--hub_revision main": UPLOAD},
    "load_best_model_at_end": {
        f"--load_best_model_at_end True --save_steps 2 {EACH_STEP}": WORKS,
        f"--load_best_model_at_end True {HELD}": "type --eval_strategy steps --save_strategy steps",
        "--load_best_model_at_end True --save_strategy no": "type --eval_strategy steps --save_strategy steps",
        "--load_best_model_at_end True --eval_strategy steps": NO_ROWS,
        f"--load_best_model_at_end True --save_steps 3 --eval_strategy steps --eval_steps 2 {HELD}": "round multiple",
    },
    "metric_for_best_model": {
        f"--metric_for_best_model perplexity --load_best_model_at_end True --save_steps 2 {EACH_STEP}": WORKS,
        "--metric_for_best_model accuracy": "is not measured here; type loss or perplexity",
    },
    "greater_is_better": {"--greater_is_better False": WORKS, "--greater_is_better True": WORKS},
    "ignore_data_skip": {"--ignore_data_skip True": "would train rows twice"},
    "restore_callback_states_from_checkpoint": {"--restore_callback_states_from_checkpoint True": WORKS},
    "full_determinism": {"--full_determinism True": WORKS},
    "seed": {"--seed 7": WORKS, "--seed -1": "expected 0 to 4294967295"},
    "data_seed": {"--data_seed 4294967295": WORKS, "--data_seed 4294967296": "expected 0 to 4294967295"},
    "use_cpu": {"--use_cpu": WORKS},
    "accelerator_config": {
        "--accelerator_config '{\"non_blocking\": true}'": WORKS,
        "--accelerator_config '{\"split_batches\": true}'": "has split_batches; expected non_blocking",
        "--accelerator_config '{\"use_configured_state\": true}'": "has use_configured_state; expected non_blocking",
        "--accelerator_config nowhere.json": "is not a JSON object",
    },
    "parallelism_config": {"--parallelism_config 2": WITH_DEEPSPEED},
    "dataloader_drop_last": {"--dataloader_drop_last True": "would leave rows out"},
    "dataloader_num_workers": {
        "--dataloader_num_workers 1": WORKS,
        "--dataloader_num_workers -1": "expected 0 or more",
    },
    "dataloader_pin_memory": {"--dataloader_pin_memory False": WORKS, "--no_dataloader_pin_memory": WORKS},
    "dataloader_persistent_workers": {
        "--dataloader_persistent_workers True --dataloader_num_workers 1": WORKS,
        "--dataloader_persistent_workers True": FOR_WORKERS,
    },
    "dataloader_prefetch_factor": {
        "--dataloader_prefetch_factor 3 --dataloader_num_workers 1": WORKS,
        "--dataloader_prefetch_factor 3": "when --dataloader_num_workers > 0",
        "--dataloader_prefetch_factor 0 --dataloader_num_workers 1": "expected 1 or more",
    },
    "dataloader_multiprocessing_context": {
        "--dataloader_multiprocessing_context fork --dataloader_num_workers 1": WORKS,
        "--dataloader_multiprocessing_context spawn --dataloader_num_workers 1": WORKS_ALONE,
        "--dataloader_multiprocessing_context forkserver --dataloader_num_workers 1": WORKS_ALONE,
        "--dataloader_multiprocessing_context fork": FOR_WORKERS,
    },
    "dataloader_in_order": {"--dataloader_in_order False": "leave it out"},
    "remove_unused_columns": {"--remove_unused_columns True": "would remove the lengths of examples"},
    "label_names": {"--label_names labels": "the labels are the answers"},
    "train_sampling_strategy": {
        "--train_sampling_strategy random": WORKS,
        "--train_sampling_strategy sequential": WORKS,
        "--train_sampling_strategy group_by_length": "type random",
        "--train_sampling_strategy batch_rebalance": "type random",
    },
    "length_column_name": {"--length_column_name tokens": "no batch has padding"},
    "ddp_find_unused_parameters": {"--ddp_find_unused_parameters False": WORKS},
    "ddp_bucket_cap_mb": {"--ddp_bucket_cap_mb 25": WORKS, "--ddp_bucket_cap_mb 0": "expected 1 or more"},
    "ddp_broadcast_buffers": {"--ddp_broadcast_buffers False": WORKS},
    "ddp_static_graph": {"--ddp_static_graph True": WORKS},
    "ddp_backend": {
        f"--ddp_backend {each}": "is for several processes, and this is one; leave it out"
        for each in ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")
    },
    "ddp_timeout": {"--ddp_timeout 7200": WORKS, "--ddp_timeout 0": "expected 1 or more"},
    "fsdp": {
        "--fsdp 'full_shard auto_wrap'": WITH_DEEPSPEED,
        "--fsdp": WITH_DEEPSPEED,
        "--fsdp True": WITH_DEEPSPEED,
        "--fsdp False": WORKS,
        "--fsdp ''": WORKS,
    },
    "fsdp_config": {"--fsdp_config fsdp.json": WITH_DEEPSPEED},
    "deepspeed": {
        "--deepspeed nowhere.json": "give ds_zero2_config.json or ds_zero3_config.json",
        '--deepspeed \'{"zero_optimization": {"stage": 2}}\'': "give ds_zero2_config.json or ds_zero3_config.json",
    },
    "debug": {
        "--debug underflow_overflow": WORKS_ALONE,
        "--debug tpu_metrics_debug": "leave it out",
        "--debug everything": "invalid DebugOption value: 'everything'",
    },
    "skip_memory_metrics": {"--skip_memory_metrics False": WORKS},
    "do_train": {"--do_train": WORKS},
    "do_eval": {f"--do_eval {HELD}": WORKS, "--do_eval": f"--do_eval {NO_ROWS}"},
    "do_predict": {"--do_predict": "type python -m sft.chat OUTPUT_DIR"},
    "resume_from_checkpoint": {
        "--resume_from_checkpoint True": WORKS,
        "--resume_from_checkpoint nowhere": "cannot resume from --resume_from_checkpoint nowhere",
    },
    "local_rank": {"--local_rank 0": WORKS},
}
