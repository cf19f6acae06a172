"""Tokenised rows on disk: made once per host by all cores, in bounded memory, as one Arrow file that later runs find.

A row of that file is one task, or as many turns of one conversation as fit into --model_max_length: "input_ids" of its
examples end to end, and "lengths", the number of tokens in each example's prompt and answer in turn.
"""

import errno
import gc
import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sft import prompts
from sft.data import encode, formats, shards, trees
from sft.data.columns import BY_NAME, NOT_READ, Columns
from sft.data.encode import Encoder, Example
from sft.data.formats import Sample
from sft.data.shards import Block, Refused
from sft.data.workers import KilledWorkerError, workers
from sft.program import UserError, one_line

ROWS, NOTES, COUNTS = "rows.arrow", "notes.jsonl", "counts.json"
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "lengths": pa.list_(pa.int32()),
        "length": pa.int32(),  # number of tokens
        "labelled": pa.int32(),  # number of them that are trained on
        "held": pa.int32(),  # number of tokens if what its examples begin with in common is there once
        "begins": pa.int32(),  # tokens that it begins with as every row of its template does
        "has_input": pa.bool_(),  # the other template
        "continues": pa.int32(),  # tokens that it begins with and the row before, of the same conversation, has too
        "question": pa.int64(),  # equal for rows that ask the same
        "file": pa.int32(),  # the shard, in the order of `find_shards`
        "row": pa.int64(),  # its line or index in the shard
        "digest": pa.binary(16),  # equal for rows of equal text
    }
)
MAX_KINDS = 50  # shapes, remarks and reasons that are counted apart in a file whose every row may have other keys
SPECIAL = "special tokens' names, read as plain text,"
LOST = "control characters that the tokenizer leaves out"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # what network file systems without locks answer
ALONE_BYTES = 2 * 2**20  # smaller data is tokenised faster than processes start


@dataclass
class Counts:
    """What was read: `rows` = `kept` + `refused`; `cut` are among the kept; bytes of all files, and unread ones."""

    rows: int = 0
    kept: int = 0
    refused: int = 0
    cut: int = 0
    conversations: int = 0  # kept ones with several replies
    num_bytes: int = 0
    unread_bytes: int = 0
    files: list[dict] = field(default_factory=list)  # see `new_file`


@dataclass
class Encoded:
    """A tokenised block: a record batch, the notes on its rows, and their numbers."""

    batch: pa.RecordBatch
    notes: list[dict[str, str]]
    num_rows: int
    num_refused: int
    num_conversations: int
    unread_bytes: int
    shapes: Counter[str]  # rows by the keys they were read from
    remarks: Counter[str]
    refused: dict[str, list]  # by kind: number, place and reason of the first


def tokenised(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | None = None,
    num_workers: int | None = None,
    columns: Columns = BY_NAME,
) -> Path:
    """Return the folder under `cache_dir` with the tokenised rows of `files`; make it if it does not exist.

    Its name is a hash of files, tokenizer, length and this code. Of processes that start together one makes it and the
    others wait. It is written under another name first, so that a killed process never leaves half of one.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "tokenised", fingerprint(files, tokenizer, columns))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                unfinished = folder.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                before = state_of(files)
                write(unfinished, files, Encoder(tokenizer), num_workers or num_cores(), columns)
                if state_of(files) != before:
                    raise UserError("a file changed while it was being tokenised; run again once nothing writes to it")
                for file in unfinished.iterdir():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
                unfinished.rename(folder)
    except OSError as error:
        where = "on a local disk" if error.errno in NO_LOCKS else "with room"
        raise UserError(
            f"tokenised rows cannot be stored in {folder.parent}: {one_line(error)}; give a --cache_dir {where}, "
            "or use --streaming True, which stores none"
        ) from None
    return folder


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _locked(path: Path) -> FileLock:
    """Return the lock once it is acquired; say so if that means waiting for another process."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("waiting for another process that is tokenising the same rows", flush=True)
        return lock.acquire()


def fingerprint(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, columns: Columns = BY_NAME) -> str:
    """Return 32 hexadecimal digits that change with the files, the tokenizer, the columns and the code that reads."""
    hashed = hashlib.sha256(state_of(files).encode(errors="backslashreplace"))
    for module in (*sorted(Path(__file__).parent.glob("*.py")), Path(prompts.__file__)):
        hashed.update(module.read_bytes())
    hashed.update(repr((columns.by_hand, sorted(columns.ignored), columns.trains_empty_outputs)).encode())
    hashed.update(tokenizer.backend_tokenizer.to_str().encode())
    hashed.update(f"{tokenizer.eos_token_id} {tokenizer.model_max_length}".encode())
    return hashed.hexdigest()[:32]


