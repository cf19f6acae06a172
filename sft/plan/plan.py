"""Which ways to train fit a machine, in a table, and the exact command for the best of them.

python train_sft.py --model_name_or_path bigscience/bloom-7b1 --data_path D --output_dir O --plan
python train_sft.py ... --plan --plan_gpu 2x24GB --plan_ram 128GB      for cards that are not here
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import gather_object
from transformers import PretrainedConfig, TrainingArguments

from sft import machine
from sft.machine import GIB, Machine
from sft.model.attention import OLDEST_WITH_BLOCKS
from sft.model.lora import LoraArguments
from sft.plan.memory import Footprint, Load, Strategy, footprint, sizes_of
from sft.program import UserError, one_line
from sft.training import disk, precision, zero

EIGHT_BIT = "adamw_bnb_8bit"
STEP_TOKENS = 16_384  # of a GPU's batch; in shorter ones launches and the optimizer take most of the time
UNKNOWN_FORM = (RuntimeError, TypeError, ValueError, AttributeError)  # of a model that cannot be probed
LORA_RATE = "2e-4"  # a usual learning rate of LoRA, ten times that of all weights


@dataclass
class PlanArguments:
    """What fits: the table of --plan, and the check before a run."""

    plan: bool = field(default=False, metadata={"help": "Say what fits, with commands, and end; loads no weights."})
    plan_gpu: str | None = field(default=None, metadata={"help": "Plan for these cards, such as 2x24GB."})
    plan_ram: str | None = field(default=None, metadata={"help": "Plan for so much memory of the host, such as 128GB."})
    plan_ranks: int | None = field(default=None, metadata={"help": "Plan for so many of the GPUs, or ranks on a CPU."})
    plan_for_shell: bool = field(default=False, metadata={"help": "With --plan: print the choice of ds_all.sh alone."})
    check_fit: bool = field(default=True, metadata={"help": "Refuse a run that the plan says cannot fit."})


@dataclass(frozen=True)
class Option:
    """A strategy with what it takes without and with activation checkpointing, and of the disk."""

    strategy: Strategy
    plain: Footprint
    checkpointed: Footprint
    disk: int

    def best_on(self, machine: Machine, is_proven: bool = False) -> Strategy | None:
        """Return the strategy as it fits, without activation checkpointing if it can be; None if it does not.

        `is_proven` asks for room to spare.
        """
        for needs, checkpointing in ((self.plain, False), (self.checkpointed, True)):
            if fits(needs, machine, self.strategy.zero_stage, is_proven):
                return replace(self.strategy, checkpointing=checkpointing)
        return None

    def verdict_on(self, machine: Machine) -> str:
        """Return whether the strategy fits, in a word or two."""
        proven, any_way = self.best_on(machine, is_proven=True), self.best_on(machine)
        if any_way is None:
            return "no"
        return "unproven" if proven is None else "checkpointed" if proven.checkpointing else "yes"


def fits(needs: Footprint, machine: Machine, zero_stage: int, is_proven: bool = False) -> bool:
    """Tell whether a machine has what is needed, or is sure to have it; on a CPU the ranks share the host's memory."""
    if machine.is_gpu:
        bytes_there = machine.proven_bytes if is_proven else machine.usable_bytes
        return needs.device <= bytes_there and needs.host <= machine.host_bytes
    ranks = machine.num_devices if zero_stage else 1
    return needs.device * ranks <= machine.usable_bytes * machine.num_devices and needs.host <= machine.host_bytes


def strategies(num_devices: int, is_gpu: bool) -> Iterator[Strategy]:
    """Yield the ways to train, the best first: all weights before LoRA, and the fast before what is offloaded."""
    spread = [Strategy("full", stage) for stage in (2, 3)]
    single = [Strategy("full")] + ([Strategy("full", optim=EIGHT_BIT)] if is_gpu else [])
    yield from [*spread, *single] if num_devices > 1 else single
    if is_gpu:
        for stage, offload in ((2, "optimizer"), (3, "optimizer"), (3, "all")):
            yield Strategy("full", stage, offload)
    spread = [Strategy("LoRA", stage) for stage in (2, 3)]
    yield from [*spread, Strategy("LoRA")] if num_devices > 1 else [Strategy("LoRA")]
    yield Strategy("QLoRA")
    if is_gpu:
        yield Strategy("LoRA", 3, "all")


