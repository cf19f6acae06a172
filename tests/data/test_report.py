"""What became of the data: printed, written down, and judged."""

import json

import numpy as np
import pytest

from sft.data.cache import Counts
from sft.data.report import DataReport, print_data, write_data_report


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
    assert rest[2:] == [*(f"refused  b.json:{line}: 坏 {line}" for line in range(1, 21)), "refused  2 more"]


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
