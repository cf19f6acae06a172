"""Answers side by side: the questions that are read, the measures, what is kept, and the page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.data.columns import Columns
from sft.program import UserError
from sft.tools.answers import category_of, character_f1, is_exact, names_of, plain, read_questions, table
from support.project import SAMPLE


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file of questions: with and without a reference, in two categories, and a row that is none."""
    rows = [
        {"instruction": "一加一等于几？", "output": "二", "class": "math"},
        {"instruction": "写一个字。<b>", "class": "write"},
        {"instruction": "再写一个。", "output": "", "class": "write"},
        {"instruction": "", "output": "x"},
        {"instruction": "说“好”。", "output": "好。", "class": "math"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def test_rows_without_an_answer_are_questions_too(questions: Path):
    found, refused = read_questions(str(questions), None)
    assert [(each.sample.instruction, each.category, each.reference) for each in found] == [
        ("一加一等于几？", "math", "二"),
        ("写一个字。<b>", "write", ""),
        ("再写一个。", "write", ""),
        ("说“好”。", "math", "好。"),
    ]
    assert [each.place for each in refused] == [f"{questions}:4"]
    assert len(read_questions(str(questions), 2)[0]) == 2


def test_belles_evaluation_set_is_read_by_columns(tmp_path: Path):
    file = tmp_path / "eval.jsonl"
    rows = [
        {"question": "一？", "std_answer": "1", "class": "math"},
        {"question": "二？", "std_answer": "", "class": "qa"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    found, refused = read_questions(str(file), None, Columns((("output", "std_answer"),)))
    assert [(each.reference, each.category) for each in found] == [("1", "math"), ("", "qa")] and not refused


def test_a_file_without_questions_is_refused(tmp_path: Path):
    (tmp_path / "none.json").write_text('[{"a": 1}]')
    with pytest.raises(UserError, match="has no questions: .*none.json"):
        read_questions(str(tmp_path), None)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("北京。", "北京", True, 1.0),
        ("ＡＢ c", "ab C!", True, 1.0),
        ("北京是首都", "首都是北京", False, 1.0),  # order aside
        ("北京", "北京市", False, 0.8),  # 2 * 2 / (2 + 3)
        ("aab", "abb", False, 2 * 2 / 6),
        ("aab", "aac", False, 2 * 2 / 6),  # each as often as both have it
        ("", "好", False, 0.0),
        ("。", "，", True, 1.0),
        ("3+4=7", "3 + 4 = 7", True, 1.0),
    ],
)
def test_measures(answer: str, reference: str, exact: bool, f1: float):
    assert is_exact(answer, reference) == exact
    assert character_f1(answer, reference) == pytest.approx(f1) == pytest.approx(character_f1(reference, answer))


def test_signs_of_arithmetic_count_and_marks_do_not():
    assert plain("3 + 4 = ７，对吗？") == "3+4=7对吗"


@pytest.mark.parametrize("record", [{"class": " "}, {"class": 3}, {}, [1], {"type": ""}])
def test_a_row_without_a_category_is_in_the_one_of_all(record: object):
    assert category_of(record) == "all"


def test_names_are_whole_where_short_ones_are_alike():
    assert names_of(["a/x", "b/y", "http://h/v1"]) == ["x", "y", "http://h/v1"]
    assert names_of(["a/x", "b/x"]) == ["a/x", "b/x"]


def test_text_in_a_table_is_no_markup():
    assert "<b>" not in table(["<b>"], [["<b>&"]]) and "&lt;b&gt;&amp;" in table(["x"], [["<b>&"]])


def test_the_page_and_going_on(make_model: Callable[[str], Path], run: Callable, questions: Path, tmp_path: Path):
    page, kept = tmp_path / "out" / "answers.html", tmp_path / "out" / "answers.jsonl"
    models = [make_model("bloom-tiny"), make_model("falcon-tiny")]
    command = ["-m", "sft.tools.answers", *models, "--data", questions, "--output", page, "--max_new_tokens", 6]
    command += ["--batch", 3, "--device", "cpu"]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert f"left out: {questions}:4: " in result.stdout and "4 questions, 2 checkpoints" in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "写一个字。&lt;b&gt;" in text and "<b>" not in text
    assert [re.sub("<.*?>", "", each) for each in re.findall("<h2>.*?</h2>", text)] == ["math (2)", "write (2)"]
    assert "<td>math</td><td>2</td>" in text and "total" not in text  # references in one category alone
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines() if line]
    assert len(lines) == 8 and {line["checkpoint"] for line in lines} == set(map(str, models))

    whole = kept.read_text(encoding="utf-8")
    kept.write_text(whole[: whole.rindex("{") + 30], encoding="utf-8")  # killed while it wrote
    page.unlink()
    assert run(*command).returncode == 0 and page.read_text(encoding="utf-8") == text
    assert len([line for line in kept.read_text(encoding="utf-8").splitlines() if line.endswith("}")]) == 8

    lines[0]["answer"] = "保留的回答"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(*command).returncode == 0 and "保留的回答" in page.read_text(encoding="utf-8")
    assert run(*command, "--temperature", 1.0).returncode == 0  # other answers are asked for
    assert "保留的回答" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", 0], "--batch and --rows must be 1 or more"),
        (["--max_new_tokens", 0], "--max_new_tokens is 0; expected 1 to 4096"),
        (["--columns", "x"], "--columns x must be ROLE=KEY"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(make_model: Callable[[str], Path], run: Callable, tmp_path: Path, flags, said: str):
    given = ["--data", SAMPLE, "--output", tmp_path / "x.html", *flags]
    result = run("-m", "sft.tools.answers", make_model("bloom-tiny"), *given)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and said in result.stderr
    assert run("-m", "sft.tools.answers", "nowhere", "--data", SAMPLE, "--output", tmp_path / "x.html").returncode == 2
