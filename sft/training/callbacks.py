"""What happens between steps: the check before the first one, and the end of a run that is stopped or wasted."""

import math
import signal
import time
from collections import deque
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel, TrainerCallback, TrainerControl

from sft.model import patch
from sft.program import WastedRunError
from sft.training import checkpoints
from sft.training.arguments import TrainingArguments

MAX_SKIPPED_STEPS = 20  # in a row, each halving the loss scale: from 2^12 to below 1


class LeakCheck(TrainerCallback):
    """Before the first step: no example may see another that shares its flat batch."""

    def __init__(self, shares_batches: bool, shares_prefixes: bool):
        self.shares_batches = shares_batches
        self.shares_prefixes = shares_prefixes

    def on_train_begin(self, args: TrainingArguments, state, control, model: PreTrainedModel, **unused) -> None:
        """Raise UserError if the logits of packed examples are not those of each alone."""
        dtype = args.compute_dtype
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            difference = patch.check(model, dtype, self.shares_batches, self.shares_prefixes)
        if state.is_world_process_zero:
            print(f"checked  examples have the same logits in a flat batch as alone, to {difference:.1g}", flush=True)


@dataclass
class StepOutcome:
    """What a step came to, on its way to the host."""

    step: int
    sums: torch.Tensor  # fp32 (2,), on the host: the loss, and how many ranks were asked to stop
    arrived: torch.Event | None  # None if the host has already waited
    was_skipped: bool

    def read(self) -> tuple[float, float]:
        """Wait for the device, and return the loss and the number of ranks."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, num_told = self.sums.tolist()
        return loss, num_told


class Watch(TrainerCallback):
    """Between steps, on all ranks at once: save and stop where asked to, and stop a run that is wasted.

    A GPU computes while the host goes on, and reading a loss would make the host wait until nothing is left to do.
    There each step is judged once the next one has been launched; before a save, an evaluation or the end, at once.
    """

    def __init__(self, trainer: transformers.Trainer, device: torch.device):
        self.trainer = trainer
        self.lag = 1 if runs_ahead(device) else 0  # steps that a judgement may be late by
        self.outcomes: deque[StepOutcome] = deque()
        self.is_told = False  # this rank was asked to stop
        self.is_stopped = False  # some rank was, and all have agreed to
        self.num_skipped = 0
        self.num_tokens, self.seconds, self.began = 0, 0.0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Return the tokens that all ranks have trained on by the seconds from step to step; None without any."""
        return self.num_tokens * self.trainer.args.world_size / self.seconds if self.seconds else None

    def on_train_begin(self, args: TrainingArguments, state, control, **unused) -> None:
        """Treat SIGTERM, and a terminal that closes, as a request to save and stop; start the clock.

        Under nohup the closing is ignored, and stays so.
        """
        heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers_before = {number: signal.signal(number, self._take_note) for number in heard}
        self.began = time.perf_counter()

    def _take_note(self, signal_number: int, frame) -> None:
        self.is_told = True

    def on_epoch_begin(self, args: TrainingArguments, state, control, **unused) -> None:
        """Set the order's epoch, which accelerate does not do for several ranks that resume within an epoch."""
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state, control, **unused) -> None:
        """Judge the steps that are due, and count the seconds since the step before, loading of rows included."""
        self.outcomes.append(self._outcome(state.global_step))
        is_due = control.should_save or control.should_evaluate or control.should_training_stop
        self._judge(control, 0 if is_due else self.lag)
        now = time.perf_counter()
        self.seconds, self.began = self.seconds + now - self.began, now

    def _outcome(self, step: int) -> StepOutcome:
        """Send what the step came to, summed over the ranks, to the host."""
        loss = self.trainer.step_loss
        sums = torch.stack([loss, torch.full_like(loss, float(self.is_told))])
        sums = self.trainer.accelerator.reduce(sums, "sum").to("cpu", non_blocking=bool(self.lag))
        arrived = torch.Event(loss.device) if self.lag else None
        if arrived is not None:
            arrived.record()
        loss.zero_()
        return StepOutcome(step, sums, arrived, self.trainer.accelerator.optimizer_step_was_skipped)

    def _judge(self, control: TrainerControl, num_left: int) -> None:
        """Judge all steps but the newest `num_left`.

        Raises WastedRunError if the loss of one is 0 or not finite, or if too many in a row were skipped.
        """
        while len(self.outcomes) > num_left:
            outcome = self.outcomes.popleft()
            loss, num_told = outcome.read()
            self.num_skipped = self.num_skipped + 1 if outcome.was_skipped else 0
            if happened := what_is_wasted(loss, self.num_skipped):
                restart = checkpoints.where_to_restart(self.trainer.args.output_dir)
                raise WastedRunError(f"at step {outcome.step:,} {happened}; {restart}")
            if num_told:
                self.is_stopped, num_left = True, 0  # the run is saved now, so no step may be left to judge
                control.should_save = control.should_training_stop = True
                control.should_evaluate = False  # there may not be time for both

    def on_evaluate(self, args: TrainingArguments, state, control, **unused) -> None:
        """Leave the seconds of an evaluation out."""
        self.began = time.perf_counter()

    def on_save(self, args: TrainingArguments, state, control, **unused) -> None:
        """Leave the seconds of a save out."""
        self.began = time.perf_counter()

    def on_epoch_end(self, args: TrainingArguments, state, control, **unused) -> None:
        """Judge the epoch's last step; a run that has saved and stops does not evaluate or save again."""
        if self.is_stopped:
            control.should_evaluate = control.should_save = False
        self._judge(control, 0)

    def on_train_end(self, args: TrainingArguments, state, control, **unused) -> None:
        """Let the signals end the process again."""
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)


def runs_ahead(device: torch.device) -> bool:
    """Tell whether a device computes while the host goes on, and says by an event that it is done."""
    if device.type == "cpu":
        return False
    try:
        torch.Event(device)
    except (RuntimeError, TypeError):
        return False
    return True


def what_is_wasted(loss: float, num_skipped: int) -> str | None:
    """Return why a run is wasted, and what to change, from a step's loss and the skipped steps in a row."""
    lower = "a lower --learning_rate or more --warmup_steps"
    if not math.isfinite(loss):
        return f"the loss is {loss}; try {lower}, or compute in bf16 (--bf16 True) or fp32 (--fp16 False)"
    if loss == 0:
        return (
            "the loss is exactly 0, which happens when numbers overflow in 16 bits; type --fp16 False --bf16 False to "
            f"compute in fp32, or try {lower}"
        )
    if num_skipped >= MAX_SKIPPED_STEPS:
        return (
            f"{num_skipped} steps in a row were skipped, since gradients overflow fp16 at every loss scale; compute "
            f"in bf16 (--bf16 True) on a GPU that has it, or in fp32 (--fp16 False), or try {lower}"
        )
    return None
