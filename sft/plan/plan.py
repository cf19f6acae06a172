"""What fits a machine, in a table, and the exact command for the best of it; the check before a run.

python train_sft.py --model_name_or_path bigscience/bloom-7b1 --data_path D --output_dir O --plan
python train_sft.py ... --plan --plan_gpu 2x24GB --plan_ram 128GB      for GPUs that are not here
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers import PretrainedConfig

from sft import machine
from sft.machine import GIB, Machine
from sft.model.attention import OLDEST_WITH_BLOCKS
from sft.plan.activations import Load, Strategy
from sft.plan.memory import Footprint, footprint, optimizer_bytes
from sft.plan.options import EIGHT_BIT, Option, choose, fits, name_of, option_of, options, table
from sft.program import UserError, one_line
from sft.training.arguments import DataArguments, ModelArguments, PlanArguments, TrainingArguments

STEP_TOKENS = 16_384  # of a GPU's batch; in shorter ones launches and the optimizer take most of the time
UNKNOWN_FORM = (RuntimeError, TypeError, ValueError, AttributeError)  # of a model that cannot be probed
USUAL_RANK = 16  # of LoRA, where no flag gives one
LORA_RATE = "2e-4"  # a usual learning rate of LoRA, ten times that of all weights


@dataclass(frozen=True)
class Run:
    """What a command asks for: its arguments and its model."""

    model_args: ModelArguments
    data_args: DataArguments
    plan_args: PlanArguments
    args: TrainingArguments
    config: PretrainedConfig

    @cached_property
    def machine(self) -> Machine:
        """Return the machine that it runs on, or is planned for."""
        ranks = self.plan_args.plan_ranks or (self.args.ranks_per_host if self.args.world_size > 1 else None)
        return machine.find(self.plan_args.plan_gpu, self.plan_args.plan_ram, ranks, self.args.use_cpu)

    @property
    def strategy(self) -> Strategy:
        """Return the strategy that its flags ask for."""
        args = self.args
        checkpointing = bool(args.activation_checkpointing)
        return Strategy(self.model_args.method, args.zero_stage, args.offload, args.optimizer_name, checkpointing)

    @cached_property
    def load(self) -> Load:
        """Return what is trained; GPUs that are only named compute in bf16, or fp16."""
        here, dtype = self.machine, self.args.compute_dtype
        if self.plan_args.plan and here.is_gpu and dtype == torch.float32:
            dtype = torch.bfloat16
        lora_config = self.model_args.lora_config or LoraConfig(r=USUAL_RANK, task_type="CAUSAL_LM")
        by_blocks = here.is_gpu and here.capability >= OLDEST_WITH_BLOCKS
        accumulates = self.args.gradient_accumulation_steps > 1
        return Load(self.config, lora_config, accumulates, dtype, here.is_gpu, by_blocks)

    def needs(self, strategy: Strategy, num_tokens: int) -> Footprint:
        """Return what a strategy takes here, with flat batches of so many tokens."""
        num_hosts = max(1, self.args.world_size // self.machine.num_devices)
        return footprint(strategy, self.load, num_tokens, self.machine.num_devices, num_hosts)

    def options(self) -> list[Option]:
        """Return every strategy with what it takes here, with sequences of --model_max_length, one in a batch."""
        return options(self.load, self.args.model_max_length, self.machine)


def command(strategy: Strategy, run: Run) -> str:
    """Return what to type for a strategy with a run's model, data and output."""
    model, data, output = run.model_args.model_name_or_path, run.data_args.data_path, run.args.output_dir
    variables = {"MODEL": model, "DATA": data, "OUTPUT": output}
    max_length = run.args.model_max_length
    flags = [f"--model_max_length {max_length}"] if max_length != 2048 else []
    if strategy.is_lora:
        flags += [f"--lora_r {USUAL_RANK}", f"--learning_rate {LORA_RATE}"]
    if strategy.method == "QLoRA":
        flags.append("--load_in_4bit")
    if strategy.optim == EIGHT_BIT:
        flags.append(f"--optim {EIGHT_BIT}")
    if strategy.zero_stage:
        variables |= {"ZERO_STAGE": str(strategy.zero_stage), "NUM_GPUS": str(run.machine.num_devices)}
        if strategy.offload != "none":
            variables["OFFLOAD"] = strategy.offload
        flags.append(f"--activation_checkpointing {strategy.checkpointing}")
    elif strategy.checkpointing:
        flags.append("--activation_checkpointing True")
    script = "ds_all.sh" if strategy.zero_stage else "base_run.sh"
    assigned = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*assigned, "sh", script, *flags])