def state_of(files: Sequence[Path]) -> str:
    """Return a text that changes whenever one of the files is written to."""
    lines = []
    for file in files:
        try:
            state = file.stat()
            lines.append(f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}")
        except (OSError, RuntimeError) as error:  # a broken or circular link
            lines.append(f"{file} {error}")
    return "\n".join(lines)


def lengths_of(examples: datasets.Dataset, name: str = "length") -> np.ndarray:
    """Return a numeric column, by default the number of tokens in each of the R rows, (R,)."""
    return np.asarray(examples.with_format("numpy")[name][:])


# ------------------------------------------------------------------------------------------------------------- writing


def write(folder: Path, files: Sequence[Path], encoder: Encoder, num_workers: int, columns: Columns = BY_NAME) -> None:
    """Tokenise `files` in `num_workers` processes and write rows, notes and counts into `folder`, in file order."""
    sizes = list(map(shards.size_of, files))
    counts = Counts(num_bytes=sum(sizes))
    alone = num_workers < 2 or counts.num_bytes < ALONE_BYTES
    blocks = _blocks(files, counts)
    encoded = _encode_here(blocks, encoder, columns) if alone else _encode_apart(blocks, encoder, columns, num_workers)
    before = [0, *accumulate(sizes)]
    bar = tqdm(desc="tokenising", total=counts.num_bytes, unit="B", unit_scale=True, delay=1, leave=False, disable=None)
    with (
        bar,
        pa.OSFile(str(folder / ROWS), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as stream,
        (folder / NOTES).open("w", encoding="utf-8") as notes,
    ):
        for number, position, block in encoded:
            if block.batch.num_rows:
                stream.write_batch(block.batch)
            counts.rows += block.num_rows
            counts.refused += block.num_refused
            counts.conversations += block.num_conversations
            counts.unread_bytes += block.unread_bytes
            _add(counts.files[number], block)
            for note in block.notes:
                counts.cut += note["note"].startswith("cut")
                notes.write(json.dumps(note, ensure_ascii=False) + "\n")
            bar.update(before[number] + position - bar.n)
    counts.kept = counts.rows - counts.refused
    # As ASCII, since a file name may not be valid UTF-8.
    (folder / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")


def new_file(file: Path) -> dict:
    """Return what is known of a file before it is read: how it is written, and its rows by shape, remark and refusal.

    "refused" holds, by kind of reason, how many there are, and place and reason of the first.
    """
    return {"file": str(file), "form": "lines", "encoding": "utf-8", "shapes": {}, "remarks": {}, "refused": {}}


def _add(file: dict, block: Encoded) -> None:
    """Add what a block has to what is known of its file."""
    for name, others in (("shapes", "other keys"), ("remarks", f"{NOT_READ}other keys")):
        known = file[name]
        for text, number in getattr(block, name).items():
            text = text if text in known or len(known) < MAX_KINDS else others
            known[text] = known.get(text, 0) + number
    known = file["refused"]
    for kind, (number, place, reason) in block.refused.items():
        kind = kind if kind in known or len(known) < MAX_KINDS else "other reasons"
        known.setdefault(kind, [0, place, reason])[0] += number


def _blocks(files: Sequence[Path], counts: Counts) -> Iterator[tuple[int, Block]]:
    """Yield every block of all files with its file's number; list the files in `counts`."""
    for number, file in enumerate(files):
        counts.files.append(new_file(file))
        for block in shards.read_blocks(file):
            counts.files[number] |= {"form": block.form, "encoding": block.encoding}
            yield number, block


def _encode_here(
    blocks: Iterator[tuple[int, Block]], encoder: Encoder, columns: Columns
) -> Iterator[tuple[int, int, Encoded]]:
    for number, block in blocks:
        yield number, block.position, encode_block(encoder, columns, number, block)


def _encode_apart(
    blocks: Iterator[tuple[int, Block]], encoder: Encoder, columns: Columns, num_workers: int
) -> Iterator[tuple[int, int, Encoded]]:
    """Encode blocks in worker processes, a few blocks ahead of the writing, and yield them in order."""
    waiting: deque[tuple[int, Block, Future]] = deque()
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one core's
    try:
        with workers(num_workers, encode_block, encoder, columns) as submit:
            for number, block in blocks:
                waiting.append((number, block, submit(number, block)))
                if len(waiting) > 2 * num_workers:
                    yield _result(encoder, columns, *waiting.popleft())
            while waiting:
                yield _result(encoder, columns, *waiting.popleft())
    except KilledWorkerError:
        raise UserError(
            f"one of {num_workers} tokenising processes was killed, most likely because memory ran out; use fewer with "
            "--preprocessing_num_workers"
        ) from None
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


def _result(encoder: Encoder, columns: Columns, number: int, block: Block, future: Future) -> tuple[int, int, Encoded]:
    try:
        return number, block.position, future.result()
    except RecursionError:  # values nested too deeply to be sent to a process
        return number, block.position, encode_block(encoder, columns, number, block)


# ------------------------------------------------------------------------------------------------------------ encoding


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause garbage collection, which would scan all of torch again and again and take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collector()
def encode_block(encoder: Encoder, columns: Columns, file: int, block: Block) -> Encoded:
    """Tokenise a block of shard number `file`, its records read by `columns`."""
    found = list(formats.samples_of(block, columns))
    kept = [(number, sample) for number, sample in found if isinstance(sample, Sample)]
    refused = [(number, sample) for number, sample in found if isinstance(sample, Refused)]
    notes = [(number, {"place": each.place, "note": f"refused: {each.reason}"}) for number, each in refused]
    arrow_rows = []
    for (number, sample), examples in zip(kept, encoder.encode([sample for _, sample in kept]), strict=True):
        arrow_rows += _arrow_rows(encoder, sample, examples, file, number)
        if cut := dict.fromkeys(filter(None, (sample.note, *(example.note for example in examples)))):
            notes.append((number, {"place": sample.place, "note": "; ".join(cut)}))
    firsts: dict[str, list] = {}
    for _, each in refused:
        firsts.setdefault(each.kind or each.reason, [0, each.place, each.reason])[0] += 1
    return Encoded(
        batch=_record_batch(arrow_rows),
        notes=[note for _, note in sorted(notes, key=lambda numbered: numbered[0])],
        num_rows=len(found),
        num_refused=len(refused),
        num_conversations=sum(bool(sample.history) for _, sample in kept),
        unread_bytes=sum(each.num_bytes for _, each in refused),
        shapes=Counter([sample.shape for _, sample in kept]),
        remarks=remarks_of([sample for _, sample in kept], {SPECIAL: encoder.special, LOST: encoder.lost}),
        refused=firsts,
    )


def remarks_of(samples: Sequence[Sample], sought: Mapping[str, Sequence[str]]) -> Counter[str]:
    """Count what the report tells about samples: their own remarks, and those for what is sought in their texts."""
    counted = Counter(chain.from_iterable([sample.remarks for sample in samples]))
    # All texts at once first, since few blocks have any of it.
    texts = [text for each in samples for text in (each.system, each.instruction, each.input, each.output)]
    texts += [text for each in samples if each.history for text in each.texts()]
    joined = "\n".join(texts)
    for remark, parts in sought.items():
        if found := [part for part in parts if part in joined]:
            counted[remark] = sum(any(part in text for text in each.texts() for part in found) for each in samples)
    return +counted


def _record_batch(rows: Sequence[dict]) -> pa.RecordBatch:
    """Return Arrow rows as a batch; lists of numbers by way of NumPy, which is four times as fast as Arrow's own."""
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    for name in ("input_ids", "lengths"):
        ends = np.cumsum([0, *map(len, columns[name])], dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(columns[name]), np.int32, ends[-1])
        columns[name] = pa.ListArray.from_arrays(ends, flat)
    return pa.record_batch(columns, schema=SCHEMA)


def _arrow_rows(encoder: Encoder, sample: Sample, examples: list[Example], file: int, number: int) -> Iterator[dict]:
    """Yield the Arrow rows of a sample: several if its examples do not fit into one."""
    question = repr((sample.system, sample.history, sample.instruction, sample.input))
    text, last = f"{question} {sample.output!r} {sample.untrained}", None
    is_alone = len(examples) > 1 or examples[0].note  # what equal questions share is not told by the prompt's length
    question_number = _number(f"{file} {number}" if is_alone else question)
    begins = encoder.begins(examples[0], bool(sample.input))
    for part, together in enumerate(encode.group(examples, encoder.max_length)):
        pieces = [ids for example in together for ids in (example.prompt, example.answer)]
        lengths = list(map(len, pieces))
        several = [np.array(example.prompt + example.answer) for example in together] if len(examples) > 1 else []
        continues, last = (trees.common(last, several[0]) if part else 0), (several or [None])[-1]
        yield {
            "input_ids": list(chain.from_iterable(pieces)),
            "lengths": lengths,
            "length": sum(lengths),
            "labelled": sum(lengths[1::2]),
            "held": trees.size(several) if several else sum(lengths),
            "begins": begins,
            "has_input": bool(sample.input),
            "continues": continues,
            "question": question_number,
            "file": file,
            "row": number,
            "digest": hashlib.blake2b(f"{part} {text}".encode(), digest_size=16).digest(),
        }


def _number(text: str) -> int:
    """Return 64 bits that are equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
