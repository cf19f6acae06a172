"""transformers' Trainer with an exact eval loss, each row once an epoch, checkpoints that can be trusted, and an end
where going on would be a waste."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate.utils import AutocastKwargs, GradScalerKwargs, gather_object
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from sft.data.order import EpochOrder, EvenSequences
from sft.model import lora, patch
from sft.program import InterruptedRunError, UserError
from sft.training import checkpoints, disk, precision, zero
from sft.training.callbacks import LeakCheck, Watch


class Trainer(transformers.Trainer):
    """transformers' Trainer on flat rows; `settings` are those of `sft.training.resume.settings_of`.

    With LoRA, checkpoints hold the adapter; the result is the adapter, and a plain model if `merges_lora`.
    """

    def __init__(self, *args, settings: dict, examples_share_rows: bool, merges_lora: bool = True, **kwargs):
        """Add the callbacks that check the attention before the first step, and the run between steps."""
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.merges_lora = merges_lora
        self.is_lora = isinstance(self.model, PeftModel)
        self.saving_into: Path | None = None
        self.has_saved = False
        self.order: EpochOrder | None = None
        self.step_loss = torch.zeros((), device=self.args.device)
        self.watch = Watch(self, self.args.device)
        self.add_callback(LeakCheck(examples_share_rows))
        self.add_callback(self.watch)

    def _build_accelerator_args(self, **keywords) -> dict:
        """Return what the Trainer asks of accelerate, with autocast's cache off and a smaller first loss scale.

        The cache would hold a 16-bit copy of every weight until the forward ends, and each is used once in it.
        """
        args = super()._build_accelerator_args(**keywords)
        scaler = GradScalerKwargs(init_scale=precision.INITIAL_LOSS_SCALE)
        args["kwargs_handlers"] += [AutocastKwargs(cache_enabled=False), scaler]
        return args

    # ----------------------------------------------------------------------------------------------------------- rows

    def _get_dataloader(self, dataset: Dataset, description: str, batch_size: int, *args, **kwargs):
        """Return the batches of rows filled up with empty ones, as many on each rank, or those of its own stream."""
        if isinstance(dataset, IterableDataset):
            # Not by accelerate: it would read a stream on one rank, and cut the flat rows up for the others.
            return DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        return super()._get_dataloader(
            EvenSequences(dataset, batch_size * self.args.world_size), description, batch_size, *args, **kwargs
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Return the order of rows in an epoch, the same on all ranks."""
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
        self.watch.num_tokens += inputs["input_ids"].numel()
        return loss

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple:
        """Return the optimizer; AdamW over offloaded states is DeepSpeed's, which runs on the host's cores."""
        optimizer_class, keywords = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.offload == "none":
            return optimizer_class, keywords
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam, {name: keywords[name] for name in ("lr", "betas", "eps")}

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
        """Save the model; an adapter from the ranks that have it whole, without a copy of the frozen weights."""
        if self.is_lora and zero.stage_of(self.args) in (1, 2):
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial) -> str:
        """Return the output folder, or the one for unfinished checkpoints in it while one is written."""
        return str(self.saving_into or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint that is there whole or not at all, then delete those beyond --save_total_limit.

        Raises UserError if the disk has no room for it, or if it is not whole.
        """
        args, output_dir = self.args, self.args.output_dir
        name = f"checkpoint-{self.state.global_step}"
        unfinished = Path(output_dir, checkpoints.UNFINISHED)
        best = self.state.best_model_checkpoint
        num_bytes = self.checkpoint_bytes()
        self.on_the_first_rank(lambda: disk.make_room(output_dir, name, num_bytes, args.save_total_limit, best))
        self.saving_into = unfinished
        with disk.writing(output_dir, name):
            super()._save_checkpoint(model, trial)
            if best := self.state.best_model_checkpoint:
                self.state.best_model_checkpoint = str(Path(output_dir, Path(best).name))
                if args.should_save:
                    self.state.save_to_json(str(unfinished / name / checkpoints.STATE))
        self.saving_into = None
        self.on_the_first_rank(lambda: self._finish_checkpoint(unfinished / name))

    def _finish_checkpoint(self, unfinished: Path) -> None:
        output_dir, args = self.args.output_dir, self.args
        if not self.has_saved:  # the others of this run are made by the same code
            checkpoints.load_apart(unfinished)
        self.has_saved = True
        with disk.writing(output_dir, unfinished.name):
            checkpoints.finish(unfinished, output_dir, self.saved_shapes(), self.settings)
        checkpoints.drop_older(output_dir, args.save_total_limit, self.state.best_model_checkpoint)
        if args.save_optimizer_limit:
            for step in checkpoints.complete_steps(output_dir)[: -args.save_optimizer_limit]:
                checkpoints.keep_weights_alone(Path(output_dir, f"checkpoint-{step}"))

    def on_the_first_rank(self, work: Callable[[], None]) -> None:
        """Do `work` on the rank that writes, the first; raise its UserError on all ranks."""
        message = None
        try:
            if self.args.should_save:
                work()
        except UserError as error:
            message = str(error)
        if messages := [message for message in gather_object([message]) if message]:
            raise UserError(messages[0])

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes the next checkpoint takes: those of the last one, or an estimate."""
        if self.has_saved and (last := checkpoints.newest(self.args.output_dir)):
            return disk.size_of(last)
        args, in_16_bits = self.args, self.args.bf16 or self.args.fp16
        trained, stage = self.settings["trained parameters"], zero.stage_of(args)
        return disk.checkpoint_bytes(trained, stage, in_16_bits, args.save_only_model)

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what the model's folder must hold, whole also where ZeRO-3 has split it."""
        if self.is_lora:
            return lora.saved_shapes(self.model)
        tied = self.model.all_tied_weights_keys
        state = self.model.state_dict(keep_vars=True)
        return {
            name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in state.items() if name not in tied
        }

    def save_result(self) -> None:
        """Make the model of the last step the result, each file in the output folder whole or not there."""
        output_dir = self.args.output_dir
        source = Path(output_dir, f"checkpoint-{self.state.global_step}")
        with disk.writing(output_dir, "the result"):
            if self.args.load_best_model_at_end or checkpoints.fault_of(source):
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
            model, tokenizer = lora.merge(str(adapter), precision.compute_dtype(self.args), self.args.cache_dir)
            model.generation_config = self.model.generation_config
            model.save_pretrained(merged)
            tokenizer.save_pretrained(merged)
            checkpoints.publish(merged, str(output_dir))

    # ------------------------------------------------------------------------------------------------- from the start

    def train_to_the_end(self, resumed: Path | None, num_steps: int) -> TrainOutput | None:
        """Train from the start or from a checkpoint; one that has every step already is the result as it is.

        Raises InterruptedRunError after SIGTERM, with a checkpoint of the step it came in.
        """
        if resumed and checkpoints.step_of(resumed) >= num_steps:
            self.state = TrainerState.load_from_json(str(resumed / checkpoints.STATE))
            if self.is_world_process_zero():
                print(f"{resumed} has made all its {self.state.global_step:,} steps", flush=True)
            return None
        output = self.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if self.watch.told_to_end and self.state.global_step < num_steps:
            step, output_dir = self.state.global_step, self.args.output_dir
            raise InterruptedRunError(
                f"SIGTERM came; saved {output_dir}/checkpoint-{step} of {num_steps:,} steps; type the same command "
                "again to go on from it"
            )
        return output
