"""Dirty data: each kind in `dirt` alone, and all of them in one folder, through the reader, the cache and the program.

No dirt is a traceback, no row is uncounted, and what is said of it is true.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerBase

from sft import IGNORE_INDEX
from sft.data import cache, json_stream, shards
from sft.data.collate import labels_of
from sft.data.files import find_shards
from sft.data.formats import Sample, read_all
from sft.data.load import load_examples
from sft.data.report import NOTES, DataReport
from sft.data.shards import NUM_NAMED, Refused
from sft.model.load import load_tokenizer
from sft.program import UserError
from support.dirt import GOOD, Kind, around, array, dump, lines, row
from support.dirt_files import KINDS, write_good
from support.project import PROJECT


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """End a test that waits for a pipe, by an error that no reader takes for the file's."""

    def fail(*_: object) -> None:
        raise AssertionError("a test waits for something")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture
def tokenizer(make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model("bloom-tiny")), 4096)


@pytest.fixture(scope="module")
def dirt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("dirt")
    for kind in KINDS:
        kind.write(folder)
    return folder


def printed(file: Path) -> str:
    return str(file).encode("utf-8", "backslashreplace").decode()


def texts(row: Sample) -> dict[str, str]:
    return {"instruction": row.instruction, "input": row.input, "output": row.output}


def numbers(found: list[Sample | Refused]) -> list[int]:
    """Return the lines or indices of rows, but of files as a whole, which have none."""
    return [int(number[1]) for each in found if (number := re.search(r"[:[ ](\d+)\]?$", each.place))]


# --------------------------------------------------------------------------------------------------------- each kind


def test_the_kinds_are_many_and_of_different_names():
    assert len(KINDS) >= 45
    assert len({kind.id for kind in KINDS}) == len({kind.file for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_dirt_is_refused_in_its_place_and_the_rest_is_read(kind: Kind, tmp_path: Path):
    kind.write(tmp_path)
    [shard] = find_shards(str(tmp_path))
    found = list(read_all(shard))
    rows, refused = ([each for each in found if isinstance(each, type)] for type in (Sample, Refused))
    assert [texts(row) for row in rows] == list(kind.kept)
    assert [each.place for each in refused] == [printed(shard) + place for place in kind.refused]
    for each, said in zip(refused, kind.refused.values(), strict=True):
        assert said in each.reason
        assert each.reason.isprintable()
        assert 0 <= each.num_bytes <= shards.size_of(shard)
    assert {row.place: row.note for row in rows if row.note} == {
        printed(shard) + place: note for place, note in kind.cut.items()
    }
    assert numbers(found) == sorted(set(numbers(found)))


# ---------------------------------------------------------------------------------------------- more than a file alone


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_a_line_too_long_is_one_refused_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str):
    monkeypatch.setattr(shards, "MAX_RECORD_BYTES", 2**20)
    long = dump(row(output="长" * 5 * 2**20))
    file = tmp_path / "rows.json"
    file.write_text(lines(*around(long)), encoding=encoding)
    before, refused, behind = read_all(file)
    assert (texts(before), texts(behind)) == (GOOD[0], GOOD[2])
    assert (refused.place, refused.reason) == (f"{file}:2", "over 1 MiB long, too long for one row")
    assert behind.place == f"{file}:3"


def test_an_element_too_long_to_be_understood_ends_its_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 2**20)
    file = tmp_path / "rows.json"
    file.write_text(array(*GOOD)[:-5] + "长" * 5 * 2**20, encoding="utf-8")
    *rows, refused = read_all(file)
    assert [texts(each) for each in rows] == GOOD[:2]
    assert refused.place == f"{file}[2]"
    assert 0.99 * file.stat().st_size < refused.num_bytes < file.stat().st_size


