"""Rows to token ids and labels, and examples to one flat row.

Shapes: T = tokens of all examples in the row.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sft import prompts, shards
from sft.loss import IGNORE_INDEX
from sft.program import UserError
from sft.shards import Row

ROWS_PER_CALL = 1000  # enough for the fast tokenizer to use every core
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "place": Value("string"),
        "note": Value("string"),
    }
)


@dataclass
class DataReport:
    """What became of every row that was read: rows = kept + dropped, and `cut` of the kept ones were shortened."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    longest: int = 0
    cut: list[dict[str, str]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)


def load_examples(
    path: str, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None = None, flag: str = "--data_path"
) -> tuple[Dataset, DataReport]:
    """Return the examples of the rows at `path`, and the report on them.

    Examples have `input_ids` and `labels`, lists of the same "length" up to `tokenizer.model_max_length`, and "place",
    the file and line of their row. They lie in Arrow files under `cache_dir`, found again as long as files, tokenizer,
    length and this code stay the same; processes of one host wait for the one that writes them. Raises UserError if
    the rows cannot be read or none is left to train on; `flag` is the one that gave the path.
    """
    files = shards.find_shards(path, flag)
    check_length(tokenizer)
    if not any(True for file in files for _ in shards.read_rows(file)):
        raise UserError(f"{flag} {path} has no row to train on; expected rows {shards.SHAPE}")
    disable_progress_bars()  # encode_shards has its own
    try:
        encoded = Dataset.from_generator(
            encode_shards,
            features=FEATURES,
            cache_dir=cache_dir,
            gen_kwargs={"files": files, "tokenizer": tokenizer},
            fingerprint=_fingerprint(files, tokenizer),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    lengths = encoded.data.column("length").to_numpy()
    kept = lengths.nonzero()[0]
    if not len(kept):
        raise UserError(f"{flag} {path} has no row to train on ({len(encoded)} read); give rows with an output")
    return encoded.select(kept), _report(encoded, lengths)


def _report(encoded: Dataset, lengths: np.ndarray) -> DataReport:
    labels = pc.list_flatten(encoded.data.column("labels"))
    report = DataReport(
        rows=len(encoded),
        kept=int((lengths > 0).sum()),
        tokens=int(lengths.sum()),
        labelled_tokens=pc.sum(pc.not_equal(labels, IGNORE_INDEX)).as_py(),
        longest=int(lengths.max()),
    )
    notes = encoded.data.column("note")
    for index in pc.indices_nonzero(pc.not_equal(notes, "")).to_pylist():
        group = report.cut if lengths[index] else report.dropped
        group.append({"place": encoded[index]["place"], "note": notes[index].as_py()})
    return report


def _fingerprint(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    code = hashlib.sha256()
    for module in (__file__, prompts.__file__, shards.__file__):
        code.update(Path(module).read_bytes())
    for file in files:
        state = file.stat()
        code.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    code.update(tokenizer.backend_tokenizer.to_str().encode())
    code.update(f"{tokenizer.eos_token_id} {tokenizer.model_max_length}".encode())
    return code.hexdigest()[:32]


def check_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if `tokenizer.model_max_length` has no room for an answer behind the empty prompt."""
    template = len(tokenizer(prompts.build_prompt("-", "-"), verbose=False).input_ids)
    if tokenizer.model_max_length < template + 2:
        raise UserError(
            f"--model_max_length {tokenizer.model_max_length} is too short: the prompt's own text is {template} "
            f"tokens and an answer needs at least 2 more; give at least {template + 2}"
        )


def encode_shards(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Yield the examples of every row of `files`, in order; a dropped row is an example without tokens."""
    rows = (row for file in files for row in shards.read_rows(file))
    # Shown on a terminal, from the second second on.
    rows = tqdm(rows, desc="tokenising", unit=" rows", delay=1, leave=False, disable=None)
    while some_rows := list(islice(rows, ROWS_PER_CALL)):
        yield from encode_rows(some_rows, tokenizer)


def encode_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Yield one example a row; prompt and answer are tokenised apart, so no token reaches over their joint.

    An inference prompt has no answer behind it, and BLOOM's pre-tokenizer would otherwise merge ":" with the
    answer's first characters into tokens that inference never sees.
    """
    rows_prompts = [prompts.build_prompt(row.instruction, row.input) for row in rows]
    encoded_prompts = tokenizer(rows_prompts, return_offsets_mapping=True, verbose=False)
    encoded_answers = tokenizer([row.output for row in rows], add_special_tokens=False, verbose=False)
    for row, prompt, offsets, answer in zip(
        rows, encoded_prompts.input_ids, encoded_prompts.offset_mapping, encoded_answers.input_ids, strict=True
    ):
        if not row.output.strip():
            yield {
                "input_ids": [],
                "labels": [],
                "length": 0,
                "place": row.place,
                "note": "dropped: the output is empty",
            }
            continue
        spans = prompts.body_spans(row.instruction, row.input)
        yield {
            "place": row.place,
            **join(prompt, offsets, spans, [*answer, tokenizer.eos_token_id], tokenizer.model_max_length),
        }


def join(
    prompt: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], answer: list[int], max_length: int
) -> dict:
    """Join a prompt and its answer (eos included) into at most `max_length` tokens.

    Where both do not fit, the user's text in the prompt is shortened first, each of `spans` (characters; tokens by
    `offsets`) from its left end and the template kept whole; then the answer from its right end, losing its eos.
    """
    note = ""
    excess = len(prompt) + len(answer) - max_length
    if excess > 0:
        length = len(prompt)
        prompt = shorten(prompt, offsets, spans, excess)
        note = f"cut: {length - len(prompt)} of the prompt's {length} tokens"
        if len(prompt) + len(answer) > max_length:
            note += f", {len(prompt) + len(answer) - max_length} of the answer's {len(answer)}"
            answer = answer[: max_length - len(prompt)]
    labels = [IGNORE_INDEX] * len(prompt) + answer
    return {"input_ids": prompt + answer, "labels": labels, "length": len(labels), "note": note}


def shorten(prompt: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], excess: int) -> list[int]:
    """Return the prompt with about `excess` tokens fewer, never fewer than the template's own.

    A character whose bytes are several tokens goes as a whole, so a few more tokens may go.
    """
    removed: set[int] = set()
    for start, end in spans:
        inside = [i for i, (first, last) in enumerate(offsets) if first >= start and last <= end]
        for position, i in enumerate(inside):
            splits_a_character = position > 0 and offsets[i][0] < offsets[inside[position - 1]][1]
            if len(removed) >= excess and not splits_a_character:
                break
            removed.add(i)
    return [token for i, token in enumerate(prompt) if i not in removed]


def flatten(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Join examples end to end, without padding: int64 `input_ids`, `labels` and `position_ids`, each (1, T).

    Positions count from 0 in each example, or as its own "position_ids" say where it is a packed row of several.
    """
    input_ids, labels, position_ids = [], [], []
    for example in examples:
        input_ids += example["input_ids"]
        labels += example["labels"]
        position_ids += example.get("position_ids") or range(len(example["input_ids"]))
    row = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    row = {name: torch.tensor([values]) for name, values in row.items()}
    # What begins an example is no continuation of the one before it.
    row["labels"][row["position_ids"] == 0] = IGNORE_INDEX
    return row