def option_of(strategy: Strategy, load: Load, machine: Machine) -> Option:
    """Return a strategy with what it takes on a machine."""
    plain, checkpointed = (
        footprint(replace(strategy, checkpointing=checkpointing), load, machine.num_devices)
        for checkpointing in (False, True)
    )
    return Option(strategy, plain, checkpointed, _disk_bytes(strategy, load))


def options(load: Load, machine: Machine) -> list[Option]:
    """Return every strategy with what it takes on a machine."""
    return [option_of(strategy, load, machine) for strategy in strategies(machine.num_devices, machine.is_gpu)]


def _disk_bytes(strategy: Strategy, load: Load) -> int:
    """Return the bytes of two checkpoints, as the scripts keep them, and of a merged model."""
    sizes, itemsize = sizes_of(load.config, load.lora_args, strategy.method != "full"), load.compute_dtype.itemsize
    merged = sizes.total * itemsize if strategy.method != "full" else 0
    return 2 * disk.checkpoint_bytes(sizes.trained, strategy.zero_stage, itemsize < 4) + merged


# ----------------------------------------------------------------------------------------------------------- the table


def name_of(strategy: Strategy) -> str:
    """Return how a table names a strategy, activation checkpointing apart."""
    where = f"ZeRO-{strategy.zero_stage}" if strategy.zero_stage else "one process"
    offload = {"none": "", "optimizer": ", optimizer on the host", "all": ", all on the host"}[strategy.offload]
    optim = ", 8-bit AdamW" if strategy.optim == EIGHT_BIT else ""
    return f"{strategy.method}, {where}{optim}{offload}"


def table(found: Sequence[Option], machine: Machine) -> str:
    """Return the strategies as lines of text, in GiB, with which of them fit."""
    device = "each GPU" if machine.is_gpu else "each process"
    head = ("", device, "checkpointed", "host", "disk", "fits")
    lines = [f"{head[0]:42}{head[1]:>13}{head[2]:>14}{head[3]:>8}{head[4]:>8}  {head[5]}"]
    for option in found:
        sizes = [option.plain.device, option.checkpointed.device, option.plain.host, option.disk]
        plain, checkpointed, host, on_disk = (f"{size / GIB:,.1f}" for size in sizes)
        name, verdict = name_of(option.strategy), option.verdict_on(machine)
        lines.append(f"{name:42}{plain:>13}{checkpointed:>14}{host:>8}{on_disk:>8}  {verdict}")
    return "\n".join(lines)


def command(strategy: Strategy, run: "Run", num_devices: int) -> str:
    """Return what to type for a strategy with a run's model, data and output."""
    variables = {"MODEL": run.model, "DATA": run.data, "OUTPUT": run.output}
    max_length = run.args.model_max_length
    flags = [f"--model_max_length {max_length}"] if max_length != 2048 else []
    if strategy.method != "full":
        flags += ["--lora_r 16", f"--learning_rate {LORA_RATE}"]
    if strategy.method == "QLoRA":
        flags.append("--load_in_4bit")
    if strategy.optim == EIGHT_BIT:
        flags.append(f"--optim {EIGHT_BIT}")
    if strategy.zero_stage:
        variables |= {"ZERO_STAGE": str(strategy.zero_stage), "NUM_GPUS": str(num_devices)}
        if strategy.offload != "none":
            variables["OFFLOAD"] = strategy.offload
        flags.append(f"--activation_checkpointing {strategy.checkpointing}")
    elif strategy.checkpointing:
        flags.append("--activation_checkpointing True")
    script = "ds_all.sh" if strategy.zero_stage else "base_run.sh"
    assigned = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*assigned, "sh", script, *flags])


