"""What became of the data: printed, written down, and judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from sft.data.cache import Counts, new_file
from sft.data.report import DataReport, print_data, write_data_report


@pytest.fixture
def make_report(tmp_path):
    """Return a function that gives the report on two files of 3,000 rows, some of them refused."""

    def make(num_refused: int, **fields) -> DataReport:
        entries = [{"place": f"b.json:{line}", "note": f"refused: 坏 {line}"} for line in range(1, num_refused + 1)]
        entries.insert(1, {"place": "b.json:2000", "note": "cut: 3 of the prompt's 9 tokens"})
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (tmp_path / "notes.jsonl").write_text("".join(lines), encoding="utf-8")
        files = [new_file(Path(name)) | {"shapes": {"prompt/response": 1500}} for name in ("a.json", "b.json")]
        files[1]["encoding"] = "gb18030"
        files[1]["refused"] = {f"坏 {line}": [1, f"b.json:{line}", f"坏 {line}"] for line in range(1, num_refused + 1)}
        counts = Counts(rows=3000, kept=3000 - num_refused, refused=num_refused, cut=1, num_bytes=10**6, files=files)
        sums = {"kept": counts.kept, "tokens": 250_000, "labelled_tokens": 90_000, "longest": 1024}
        return DataReport(counts, tmp_path / "notes.jsonl", **{**sums, **fields})

    return make


def test_what_became_of_the_data_is_told_with_shapes_encodings_and_the_first_refused_rows(make_report, capsys):
    print_data("data", make_report(22))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "data     3,000 rows read: 2,978 kept (1 of them cut), 22 refused; 250,000 tokens, 90,000 of them trained; "
        "longest 1,024"
    )
    assert rest[:2] == [
        "shape    prompt/response in 1 file (lines)",
        "shape    prompt/response in 1 file (lines, read as gb18030, not as UTF-8)",
    ]
    assert rest[2:] == [
        *(f"refused  b.json:{line}: 坏 {line}" for line in range(1, 21)),
        "refused  2 more lines like these",
    ]


def test_shapes_remarks_and_kinds_of_refusal_are_each_a_line_with_their_numbers(make_report, capsys):
    several = make_report(0)
    first, second = several.counts.files
    first["shapes"] = {"instruction/output": 900, "instruction/input/output": 500, "messages": 100}
    first["remarks"] = {"not read: 备注": 1, "consecutive turns of one speaker joined": 2_000, "not read: note": 1_400}
    first["refused"] = {"rare": [1, "a.json:9", "rare: 1"], "often": [1_200, "a.json:7", "often: 2"]}
    second |= {
        "file": "\udcb6.json",
        "remarks": {"not read: id2": 2},
        "refused": {"often": [30, "b.json:1", "often: 3"]},
    }
    second["shapes"] = {}
    print_data("data", several)
    _, *rest = capsys.readouterr().out.splitlines()
    assert rest == [
        "shape    instruction/input/output and messages in 1 file (lines)",
        "shape    unknown in 1 file (lines, read as gb18030, not as UTF-8)",
        "noted    a.json: not read: 备注 in 1 row, note in 1,400 rows; "
        "consecutive turns of one speaker joined in 2,000 rows",
        "noted    \\udcb6.json: not read: id2 in 2 rows",
        "refused  a.json:7: often: 2; and 1,199 more like it",
        "refused  b.json:1: often: 3; and 29 more like it",
        "refused  a.json:9: rare: 1",
    ]


def test_a_file_without_rows_is_empty_and_many_files_alike_are_one_line(make_report, capsys):
    alike = make_report(0)
    alike.counts.files = [new_file(Path(f"{number}.json")) for number in range(1_001)]
    print_data("data", alike)
    assert capsys.readouterr().out.splitlines()[1:] == ["shape    empty in 1,001 files (lines)"]


def test_every_row_that_was_refused_cut_or_a_duplicate_is_written_down(make_report, tmp_path):
    duplicates = np.array([[1, 7, 0, 5], [1, 8, 1, 2]])
    with_duplicates = make_report(2, duplicates=duplicates, kept=2996)
    assert ", 2 refused, 2 duplicates; " in with_duplicates.line()
    write_data_report([with_duplicates, with_duplicates], tmp_path / "data_report.jsonl")
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
