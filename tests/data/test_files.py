"""Which files are read at a path, and what is said of those that are not."""

import os
from pathlib import Path

import datasets
import pytest

from sft.data.files import ABOUT, ASIDE, COPIES, OTHER_SPLIT, find_shards, look_through, skipped_in
from sft.data.shards import read_blocks, records_of
from sft.program import UserError
from support.files import GOOD, write


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(GOOD)


def names_of(folder: Path, files: list[Path]) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in files]


def test_files_are_sorted_and_hidden_ones_ignored(tmp_path: Path):
    names = ["b.json", "a.jsonl", "sub/c.json", ".hidden.json", ".ipynb_checkpoints/b.json", "sub/.x/d.json", "e.txt"]
    names += ["f.jsonl.gz", "sub/g.parquet", "h.JSON.GZ", "i.gz", "j.csv", "k.TSV", "l.csv.gz", "m.xlsx", "n.arrow"]
    lay(tmp_path, *reversed(names), "~$m.xlsx")
    (tmp_path / "folder.json").mkdir()
    assert names_of(tmp_path, find_shards(str(tmp_path))) == [
        "a.jsonl",
        "b.json",
        "f.jsonl.gz",
        "h.JSON.GZ",
        "j.csv",
        "k.TSV",
        "l.csv.gz",
        "m.xlsx",
        "n.arrow",
        "sub/c.json",
        "sub/g.parquet",
    ]


def test_hidden_folder_above_the_data_does_not_matter(tmp_path: Path):
    (tmp_path / ".home").mkdir()
    file = write(tmp_path / ".home", GOOD)
    assert find_shards(str(tmp_path / ".home")) == [file]


def test_a_file_is_found_whatever_its_name(tmp_path: Path):
    for name in ("rows.txt", "config.json", ".rows"):
        file = write(tmp_path, GOOD, name)
        assert look_through(str(file)) == ([file], {})


@pytest.mark.parametrize("name", ["nowhere", "nowhere/to/go", "rows.json", "sub/rows.csv"])
def test_missing_path_is_named_with_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for path in (name, str(tmp_path / name), f"./{name}", f"here/{name}", "here/nowhere"):
        with pytest.raises(UserError) as caught:
            find_shards(path, "--eval_data_path")
        assert str(caught.value).startswith(f"--eval_data_path {path} does not exist; expected a file of rows")
        assert "\n" not in str(caught.value)


def test_folder_without_shards_is_named_with_its_flag(tmp_path: Path):
    lay(tmp_path, "rows.txt", "state.json")
    with pytest.raises(UserError) as caught:
        find_shards(str(tmp_path))
    assert str(caught.value).startswith(f"--data_path {tmp_path} contains no .json, .jsonl, .csv, ")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- what is not


def test_every_file_that_is_not_read_is_named(tmp_path: Path):
    lay(
        tmp_path,
        "a.json",
        "notes.txt",
        "sub/a.txt",
        "b.txt",
        "make.py",
        "Makefile",
        "rows.json.bak",
        "c.zip",
        "d.txt.gz",
    )
    assert look_through(str(tmp_path)) == (
        [tmp_path / "a.json"],
        {
            "no rows are read from .bak files": [tmp_path / "rows.json.bak"],
            "no rows are read from .py files": [tmp_path / "make.py"],
            "no rows are read from .txt files": [tmp_path / name for name in ("b.txt", "notes.txt", "sub/a.txt")],
            "no rows are read from .txt.gz files": [tmp_path / "d.txt.gz"],
            "no rows are read from .zip files": [tmp_path / "c.zip"],
            "no rows are read from files without a suffix": [tmp_path / "Makefile"],
        },
    )
    assert skipped_in(str(tmp_path)) == [
        "rows.json.bak: no rows are read from .bak files",
        "make.py: no rows are read from .py files",
        "b.txt and 2 more: no rows are read from .txt files",
        "d.txt.gz: no rows are read from .txt.gz files",
        "c.zip: no rows are read from .zip files",
        "Makefile: no rows are read from files without a suffix",
    ]


