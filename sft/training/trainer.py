"""transformers' Trainer with an exact eval loss, each sequence once an epoch, and checkpoints that can be trusted."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate.utils import AutocastKwargs, GradScalerKwargs, gather_object
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import TrainOutput

from sft.data.order import EpochOrder, EvenSequences
from sft.model import lora, patch
from sft.program import InterruptedRunError, UserError, one_line
from sft.training import checkpoints, disk
from sft.training.arguments import INITIAL_LOSS_SCALE, TrainingArguments
from sft.training.callbacks import LeakCheck, Watch
from sft.training.resume import RunSettings


class Trainer(transformers.Trainer):
    """transformers' Trainer on flat batches; `shares_batches` tells that several examples may be in one.

    With LoRA, checkpoints hold the adapter; the result is the adapter, and a plain model if `merges_lora`.
    """

    args: TrainingArguments

    def __init__(self, *args, settings: RunSettings, shares_batches: bool, merges_lora: bool = True, **kwargs):
        """Add the callbacks that check the attention before the first step, and the run between steps."""
        super().__init__(*args, **kwargs)
        self._loss_shifts_labels = False  # each of a batch's labels is trained on, the first one too
        self.neftune_noise_alpha = None  # the noise of sft.model.neftune knows each example's length
        self.settings = settings
        self.merges_lora = merges_lora
        self.is_lora = isinstance(self.model, PeftModel)
        self.saving_into: Path | None = None
        self.has_saved = False
        self.order: EpochOrder | None = None
        self.step_loss = torch.zeros((), device=self.args.device)
        self.watch = Watch(self, self.args.device)
        self.add_callback(LeakCheck(shares_batches, settings.share_prefixes))
        self.add_callback(self.watch)

    def _build_accelerator_args(self, **keywords) -> dict:
        """Return what the Trainer asks of accelerate, with autocast's cache off and a smaller first loss scale.

        The cache would hold a 16-bit copy of every weight until the forward ends, and each is used once in it.
        """
        args = super()._build_accelerator_args(**keywords)
        scaler = GradScalerKwargs(init_scale=INITIAL_LOSS_SCALE)
        args["kwargs_handlers"] += [AutocastKwargs(cache_enabled=False), scaler]
        return args

    # ----------------------------------------------------------------------------------------------------------- data

    def _get_dataloader(self, dataset: Dataset, description: str, batch_size: int, *args, **kwargs):
        """Return batches of sequences, as many on each rank by adding empty ones, or those of the rank's own stream."""
        if isinstance(dataset, IterableDataset):
            # Not by accelerate: it would read the stream on one rank, and cut the flat batches up for the others.
            return DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        return super()._get_dataloader(
            EvenSequences(dataset, batch_size * self.args.world_size), description, batch_size, *args, **kwargs
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Return the order of sequences in an epoch, the same on all ranks."""
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        data_seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.order = EpochOrder(train_dataset, data_seed)
        return self.order

    # ----------------------------------------------------------------------------------------------------------- loss

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """Run a forward and a backward; keep this rank's loss of the optimizer step, and count its tokens."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_loss += loss
        self.watch.num_tokens += inputs["num_tokens"]
        return loss

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple:
        """Return the optimizer; with offloaded states, DeepSpeed's AdamW, which runs on the host's cores."""
        optimizer_class, keywords = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.offload == "none":
            return optimizer_class, keywords
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam, {name: keywords[name] for name in ("lr", "betas", "eps")}

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Return the optimizer; raise UserError if it cannot be made for this model."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, TypeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"--optim {self.args.optimizer_name} cannot be used: {one_line(error)}; type --optim adamw_torch_fused"
            ) from None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate; `eval_loss` is in nats per labelled token, `eval_perplexity` its exponential."""
        self.eval_loss_sum, self.eval_num_labels = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sums, numbers_of_labels = zip(*gather_object([(self.eval_loss_sum, self.eval_num_labels)]), strict=True)
        loss = sum(loss_sums) / sum(numbers_of_labels)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700))  # 709 would overflow
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add the batch's loss and labels to this rank's sums; return its summed loss."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss_sum = model(**inputs, num_items_in_batch=1).loss.detach()
        self.eval_loss_sum += loss_sum.item()
        self.eval_num_labels += inputs["label_positions"].numel()
        return loss_sum, None, None

    # --------------------------------------------------------------------------------------------------------- saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save a folder to generate from: with the cache on, which training turns off, and tied weights once.

        DeepSpeed ZeRO-2 hands the tied head over as a second copy, 2 GB for bloom-7b1 in 16 bits.
        """
        if state_dict is not None:
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        self.model.config.use_cache = True
        with patch.removed(self.model):
            super()._save(output_dir, state_dict)
        self.model.config.use_cache = self.args.use_cache

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; an adapter without a copy of the frozen weights, where each rank has all of it."""
        if self.is_lora and self.args.zero_stage in (1, 2):
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial) -> str:
        """Return the output folder, or the folder for unfinished checkpoints while one is being written."""
        return str(self.saving_into or super()._get_output_dir(trial))

    @contextmanager
    def _saving_into(self, folder: Path) -> Iterator[None]:
        """Let transformers write checkpoints into another folder than the output folder."""
        self.saving_into = folder
        try:
            yield
        finally:
            self.saving_into = None

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint that is there complete or not at all, then delete those beyond --save_total_limit.

        Raises UserError if the disk has no room for it, or if it is not what the model needs.
        """
        output_dir, name = self.args.output_dir, f"checkpoint-{self.state.global_step}"
        unfinished = Path(output_dir, checkpoints.UNFINISHED)
        self.on_the_first_rank(partial(self._make_room, name))
        with disk.writing(output_dir, name), self._saving_into(unfinished):
            super()._save_checkpoint(model, trial)
            self._name_the_best(unfinished / name)
        self.on_the_first_rank(partial(self._finish_checkpoint, unfinished / name))

    def _make_room(self, name: str) -> None:
        args, best = self.args, self.state.best_model_checkpoint
        disk.make_room(args.output_dir, name, self.checkpoint_bytes(), args.save_total_limit, best)

    def _name_the_best(self, unfinished: Path) -> None:
        """Give the best checkpoint the name in the state that it will have once it is finished."""
        if best := self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(Path(self.args.output_dir, Path(best).name))
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / checkpoints.STATE))

    def _finish_checkpoint(self, unfinished: Path) -> None:
        """Check and mark a written checkpoint, then delete what the limits no longer keep."""
        output_dir, args = self.args.output_dir, self.args
        self.has_saved = True
        with disk.writing(output_dir, unfinished.name):
            checkpoints.finish(unfinished, output_dir, self.saved_shapes(), self.settings.named())
        checkpoints.drop_older(output_dir, args.save_total_limit, self.state.best_model_checkpoint)
        if args.save_optimizer_limit:
            for step in checkpoints.complete_steps(output_dir)[: -args.save_optimizer_limit]:
                checkpoints.keep_weights_alone(Path(output_dir, f"checkpoint-{step}"))

    def on_the_first_rank(self, work: Callable[[], None]) -> None:
        """Do `work` on the first rank, which writes; raise its UserError on all ranks."""
        message = None
        try:
            if self.args.should_save:
                work()
        except UserError as error:
            message = str(error)
        if messages := [message for message in gather_object([message]) if message]:
            raise UserError(messages[0])

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes the next checkpoint takes: those of the last one, else an estimate."""
        if self.has_saved and (last := checkpoints.newest(self.args.output_dir)):
            return disk.size_of(last)
        args, in_16_bits = self.args, self.args.compute_dtype.itemsize < 4
        return disk.checkpoint_bytes(self.settings.num_trained, args.zero_stage, in_16_bits, args.save_only_model)

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shapes of what the model's folder must hold, also where ZeRO-3 has split it."""
        if self.is_lora:
            return lora.saved_shapes(self.model)
        tied = self.model.all_tied_weights_keys
        state = self.model.state_dict(keep_vars=True)
        return {
            name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in state.items() if name not in tied
        }

    def save_result(self) -> None:
        """Make the model of the last step the result, each file in the output folder complete or not there."""
        output_dir = self.args.output_dir
        source = Path(output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            source = Path(output_dir, Path(self.state.best_model_checkpoint).name)
        with disk.writing(output_dir, "the result"):
            if checkpoints.fault_of(source):
                source = Path(output_dir, checkpoints.UNFINISHED, "model")
                self.save_model(str(source))
            self.on_the_first_rank(lambda: self._publish(source))
            self.on_the_first_rank(lambda: shutil.rmtree(Path(output_dir, checkpoints.UNFINISHED), ignore_errors=True))
            self.save_state()

    def _publish(self, source: Path) -> None:
        """Make a saved model the result; an adapter goes into a folder of its own beside its merged model."""
        output_dir = Path(self.args.output_dir)
        if not self.is_lora:
            checkpoints.publish(source, str(output_dir))
            return
        adapter, merged = output_dir / lora.ADAPTER, output_dir / checkpoints.UNFINISHED / "merged"
        adapter.mkdir(exist_ok=True)
        checkpoints.publish(source, str(adapter))
        if self.merges_lora:
            model, tokenizer = lora.merge(str(adapter), self.args.compute_dtype, self.args.cache_dir)
            model.generation_config = self.model.generation_config
            model.save_pretrained(merged)
            tokenizer.save_pretrained(merged)
            checkpoints.publish(merged, str(output_dir))

    # ------------------------------------------------------------------------------------------------ the whole run

    def train_to_the_end(self, resumed: Path | None, num_steps: int) -> TrainOutput | None:
        """Train from the start or from a checkpoint; a checkpoint of the last step is already the result.

        Raises InterruptedRunError after SIGTERM or SIGHUP, once the step it came in is saved.
        """
        if resumed and checkpoints.step_of(resumed) >= num_steps:
            self.state = TrainerState.load_from_json(str(resumed / checkpoints.STATE))
            if self.is_world_process_zero():
                print(f"{resumed} is the last one: all {self.state.global_step:,} steps are done", flush=True)
            return None
        with loading_told():
            output = self.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if self.watch.is_stopped and self.state.global_step < num_steps:
            step, output_dir = self.state.global_step, self.args.output_dir
            raise InterruptedRunError(
                f"SIGTERM or SIGHUP received; saved {output_dir}/checkpoint-{step} after step {step:,} of "
                f"{num_steps:,}; type the same command again to resume"
            )
        return output

    def close(self) -> None:
        """Wait for all ranks and close the process group: one open at exit can abort a rank whose work is done."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


@contextmanager
def loading_told() -> Iterator[None]:
    """Raise UserError where a process that builds batches was killed; PyTorch says so with its own traceback."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{one_line(error)}: most likely memory ran out; type --dataloader_num_workers 0 to build batches without "
            "other processes, and the same command goes on from the newest checkpoint"
        ) from None
