"""Rows that are read while training are those of the data set, each once an epoch over all ranks."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from sft.data import formats, streaming
from sft.data.columns import Columns
from sft.data.encode import Encoder
from sft.data.files import find_shards
from sft.data.load import load_examples
from sft.data.streaming import StreamedSequences
from sft.model.load import load_tokenizer
from sft.program import OneRankError, UserError

Tokens = tuple[tuple[int, ...], tuple[int, ...]]  # of a row: its ids, and the lengths of its prompts and answers
MAX_LENGTH = 300


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def tokenizer(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(make_model(request.param)), MAX_LENGTH)


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few hundred rows be many buffers, and many rows tokenised together."""
    monkeypatch.setattr(streaming, "BUFFER_SAMPLES", 30)
    monkeypatch.setattr(streaming, "ENCODED_REPLIES", 21)


def task(number: int) -> dict[str, str]:
    return {"instruction": f"第{number}题" + "问" * (number % 7), "output": "答" * (1 + number % 11)}


def conversation(number: int) -> dict[str, list]:
    texts = [f"第{number}题第{turn}句" * 3 for turn in range(2 + number % 9 * 2)]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def write(path: Path, records: Iterable[dict | str]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 210 rows of one reply in three files, in which two rows are refused."""
    folder = tmp_path_factory.mktemp("tasks")
    for number, name in enumerate("abc"):
        records = [task(100 * number + i) for i in range(70)]
        write(folder / f"{name}.jsonl", records if name == "a" else [*records[:9], f"bad {name}", *records[9:]])
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of conversations, of which the longer ones are several rows of the data set."""
    folder = tmp_path_factory.mktemp("conversations")
    write(folder / "a.jsonl", map(conversation, range(60)))
    write(folder / "b.jsonl", map(conversation, range(100, 130)))
    return folder


@pytest.fixture
def stream(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., StreamedSequences]:
    """Return a function that gives the rows of a folder, streamed."""

    def stream(folder: Path, **settings: object) -> StreamedSequences:
        notes = tmp_path / f"notes{settings.get('rank', 0)}.jsonl"
        return StreamedSequences(
            find_shards(str(folder)), Encoder(tokenizer), notes, **{"max_bad_fraction": 0.1, **settings}
        )

    return stream


def tokens_of(row: dict) -> Tokens:
    return tuple(row["input_ids"]), tuple(row["lengths"])


def take(rows: Iterable[dict], number: int) -> list[Tokens]:
    return [tokens_of(row) for row in islice(rows, number)]


def examples_in(rows: Iterable[Tokens]) -> Counter:
    """Count every example of some rows: its ids, and how many of them are the prompt."""
    counted: Counter = Counter()
    for ids, lengths in rows:
        ends = accumulate(map(sum, zip(lengths[::2], lengths[1::2], strict=True)), initial=0)
        counted.update(
            (ids[start:end], prompt) for (start, end), prompt in zip(pairwise(ends), lengths[::2], strict=True)
        )
    return counted


@pytest.fixture
def expected(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[[Path], list[Tokens]]:
    """Return a function that gives the rows of the data set of a folder."""
    return lambda folder: list(map(tokens_of, load_examples(str(folder), tokenizer, str(tmp_path / "cache"))[0]))


# ---------------------------------------------------------------------------------------------------------- every row


def interleaved(ranks: Sequence[Iterator[dict]], number: int) -> list[Tokens]:
    """Return the first rows of all ranks in the order in which they are drawn: one of each rank, by turns."""
    return [tokens_of(row) for row in islice(chain.from_iterable(zip(*ranks, strict=True)), number)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_comes_once_an_epoch_over_all_ranks(world_size, stream, tasks, expected, small_buffers):
    own = expected(tasks)
    ranks = [iter(stream(tasks, rank=rank, world_size=world_size)) for rank in range(world_size)]
    drawn = interleaved(ranks, 3 * len(own))
    epochs = [drawn[start : start + len(own)] for start in range(0, len(drawn), len(own))]
    assert all(Counter(epoch) == Counter(own) for epoch in epochs) and max(Counter(own).values()) == 1
    assert len({tuple(order) for order in (own, *epochs)}) == 4
    assert drawn == take(stream(tasks), len(drawn)), "another number of ranks draws in another order"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_packed_rows_hold_every_example_once_an_epoch_over_all_ranks(
    world_size, stream, tasks, expected, small_buffers, monkeypatch
):
    own = expected(tasks)
    monkeypatch.setattr(streaming, "ENCODED_REPLIES", len(own) // world_size)  # so that no row packs two epochs
    found: Counter = Counter()
    for rank in range(world_size):
        rows, num_examples = [], 0
        for row in stream(tasks, rank=rank, world_size=world_size, is_packed=True):
            rows.append(tokens_of(row))
            num_examples += len(row["lengths"]) // 2
            assert len(row["input_ids"]) == sum(row["lengths"]) <= MAX_LENGTH
            if num_examples == 2 * len(own) // world_size:
                break
        assert len(rows) < num_examples / 1.5
        found += examples_in(rows)
    assert found == Counter({example: 2 for example in examples_in(own)})


@pytest.mark.parametrize("packing", [False, True])
def test_conversations_are_the_rows_of_the_data_set(packing, stream, conversations, expected, monkeypatch):
    own = expected(conversations)
    assert len(own) > 90 + 30, "no conversation is several rows"
    if packing:
        monkeypatch.setattr(streaming, "ENCODED_REPLIES", examples_in(own).total())
        rows, num_examples = [], 0
        for row in stream(conversations, is_packed=True):
            rows.append(tokens_of(row))
            num_examples += len(row["lengths"]) // 2
            if num_examples == examples_in(own).total():
                break
        assert max(len(ids) for ids, _ in rows) <= MAX_LENGTH and examples_in(rows) == examples_in(own)
    else:
        monkeypatch.setattr(streaming, "ENCODED_REPLIES", 40)
        drawn = take(stream(conversations), 2 * len(own))
        assert Counter(drawn[: len(own)]) == Counter(drawn[len(own) :]) == Counter(own)
        assert drawn[: len(own)] != drawn[len(own) :]


def test_unshuffled_rows_come_in_the_order_of_the_files(stream, tasks, expected):
    own = expected(tasks)
    assert take(stream(tasks, shuffle=False), 2 * len(own)) == 2 * own


@pytest.mark.parametrize("packing", [False, True])
def test_the_order_is_that_of_the_seed(packing, stream, tasks, small_buffers):
    one, again, other = (take(stream(tasks, is_packed=packing, seed=seed), 200) for seed in (5, 5, 6))
    rows = stream(tasks, is_packed=packing, seed=5)
    assert one == again == take(rows, 200) == take(rows, 200)
    assert one != other


# ------------------------------------------------------------------------------------------------------ memory, begin


def count_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    read_all, places = streaming.read_all, []

    def read(file: Path, columns: Columns) -> Iterator[formats.Sample]:
        for row in read_all(file, columns):
            places.append(row.place)
            yield row

    monkeypatch.setattr(streaming, "read_all", read)
    return lambda: len(places)


@pytest.mark.parametrize("packing", [False, True])
def test_training_begins_before_all_is_read(packing, stream, tmp_path, monkeypatch):
    file, num_read = write(tmp_path / "rows.jsonl", map(task, range(60_000))), count_read(monkeypatch)
    rows = iter(stream(file, is_packed=packing, world_size=2))
    next(rows)
    assert num_read() < 15_000
    take(rows, 50)
    assert num_read() < 15_000


def test_conversations_of_many_replies_are_tokenised_few_at_a_time(stream, conversations, monkeypatch):
    encode, at_once = Encoder.encode, []

    def count(encoder: Encoder, rows: Sequence) -> list:
        at_once.append(sum(1 + len(row.history) for row in rows))
        return encode(encoder, rows)

    monkeypatch.setattr(Encoder, "encode", count)
    monkeypatch.setattr(streaming, "ENCODED_REPLIES", 40)
    take(stream(conversations), 200)
    assert len(at_once) > 5 and min(at_once) >= 40 and max(at_once) < 40 + 10


# ---------------------------------------------------------------------------------------------------------- bad rows


def test_keys_that_are_not_read_are_named_once_by_the_first_rank(stream, tmp_path, capsys):
    folder = tmp_path / "remarked"
    folder.mkdir()
    row = {"q": "几时？", "a": "今晚", "旁注": "略"}
    rows = [{**row, f"键{number // 20}": 1} for number in range(100)]
    (folder / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for rank in (1, 0):
        take(stream(folder, rank=rank, world_size=2), 120)  # more than an epoch
    noted = re.findall(r"^noted +\S+: not read: (\S+),", capsys.readouterr().out, re.MULTILINE)
    assert sorted(noted) == ["旁注", *(f"键{number}" for number in range(5))]


def test_bad_rows_are_noted_once_by_the_first_rank(stream, tasks, tmp_path, capsys):
    for rank in (1, 0):
        streamed = stream(tasks, rank=rank, world_size=2)
        streamed.notes = tmp_path / "notes.jsonl"
        take(streamed, 250)  # of a third epoch too
        assert (streamed.num_rows, streamed.num_refused) == (212, 2)
    noted = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text(encoding="utf-8").splitlines()]
    places = {f"{tasks / name}:10" for name in ("b.jsonl", "c.jsonl")}
    assert len(noted) == 2 and {entry["place"] for entry in noted} == places
    assert all(entry["note"].startswith("refused: invalid JSON") for entry in noted)
    assert sorted(re.findall(r"^refused  (\S+): invalid JSON", capsys.readouterr().out, re.MULTILINE)) == sorted(places)


def test_another_rank_leaves_the_notes_of_the_first_and_those_of_rows_held_out(stream, tasks, tmp_path):
    (tmp_path / "notes0.jsonl").write_text("held out\n", encoding="utf-8")
    first, other = (stream(tasks, rank=rank, world_size=2) for rank in (0, 1))
    other.notes = first.notes
    for streamed in (first, other, first):
        take(streamed, 3)
    assert [line[:9] for line in first.notes.read_text(encoding="utf-8").splitlines()] == [
        "held out",
        *2 * ['{"place":'],
    ]


@pytest.mark.parametrize(
    ("num_bad", "limit", "said"),
    [(21, 0.01, "20 of the first 1,999"), (20, 0.01, None), (5, 0, "1 of the first 1,996"), (0, 0, None)],
)
def test_too_many_bad_rows_end_the_stream(num_bad, limit, said, stream, tmp_path):
    file = write(tmp_path / "rows.jsonl", [*map(task, range(2000 - num_bad)), *["bad"] * num_bad])
    streamed = stream(file, max_bad_fraction=limit)
    if said is None:
        assert len(take(streamed, 2100)) == 2100
        return
    with pytest.raises(UserError, match=f"^{said} rows were refused, more than --max_bad_fraction {limit:g}; "):
        take(streamed, 1)


def test_a_rank_that_reads_ahead_of_the_others_says_itself_why_it_ends(stream, tmp_path):
    """What all ranks meet at once is said by the first alone."""
    records = [*map(task, range(4000)), *["bad"] * 100]
    file = write(tmp_path / "rows.jsonl", records)
    ahead = iter(stream(file, rank=1, world_size=2, shuffle=False, max_bad_fraction=0.01))
    take(ahead, 500)
    with pytest.raises(OneRankError, match="^41 of the first 4,041 rows were refused"):
        take(ahead, 2000)
    write(file, reversed(records))
    for rank in (0, 1):
        with pytest.raises(UserError, match="^100 of the first 1,000 rows were refused") as caught:
            take(stream(file, rank=rank, world_size=2, max_bad_fraction=0.05), 1)
        assert not isinstance(caught.value, OneRankError)


def test_many_bad_rows_end_the_stream_before_all_is_read(stream, tmp_path, monkeypatch):
    num_read = count_read(monkeypatch)
    file = write(tmp_path / "rows.jsonl", ["bad" if i % 4 == 3 else task(i) for i in range(5000)])
    with pytest.raises(UserError, match="^250 of the first 1,000 rows were refused"):
        take(stream(file), 1)
    assert num_read() <= 1000


def test_a_file_that_breaks_off_counts_by_what_is_not_read(stream, tmp_path):
    rest = "x" * 5000
    (tmp_path / "rows.json").write_text(json.dumps([task(i) for i in range(40)])[:-1] + f", {rest}", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^1 of the first 41 rows were refused and 5,\d\d\d of \d,\d\d\d bytes not read"
    ):
        take(stream(tmp_path / "rows.json"), 1)
    assert len(take(stream(tmp_path / "rows.json", max_bad_fraction=0.8), 50)) == 50


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "bad\n" * 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_row_the_stream_ends(content, rank, stream, tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text(content)
    read_all, times = streaming.read_all, iter(range(3))
    # Not for ever.
    monkeypatch.setattr(streaming, "read_all", lambda file, columns: next(times) < 3 and read_all(file, columns))
    with pytest.raises(UserError, match="^there are no rows to train on; "):
        take(stream(tmp_path / "rows.json", rank=rank, world_size=2, max_bad_fraction=1), 1)
