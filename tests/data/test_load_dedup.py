"""--dedup: a row whose text stood before is left out, counted, and listed with the place of the first."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import train_sft
from sft.data.load import load_examples
from sft.model.load import load_tokenizer
from sft.program import run_program


@pytest.fixture
def tokenizer(make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model("bloom-tiny")), 300)


def task(instruction: str, output: str, **more: object) -> dict:
    return {"instruction": instruction, "input": "", "output": output, **more}


def conversation(*texts: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def places_and_notes(report) -> list[tuple[str, str]]:
    return [(entry["place"], entry["note"]) for entry in report.entries()]


def test_the_first_of_equal_rows_is_kept_across_files(tokenizer, tmp_path):
    one, other = task("问", "答"), task("问", "另一个答")
    data = tmp_path / "data"
    data.mkdir()
    first = write(data / "a.jsonl", one, other, one, {**one, "id": 7})
    array = data / "b.json"
    array.write_text(json.dumps([task("三", "四"), other, {"output": "四", "instruction": "三"}]), encoding="utf-8")
    again = write(data / "c.jsonl", conversation("问", "答"), conversation("五", "六"))
    examples, report = load_examples(str(data), tokenizer, str(tmp_path / "cache"), dedup=True)
    assert list(zip(examples["file"], examples["row"], strict=True)) == [(0, 1), (0, 2), (1, 0), (2, 2)]
    assert places_and_notes(report) == [
        (f"{first}:3", f"duplicate: of {first}:1"),
        (f"{first}:4", f"duplicate: of {first}:1"),
        (f"{array}[1]", f"duplicate: of {first}:2"),
        (f"{array}[2]", f"duplicate: of {array}[0]"),
        (f"{again}:1", f"duplicate: of {first}:1"),
    ]
    assert (report.counts.rows, report.kept, len(report.duplicates)) == (9, 4, 5)
    assert (report.tokens, report.longest) == (sum(examples["length"]), max(examples["length"]))
    assert report.labelled_tokens == sum(examples["labelled"])
    whole, everything = load_examples(str(data), tokenizer, str(tmp_path / "cache"))
    assert (len(whole), everything.kept, list(everything.entries())) == (9, 9, [])
    texts = [tuple(ids) for ids in whole["input_ids"]]
    assert [tuple(ids) for ids in examples["input_ids"]] == list(dict.fromkeys(texts))


def test_rows_that_differ_in_anything_stay(tokenizer, tmp_path):
    rows = [
        task("问", "答"),
        task("问 ", "答"),
        task("问", "答\n"),
        task("问", "答", input="材"),
        task("问", "答", system="简"),
    ]
    rows += [task("问", "答", history=[["一", "二"]]), task("问", "答", history=[["一", "二\n"]])]
    rows += [
        task("问", "答", history=[["一", "二"], ["一", "二"]]),
        task("答", "问"),
        task("问答", "答"),
        task("问\n材", "答"),
    ]
    file = write(tmp_path / "rows.jsonl", *rows)
    examples, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"), dedup=True)
    assert (len(examples), report.kept, len(report.duplicates)) == (len(rows), len(rows), 0)


def test_a_conversation_of_several_rows_counts_once(tokenizer, tmp_path):
    long = conversation(*(f"第{number}句：天地玄黄宇宙洪荒" for number in range(24)))
    # Its beginning is that of the other, its first row of the data set even the same, but it is another conversation.
    begins_so = {"messages": long["messages"][:-2]}
    file = write(tmp_path / "rows.jsonl", long, begins_so, long, conversation("问", "答"), long)
    examples, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"), dedup=True)
    whole, _ = load_examples(str(file), tokenizer, str(tmp_path / "cache"))
    rows = [row["row"] for row in whole]
    assert rows.count(1) == rows.count(3) == rows.count(5) > 2 and rows.count(2) > 2
    assert whole[0]["input_ids"] == whole[rows.index(2)]["input_ids"]
    assert [row["row"] for row in examples] == [row for row in rows if row in (1, 2, 4)]
    assert [row for row in examples] == [row for row in whole if row["row"] in (1, 2, 4)]
    assert (report.counts.rows, report.kept, len(report.duplicates)) == (5, 3, 2)
    notes = places_and_notes(report)
    assert notes[-2:] == [(f"{file}:{number}", f"duplicate: of {file}:1") for number in (3, 5)]
    assert all(note.startswith("cut: the first ") for _, note in notes[:-2]) and len(notes) == 4


def test_a_cut_row_that_is_left_out_is_no_longer_among_the_cut(tokenizer, tmp_path):
    cut = task("问", "长" * 900)
    file = write(tmp_path / "rows.jsonl", cut, task("空", ""), cut, task("空", ""))
    _, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"), dedup=True)
    assert [note.split(":")[0] for _, note in places_and_notes(report)] == ["cut", "refused", "refused", "duplicate"]
    assert report.line().startswith("4 rows read: 1 kept (1 of them cut), 2 refused, 1 duplicates; 300 tokens")


def test_the_program_counts_and_lists_them(make_model, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "rows.jsonl", *(task("问", "答") for _ in range(30)), task("三", "四"))
    given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", file, "--output_dir", tmp_path / "run"]
    given += ["--cache_dir", tmp_path / "cache", "--dedup", "True", "--check_data", "True", "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, given)])
    run_program(train_sft.main)
    assert "data     31 rows read: 2 kept (0 of them cut), 0 refused, 29 duplicates; " in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "run" / "data_report.jsonl").open(encoding="utf-8")]
    expected = [{"place": f"{file}:{line}", "note": f"duplicate: of {file}:1"} for line in range(2, 31)]
    assert listed == expected
    assert not (tmp_path / "run" / ".in-use").exists()