def choose(found: Sequence[Option], machine: Machine, method: str | None = None) -> Strategy | None:
    """Return the first strategy that fits, of one method or of any; one that is unproven where no other does."""
    asked = [option for option in found if method in (None, option.strategy.method)]
    fitting = (option.best_on(machine, is_proven) for is_proven in (True, False) for option in asked)
    return next((strategy for strategy in fitting if strategy), None)


# ----------------------------------------------------------------------------------------------------- for one command


@dataclass(frozen=True)
class Run:
    """What a command asks for: its arguments and its model."""

    args: TrainingArguments
    lora_args: LoraArguments
    plan_args: PlanArguments
    config: PretrainedConfig
    model: str
    data: str
    output: str

    @property
    def machine(self) -> Machine:
        """Return the machine that it runs on, or is planned for."""
        ranks = self.plan_args.plan_ranks or (zero.ranks_a_host(self.args) if self.args.world_size > 1 else None)
        return machine.find(self.plan_args.plan_gpu, self.plan_args.plan_ram, ranks, self.args.use_cpu)

    @property
    def strategy(self) -> Strategy:
        """Return the strategy that its flags ask for."""
        method = "QLoRA" if self.lora_args.load_in_4bit else "LoRA" if self.lora_args.lora_r else "full"
        optim = getattr(self.args.optim, "value", self.args.optim)
        checkpointing = bool(self.args.activation_checkpointing)
        return Strategy(method, zero.stage_of(self.args), self.args.offload, optim, checkpointing)

    def load(self, num_tokens: int, here: Machine) -> Load:
        """Return what is trained on, in rows of so many tokens; cards that are only named compute in bf16, or fp16."""
        dtype = precision.compute_dtype(self.args)
        if self.plan_args.plan and here.is_gpu and dtype == torch.float32:
            dtype = torch.bfloat16
        lora_args = self.lora_args if self.lora_args.lora_r else replace(self.lora_args, lora_r=16)
        accumulates = self.args.gradient_accumulation_steps > 1
        by_blocks = here.is_gpu and here.capability >= OLDEST_WITH_BLOCKS
        return Load(self.config, lora_args, num_tokens, accumulates, dtype, here.is_gpu, by_blocks)

    def needs(self, strategy: Strategy, num_tokens: int) -> Footprint:
        """Return what a strategy takes here, in rows of so many tokens."""
        here = self.machine
        num_hosts = max(1, self.args.world_size // here.num_devices)
        return footprint(strategy, self.load(num_tokens, here), here.num_devices, num_hosts)


def show(run: Run) -> str:
    """Return the table of --plan with the best command of each method, or the choice for ds_all.sh.

    A row is one of --model_max_length tokens, as the scripts pack them.

    Raises UserError for ds_all.sh if no ZeRO strategy of the method fits.
    """
    here, num_tokens = run.machine, run.args.model_max_length
    load = run.load(num_tokens, here)
    found = options(load, here)
    if run.plan_args.plan_for_shell:
        return _for_shell(run, found, load, here)
    total = here.device_bytes if here.is_gpu else here.host_bytes
    lines = [
        f"plan     {run.config.model_type} on {here.name} of {total / GIB:,.0f} GiB, {here.host_bytes / GIB:,.0f} GiB "
        f"of host memory; rows of {num_tokens:,} tokens, all trained; GiB, computed and not measured",
        table(found, here),
    ]
    if here.is_gpu:
        lines.append(
            f"note     unproven: it leaves less than {(here.usable_bytes - here.proven_bytes) / GIB:.1f} GiB to what "
            f"no plan can know; GPUs must have compute capability {machine.OLDEST_CAPABILITY} or newer, so no V100"
        )
    for method in ("full", "LoRA", "QLoRA"):
        chosen = choose(found, here, method)
        what = command(chosen, run, here.num_devices) if chosen else "does not fit"
        lines.append(f"{method:9}{what}")
    return "\n".join(lines)


def _for_shell(run: Run, found: Sequence[Option], load: Load, here: Machine) -> str:
    """Return stage, offload and activation checkpointing of the fastest ZeRO strategy that fits."""
    asked = run.strategy
    stages = [(2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
    stages = [(stage, offload) for stage, offload in stages if here.is_gpu or offload == "none"]
    ways = [replace(asked, zero_stage=stage, offload=offload) for stage, offload in stages]
    ways = [way for way in ways if asked.method != "QLoRA" or way.zero_stage == 2]
    if way := choose([option_of(way, load, here) for way in ways], here):
        return f"{way.zero_stage} {way.offload} {way.checkpointing}"
    raise UserError(f"ZERO_STAGE=auto finds no stage that fits {here.name}; {_instead(run, found, here)}")


def _instead(run: Run, found: Sequence[Option], here: Machine) -> str:
    """Return what to type instead: the best strategy of the same method that fits, or of any."""
    chosen = choose(found, here, run.strategy.method) or choose(found, here)
    if chosen is None:
        return "nothing that --plan knows fits here; give a smaller model or a shorter --model_max_length"
    return f"this fits: {command(chosen, run, here.num_devices)}"


def choose_batch_size(run: Run) -> None:
    """Set the packed rows of a batch, which no flag does: 1 on a CPU, on a GPU as many as make STEP_TOKENS and fit.

    All ranks take the same number. A run goes on with the same number on the same cards: what a host has free, which
    changes, is not asked for.
    """
    args, here, number = run.args, run.machine, 1
    if here.is_gpu:
        number = max(1, STEP_TOKENS // args.model_max_length)
    while number > 1 and not _fits_a_device(run, number * args.model_max_length):
        number //= 2
    number = min(gather_object([number]))
    args.per_device_train_batch_size = number
    if args.deepspeed:
        args.hf_deepspeed_config.config["train_micro_batch_size_per_gpu"] = number


def _fits_a_device(run: Run, num_tokens: int) -> bool:
    strategy = run.strategy
    if precision.optimizer_bytes(strategy.optim) is None:
        return False
    try:
        return run.needs(strategy, num_tokens).device <= run.machine.proven_bytes
    except UNKNOWN_FORM:
        return False


def prepare(run: Run, num_tokens: int) -> str:
    """Return the header's line on memory; turn activation checkpointing on where the run fits only with it.

    `num_tokens` are those of its longest row.

    Raises UserError if it does not fit at all, unless --check_fit is off.
    """
    here, strategy = run.machine, run.strategy
    if precision.optimizer_bytes(strategy.optim) is None:
        return f"not planned: --optim {strategy.optim} has no size that is known here"
    try:
        needs = run.needs(strategy, num_tokens)
    except UNKNOWN_FORM as error:
        return f"not planned: {run.config.model_type} has another form than is known here ({one_line(error)})"
    note = ""
    if not fits(needs, here, strategy.zero_stage, is_proven=True) and run.args.checkpointing_is_open:
        needs = run.needs(replace(strategy, checkpointing=True), num_tokens)
        run.args.activation_checkpointing = run.args.gradient_checkpointing = True
        note = "; activation checkpointing is on, without which it is not sure to fit"
    if not fits(needs, here, strategy.zero_stage, is_proven=True):
        note += "; unproven: it leaves little to what no plan can know"
    line = (
        f"about {needs.device / GIB:,.1f} of {here.usable_bytes / GIB:,.1f} GiB on "
        f"{'each GPU' if here.is_gpu else 'each process'} and {needs.host / GIB:,.1f} of "
        f"{here.host_bytes / GIB:,.1f} on the host"
    )
    if fits(needs, here, strategy.zero_stage) or not run.plan_args.check_fit:
        return f"{line}, by --plan{note}"
    found = options(run.load(run.args.model_max_length, here), here)
    raise UserError(
        f"{name_of(strategy)} on rows of {num_tokens:,} tokens needs {line}, by --plan; "
        f"{_instead(run, found, here)}; or try it all the same: --check_fit False"
    )
