"""Names of data sets on the Hugging Face hub, with a stand-in for the hub."""

import re
from pathlib import Path

import datasets
import pytest

from sft import network
from sft.data import hub
from sft.data.files import find_shards
from sft.data.kinds import SUFFIXES
from sft.data.shards import read_blocks, records_of
from sft.program import UserError
from support.files import RECORDS, as_lines, write


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stand in for a hub of one set; return what it is asked for."""
    source, asked, load = write(tmp_path, as_lines(RECORDS)), [], datasets.load_dataset

    def load_dataset(name: str, split: str, cache_dir: str | None) -> datasets.Dataset:
        asked.append((name, split, cache_dir))
        return load("json", data_files={"train": str(source), "short": str(source)}, split=split, cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(("path", "split"), [("someone/pairs", "train"), ("some.one/pairs_0.4M:short", "short")])
def test_a_set_of_the_hub_is_read_from_where_it_is_stored(asked: list, tmp_path: Path, path: str, split: str):
    cache = str(tmp_path / "cache")
    shards = find_shards(path, cache_dir=cache)
    assert asked == [(path.partition(":")[0], split, cache)]
    assert all(shard.is_relative_to(cache) for shard in shards)
    values = [value for shard in shards for block in read_blocks(shard) for _, value in records_of(block)]
    assert [value["output"] for value in values] == [record["output"] for record in RECORDS]


def test_what_is_here_or_can_only_be_a_path_is_not_asked_for(asked: list, tmp_path: Path):
    (tmp_path / "someone" / "pairs").mkdir(parents=True)
    file = write(tmp_path / "someone" / "pairs", as_lines(RECORDS))
    assert find_shards("someone/pairs") == [file.relative_to(tmp_path)]
    for path in (
        "someone/other",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "pairs",
        "a/rows.json",
        "a/rows.csv",
        "a/b:c/d",
        "a/b:",
    ):
        with pytest.raises(UserError, match=f"--data_path {re.escape(path)} does not exist"):
            find_shards(path)
    assert asked == []


def test_a_split_that_is_missing_is_one_line(asked: list, monkeypatch: pytest.MonkeyPatch):
    reach(monkeypatch, True)
    with pytest.raises(UserError) as caught:
        find_shards("someone/pairs:nothing", "--eval_data_path")
    assert str(caught.value).startswith("--eval_data_path someone/pairs:nothing is no file or folder, and no set of")
    assert 'Unknown split "nothing"' in str(caught.value) and "\n" not in str(caught.value)
    assert "; correct it, or " in str(caught.value)


def reach(monkeypatch: pytest.MonkeyPatch, is_reached: bool) -> None:
    """Let the hub seem to be reached or not, where nothing says that it may not be."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "answers", lambda _: is_reached)


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_a_network_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool):
    monkeypatch.chdir(tmp_path)
    if not is_offline:
        reach(monkeypatch, False)
    with pytest.raises(UserError) as caught:
        find_shards("someone/pairs", cache_dir=str(tmp_path))
    why, remedy = ("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    if not is_offline:
        why, remedy = f"{hub.constants.ENDPOINT} cannot be reached", "set HF_ENDPOINT to a mirror"
    assert str(caught.value) == (
        "--data_path someone/pairs is no file or folder, and no set of the Hugging Face hub that can be loaded "
        f"({why}); expected a path, owner/name or owner/name:split; {remedy}, or give the folder of a set that was "
        "downloaded"
    )
    assert hub.constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is is_offline


def test_a_set_of_no_files_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([]))
    reach(monkeypatch, True)
    with pytest.raises(UserError, match="someone/pairs .*it holds no rows"):
        hub.download("someone/pairs", "--data_path")
    assert hub.is_id("someone/pairs", SUFFIXES)