def as_nobody(folder: Path, read: Callable[[], object]) -> object:
    """Return what `read` gives in a process that root's rights do not help, with a folder that it may enter."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.chdir(folder)  # its parents are closed to others
            if os.geteuid() == 0:
                os.setuid(65534)
            os.write(sender, json.dumps(read()).encode())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with os.fdopen(receiver, "rb") as answer:
        return json.loads(answer.read())


def test_an_unreadable_file_is_one_refused_row(tmp_path: Path):
    tmp_path.chmod(0o755)
    write_good(tmp_path / "rows.json").chmod(0)
    said = as_nobody(
        tmp_path, lambda: [[each.place, each.reason, each.num_bytes] for each in read_all(Path("rows.json"))]
    )
    reason = "cannot be read ([Errno 13] Permission denied: 'rows.json')"
    assert said == [["rows.json", reason, len(lines(*GOOD).encode())]]


def test_a_folder_that_cannot_be_listed_is_one_refused_row(tmp_path: Path):
    tmp_path.chmod(0o755)
    write_good(tmp_path / "open.json").chmod(0o644)
    write_good(tmp_path / "closed" / "rows.json").parent.chmod(0)

    def read() -> list[list[str]]:
        found = [each for shard in find_shards(".") for each in read_all(shard)]
        return [[each.place, getattr(each, "reason", "")] for each in found]

    said = as_nobody(tmp_path, read)
    (tmp_path / "closed").chmod(0o700)  # for pytest to remove it
    assert said == [["closed", "a folder that cannot be listed"], *([f"open.json:{n}", ""] for n in (1, 2, 3))]


def test_a_path_in_a_closed_folder_is_the_users_mistake(tmp_path: Path):
    tmp_path.chmod(0o755)
    write_good(tmp_path / "closed" / "rows.json").parent.chmod(0)

    def find() -> str:
        with pytest.raises(UserError) as caught:
            find_shards("closed/rows.json", "--eval_data_path")
        return str(caught.value)

    said = as_nobody(tmp_path, find)
    (tmp_path / "closed").chmod(0o700)
    assert said.startswith("--eval_data_path closed/rows.json cannot be reached ([Errno 13] Permission denied")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_file_may_be_left_before_its_end(tmp_path: Path, encoding: str):
    file = tmp_path / "rows.json"
    file.write_text(lines(*GOOD * 1000), encoding=encoding)
    reading = f"next(formats.read_samples(pathlib.Path({str(file)!r})))"
    code = f"import pathlib; from sft.data import formats; print({reading})"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert result.stdout.startswith("Sample(")
    assert result.stderr == ""


# ------------------------------------------------------------------------------------------------------- all together


def kinds_of(folder: Path) -> list[tuple[Path, Kind]]:
    """Return the shards of a folder of all kinds, in their order, with what each is."""
    kinds = {str(folder / kind.file): kind for kind in KINDS}
    shards = find_shards(str(folder))
    assert len(shards) == len(kinds)  # no file twice, none left out
    return [(shard, kinds[str(shard)]) for shard in shards]


def check_entries(entries: list[dict[str, str]], folder: Path) -> None:
    """Check that everything that is noted stands in its place, in the order of the files."""
    expected = [
        (printed(shard) + place, note if note.startswith("cut: ") else f"refused: {note}")
        for shard, kind in kinds_of(folder)
        for place, note in (kind.refused | kind.cut).items()
    ]
    assert [entry["place"] for entry in entries] == [place for place, _ in expected]
    for entry, (_, note) in zip(entries, expected, strict=True):
        word, _, said = note.partition(": ")
        assert entry["note"].startswith(f"{word}: ")
        assert said in entry["note"]


def test_all_dirt_together_is_counted_alike_by_one_process_and_by_two(
    dirt: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "ALONE_BYTES", 0)
    written = []
    for num_workers in (1, 2):
        examples, report = load_examples(
            str(dirt), tokenizer, str(tmp_path / str(num_workers)), num_workers=num_workers
        )
        counts = report.counts
        assert counts.rows == counts.kept + counts.refused
        assert counts.kept == report.kept == len(examples) == sum(len(kind.kept) for kind in KINDS)
        assert counts.refused == sum(len(kind.refused) for kind in KINDS)
        assert counts.cut == sum(len(kind.cut) for kind in KINDS)
        assert counts.num_bytes >= counts.unread_bytes > 0
        check_entries(list(report.entries()), dirt)
        folder = report.notes.parent
        written.append([(folder / name).read_bytes() for name in (cache.ROWS, cache.NOTES, cache.COUNTS)])
    assert written[0] == written[1]


def test_the_rows_of_all_dirt_together_are_those_that_were_read(dirt, tokenizer, tmp_path):
    examples, _ = load_examples(str(dirt), tokenizer, str(tmp_path), num_workers=1)
    expected = [each for _, kind in kinds_of(dirt) for each in kind.kept]
    for example, each in zip(examples, expected, strict=True):
        answer = [label for label in labels_of(example) if label != IGNORE_INDEX]
        assert tokenizer.decode(answer, clean_up_tokenization_spaces=False) == each["output"] + tokenizer.eos_token


@pytest.fixture
def train(run: Callable, make_model: Callable[[str], Path], tmp_path: Path) -> Callable:
    """Return a function that runs train_sft.py on a folder with some flags more."""

    def train(data: Path, *flags: object) -> subprocess.CompletedProcess:
        model, output = make_model("bloom-tiny"), tmp_path / "output"
        arguments = ["--model_name_or_path", model, "--data_path", data, "--output_dir", output, "--use_cpu", "True"]
        return run("train_sft.py", *arguments, "--save_strategy", "no", *flags)

    return train


def test_the_program_refuses_a_folder_of_dirt_and_trains_on_what_is_left_of_it(
    dirt: Path, train: Callable, tmp_path: Path
):
    checked = train(dirt, "--check_data")
    assert checked.returncode == 2
    assert "Traceback" not in checked.stderr + checked.stdout
    num_refused, num_kept = (
        sum(map(len, each)) for each in zip(*((kind.refused, kind.kept) for kind in KINDS), strict=True)
    )
    assert f"error: --data_path {dirt} has {num_refused:,} of {num_kept + num_refused:,} rows refused" in checked.stderr
    check_entries(noted := entries_in(tmp_path / "output" / NOTES), dirt)
    said = [f"refused  {line}" for line in refused_lines(dirt)]
    printed_lines = [line for line in checked.stdout.split("\n") if line.startswith("refused  ")]
    assert printed_lines == [*said[:NUM_NAMED], f"refused  {len(said) - NUM_NAMED:,} more lines like these"]
    assert sum(line.endswith("; and 149 more like it") for line in printed_lines) == 2

    trained = train(dirt, "--max_bad_fraction", 1, "--max_steps", 1)
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr
    assert entries_in(tmp_path / "output" / NOTES) == noted
    assert (tmp_path / "output" / "model.safetensors").exists()


def refused_lines(folder: Path) -> list[str]:
    """Return the first refused row of each file and kind of reason, and how many are like it, the most first."""
    alike: dict[tuple[Path, str], list[Refused]] = {}
    for shard in find_shards(str(folder)):
        for each in read_all(shard):
            if isinstance(each, Refused):
                alike.setdefault((shard, each.kind or each.reason), []).append(each)
    return [
        f"{first.place}: {first.reason}" + (f"; and {len(others):,} more like it" if others else "")
        for first, *others in sorted(alike.values(), key=len, reverse=True)
    ]


def entries_in(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ how much is too much


def tell(report: DataReport, output: Path) -> None:
    """Do what the program does with a report, at its default share of refused rows."""
    import train_sft

    data_args = train_sft.DataArguments(data_path="rows")
    output.mkdir(exist_ok=True)
    train_sft.report_data(data_args, SimpleNamespace(output_dir=str(output), process_index=0), {"data": report})


def test_what_is_skipped_in_a_folder_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import train_sft

    write_good(tmp_path / "rows" / "a.json")
    for name in ("notes.txt", "more.txt", "state.json", "README.md", ".hidden"):
        write_good(tmp_path / "rows" / name)
    data_args = train_sft.DataArguments(
        data_path=str(tmp_path / "rows"), eval_data_path=str(tmp_path / "rows" / "a.json")
    )
    train_sft.report_data(data_args, SimpleNamespace(output_dir=str(tmp_path), process_index=0), {})
    assert capsys.readouterr().out.splitlines() == [
        "skipped  state.json: about the data, no rows",
        "skipped  2 files: hidden, or a licence, a README or an image",
        "skipped  more.txt and 1 more: no rows are read from .txt files",
    ]


@pytest.mark.parametrize("num_refused", [0, 1, 2])
def test_one_of_a_hundred_rows_may_be_refused_and_not_two(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, num_refused: int
):
    file = tmp_path / "rows.json"
    file.write_text(lines(*GOOD[:1] * (100 - num_refused), *["dirt"] * num_refused), encoding="utf-8")
    _, report = load_examples(str(file), tokenizer, str(tmp_path / "cache"))
    assert (report.counts.rows, report.counts.refused) == (100, num_refused)
    if num_refused < 2:
        tell(report, tmp_path / "output")
        return
    with pytest.raises(UserError, match="has 2 of 100 rows refused, more than --max_bad_fraction 0.01"):
        tell(report, tmp_path / "output")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_what_cannot_be_read_counts_by_its_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encoding: str, pack: Callable[[bytes], bytes]
):
    (tmp_path / "good.json").write_text(lines(*GOOD * 100), encoding="utf-8")
    broken = array(*GOOD * 100).replace("}, {", "} {", 30)  # from the first comma on
    (tmp_path / "broken.json").write_bytes(pack(broken.encode(encoding)))
    _, report = load_examples(str(tmp_path), tokenizer, str(tmp_path / "cache"))
    counts = report.counts
    assert (counts.rows, counts.refused) == (302, 1)  # below the share of rows that may be refused
    size = len(pack(broken.encode(encoding)))
    assert 0.95 * size <= counts.unread_bytes <= size
    with pytest.raises(
        UserError, match=rf"1 of 302 rows refused and {counts.unread_bytes:,} of {counts.num_bytes:,} bytes"
    ):
        tell(report, tmp_path / "output")
