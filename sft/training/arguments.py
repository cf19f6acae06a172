"""Every flag of train_sft.py, and which of them do not go together.

The checks run before a model or a record is read: they find what would otherwise fail late, or silently do less.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import IntervalStrategy

from sft import machine
from sft.data.columns import ROLES, SPEAKERS, Columns
from sft.program import UserError
from sft.training import flags, optimization, zero

if TYPE_CHECKING:
    from peft import LoraConfig

EXAMPLES_PER_BATCH = 8  # transformers' own default
# torch and DeepSpeed start at 65,536, which overflows in the first steps and skips them.
INITIAL_LOSS_SCALE = 2**12
BARE = {"nargs": "?", "const": True}  # the flag without a value means True


@dataclass
class ModelArguments:
    """Which model, and whether LoRA trains a few matrices beside it instead of all its weights."""

    model_name_or_path: str = field(metadata={"help": "A Hugging Face model folder, or a hub id."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA's matrices, such as 16; 0 trains all weights."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "LoRA's update is scaled by alpha / r; by default alpha is 2 r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of LoRA's inputs to drop in training."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that get LoRA; by default all of attention and MLP."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: hold the frozen weights in 4 bits."})
    merge_lora: bool = field(
        default=True, metadata={"help": "At the end, also save a plain model with LoRA merged into its weights."}
    )

    @property
    def lora_config(self) -> "LoraConfig | None":
        """Return peft's configuration, without target modules where no flag names them; None without --lora_r."""
        from peft import LoraConfig

        if not self.lora_r:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha or 2 * self.lora_r,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            task_type="CAUSAL_LM",
        )

    @property
    def method(self) -> str:
        """Return "full", "LoRA" or "QLoRA"."""
        return "QLoRA" if self.load_in_4bit else "LoRA" if self.lora_r else "full"


@dataclass
class DataArguments:
    """Which data, and how they become sequences of tokens."""

    data_path: str = field(
        metadata={"help": "A file of instructions or conversations, a folder of them, or OWNER/NAME."}
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Held-out data, for an eval loss."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Without --eval_data_path: the share of rows to hold out, chosen by --seed."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack several examples into sequences of --model_max_length; a batch counts sequences."},
    )
    share_prefixes: bool = field(
        default=True,
        metadata={"help": "Compute what examples of a batch begin with in common once; exact, and faster."},
    )
    dedup: bool = field(default=False, metadata={"help": "Drop rows whose text has already been read."})
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Stop before training if more than this share of the rows is refused."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Roles of keys by hand: instruction=KEY,output=KEY; input, system, history, messages. "
            "user=NAME,assistant=NAME are the names of speakers."
        },
    )
    ignore_columns: str | None = field(default=None, metadata={"help": "Keys to leave unread: KEY,KEY."})
    empty_output: str = field(
        default="refuse",
        metadata={"help": "What to do with rows without an answer: refuse, or train.", "choices": ["refuse", "train"]},
    )
    check_data: bool = field(default=False, metadata={"help": "Validate the data, report, and exit."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise while training and keep nothing on disk; needs --max_steps."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; by default one per core."}
    )

    @property
    def reads_by(self) -> Columns:
        """Return how records are to be read; raise UserError if --columns cannot be understood."""
        by_hand = []
        for given in self.columns.split(",") if self.columns else []:
            role, _, key = given.partition("=")
            if role.strip() not in (*ROLES, *SPEAKERS) or not key.strip():
                raise UserError(
                    f"--columns {self.columns} must be ROLE=KEY,ROLE=KEY with the roles {', '.join(ROLES)}, or user "
                    "and assistant for speakers; type, for example, --columns instruction=question,output=answer"
                )
            by_hand.append((role.strip(), key.strip()))
        ignored = frozenset(key.strip() for key in (self.ignore_columns or "").split(",") if key.strip())
        return Columns(tuple(by_hand), ignored, self.empty_output == "train")

    @property
    def holds_out(self) -> bool:
        """Tell whether there is an eval loss."""
        return bool(self.eval_data_path or self.eval_fraction)


@dataclass
class PlanArguments:
    """What fits: the table of --plan, and the check before a run."""

    plan: bool = field(default=False, metadata={"help": "Show what fits, with commands, and exit; loads no weights."})
    plan_gpu: str | None = field(default=None, metadata={"help": "Plan for these GPUs, such as 2x24GB."})
    plan_ram: str | None = field(default=None, metadata={"help": "Plan for this much host memory, such as 128GB."})
    plan_ranks: int | None = field(default=None, metadata={"help": "Plan for this many of your GPUs, or CPU ranks."})
    plan_for_shell: bool = field(default=False, metadata={"help": "With --plan: print only the choice for ds_all.sh."})
    check_fit: bool = field(default=True, metadata={"help": "Refuse a run that will not fit according to the plan."})


