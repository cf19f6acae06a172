"""Whatever a file holds, no row is lost or changed: hypothesis writes files, spoils them, and reads them back.

The examples are the same at every run.
"""

import codecs
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sft import IGNORE_INDEX
from sft.data import cache
from sft.data.collate import labels_of
from sft.data.columns import MEDIA, OPTIONS, SOURCES, TOOLS
from sft.data.encode import Encoder
from sft.data.formats import Sample, read_all, read_samples
from sft.data.shards import Refused
from sft.data.turns import SPEAKER_KEYS, SPEAKERS, TEXT_KEYS, TRAINED_KEYS
from sft.model.load import load_tokenizer
from sft.prompts import PROMPT_INPUT, PROMPT_NO_INPUT, build_prompt
from support.talks import NAMES_OF, PAIRS, SHAPES, TALKS, Pair, Talk, Turns, messages_of, prompts_of, write_talks

LONG = 10**6  # tokens; nothing here is cut


def examples(number: int) -> settings:
    too_slow = [HealthCheck.too_slow]  # says more of the machine than of the test
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=too_slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that one example after another writes to."""
    return tmp_path_factory.mktemp("property")


@pytest.fixture(scope="module", params=["bloom-tiny", "falcon-tiny"])
def encoder(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> Encoder:
    return Encoder(load_tokenizer(str(make_model(request.param)), LONG))


@pytest.fixture(scope="module")
def bloom(make_model: Callable[[str], Path]) -> Encoder:
    return Encoder(load_tokenizer(str(make_model("bloom-tiny")), LONG))


def tokenised(folder: Path, file: Path, encoder: Encoder) -> tuple[list[dict], dict, list[dict]]:
    """Return the tokenised rows of a file, the counts and the notes."""
    cache.write(folder, [file], encoder, 1)
    with pa.OSFile(str(folder / cache.ROWS)) as source:
        rows = pa.ipc.open_stream(source).read_all().to_pylist()
    notes = [json.loads(line) for line in (folder / cache.NOTES).read_text(encoding="utf-8").split("\n") if line]
    return rows, json.loads((folder / cache.COUNTS).read_text(encoding="utf-8")), notes


# --------------------------------------------------------------------------------------------------------- spoilt files

CLEAN = [{"instruction": f"问题{i}，second", "input": "", "output": f"答案{i}😀\n"} for i in range(12)]
CHATS = [{"messages": [{"role": role, "content": "你好"} for role in ("user", "assistant")]} for _ in range(5)]
LINES = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in CLEAN)
ARRAY = json.dumps(CLEAN, ensure_ascii=False, indent=1)
SPREAD = "\n".join(json.dumps(each, ensure_ascii=False, indent=1) for each in CLEAN)


def as_parquet(records: list[dict], **options: object) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records), buffer, **options)
    return buffer.getvalue()


FILES = {
    "lines": LINES.encode(),
    "array": ARRAY.encode(),
    "objects": SPREAD.encode(),
    "gzip of lines": gzip.compress(LINES.encode(), mtime=0),
    "gzip of an array": gzip.compress(ARRAY.encode(), mtime=0),
    "GB18030 lines": LINES.encode("gb18030"),
    "GB18030 array": ARRAY.encode("gb18030"),
    "UTF-16 lines": codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
    "UTF-16 array": codecs.BOM_UTF16_BE + ARRAY.encode("utf-16-be"),
    "parquet": as_parquet(CLEAN, row_group_size=5),
    "parquet of conversations": as_parquet(CHATS, compression="none"),
}
PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), PLACES, st.binary(min_size=1, max_size=6)),
        st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
        st.tuples(st.just("delete"), PLACES, st.integers(1, 40)),
        st.tuples(st.just("cut"), PLACES, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def spoil(content: bytes, changes: list[tuple]) -> bytes:
    spoilt = bytearray(content)
    for change, place, what in changes:
        start = int(place * len(spoilt))
        if change == "put":
            spoilt[start:start] = what
        elif change == "flip" and spoilt:
            spoilt[start] ^= what
        elif change == "delete":
            del spoilt[start : start + what]
        elif change == "cut":
            del spoilt[start:]
    return bytes(spoilt)


def firsts_of(refused: list[Refused]) -> dict[str, list[str]]:
    """Return place and reason of the first of each kind of refused row."""
    firsts: dict[str, list[str]] = {}
    for each in refused:
        firsts.setdefault(each.kind or each.reason, [each.place, each.reason])
    return firsts


def check_nothing_is_lost(folder: Path, content: bytes, encoder: Encoder) -> list[Sample | Refused]:
    """Check that the reader and the cache agree on every row of a file, and return the rows."""
    file = folder / "rows.json"
    file.write_bytes(content)
    found = list(read_all(file))
    refused = [each for each in found if isinstance(each, Refused)]
    rows, counts, notes = tokenised(folder, file, encoder)
    assert counts["rows"] == counts["kept"] + counts["refused"] == len(found)
    assert counts["refused"] == len(refused)
    noted = [(note["place"], note["note"]) for note in notes if note["note"].startswith("refused: ")]
    assert noted == [(each.place, f"refused: {each.reason}") for each in refused]
    assert counts["unread_bytes"] == sum(each.num_bytes for each in refused) <= counts["num_bytes"] == len(content)
    assert {(row["file"], row["row"]) for row in rows} == {
        (0, int(each.place.removeprefix(str(file)).strip(":[]"))) for each in found if isinstance(each, Sample)
    }
    assert all(each.reason and each.reason.isprintable() and each.kind.isprintable() for each in refused)
    [known] = counts["files"]
    assert sum(known["shapes"].values()) == counts["kept"]
    assert sum(number for number, _, _ in known["refused"].values()) == counts["refused"]
    assert [first[1:] for first in known["refused"].values()] == list(firsts_of(refused).values())
    assert all(text.isprintable() for text in [*known["shapes"], *known["remarks"], *known["refused"]])
    return found


@pytest.mark.parametrize("form", FILES)
def test_clean_files_are_read_whole(folder: Path, bloom: Encoder, form: str):
    found = check_nothing_is_lost(folder, FILES[form], bloom)
    expected = [("你好", "你好")] * 5 if len(found) == 5 else [(each["instruction"], each["output"]) for each in CLEAN]
    assert [(row.instruction, row.output) for row in found] == expected


@pytest.mark.parametrize("form", FILES)
def test_no_spoilt_file_is_an_error_or_loses_a_row_unsaid(folder: Path, bloom: Encoder, form: str):
    @examples(60)
    @given(CHANGES)
    def check(changes: list[tuple]) -> None:
        check_nothing_is_lost(folder, spoil(FILES[form], changes), bloom)

    check()


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [LINES, ARRAY, SPREAD], ids=["lines", "array", "objects"])
def test_a_file_cut_anywhere_gives_every_row_before_the_cut(folder: Path, text: str, encoding: str):
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    content = (mark + text).encode(encoding)
    ends = [len((mark + text[: end.end()]).encode(encoding)) for end in re.finditer("}", text)]

    @examples(40)
    @given(st.integers(0, len(content)))
    def check(length: int) -> None:
        (folder / "rows.json").write_bytes(content[:length])
        rows = [each for each in read_all(folder / "rows.json") if isinstance(each, Sample)]
        # Half a line end, of UTF-16, makes its line one that cannot be read, and that is said.
        half = text is LINES and encoding.startswith("utf-16")
        number = sum(end <= length and not (half and length == end + 1) for end in ends)
        assert [row.output for row in rows] == [each["output"] for each in CLEAN[:number]]

    check()


MARKS = [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE]
MAGIC = [b"\x1f\x8b", b"\x1f\x8b\x08\0\0\0\0\0\0\3", b"PAR1"]
STARTS = [b"", *MARKS, *MAGIC, b"[", b'{"', b"\n\n", b'{"a":\n', b"[{},"]


def test_no_bytes_are_an_error_or_a_row_unsaid(folder: Path, bloom: Encoder):
    @examples(200)
    @given(st.sampled_from(STARTS), st.binary(max_size=200))
    def check(start: bytes, rest: bytes) -> None:
        check_nothing_is_lost(folder, start + rest, bloom)

    check()


OF_TURNS = (*SPEAKER_KEYS, *TEXT_KEYS, *TRAINED_KEYS, "tool_calls", "function_call", "type", "turn_1", "turn_2", "MOSS")
OTHERS = ("id", "", " ", "备注", "A\nB", "\ud83d", "label", "is_bad", "__index_level_0__", "长" * 50)
KEYS = sorted({name for names in NAMES_OF.values() for name in names} | {*OF_TURNS, *OTHERS, *"ABC"})
KEYS += sorted(each for some in (MEDIA, OPTIONS, SOURCES, TOOLS) for each in some)
USUAL = ("messages", "system", "history", "instruction", "input", "output", "prompt", "completion", *OF_TURNS)
ANY_KEY = st.sampled_from(USUAL) | st.sampled_from(KEYS)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from([*SPEAKERS, "tool", "[]", "{}", "text", "None"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_KEY, inner, max_size=4),
    max_leaves=12,
)


def test_no_value_is_an_error_or_a_row_unsaid(folder: Path, bloom: Encoder):
    """Values of any kind under keys of every role and of none, halves of characters among them."""
    turn = st.dictionaries(st.sampled_from(OF_TURNS), ANYTHING, max_size=4)
    turns = st.lists(turn | ANYTHING, max_size=4)
    record = st.dictionaries(ANY_KEY, ANYTHING | turn | turns, max_size=6)

    @examples(400)
    @given(st.lists(record | turns | ANYTHING, max_size=6), st.booleans())
    def check(values: list, as_lines: bool) -> None:
        content = "".join(json.dumps(value) + "\n" for value in values) if as_lines else json.dumps(values)
        found = check_nothing_is_lost(folder, content.encode(), bloom)
        is_more_than_lines = content.startswith("[") or any(isinstance(value, dict) for value in values)
        assert len(found) == len(values) or is_more_than_lines  # turns may be one row, an object may wrap rows

    check()


# -------------------------------------------------------------------------------------------------------- random rows


def check_texts(talk: Talk, shape: Pair | Turns, row: Sample) -> None:
    messages, input = messages_of(talk, shape)
    system = [message["content"] + "\n" for message in messages if message["role"] == "system"]
    question, reply = messages[-1]["content"], talk.pairs[-1][1]
    assert (row.instruction, row.input, row.output) == (question, input, reply)
    assert (row.history, row.system) == (tuple(talk.pairs[:-1]), "".join(system))
    assert (row.note, row.untrained) == ("", ())
    assert set(row.remarks) <= {
        "a prompt template of its own",
        "an answer that ends with a mark such as </s>, which is trained as text,",
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: " ".join(vars(shape).values()))
def test_rows_of_every_shape_keep_their_texts(folder: Path, shape: Pair | Turns):
    @examples(20)
    @given(st.lists(TALKS, max_size=3), st.sampled_from(["lines", "array", "ASCII array"]))
    def check(talks: list[Talk], form: str) -> None:
        file = folder / "rows.json"
        write_talks(file, talks, [shape], form)
        for talk, row in zip(talks, read_samples(file), strict=True):
            check_texts(talk, shape, row)

    check()


def test_a_row_is_read_alike_whatever_the_others_of_its_file_look_like(folder: Path):
    @examples(60)
    @given(st.lists(TALKS, max_size=6), st.lists(st.sampled_from(SHAPES), min_size=2, max_size=4))
    def check(talks: list[Talk], mixed: list[Pair | Turns]) -> None:
        write_talks(folder / "rows.json", talks, mixed, "lines")
        for number, row in enumerate(read_samples(folder / "rows.json")):
            check_texts(talks[number], mixed[number % len(mixed)], row)

    check()


def prompt_ids(row: dict) -> list[list[int]]:
    """Return the ids of each prompt of a tokenised row."""
    ids = iter(row["input_ids"])
    parts = [[next(ids) for _ in range(length)] for length in row["lengths"]]
    assert next(ids, None) is None
    return parts[::2]


def test_rows_are_tokenised_into_every_prompt_of_the_chat_and_every_reply(folder: Path, encoder: Encoder):
    tokenizer = encoder.tokenizer

    @examples(150)
    @given(st.lists(TALKS, max_size=3), st.sampled_from(SHAPES))
    def check(talks: list[Talk], shape: Pair | Turns) -> None:
        write_talks(folder / "rows.json", talks, [shape], "lines")
        rows, _, notes = tokenised(folder, folder / "rows.json", encoder)
        assert notes == []
        for talk, row in zip(talks, rows, strict=True):
            answers = [label for label in labels_of(row) if label != IGNORE_INDEX]
            said = tokenizer.decode(answers, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert said == "".join(reply + tokenizer.eos_token for _, reply in talk.pairs)
            told = prompts_of(*messages_of(talk, shape))
            assert prompt_ids(row) == tokenizer(told, split_special_tokens=True).input_ids

    check()


def test_rows_cut_to_any_length_keep_the_template_and_a_label(folder: Path, encoder: Encoder):
    tokenizer = encoder.tokenizer
    shortest = len(tokenizer(build_prompt("-", "-")).input_ids) + 2
    frames = [prompt.partition("{instruction}")[::2] for prompt in (PROMPT_INPUT, PROMPT_NO_INPUT)]
    between, end = frames[0][1].split("{input}")

    @examples(150)
    @given(st.lists(TALKS, max_size=3), st.integers(0, 60), st.sampled_from(PAIRS))
    def check(talks: list[Talk], room: int, shape: Pair | Turns) -> None:
        encoder.max_length = shortest + room
        write_talks(folder / "rows.json", talks, [shape], "lines")
        rows, _, _ = tokenised(folder, folder / "rows.json", encoder)
        assert sum(len(row["lengths"]) for row in rows) == 2 * sum(len(talk.pairs) for talk in talks)
        for row in rows:
            assert min(row["lengths"]) > 0
            assert sum(row["lengths"]) == row["length"] <= encoder.max_length
            assert row["labelled"] == sum(label != IGNORE_INDEX for label in labels_of(row))
            has_input = len(row["lengths"]) == 2 and bool(messages_of(talks[row["row"] - 1], shape)[1])
            for prompt in map(tokenizer.decode, prompt_ids(row)):
                assert prompt.startswith(frames[not has_input][0])
                assert prompt.endswith(end)
                assert between in prompt or not has_input

    try:
        check()
    finally:
        encoder.max_length = LONG
