"""sft/report.py: what a run says of itself."""

import pytest
from transformers import Trainer, TrainingArguments

from sft.models import load_tokenizer
from sft.report import count_steps, losses, marked_example, plot_losses


@pytest.mark.parametrize("num_examples", [1, 7, 24, 25])
@pytest.mark.parametrize(("batch", "accumulated"), [(1, 1), (2, 4), (3, 8)])
@pytest.mark.parametrize("length", [{"num_train_epochs": 2}, {"num_train_epochs": 0.5}, {"max_steps": 5}])
def test_steps_are_counted_as_the_trainer_counts_them(num_examples, batch, accumulated, length, make_model, tmp_path):
    from transformers import AutoModelForCausalLM

    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        use_cpu=True,
        **length,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(make_model("bloom-tiny")), args, train_dataset=[{}] * num_examples
    )
    _, steps_per_epoch, *_, max_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert count_steps(args, num_examples) == (max_steps, max_steps / steps_per_epoch)


@pytest.fixture
def tokenizer(make_model):
    return load_tokenizer(str(make_model("falcon-tiny")))


def test_every_trained_part_is_marked(tokenizer):
    parts = [("问一", False), ("答一", True), ("问二", False), ("答二", True)]
    example = {"input_ids": [], "labels": []}
    for text, trained in parts:
        ids = tokenizer(text).input_ids
        example["input_ids"] += ids
        example["labels"] += ids if trained else [-100] * len(ids)
    assert marked_example(tokenizer, example) == "问一⟦答一⟧问二⟦答二⟧"


def test_the_middle_of_a_long_example_is_left_out(tokenizer):
    ids = tokenizer("始" + "中" * 100 + "终").input_ids
    shown = marked_example(tokenizer, {"input_ids": ids, "labels": [-100] * len(ids)}, max_characters=20)
    assert shown == "始" + "中" * 9 + " ... [82 characters] ... " + "中" * 9 + "终"


def test_losses_are_drawn_even_where_nothing_was_logged(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "loss": 1.0}]
    assert losses(history) == [(1, 2.0), (3, 1.0)] and losses(history, "eval_loss") == [(2, 1.5)]
    for logged in (history, []):
        plot_losses(logged, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
