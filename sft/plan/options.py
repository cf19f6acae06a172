"""The ways to train, what each takes of a machine, and the best that fits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sft.machine import GIB, Machine
from sft.plan.activations import Load, Strategy
from sft.plan.memory import Footprint, footprint, sizes_of
from sft.training import disk

EIGHT_BIT = "adamw_bnb_8bit"


@dataclass(frozen=True)
class Option:
    """A strategy with what it takes without and with activation checkpointing, and of the disk."""

    strategy: Strategy
    plain: Footprint
    checkpointed: Footprint
    disk: int

    def best_on(self, machine: Machine, is_proven: bool = False) -> Strategy | None:
        """Return the strategy in the way that fits, preferably without activation checkpointing; None if it does not.

        `is_proven` demands room to spare.
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
    """Tell whether a machine has what is needed, with room to spare if `is_proven`; CPU ranks share its memory."""
    if machine.is_gpu:
        bytes_there = machine.proven_bytes if is_proven else machine.usable_bytes
        return needs.device <= bytes_there and needs.host <= machine.host_bytes
    ranks = machine.num_devices if zero_stage else 1
    return needs.device * ranks <= machine.usable_bytes * machine.num_devices and needs.host <= machine.host_bytes


def strategies(num_devices: int, is_gpu: bool) -> Iterator[Strategy]:
    """Yield the ways to train, the best first: all weights before LoRA, and fast ones before offloaded ones."""
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


def option_of(strategy: Strategy, load: Load, num_tokens: int, machine: Machine) -> Option:
    """Return a strategy with what it takes on a machine."""
    plain, checkpointed = (
        footprint(replace(strategy, checkpointing=checkpointing), load, num_tokens, machine.num_devices)
        for checkpointing in (False, True)
    )
    return Option(strategy, plain, checkpointed, _disk_bytes(strategy, load))


def options(load: Load, num_tokens: int, machine: Machine) -> list[Option]:
    """Return every strategy with what it takes on a machine, for flat batches of so many tokens."""
    ways = strategies(machine.num_devices, machine.is_gpu)
    return [option_of(strategy, load, num_tokens, machine) for strategy in ways]


def _disk_bytes(strategy: Strategy, load: Load) -> int:
    """Return the bytes of two checkpoints, which is what the scripts keep, and of a merged model."""
    sizes, itemsize = sizes_of(load, strategy.is_lora), load.compute_dtype.itemsize
    merged = sizes.total * itemsize if strategy.is_lora else 0
    return 2 * disk.checkpoint_bytes(sizes.trained, strategy.zero_stage, itemsize < 4) + merged


# ----------------------------------------------------------------------------------------------------------- the table


def name_of(strategy: Strategy) -> str:
    """Return the name of a strategy in the table, without activation checkpointing."""
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


def choose(found: Sequence[Option], machine: Machine, method: str | None = None) -> Strategy | None:
    """Return the first strategy that surely fits, of one method or of any; else the first that may fit, if any."""
    asked = [option for option in found if method in (None, option.strategy.method)]
    fitting = (option.best_on(machine, is_proven) for is_proven in (True, False) for option in asked)
    return next((strategy for strategy in fitting if strategy), None)
