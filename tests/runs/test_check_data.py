"""--check_data, as a user types it: what is read, what is not, and how the rows look to the model."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sft.data.cache import MAX_KINDS


@pytest.fixture
def check(run: Callable, make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., CompletedProcess]:
    """Return a function that writes rows to a file and checks it with flags."""

    def check(rows: list[dict], *flags: object) -> CompletedProcess:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        given = ["--model_name_or_path", make_model("bloom-tiny"), "--data_path", file, "--output_dir", tmp_path / "o"]
        return run("train_sft.py", *given, "--check_data", *flags)

    return check


def lines_of(result: CompletedProcess, name: str) -> list[str]:
    assert "Traceback" not in result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith(f"{name:9}")]


def test_three_rows_are_shown_as_the_model_sees_them(check, tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "早安再见", strict=True)]
    rows = [{"问题": "一加一？", "答案": "二"}, {"问题": "短？", "答案": "短"}, {"问题": "长？", "答案": "很长" * 20}]
    result = check([*rows, {"messages": turns}])
    assert result.returncode == 0, result.stderr
    shown = lines_of(result, "example")
    assert [line.split(": ")[0].rpartition(":")[2] for line in shown] == ["1", "3", "4"]
    assert "### Response:⟦二</s>⟧\n" in result.stdout
    assert "### Response:⟦安</s>⟧" in result.stdout and "Human:早\nAssistant:安\nHuman:再\nAssistant:" in result.stdout


def test_names_of_special_tokens_are_counted(check):
    result = check([{"q": "什么是 </s>？", "a": "句末"}, {"q": "几？", "a": "<pad> 不是"}, {"q": "好？", "a": "好"}])
    [noted] = lines_of(result, "noted")
    assert noted.endswith("special tokens' names, read as plain text, in 2 rows")


def test_a_template_that_was_written_into_the_rows_is_noted(check):
    rows = [
        {"prompt": "### Instruction:\n数到三\n\n### Response:", "response": "一二三"},
        {"prompt": "甲", "response": "乙"},
    ]
    [noted] = lines_of(check(rows), "noted")
    assert noted.endswith("a prompt template of its own in 1 row")


def test_flags_by_hand_make_rows_readable_that_were_refused(check):
    rows = [{"题面": "几只？", "题解": "三只", "资料": "园里有三只猫。"}] * 4
    refused = check(rows)
    assert refused.returncode == 2
    [line] = lines_of(refused, "refused")
    assert '"资料" has no role, and the answer may depend on it' in line and line.endswith("; and 3 more like it")
    read = check(rows, "--columns", "instruction=题面,output=题解,input=资料")
    assert read.returncode == 0 and "### Input:\n园里有三只猫。\n\n### Response:⟦三只</s>⟧" in read.stdout
    left = check(rows, "--columns", "instruction=题面,output=题解", "--ignore_columns", "资料")
    assert left.returncode == 0 and "not read: 资料 in 4 rows" in left.stdout


def test_an_empty_answer_is_refused_or_trained(check):
    rows = [{"prompt": "找出人名：天晴。", "completion": ""}, {"prompt": "找出人名：李白。", "completion": "李白"}]
    assert check(rows).returncode == 2
    trained = check(rows, "--empty_output", "train")
    assert trained.returncode == 0 and "empty output, trained as an answer of nothing in 1 row" in trained.stdout


def test_a_file_whose_every_row_has_other_keys_is_reported_in_bounded_space(check):
    number = 3 * MAX_KINDS
    result = check([{"q": "几？", "a": str(each), f"键{each}": "值"} for each in range(number)])
    [noted] = lines_of(result, "noted")
    assert noted.count(" in 1 row") == MAX_KINDS
    assert f"other keys in {number - MAX_KINDS} rows" in noted


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--columns", "问=答"], "must be ROLE=KEY,ROLE=KEY with the roles"),
        (["--columns", "input"], "must be ROLE=KEY"),
        (["--columns", "input=a,input=b"], "gives a role or a key twice"),
        (["--columns", "input=a,output=a"], "gives a role or a key twice"),
        (["--columns", "input=a", "--ignore_columns", "b, a"], "a is in --columns and in --ignore_columns"),
        (["--columns", "user=甲,assistant=甲"], "gives a role or a key twice"),
        (
            ["--columns", "input=资料"],
            'no row has the key "资料"; the rows were read from q/a; type a key that they have',
        ),
        (["--empty_output", "keep"], "--empty_output"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_line(check, flags, said):
    result = check([{"q": "几？", "a": "一"}], *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr


def test_speakers_of_any_name_are_read_by_hand(check):
    names = ["学徒", "师傅", "伙计", "师傅"]
    row = {"对话": [{"role": name, "content": text} for name, text in zip(names, "问答谢好", strict=True)]}
    refused = check([row] * 2)
    assert refused.returncode == 2
    assert lines_of(refused, "refused")[0].endswith(
        "has role '学徒'; type --columns user=学徒 or --columns assistant=学徒; and 1 more like it"
    )
    read = check([row] * 2, "--columns", "user=学徒,user=伙计,assistant=师傅")
    assert read.returncode == 0 and "### Response:⟦答</s>⟧" in read.stdout and "### Response:⟦好</s>⟧" in read.stdout


def test_an_object_around_all_rows_is_one_line_with_a_command(check, tmp_path):
    rows = [{"q": f"{number}是几？", "a": "数" * 400} for number in range(400)]
    (tmp_path / "exam.json").write_text(json.dumps({"试题": rows}, ensure_ascii=False, indent=2), encoding="utf-8")
    result = check([], "--data_path", str(tmp_path / "exam.json"))
    assert result.returncode == 2
    [refused] = lines_of(result, "refused")
    assert refused.endswith("""type jq -c '.["试题"][]' FILE > rows.jsonl""")
