"""What a run says of itself."""

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from sft.data.packing import PackedSequences
from sft.data.sequences import SampleSequences
from sft.model.load import load_tokenizer
from sft.training import arguments
from sft.training.summary import count_steps, losses, marked_example, plot_losses, rate_line, steps_line


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
    assert count_steps(args, make_sequences([5] * num_examples)) == (max_steps, max_steps / steps_per_epoch)


def make_sequences(lengths, max_length=None):
    """Return sequences of one sample each, or packed up to a length."""
    ids, turns = [[1] * length for length in lengths], [[0, length] for length in lengths]
    samples = Dataset.from_dict({"input_ids": ids, "lengths": turns, "length": lengths})
    return PackedSequences(samples, max_length) if max_length else SampleSequences(samples)


def make_arguments(tmp_path, **fields):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-5, **fields)


def test_steps_line_of_plain_examples_is_exact(tmp_path):
    sequences = make_sequences([5] * 50)
    args = make_arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1)
    assert steps_line(args, sequences) == (
        "8 examples a step = 2 per device x 4 accumulated x 1 process; 7 steps = 1 epoch; learning rate 2e-05, linear"
    )


def test_steps_line_of_packed_examples_counts_rows(tmp_path):
    # 50 examples of 3 tokens, 3 in each row of 10: 17 rows, 9 batches, 5 steps an epoch.
    sequences = make_sequences([3] * 50, 10)
    args = make_arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        lr_scheduler_type="cosine",
    )
    assert steps_line(args, sequences) == (
        "about 12 examples a step = 2.9 a row x 2 per device x 2 accumulated x 1 process; 15 steps = 3 epochs; "
        "learning rate 2e-05, cosine"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_steps_line_counts_the_processes(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    args = make_arguments(tmp_path, per_device_train_batch_size=2, max_steps=1000)
    if packed:  # two examples a row
        start, end = "about 12 examples a step = 2.0 a row x 2 per", "1,000 steps = 250 epochs"
        line = steps_line(args, make_sequences([5] * 48, 10))
    else:
        start, end = "6 examples a step = 2 per", "1,000 steps = 125 epochs"
        line = steps_line(args, make_sequences([5] * 48))
    assert line == f"{start} device x 1 accumulated x 3 processes; {end}; learning rate 2e-05, linear"


def test_the_learning_rate_is_explained_where_no_flag_says_how_large_a_step_is(tmp_path):
    sequences = make_sequences([3] * 150, 10)  # three examples in a row
    args = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-5)
    args.per_device_train_batch_size = 8  # as plan.choose_batch_size finds on a GPU
    line = rate_line(args, sequences)["rate"]
    assert "the original's steps had 8 examples. For 24 the square root rule gives --learning_rate 3.5e-05;" in line
    assert "--per_device_train_batch_size 1 makes more steps" in line
    args.per_device_train_batch_size = 1
    assert rate_line(args, sequences) == {}
    asked = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8)
    assert rate_line(asked, sequences) == {} == rate_line(asked, make_sequences([3] * 9))


@pytest.fixture
def tokenizer(make_model):
    return load_tokenizer(str(make_model("falcon-tiny")))


def test_every_trained_part_is_marked(tokenizer):
    texts = ["问一", "答一", "问二", "答二"]
    example = {"input_ids": [], "lengths": []}
    for text in texts:
        ids = tokenizer(text).input_ids
        example["input_ids"] += ids
        example["lengths"].append(len(ids))
    assert marked_example(tokenizer, example) == "问一⟦答一⟧问二⟦答二⟧"


def test_the_middle_of_a_long_example_is_left_out(tokenizer):
    ids = tokenizer("始" + "中" * 100 + "终").input_ids
    shown = marked_example(tokenizer, {"input_ids": ids, "lengths": [len(ids), 0]}, max_characters=20)
    assert shown == "始" + "中" * 9 + " ... [82 characters] ... " + "中" * 9 + "终"


def test_losses_are_drawn_even_where_nothing_was_logged(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "loss": 1.0}]
    assert losses(history) == [(1, 2.0), (3, 1.0)] and losses(history, "eval_loss") == [(2, 1.5)]
    for logged in (history, []):
        plot_losses(logged, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