def show(run: Run) -> str:
    """Return the table of --plan with the best command of each method, or the choice for ds_all.sh.

    A batch is one sequence of --model_max_length tokens, as the scripts pack them. Raises UserError for ds_all.sh if
    no ZeRO strategy of the method fits.
    """
    here, found = run.machine, run.options()
    if run.plan_args.plan_for_shell:
        return _for_shell(run, found)
    total = here.device_bytes if here.is_gpu else here.host_bytes
    lines = [
        f"plan     {run.config.model_type} on {here.name} of {total / GIB:,.0f} GiB, {here.host_bytes / GIB:,.0f} GiB "
        f"of host memory; sequences of {run.args.model_max_length:,} tokens; in GiB, computed and not measured; "
        "checkpointed: with activation checkpointing",
        table(found, here),
    ]
    if here.is_gpu:
        spare = (here.usable_bytes - here.proven_bytes) / GIB
        lines.append(
            f"note     unproven: leaves less than {spare:.1f} GiB for what no plan can foresee; GPUs need compute "
            f"capability {machine.OLDEST_CAPABILITY} or newer, so no V100"
        )
    for method in ("full", "LoRA", "QLoRA"):
        chosen = choose(found, here, method)
        lines.append(f"{method:9}{command(chosen, run) if chosen else 'does not fit'}")
    return "\n".join(lines)


def _for_shell(run: Run, found: Sequence[Option]) -> str:
    """Return stage, offload and activation checkpointing of the fastest ZeRO strategy that fits."""
    here, asked = run.machine, run.strategy
    stages = [(2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
    stages = [(stage, offload) for stage, offload in stages if here.is_gpu or offload == "none"]
    ways = [replace(asked, zero_stage=stage, offload=offload) for stage, offload in stages]
    ways = [way for way in ways if asked.method != "QLoRA" or way.zero_stage == 2]
    if way := choose([option_of(way, run.load, run.args.model_max_length, here) for way in ways], here):
        return f"{way.zero_stage} {way.offload} {way.checkpointing}"
    raise UserError(f"ZERO_STAGE=auto finds no stage that fits {here.name}; {_instead(run, found)}")


def _instead(run: Run, found: Sequence[Option]) -> str:
    """Return what to type instead: the best strategy of the same method that fits, or of any."""
    chosen = choose(found, run.machine, run.strategy.method) or choose(found, run.machine)
    if chosen is None:
        return "nothing that --plan knows fits here; give a smaller model or a shorter --model_max_length"
    return f"this fits: {command(chosen, run)}"


# ------------------------------------------------------------------------------------------------------- before a run


def batch_size(run: Run) -> int:
    """Return the packed sequences of a device's batch: 1 on a CPU, on a GPU as many as make STEP_TOKENS and fit.

    All ranks get the same number. A run resumes with the same number on the same GPUs: what the host has free, which
    changes, is not asked for.
    """
    number, length = 1, run.args.model_max_length
    if run.machine.is_gpu:
        number = max(1, STEP_TOKENS // length)
    while number > 1 and not _fits_a_device(run, number * length):
        number //= 2
    return min(gather_object([number]))


def _fits_a_device(run: Run, num_tokens: int) -> bool:
    if optimizer_bytes(run.strategy.optim) is None:
        return False
    try:
        return run.needs(run.strategy, num_tokens).device <= run.machine.proven_bytes
    except UNKNOWN_FORM:
        return False


@dataclass(frozen=True)
class Fit:
    """How a run fits: the header's line on memory, and whether only with activation checkpointing."""

    line: str
    needs_checkpointing: bool = False


def fit(run: Run, num_tokens: int) -> Fit:
    """Return how a run fits whose longest flat batch has so many tokens.

    Raises UserError if it does not fit, unless --check_fit is off.
    """
    here, strategy = run.machine, run.strategy
    if optimizer_bytes(strategy.optim) is None:
        return Fit(f"not planned: the memory of --optim {strategy.optim} is not known")
    try:
        needs = run.needs(strategy, num_tokens)
    except UNKNOWN_FORM as error:
        return Fit(f"not planned: {run.config.model_type} is built in a way not known here ({one_line(error)})")
    note, is_proven = "", fits(needs, here, strategy.zero_stage, is_proven=True)
    needs_checkpointing = not is_proven and run.args.chooses_checkpointing
    if needs_checkpointing:
        needs = run.needs(replace(strategy, checkpointing=True), num_tokens)
        is_proven = fits(needs, here, strategy.zero_stage, is_proven=True)
        note = "; activation checkpointing is on, without which it might not fit"
    if not is_proven:
        note += "; unproven: it leaves little for what no plan can foresee"
    line = _memory_line(needs, here)
    if fits(needs, here, strategy.zero_stage) or not run.plan_args.check_fit:
        return Fit(f"{line}, according to --plan{note}", needs_checkpointing)
    raise UserError(
        f"{name_of(strategy)} with {num_tokens:,} tokens in a batch needs {line}, according to --plan; "
        f"{_instead(run, run.options())}; or try it anyway: --check_fit False"
    )


def _memory_line(needs: Footprint, here: Machine) -> str:
    where = "each GPU" if here.is_gpu else "each process"
    return (
        f"about {needs.device / GIB:,.1f} GiB on {where} (of {here.usable_bytes / GIB:,.1f}) and "
        f"{needs.host / GIB:,.1f} GiB on the host (of {here.host_bytes / GIB:,.1f})"
    )
