"""What a run says of itself."""

import warnings

import pytest
from datasets import Dataset

from sft.data.packing import PackedSequences
from sft.data.sequences import SampleSequences
from sft.training.arguments import TrainingArguments
from sft.training.summary import losses, marked_example, plot_losses, precision_line, rate_line, steps_line


def make_examples(lengths):
    ids, turns = [[1] * length for length in lengths], [[0, length] for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "lengths": turns, "length": lengths})


def make_arguments(tmp_path, **fields):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-5, **fields)


def test_steps_line_of_plain_examples_is_exact(tmp_path):
    data = SampleSequences(make_examples([5] * 50))
    args = make_arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1)
    assert steps_line(args, data) == (
        "8 examples per step = 2 per device x 4 accumulated x 1 process; 7 steps = 1 epoch; learning rate 2e-05, linear"
    )


def test_steps_line_of_packed_examples_counts_rows(tmp_path):
    # 50 examples of 3 tokens, 3 in each row of 10: 17 rows, 9 batches, 5 steps an epoch.
    data = PackedSequences(make_examples([3] * 50), 10)
    args = make_arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        lr_scheduler_type="cosine",
    )
    assert steps_line(args, data) == (
        "about 12 examples per step = 2.9 per sequence x 2 per device x 2 accumulated x 1 process; 15 steps = 3 "
        "epochs; learning rate 2e-05, cosine"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_steps_line_counts_the_processes(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    samples = make_examples([5] * 48)
    args = make_arguments(tmp_path, per_device_train_batch_size=2, max_steps=1000)
    if packed:  # two examples a row
        start, end = "about 12 examples per step = 2.0 per sequence x 2 per", "1,000 steps = 250 epochs"
        line = steps_line(args, PackedSequences(samples, 10))
    else:
        start, end = "6 examples per step = 2 per", "1,000 steps = 125 epochs"
        line = steps_line(args, SampleSequences(samples))
    assert line == f"{start} device x 1 accumulated x 3 processes; {end}; learning rate 2e-05, linear"


def test_the_learning_rate_is_explained_where_no_flag_says_how_large_a_step_is(tmp_path):
    data = PackedSequences(make_examples([3] * 150), 10)  # three examples in a row
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-5)
    args.per_device_train_batch_size = 8  # as plan.batch_size finds on a GPU
    line = rate_line(args, data)
    assert "the original recipe has 8 per step. For 24 the square root rule gives --learning_rate 3.5e-05;" in line
    assert "--per_device_train_batch_size 1 makes more and smaller steps" in line
    args.per_device_train_batch_size = 1
    assert rate_line(args, data) == ""
    asked = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8)
    assert rate_line(asked, data) == "" == rate_line(asked, SampleSequences(make_examples([3] * 9)))


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


def test_a_loss_curve_in_a_folder_with_a_chinese_name_needs_no_chinese_font(tmp_path):
    folder = tmp_path / "输出"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses([{"step": 1, "loss": 2.0}], folder / "curve.png")
    assert (folder / "curve.png").is_file()


@pytest.mark.parametrize(
    ("bf16", "fp16", "is_lora", "expected"),
    [
        (False, False, False, "fp32 weights, computed in fp32"),
        (True, False, False, "fp32 weights, computed in bf16"),
        (False, True, False, "fp32 weights, computed in fp16, the loss scaled by 4,096 at first"),
        (True, False, True, "fp32 for what is trained, bf16 for the frozen weights, computed in bf16"),
    ],
)
def test_the_header_names_the_dtypes(bf16, fp16, is_lora, expected, tmp_path):
    args = make_arguments(tmp_path, bf16=False)
    args.bf16, args.fp16 = bf16, fp16
    assert precision_line(args, is_lora) == expected