@dataclass(frozen=True)
class Schedule:
    """How long a run is; a stream counts as one epoch."""

    num_steps: int
    num_epochs: float


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How to train: transformers' own arguments, with the defaults that suit fine-tuning.

    `chooses_checkpointing`, `chooses_batch_size` and `chooses_workers` tell that no flag decides.
    """

    output_dir: str = field(kw_only=True, metadata={"help": "Where the fine-tuned model and its checkpoints go."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where hub files and tokenised data are kept."})
    model_max_length: int = field(default=2048, metadata={"help": "Tokens per sequence at most; longer rows are cut."})
    bf16: bool | None = field(default=None, metadata={**BARE, "help": "bf16 autocast; by default if the GPU has bf16."})
    fp16: bool | None = field(default=None, metadata={**BARE, "help": "fp16 autocast; by default if the GPU lacks it."})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Batch size per device; by default 8 examples. With --packing: 1 sequence on a CPU; on a GPU as "
            "many sequences as fit, up to 16,384 tokens in all."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={"help": "Compile layers around attention and loss (a minute); not with activation checkpointing."},
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that build batches; by default 2 with a GPU, else none."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log the loss every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it False: every column is used."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Log an average in place of NaN or inf."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep; older ones are deleted."})
    save_optimizer_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints that keep their optimizer state; older ones keep only weights."}
    )
    offload: str = field(
        default="none",
        metadata={"help": "ZeRO: keep optimizer states, or everything, in host memory.", "choices": zero.OFFLOADS},
    )
    offload_dir: str | None = field(
        default=None, metadata={"help": "ZeRO-3: a folder on an NVMe disk for what is offloaded."}
    )

    def __post_init__(self):
        flags.check_each(self)
        self.fsdp = None  # transformers takes the word "False" for an option
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = False  # transformers would take a perplexity for better if it is greater
        device = machine.accelerator(self.use_cpu)
        pins_memory = machine.has_own_memory(device)
        if self.bf16 is None and self.fp16 is None:
            self.bf16, self.fp16 = machine.choose_precision(device)
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        if self.deepspeed:
            self.deepspeed = zero.read_configuration(self.deepspeed, self.offload, self.offload_dir, pins_memory)
        self.chooses_checkpointing = self.activation_checkpointing is None and self.gradient_checkpointing is None
        self.chooses_batch_size = self.per_device_train_batch_size is None
        if self.chooses_batch_size:
            self.per_device_train_batch_size = EXAMPLES_PER_BATCH
        self.chooses_workers = self.dataloader_num_workers is None
        if self.chooses_workers:
            self.dataloader_num_workers = 2 if pins_memory else 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and pins_memory
        if self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}  # waiting for a copy would empty the device's queue
        try:
            super().__post_init__()
        except Exception as error:  # of many kinds, from transformers and accelerate
            raise UserError(f"a flag cannot be used: {' '.join(str(error).split())}") from None
        if self.n_gpu > 1:
            # Without a launcher the Trainer would split each batch over all visible GPUs by DataParallel.
            self._n_gpu = 1
            if self.should_log:
                print("one process uses one GPU; to use every GPU of this host: sh ds_all.sh")

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage, 0 without DeepSpeed."""
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of matrix products."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def optimizer_name(self) -> str:
        """Return --optim as it was typed."""
        return flags.name_of(self.optim)

    @property
    def ranks_per_host(self) -> int:
        """Return how many of the run's processes are on this host, according to its launcher."""
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.world_size)

    @property
    def sequences_per_step(self) -> int:
        """Return how many sequences all ranks train on in one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def schedule(self, num_sequences: int | None) -> Schedule:
        """Return the length of a run over so many sequences an epoch; None is a stream."""
        if num_sequences is None:
            return Schedule(self.max_steps, 1.0)
        num_batches = math.ceil(num_sequences / (self.train_batch_size * self.world_size))
        steps_per_epoch = math.ceil(num_batches / self.gradient_accumulation_steps)
        num_steps = self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)
        return Schedule(num_steps, num_steps / steps_per_epoch)

    def set_batch_size(self, number: int) -> None:
        """Make a batch of so many sequences per device."""
        self.per_device_train_batch_size = number
        if self.deepspeed:
            self.hf_deepspeed_config.config["train_micro_batch_size_per_gpu"] = number

    def turn_on_checkpointing(self) -> None:
        """Recompute activations in the backward instead of keeping them."""
        self.activation_checkpointing = self.gradient_checkpointing = True


# -------------------------------------------------------------------------------------------------------------- checks


def settle(data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Set what no flag says and another flag implies: evaluation where data are held out, no workers for a stream.

    NEFTune's noise is another one for each example, so nothing can be computed once for several.
    """
    if data_args.holds_out and training_args.eval_strategy == "no":
        training_args.eval_strategy = IntervalStrategy.EPOCH
    if data_args.streaming and training_args.chooses_workers:
        training_args.dataloader_num_workers = 0
    data_args.share_prefixes &= not training_args.neftune_noise_alpha


