"""What the command line of train_sft.py asks for: model, rows and training, and what of it could only fail later."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers.integrations import get_available_reporting_integrations

from sft import machine
from sft.plan.plan import PlanArguments
from sft.program import UserError
from sft.training import disk, precision, zero

EXAMPLES_A_BATCH = 8  # transformers' own default


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "A Hugging Face model folder, or a hub id."})


@dataclass
class DataArguments:
    """Which rows."""

    data_path: str = field(metadata={"help": "A file of instruction rows or conversations, or a folder of them."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Held-out rows, for an eval loss."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Without --eval_data_path: the share of the rows to hold out, chosen by --seed."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Fill rows of --model_max_length tokens with several examples; a batch counts such rows."},
    )
    dedup: bool = field(default=False, metadata={"help": "Leave out rows whose text stood before."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "End before training if more than this share of the rows is refused."}
    )
    check_data: bool = field(default=False, metadata={"help": "Say what becomes of the rows, and end."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise rows while training on them, and keep none; needs --max_steps."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; by default one for each core."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How to train: transformers' own arguments, with the defaults that fine-tuning wants."""

    output_dir: str = field(kw_only=True, metadata={"help": "Where the fine-tuned model and its checkpoints go."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where hub files and tokenised rows are kept."})
    model_max_length: int = field(default=2048, metadata={"help": "Tokens of a row at most; longer rows are cut."})
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast; by default where the GPU has bf16."})
    fp16: bool | None = field(default=None, metadata={"help": "fp16 autocast; by default where the GPU lacks bf16."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a batch on each device; by default 8 examples, or packed rows: 1 on a CPU, on a GPU as "
            "many as make 16,384 tokens and fit."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "Compile the layers around attention and loss, which takes a minute; not with checkpointing."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that join rows into batches; by default 2 beside a GPU, else none."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log the loss every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it False: rows are tokens alone."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log a mean for a loss that is no number."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep; older ones are deleted."})
    save_optimizer_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints that keep their optimizer state; older ones become weights alone."}
    )
    offload: str = field(
        default="none",
        metadata={"help": "ZeRO: keep optimizer states, or all, in host memory.", "choices": zero.OFFLOADS},
    )
    offload_dir: str | None = field(
        default=None, metadata={"help": "ZeRO-3: a folder on an NVMe disk for what is offloaded."}
    )

    def __post_init__(self):
        device = machine.accelerator(self.use_cpu)
        pins_memory = machine.has_own_memory(device)
        if self.bf16 is None and self.fp16 is None:
            self.bf16, self.fp16 = precision.choose(device)
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        if self.deepspeed:
            self.deepspeed = zero.read_configuration(self.deepspeed, self.offload, self.offload_dir, pins_memory)
        self.checkpointing_is_open = self.activation_checkpointing is None and self.gradient_checkpointing is None
        self.batch_size_is_open = self.per_device_train_batch_size is None
        if self.batch_size_is_open:
            self.per_device_train_batch_size = EXAMPLES_A_BATCH
        self.workers_are_open = self.dataloader_num_workers is None
        if self.workers_are_open:
            self.dataloader_num_workers = 2 if pins_memory else 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and pins_memory
        if self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}  # a copy that is waited for would empty the device's queue
        super().__post_init__()
        if self.n_gpu > 1:
            # Without a launcher the Trainer would split each batch over all visible GPUs by DataParallel.
            self._n_gpu = 1
            if self.should_log:
                print("one process uses one GPU; for every GPU of this host type: sh ds_all.sh")


def check(
    model_args: ModelArguments, data_args: DataArguments, plan_args: PlanArguments, training_args: TrainingArguments
) -> None:
    """Raise UserError on arguments that could only fail later, and on a GPU that PyTorch has no kernels for."""
    if training_args.device.type == "cuda" and not plan_args.plan_gpu:
        machine.check_kernels("--use_cpu True")
    output_dir, model = Path(training_args.output_dir), Path(model_args.model_name_or_path)
    disk.check_writable(training_args.output_dir)
    if output_dir.exists() and model.exists() and output_dir.samefile(model):
        raise UserError(f"--output_dir {output_dir} is the model itself, which would be written over; give another")
    if not 0 <= data_args.eval_fraction < 1:
        raise UserError(f"--eval_fraction {data_args.eval_fraction} is no share; give a number from 0 to below 1")
    if data_args.streaming and (training_args.max_steps <= 0 or data_args.eval_fraction or data_args.dedup):
        raise UserError("--streaming True needs --max_steps, and has no --eval_fraction and no --dedup: give what fits")
    if data_args.streaming and training_args.workers_are_open:
        training_args.dataloader_num_workers = 0
    if data_args.streaming and (training_args.dataloader_num_workers or data_args.check_data):
        raise UserError(
            "--streaming True reads in the training process; leave out --dataloader_num_workers, --check_data"
        )
    if missing := set(training_args.report_to) - set(get_available_reporting_integrations()):
        installed = ", ".join(get_available_reporting_integrations()) or "none"
        raise UserError(f"--report_to {', '.join(missing)} is not installed; pip install it, or use: {installed}")
    if training_args.train_sampling_strategy not in ("random", "sequential"):
        strategy = training_args.train_sampling_strategy
        raise UserError(f"--train_sampling_strategy {strategy} saves padding, which rows here have not; type random")
    if training_args.save_on_each_node:
        raise UserError("--save_on_each_node does not save all weights; leave it out, and share the output folder")
    _check_zero(training_args)
    if training_args.compile_blocks and (other := _excludes_compiled_blocks(training_args)):
        raise UserError(f"--compile_blocks does not go with {other}; leave one of them out")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != training_args.world_size:
        # On a CPU the Trainer joins the other ranks only if told to; each would train on the same rows.
        raise UserError(f"{launched} processes were launched but the Trainer sees one; add --use_cpu True")


def _excludes_compiled_blocks(args: TrainingArguments) -> str | None:
    """Return what --compile_blocks cannot go with: PyTorch compiles nothing within a recomputed layer."""
    others = {
        "--torch_compile, which compiles them too": args.torch_compile,
        "ZeRO-3, which splits their weights": zero.stage_of(args) == 3,
        "--activation_checkpointing": bool(args.activation_checkpointing or args.gradient_checkpointing),
    }
    return next((name for name, is_asked in others.items() if is_asked), None)


def _check_zero(args: TrainingArguments) -> None:
    """Raise UserError if DeepSpeed cannot run on the device, or cannot offload as it is asked to."""
    if (args.offload != "none" or args.offload_dir) and not args.deepspeed:
        raise UserError("--offload is ZeRO's; type OFFLOAD=optimizer sh ds_all.sh, or add --deepspeed")
    if args.deepspeed and args.device.type not in ("cuda", "cpu"):
        raise UserError(f"--deepspeed runs here on CUDA GPUs and CPUs, not on {args.device.type}; leave it out")
    if args.offload != "none":
        zero.check_machine(args)
