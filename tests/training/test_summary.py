"""What a run says of itself."""

import json

import numpy as np
import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from sft.data.cache import Counts
from sft.data.load import DataReport
from sft.data.packing import PackedDataset
from sft.training import arguments, summary
from sft.training.summary import count_steps, losses, marked_example, plot_losses, rate_line, rows_line, steps_line


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
    assert count_steps(args, [{}] * num_examples) == (max_steps, max_steps / steps_per_epoch)


def make_examples(lengths):
    ids, turns = [[1] * length for length in lengths], [[0, length] for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "lengths": turns, "length": lengths})


def make_arguments(tmp_path, **fields):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-5, **fields)


def test_rows_line_of_plain_examples_names_the_flat_row():
    assert rows_line(make_examples([3, 4]), 10) == "each batch of examples is one row, end to end, without padding"


def test_rows_line_of_packed_examples_counts_them():
    # Rows of 10 + 0, 7 + 3 and 6 tokens: 26 of 30.
    rows = PackedDataset(make_examples([10, 7, 3, 6]), 10)
    assert rows_line(rows, 10) == "3 packed of up to 10 tokens, 86.7% full, 1.3 examples each"
    rows = PackedDataset(make_examples([1500] * 1100), 2048)
    assert rows_line(rows, 2048) == "1,100 packed of up to 2,048 tokens, 73.2% full, 1.0 examples each"


def test_steps_line_of_plain_examples_is_exact(tmp_path):
    rows = make_examples([5] * 50)
    args = make_arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1)
    assert steps_line(args, rows) == (
        "8 examples a step = 2 per device x 4 accumulated x 1 process; 7 steps = 1 epoch; learning rate 2e-05, linear"
    )


def test_steps_line_of_packed_examples_counts_rows(tmp_path):
    # 50 examples of 3 tokens, 3 in each row of 10: 17 rows, 9 batches, 5 steps an epoch.
    rows = PackedDataset(make_examples([3] * 50), 10)
    args = make_arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        lr_scheduler_type="cosine",
    )
    assert steps_line(args, rows) == (
        "about 12 examples a step = 2.9 a row x 2 per device x 2 accumulated x 1 process; 15 steps = 3 epochs; "
        "learning rate 2e-05, cosine"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_steps_line_counts_the_processes(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    rows = make_examples([5] * 48)
    args = make_arguments(tmp_path, per_device_train_batch_size=2, max_steps=1000)
    if packed:  # two examples a row
        start, end = "about 12 examples a step = 2.0 a row x 2 per", "1,000 steps = 250 epochs"
        line = steps_line(args, PackedDataset(rows, 10))
    else:
        start, end = "6 examples a step = 2 per", "1,000 steps = 125 epochs"
        line = steps_line(args, rows)
    assert line == f"{start} device x 1 accumulated x 3 processes; {end}; learning rate 2e-05, linear"


def test_the_learning_rate_is_explained_where_no_flag_says_how_large_a_step_is(tmp_path):
    rows = PackedDataset(make_examples([3] * 150), 10)  # three examples in a row
    args = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=2e-5)
    args.per_device_train_batch_size = 8  # as plan.choose_batch_size finds on a GPU
    line = rate_line(args, rows)["rate"]
    assert "the original's steps had 8 examples. For 24 the square root rule gives --learning_rate 3.5e-05;" in line
    assert "--per_device_train_batch_size 1 makes more steps" in line
    args.per_device_train_batch_size = 1
    assert rate_line(args, rows) == {}
    asked = arguments.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8)
    assert rate_line(asked, rows) == {} == rate_line(asked, make_examples([3] * 9))


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


@pytest.fixture
def make_report(tmp_path):
    """Return a function that gives the report on two files of 3,000 rows, some of them refused."""

    def make(num_refused: int, **fields) -> DataReport:
        entries = [{"place": f"b.json:{line}", "note": f"refused: 坏 {line}"} for line in range(1, num_refused + 1)]
        entries.insert(1, {"place": "b.json:2000", "note": "cut: 3 of the prompt's 9 tokens"})
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (tmp_path / "notes.jsonl").write_text("".join(lines), encoding="utf-8")
        shape = {"form": "lines", "encoding": "utf-8", "shape": "prompt/response"}
        files = [{"file": "a.json", **shape}, {"file": "b.json", **shape, "encoding": "gb18030"}]
        counts = Counts(rows=3000, kept=3000 - num_refused, refused=num_refused, cut=1, num_bytes=10**6, files=files)
        sums = {"kept": counts.kept, "tokens": 250_000, "labelled_tokens": 90_000, "longest": 1024}
        return DataReport(counts, tmp_path / "notes.jsonl", **{**sums, **fields})

    return make


def test_what_became_of_the_data_is_told_with_shapes_encodings_and_the_first_refused_rows(make_report, capsys):
    summary.print_data("data", make_report(22))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "data     3,000 rows read: 2,978 kept (1 of them cut), 22 refused; 250,000 tokens, 90,000 of them trained; "
        "longest 1,024"
    )
    assert rest[:2] == [
        "shape    prompt/response in 1 file (lines)",
        "shape    prompt/response in 1 file (lines, read as gb18030, not as UTF-8)",
    ]
    assert rest[2:] == [*(f"refused  b.json:{line}: 坏 {line}" for line in range(1, 21)), "refused  2 more"]


def test_every_row_that_was_refused_cut_or_a_duplicate_is_written_down(make_report, tmp_path):
    duplicates = np.array([[1, 7, 0, 5], [1, 8, 1, 2]])
    with_duplicates = make_report(2, duplicates=duplicates, kept=2996)
    assert ", 2 refused, 2 duplicates; " in summary.data_line(with_duplicates)
    summary.write_data_report([with_duplicates, with_duplicates], tmp_path / "data_report.jsonl")
    lines = (tmp_path / "data_report.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [{"place": "b.json:1", "note": "refused: 坏 1"}]
    entries += [{"place": "b.json:2000", "note": "cut: 3 of the prompt's 9 tokens"}]
    entries += [{"place": "b.json:2", "note": "refused: 坏 2"}]
    entries += [{"place": "b.json:7", "note": "duplicate: of a.json:5"}]
    entries += [{"place": "b.json:8", "note": "duplicate: of b.json:2"}]
    assert [json.loads(line) for line in lines] == entries * 2
    assert "坏" in lines[0]


@pytest.mark.parametrize(("unread", "fraction"), [(0, 0.02), (500_000, 0.5)])
def test_the_bad_share_is_that_of_rows_or_of_bytes_whichever_is_larger(make_report, unread, fraction):
    bad = make_report(60)
    bad.counts.unread_bytes = unread
    assert bad.bad_fraction == pytest.approx(fraction)
    assert bad.what_is_wrong(fraction) is None
    said = bad.what_is_wrong(fraction - 0.001)
    assert said.startswith("has 60 of 3,000 rows refused") and "--max_bad_fraction" in said
    assert ("and 500,000 of 1,000,000 bytes not read" in said) == bool(unread)