def check(
    model_args: ModelArguments, data_args: DataArguments, plan_args: PlanArguments, training_args: TrainingArguments
) -> None:
    """Raise UserError on arguments that could only fail later, and on a GPU that PyTorch has no kernels for."""
    if training_args.device.type == "cuda" and not plan_args.plan_gpu:
        machine.check_kernels("--use_cpu True")
    _check_output(model_args, training_args)
    _check_data(data_args, training_args)
    _check_lora(model_args, training_args)
    flags.check_together(training_args, data_args.holds_out)
    optimization.check_optimizer(training_args)
    optimization.check_schedule(training_args)
    _check_zero(training_args)
    _check_compiled_blocks(training_args)
    _check_ranks(training_args)


def _check_output(model_args: ModelArguments, args: TrainingArguments) -> None:
    output_dir, model = Path(args.output_dir), Path(model_args.model_name_or_path)
    if output_dir.exists() and model.exists() and output_dir.samefile(model):
        raise UserError(
            f"--output_dir {output_dir} is the model folder itself, which would be overwritten; give another folder"
        )


def _check_data(data_args: DataArguments, args: TrainingArguments) -> None:
    columns = data_args.reads_by
    roles = [role for role, _ in columns.by_hand if role not in SPEAKERS]
    if len({*roles}) < len(roles) or len({key for _, key in columns.by_hand}) < len(columns.by_hand):
        raise UserError(f"--columns {data_args.columns} gives a role or a key twice; type each once")
    if both := columns.ignored.intersection(key for _, key in columns.by_hand):
        raise UserError(f"{sorted(both)[0]} is in --columns and in --ignore_columns; leave it out of one of them")
    if not 0 <= data_args.eval_fraction < 1:
        raise UserError(f"--eval_fraction {data_args.eval_fraction} must be in [0, 1), such as 0.05")
    if not data_args.streaming:
        return
    if args.max_steps <= 0:
        raise UserError("--streaming True needs --max_steps: rows are not counted in advance; type --max_steps 1000")
    not_streamed = {
        "--eval_fraction": data_args.eval_fraction,
        "--dedup": data_args.dedup,
        "--check_data": data_args.check_data,
        "--dataloader_num_workers": args.dataloader_num_workers,
    }
    if given := [flag for flag, value in not_streamed.items() if value]:
        raise UserError(f"--streaming True reads rows while it trains, and keeps none; leave out {', '.join(given)}")


def _check_lora(model_args: ModelArguments, args: TrainingArguments) -> None:
    rank, alpha, dropout = model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout
    if rank < 0 or not 0 <= dropout < 1 or (alpha is not None and alpha <= 0):
        raise UserError(
            f"--lora_r {rank} --lora_alpha {alpha} --lora_dropout {dropout} cannot be used: rank and alpha must be "
            "above 0, and dropout in [0, 1); type, for example, --lora_r 16 --lora_alpha 32 --lora_dropout 0.05"
        )
    if not rank and (model_args.load_in_4bit or alpha or model_args.lora_target_modules or dropout):
        raise UserError("--load_in_4bit and --lora_* need LoRA, which is off; add --lora_r 16")
    if model_args.load_in_4bit and args.zero_stage == 3:
        raise UserError("--load_in_4bit does not go with ZeRO-3, which cannot split such weights; type ZERO_STAGE=2")
    if model_args.load_in_4bit:
        optimization.check_bitsandbytes("--load_in_4bit")


def _check_zero(args: TrainingArguments) -> None:
    if (args.offload != "none" or args.offload_dir) and not args.deepspeed:
        raise UserError(
            "--offload needs DeepSpeed ZeRO; type OFFLOAD=optimizer sh ds_all.sh, or add "
            "--deepspeed ds_zero3_config.json"
        )
    if args.deepspeed and args.device.type not in ("cuda", "cpu"):
        raise UserError(f"--deepspeed runs here on CUDA GPUs and CPUs, not on {args.device.type}; leave it out")
    if args.offload != "none" and args.optimizer_name not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(f"--offload runs DeepSpeed's own AdamW, not --optim {args.optimizer_name}; leave --optim out")
    if args.deepspeed:
        tell = args.local_process_index == 0
        zero.check_machine(args.offload, args.offload_dir, on_the_cpu=args.device.type == "cpu", tell=tell)


def _check_compiled_blocks(args: TrainingArguments) -> None:
    """Raise UserError if --compile_blocks is asked for where PyTorch cannot compile a layer by itself."""
    others = {
        "--torch_compile, which compiles them too": args.torch_compile,
        "ZeRO-3, which splits their weights": args.zero_stage == 3,
        "--activation_checkpointing, inside which PyTorch compiles nothing": (
            args.activation_checkpointing or args.gradient_checkpointing
        ),
    }
    if args.compile_blocks and (other := next((name for name, is_given in others.items() if is_given), None)):
        raise UserError(f"--compile_blocks does not go with {other}; leave one of them out")


def _check_ranks(args: TrainingArguments) -> None:
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        # On a CPU the Trainer joins the other ranks only if told to; each would train on the same data.
        raise UserError(f"{launched} processes were launched but the Trainer sees one; add --use_cpu True")
