"""One interface for sequences of one sample each, packed ones, and streamed ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value

from sft.data import sequences
from sft.data.encode import Encoder
from sft.data.files import find_shards
from sft.data.packing import PackedSequences
from sft.data.sequences import SampleSequences, Sequences
from sft.data.streaming import StreamedSequences
from sft.model.load import load_tokenizer
from sft.program import UserError

LIST = List(Value("int32"))
FEATURES = Features({"input_ids": LIST, "lengths": LIST, "length": Value("int32"), "file": Value("int32")})
NOT_PACKED = "off: the examples of a batch lie end to end, without padding"


def samples_of(lengths: list[int], step: int = 10) -> Dataset:
    """Return samples of these lengths, no two tokens of which are equal."""
    ids = [[step * index + place for place in range(length)] for index, length in enumerate(lengths)]
    turns = [[1, length - 1] for length in lengths]
    columns = {"input_ids": ids, "lengths": turns, "length": lengths, "file": [0] * len(lengths)}
    return Dataset.from_dict(columns, features=FEATURES)


@pytest.fixture
def streamed(make_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., StreamedSequences]:
    """Return a function that streams some lines of text from two files."""

    def streamed(*lines: str, **settings: object) -> StreamedSequences:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name in ("a.jsonl", "b.jsonl"):
            (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        encoder = Encoder(load_tokenizer(str(make_model("bloom-tiny")), 300))
        return StreamedSequences(find_shards(str(folder)), encoder, tmp_path / "notes.jsonl", **settings)

    return streamed


TASK = json.dumps({"instruction": "问", "output": "答"}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_each_sample_is_one_sequence_of_its_tokens_and_lengths():
    found = SampleSequences(samples_of([3, 1, 2]))
    assert [found[index] for index in range(len(found))] == [
        {"input_ids": [0, 1, 2], "lengths": [1, 2]},
        {"input_ids": [10], "lengths": [1, 0]},
        {"input_ids": [20, 21], "lengths": [1, 1]},
    ]
    assert (found.num_samples, found.num_sequences, found.is_packed) == (3, 3, False)
    assert (found.samples_line(), found.sequences_line()) == ("3 trained on", NOT_PACKED)


def test_packed_sequences_count_samples_and_sequences():
    # Sequences of 10, 7 + 3 and 6 tokens: 26 of 30.
    found = PackedSequences(samples_of([10, 7, 3, 6]), 10)
    assert (found.num_samples, found.num_sequences, len(found), found.is_packed) == (4, 3, 3, True)
    assert found.samples_line() == "4 trained on"
    assert found.sequences_line() == "3 sequences of up to 10 tokens, 86.7% full, 1.3 examples each"
    many = PackedSequences(samples_of([1500] * 1100), 2048)
    assert many.sequences_line() == "1,100 sequences of up to 2,048 tokens, 73.2% full, 1.0 examples each"


def test_a_stream_has_no_numbers_and_no_length(streamed):
    found = streamed(TASK)
    assert (found.num_samples, found.num_sequences, found.is_packed) == (None, None, False)
    with pytest.raises(TypeError):
        len(found)
    assert found.samples_line() == "streamed from 2 files, 0.0 MiB in all"
    assert found.sequences_line() == NOT_PACKED
    packed = streamed(TASK, is_packed=True)
    assert packed.is_packed and packed.sequences_line() == "sequences of up to 300 tokens, packed while training"
    assert packed.line() == "0 rows read while training, 0 refused"


def test_the_longest_batch_is_that_of_the_longest_samples_or_of_full_sequences(streamed):
    lengths = [3, 5, 2, 4]
    plain, packed = SampleSequences(samples_of(lengths)), PackedSequences(samples_of(lengths), 6)  # 5, 4 + 2, 3
    assert [plain.longest_batch(size) for size in (1, 2, 9)] == [5, 9, 14]
    assert [packed.longest_batch(size) for size in (1, 2, 9)] == [6, 12, 18]
    assert [streamed(TASK, is_packed=True).longest_batch(size) for size in (1, 9)] == [300, 2700]
    assert streamed(TASK).longest_batch(9) == 300


def test_the_first_one_is_the_first_sample_also_where_it_is_packed_later(streamed):
    samples = samples_of([3, 5, 2])
    expected = {"input_ids": [0, 1, 2], "lengths": [1, 2]}
    assert SampleSequences(samples).first() == PackedSequences(samples, 8).first() == expected
    found = streamed("bad", TASK)
    assert found.first() == next(iter(streamed(TASK, shuffle=False)))


@pytest.mark.parametrize("lines", [(), ("bad",)])
def test_a_stream_without_a_row_has_no_first_one(streamed, lines, tmp_path):
    with pytest.raises(UserError, match=f"^there are no rows to train on in {tmp_path / 'data'}"):
        streamed(*lines).first()


# --------------------------------------------------------------------------------------------------------- fingerprint


def of(lengths: list[int]) -> Sequences:
    return SampleSequences(samples_of(lengths))


def test_the_fingerprint_is_that_of_checkpoints_made_before():
    samples = samples_of([3, 5, 2, 4, 6, 3, 3])
    assert SampleSequences(samples).fingerprint() == PackedSequences(samples, 8).fingerprint() == "9234813cb9ce7acb"


def test_other_lengths_tokens_order_and_number_have_another_fingerprint():
    samples = samples_of([3, 5, 2, 3])
    others = [of([3, 5, 2, 4]), of([3, 5, 2]), SampleSequences(samples_of([3, 5, 2, 3], step=11))]
    others += [SampleSequences(samples.select([3, 1, 2, 0]))]
    assert len({each.fingerprint() for each in (SampleSequences(samples), *others)}) == 5
    assert of([3, 5, 2]).fingerprint() == SampleSequences(samples.select([0, 1, 2])).fingerprint()


def test_of_many_samples_all_lengths_and_some_tokens_count(monkeypatch):
    monkeypatch.setattr(sequences, "NUM_HASHED", 3)  # the first, the middle and the last one
    lengths = [3, 5, 2, 4, 6]

    def fingerprint(changed: int | None) -> str:
        columns = samples_of(lengths).to_dict()
        if changed is not None:
            columns["input_ids"][changed][-1] += 1
        return SampleSequences(Dataset.from_dict(columns, features=FEATURES)).fingerprint()

    assert [fingerprint(index) == fingerprint(None) for index in range(5)] == [False, True, False, True, False]


def test_a_streams_fingerprint_is_that_of_its_files(streamed, tmp_path):
    one, packed, other = streamed(TASK), streamed(TASK, is_packed=True), streamed(TASK, TASK)
    assert len(one.fingerprint()) == 16
    assert packed.fingerprint() == other.fingerprint()  # of the files as they are now
    before = other.fingerprint()
    (tmp_path / "data" / "a.jsonl").write_text(TASK + "\n", encoding="utf-8")
    assert other.fingerprint() != before
