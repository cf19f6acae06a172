"""Why a record has no question or no answer, and what to type: what is typed then works."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sft.data import json_stream
from sft.data.formats import Sample, read_all
from sft.data.shards import Refused
from support.records import advised, read, refusal, typed

ASKED = [{"role": "user", "content": "九减二？"}]
ROWS = [{"问题": f"{number}个苹果分给两人？", "答案": f"每人{number / 2:g}个"} for number in range(2, 8)]


@pytest.mark.parametrize("turns", ["messages", "prompt"])
@pytest.mark.parametrize("reply", ["ground_truth", "std_answer", "model_output"])
def test_a_reply_that_stands_beside_the_turns_is_named_and_read_by_hand(turns: str, reply: str):
    record = {turns: ASKED, reply: "七", "data_source": "口算"}
    reason = refusal(record)
    assert reason.startswith(f'no question with a reply, but "{reply}" beside the turns; type --columns ')
    sample = read(record, typed(advised(reason)[0]))
    assert (sample.instruction, sample.output, sample.remarks) == ("九减二？", "七", ())


def test_an_answer_beside_turns_that_end_with_a_question_follows_them_by_hand():
    record = {"conversations": [["几点了？", "三点。"], *ASKED], "answer": "七"}
    assert read({"messages": [*ASKED, {"role": "bot", "content": "七"}], "answer": "七"}).output == "七"
    assert "both are there" not in refusal({"messages": ASKED, "answer": "七"})
    sample = read(record, typed("--columns messages=conversations,output=answer"))
    assert sample.history == (("几点了？", "三点。"),) and sample.output == "七"


def test_no_reply_and_nothing_like_one_is_told_as_it_is():
    assert refusal({"messages": ASKED, "remark": "难"}) == "no question with a reply: ['user']"


@pytest.mark.parametrize("nothing", [None, []])
def test_an_answer_without_a_value_leads_to_the_key_that_has_one(nothing: object):
    record = {"question": "九减二？", "answer": nothing, "label": "七", "note": "难"}
    reason = refusal(record)
    assert reason.endswith("; type --columns output=label")
    assert read(record, typed(advised(reason)[0])).output == "七"
    assert refusal({"question": "九减二？", "answer": None, "label": 1}) == 'the "answer" is null'


# ------------------------------------------------------------------------------------------------ rows within an object


def run_jq(reason: str, file: Path) -> Path:
    """Run the command that a refusal gives, in the folder of the file."""
    command = reason.partition("; to write each as a line of its own, type ")[2].replace("FILE", file.name)
    assert command.startswith("jq -c ")
    subprocess.run(command, shell=True, check=True, cwd=file.parent)
    return file.parent / "rows.jsonl"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("sample_bytes", [64, 2**18])  # whether the object is longer than what is looked at first
@pytest.mark.parametrize("key", ["考题", 'q"s', "dev.set"])
@pytest.mark.parametrize("is_each", [False, True])
def test_rows_within_an_object_are_told_in_one_sentence_whose_command_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, sample_bytes: int, key: str, is_each: bool
):
    monkeypatch.setattr(json_stream, "SAMPLE_BYTES", sample_bytes)
    whole = {f"{key}{number}": row for number, row in enumerate(ROWS)} if is_each else {"version": 2, key: ROWS}
    file = tmp_path / "exam.json"
    file.write_text(json.dumps(whole, ensure_ascii=False, indent=indent), encoding="utf-8")
    [refused] = read_all(file)
    assert isinstance(refused, Refused) and refused.place == f"{file}{':1' if indent is None else '[0]'}"
    said = "each row stands under a key of its own" if is_each else "rows stand under"
    assert refused.reason.startswith(said) and refused.reason.isprintable()
    if shutil.which("jq"):
        samples = list(read_all(run_jq(refused.reason, file)))
        assert [(each.instruction, each.output) for each in samples] == [tuple(row.values()) for row in ROWS]


def test_rows_of_unknown_keys_and_rows_below_a_prompt_of_all_are_told_too():
    told = refusal({str(number): {"origin": "甲", "prediction": "乙"} for number in range(4)})
    assert told.startswith('each row stands under a key of its own ("0", "1", ...)')
    assert refusal({"loss": [{"x": 1, "y": 2}] * 3}).startswith('rows stand under "loss"')
    assert refusal({"prompt": "请答题。", "example": ROWS}).startswith('rows stand under "example"')
    assert refusal({"prompt": "请答题。", "sides": [{"x": 1}] * 3}).startswith("no output found")


def test_an_object_whose_lists_are_no_rows_is_not_said_to_hold_some():
    for record in ({"stats": [{"loss": 1.5}], "config": {"lr": 1}}, {"b": {"x": 1}, "c": {"d": 2}}, {"xs": [{}]}):
        assert "no instruction and no output found" in refusal(record)


def test_a_long_object_over_several_lines_is_one_row(tmp_path: Path):
    row = {"question": "背一首长诗。", "answer": "春眠不觉晓，\n" * 60_000}
    (tmp_path / "row.json").write_text(json.dumps(row, ensure_ascii=False, indent=2), encoding="utf-8")
    [sample] = read_all(tmp_path / "row.json")
    assert isinstance(sample, Sample) and sample.output == row["answer"]


@pytest.mark.parametrize("end", range(4, 60))
def test_an_object_over_several_lines_is_one_wherever_the_first_look_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int
):
    row = {"question": "\\ud83d\\ude00几？", "answer": "是\t", "n": [1.5e3, True, None, -2], "o": {"x": "y"}}
    text = json.dumps(row, indent=1).replace("\\\\u", "\\u")
    monkeypatch.setattr(json_stream, "SAMPLE_BYTES", end + len("{\n"))
    (tmp_path / "row.json").write_text(text, encoding="utf-8")
    assert [sample.output for sample in read_all(tmp_path / "row.json")] == ["是\t"]


def test_lines_that_are_cut_or_broken_stay_lines(tmp_path: Path):
    good = json.dumps(ROWS[0], ensure_ascii=False)
    for broken in ('{"问题": "一', '{"问题": 1, "答案', "{", '{"问题": [1,'):
        (tmp_path / "rows.json").write_text(f"{broken}\n{good}\n{good}\n", encoding="utf-8")
        read = list(read_all(tmp_path / "rows.json"))
        assert [isinstance(each, Sample) for each in read] == [False, True, True], broken


def test_a_short_second_line_is_not_taken_for_the_end_of_the_first(tmp_path: Path):
    (tmp_path / "rows.json").write_text('{"问题": 1,\n{"a":1}\n', encoding="utf-8")
    assert [each.place.rpartition(":")[2] for each in read_all(tmp_path / "rows.json")] == ["1", "2"]


def test_an_object_that_is_too_long_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 2**20)
    file = tmp_path / "all.json"
    file.write_text(json.dumps({"考题": ROWS * 9_000}, indent=1), encoding="utf-8")
    [refused] = read_all(file)
    assert "over 1 MiB long; if rows stand within it, write each as a line of its own" in refused.reason
    assert refused.num_bytes == file.stat().st_size