def test_what_lies_beside_data_everywhere_is_counted_in_one_line(tmp_path: Path):
    lay(
        tmp_path, "a.json", "README.md", "LICENSE", "licence.txt", "plot.PNG", ".gitattributes", ".git/a.json", ".git/b"
    )
    assert skipped_in(str(tmp_path)) == [f"6 files: {ASIDE}"]
    (tmp_path / "b").mkdir()
    lay(tmp_path / "b", "a.json", ".hidden")
    assert skipped_in(str(tmp_path / "b")) == [f"1 file: {ASIDE}"]


def test_nothing_is_said_of_a_file_or_a_folder_of_rows(tmp_path: Path):
    lay(tmp_path, "a.json", "b/c.csv", "readme.json")
    assert skipped_in(str(tmp_path)) == skipped_in(str(tmp_path / "a.json")) == skipped_in("owner/name") == []


def test_what_tells_of_the_data_is_no_data(tmp_path: Path):
    lay(tmp_path, "a.json", "dataset_info.json", "sub/dataset_infos.json", "config.json")
    (tmp_path / "state.json").write_text(f"\n[{GOOD}]")  # which are rows, whatever the name
    assert look_through(str(tmp_path)) == (
        [tmp_path / "a.json", tmp_path / "state.json"],
        {ABOUT: [tmp_path / name for name in ("config.json", "dataset_info.json", "sub/dataset_infos.json")]},
    )


def test_a_name_in_another_encoding_is_printable(tmp_path: Path):
    lay(tmp_path, "a.json", os.fsdecode("数据".encode("gbk") + b".txt"))
    assert skipped_in(str(tmp_path)) == ["\\xca\\xfd\\xbe\\xdd.txt: no rows are read from .txt files"]


def saved_set(folder: Path, **splits: int) -> Path:
    """Save a set of so many rows in each split, as the datasets library does."""
    rows = {name: [{"ask": name, "say": str(index)} for index in range(number)] for name, number in splits.items()}
    datasets.DatasetDict({name: datasets.Dataset.from_list(each) for name, each in rows.items()}).save_to_disk(folder)
    return folder


def values_in(shards: list[Path]) -> list[list[dict]]:
    return [[value for block in read_blocks(shard) for _, value in records_of(block)] for shard in shards]


def test_what_datasets_saves_is_found_and_its_copies_are_not(tmp_path: Path):
    folder = saved_set(tmp_path / "set", train=20)
    lay(folder, "train/cache-0a1b.arrow", "train/indices.arrow")
    shards, skipped = look_through(str(folder))
    assert values_in(shards) == [[{"ask": "train", "say": str(number)} for number in range(20)]]
    assert names_of(folder, skipped[ABOUT]) == ["dataset_dict.json", "train/dataset_info.json", "train/state.json"]
    assert names_of(folder, skipped[COPIES]) == ["train/cache-0a1b.arrow", "train/indices.arrow"]


def test_of_a_saved_set_only_the_split_to_train_on_is_read(tmp_path: Path):
    folder = saved_set(tmp_path / "set", train=4, test=3, validation=2)
    (folder / "more").mkdir()
    (folder / "more" / "a.json").write_text(GOOD)
    shards, _ = look_through(str(folder))
    assert names_of(folder, shards) == ["more/a.json", "train/data-00000-of-00001.arrow"]
    assert skipped_in(str(folder))[-1] == f"test and 1 more: {OTHER_SPLIT}"
    [[row, *_]] = values_in(look_through(str(folder / "test"))[0])
    assert row["ask"] == "test"


@pytest.mark.parametrize("saved", ["", "null", '{"splits": 1}', '{"splits": [[]]}', '{"splits": ' + "[" * 9999, "{}"])
def test_every_split_is_read_where_none_is_to_train_on_or_the_list_of_them_is_broken(tmp_path: Path, saved: str):
    folder = saved_set(tmp_path / "set", test=3, validation=2)
    assert len(look_through(str(folder))[0]) == 2
    (folder / "train").mkdir()
    (folder / "train" / "a.json").write_text(GOOD)
    (folder / "dataset_dict.json").write_text(saved)
    assert len(look_through(str(folder))[0]) == 3
