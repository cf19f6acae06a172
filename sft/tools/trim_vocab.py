"""Keep only the part of a vocabulary that your data uses: fewer weights, a cheaper loss, the same answers.

    python -m sft.tools.trim_vocab bigscience/bloom-560m output_dir/bloom-560m-zh --data data_proj/opendata
    python -m sft.tools.trim_vocab ... --keep_top 20000      no more than the 20,000 most frequent tokens of the data

It keeps the tokens that occur in the data, those that they are merged from, the single bytes, the special tokens and
those of the prompt. The data is split into the same tokens as before; other text is split into more tokens, down to
bytes, and nothing is lost.

Symbols: V = tokens of the vocabulary, K = tokens kept, H = hidden size.
"""

import copy
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft import prompts
from sft.data.load import load_examples
from sft.data.report import print_data
from sft.model import quantized
from sft.model.download import locate
from sft.model.load import load_config, load_model, load_tokenizer
from sft.program import ArgumentParser, UserError, run_program
from sft.training.disk import new_model_folder
from sft.training.model_card import base_licence

ROWS_AT_ONCE = 10_000
MULTIPLE = 64  # of rows in the embedding, as matrix products on a GPU want
CARD = """---
library_name: transformers
pipeline_tag: text-generation
{metadata}---

# {name}

{base} with a smaller vocabulary, that of the data it is to be fine-tuned on. The remaining weights are unchanged.

{lines}

{licence}
"""


class Merges:
    """The merges of a byte-level BPE: which two tokens make another."""

    def __init__(self, state: dict):
        """Take a tokenizer's state, as `tokenizers` writes it to JSON."""
        self.ids = state["model"]["vocab"]
        self.rank = {tuple(pair): rank for rank, pair in enumerate(state["model"]["merges"])}

    def parts_of(self, token: str) -> tuple[str, str] | None:
        """Return the two tokens whose merge gives a token; None if merging its bytes does not give it.

        Inside any text the merges within a token are those of the token alone, since none crosses its ends.
        """
        pieces = list(token)
        while len(pieces) > 2:
            ranks = [self.rank.get(pair, math.inf) for pair in pairwise(pieces)]
            first = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[first] == math.inf:
                return None
            pieces[first : first + 2] = [pieces[first] + pieces[first + 1]]
        return tuple(pieces) if tuple(pieces) in self.rank else None

    def made_of(self, token: str) -> set[int]:
        """Return the ids of a token and of all that it is merged from; nothing for a token without merges."""
        found, open_tokens = {}, [token] if token in self.ids else []
        while open_tokens:
            token = open_tokens.pop()
            if token not in found:
                found[token] = self.ids[token]
                open_tokens += self.parts_of(token) or ()
        return set(found.values())


# -------------------------------------------------------------------------------------------------- what there is to do


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return a tokenizer's state; raise UserError if it is not a byte-level BPE, which can write any text.

    Falcon's lacks bytes that no text has, and some control characters.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    is_byte_level = "ByteLevel" in json.dumps([state["normalizer"], state["pre_tokenizer"]])
    if model["type"] != "BPE" or affixes or not is_byte_level:
        raise UserError(
            f"the tokenizer is a {model['type']} that is not byte-level or adds affixes; expected a byte-level BPE, as "
            "BLOOM and Falcon have; train the model with its full vocabulary"
        )
    return state


def pinned_ids(tokenizer: PreTrainedTokenizerBase, settings: Iterable[PretrainedConfig | GenerationConfig]) -> set[int]:
    """Return the ids that are always kept: bytes, special and added tokens, those of prompt and configurations."""
    letters = tokenizer.get_vocab().keys() & set(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *tokenizer.get_added_vocab(), *tokenizer.all_special_tokens]
    pinned = set(tokenizer.convert_tokens_to_ids(names))
    template = chain.from_iterable(map(prompts.split_prompt, ("", ""), ("", "-")))
    for text in (*template, prompts.write_turn(("", ""))):
        pinned.update(tokenizer(text, add_special_tokens=False).input_ids)
    for name, ids in chain.from_iterable(map(token_ids_of, settings)):
        if unknown := [id for id in ids if id >= len(tokenizer)]:
            raise UserError(
                f"the model's {name} {unknown[0]} is not a token of its tokenizer; correct config.json or "
                "generation_config.json"
            )
        pinned.update(ids)
    return pinned


def token_ids_of(settings: PretrainedConfig | GenerationConfig) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and the ids of each special token that a configuration names."""
    for name, value in settings.to_dict().items():
        if name.endswith("_token_id") and value is not None:
            yield name, value if isinstance(value, list) else [value]


def ids_of(examples: Dataset) -> Iterator[np.ndarray]:
    """Yield the token ids of all samples, some thousands at a time."""
    for start in range(0, len(examples), ROWS_AT_ONCE):
        rows = examples.with_format("arrow")[start : start + ROWS_AT_ONCE]
        yield rows.column("input_ids").combine_chunks().flatten().to_numpy()


def count_tokens(examples: Dataset, size: int) -> np.ndarray:
    """Return how often each token occurs, (V,)."""
    counts = np.zeros(size, np.int64)
    for ids in tqdm(ids_of(examples), "counting", math.ceil(len(examples) / ROWS_AT_ONCE), leave=False):
        counts += np.bincount(ids, minlength=size)
    return counts


def choose(
    counts: np.ndarray, tokens: Sequence[str], merges: Merges, pinned: set[int], keep_top: int | None
) -> list[int]:
    """Return the ids to keep, sorted, (K,): the most frequent, what they are merged from, and the pinned ones.

    `counts` is (V,), `tokens` the V names. Without `keep_top` all that occur are kept. The next ones, by frequency and
    then by id, fill up to `keep_top` and to a multiple of 64.
    """
    occurring = np.flatnonzero(counts)
    by_count = occurring[np.argsort(-counts[occurring], kind="stable")].tolist()
    others = (id for id in np.flatnonzero(counts == 0).tolist() if merges.parts_of(tokens[id]))
    candidates, number, kept = chain(by_count, others), keep_top or len(by_count), set(pinned)
    for id in tqdm(chain(pinned, islice(candidates, number)), "choosing", len(pinned) + number, leave=False):
        kept |= merges.made_of(tokens[id])
    for id in candidates:
        room = -len(kept) % MULTIPLE
        if not room:
            break
        more = merges.made_of(tokens[id]) - kept
        if len(more) <= room:
            kept |= more
    return sorted(kept)


# ------------------------------------------------------------------------------------------------- tokenizer and model


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the tokens `kept`, (K,), numbered from 0 in the same order."""
    state, new_of = state_of(tokenizer), {old: new for new, old in enumerate(kept)}
    model = state["model"]
    model["vocab"] = {token: new_of[old] for token, old in model["vocab"].items() if old in new_of}
    model["merges"] = [
        pair for pair in model["merges"] if all(token in model["vocab"] for token in (*pair, "".join(pair)))
    ]
    for added in state["added_tokens"]:
        added["id"] = new_of[added["id"]]
    for special in ((state["post_processor"] or {}).get("special_tokens") or {}).values():
        special["ids"] = [new_of[id] for id in special["ids"]]
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(state))
    names = tokenizer.convert_ids_to_tokens(kept)
    assert trimmed.convert_ids_to_tokens(range(len(kept))) == names and len(trimmed) == len(kept)
    return trimmed


def trim_model(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave the rows `kept`, (K,), of embedding and head in place, tied or not; renumber the special tokens."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied, rows = head.weight is embedding.weight, torch.tensor(kept)
    embedding.weight = nn.Parameter(embedding.weight.detach()[rows])  # (K, H)
    head.weight = embedding.weight if is_tied else nn.Parameter(head.weight.detach()[rows])
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[rows])
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(kept)
    new_of = {old: new for new, old in enumerate(kept)}
    for settings in (model.config, model.generation_config):
        for name, ids in token_ids_of(settings):
            new = [new_of[id] for id in ids]
            setattr(settings, name, new if isinstance(getattr(settings, name), list) else new[0])


def check_same(before: Dataset, after: Dataset, kept: Sequence[int]) -> None:
    """Assert that both vocabularies split all samples into the same tokens."""
    rows = zip(ids_of(before), ids_of(after), strict=True)
    for ids, new_ids in tqdm(rows, "comparing", math.ceil(len(before) / ROWS_AT_ONCE), leave=False):
        assert np.array_equal(ids, np.asarray(kept)[new_ids]), "the smaller vocabulary splits the data differently"


# ----------------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Outcome:
    """What a smaller vocabulary has, and saves; pairs are before and after."""

    num_tokens: tuple[int, int]
    num_occurring: int
    num_parameters: tuple[int, int]
    data_tokens: tuple[int, int]
    data: str

    def lines(self) -> Iterator[str]:
        """Yield the figures in words."""
        (before, after), (weights, fewer), (tokens, more) = self.num_tokens, self.num_parameters, self.data_tokens
        more_tokens = f"{more / tokens - 1:.2%} more tokens than" if more != tokens else "as many tokens as"
        yield f"tokens: {after:,} of {before:,} kept; {self.num_occurring:,} occur in the data"
        yield f"parameters: {fewer:,} of {weights:,}, {1 - fewer / weights:.1%} fewer"
        yield f"the data is split into {more_tokens} before"


def trim(name: str, data: str, folder: Path, keep_top: int | None, max_length: int, cache_dir: str | None) -> Outcome:
    """Write the model and tokenizer `name` with a vocabulary for `data` into a folder.

    Raises UserError if the data has no rows, the tokenizer is not a byte-level BPE, or no token would be dropped.
    """
    location = locate(name, cache_dir)
    config, tokenizer = load_config(location, cache_dir), load_tokenizer(location, max_length, cache_dir)
    quantized.check_whole(location, config, "which cannot be cut to fewer tokens")
    merges = Merges(state_of(tokenizer))
    examples, report = load_examples(data, tokenizer, cache_dir, "--data")
    print_data("data", report)
    if wrong := report.what_is_wrong(max_bad_fraction=1):
        raise UserError(f"--data {data} {wrong}")
    counts = count_tokens(examples, len(tokenizer))
    model = load_model(location, "auto", cache_dir)
    pinned = pinned_ids(tokenizer, (config, model.generation_config))
    kept = choose(counts, tokenizer.convert_ids_to_tokens(range(len(tokenizer))), merges, pinned, keep_top)
    if len(kept) >= config.vocab_size:
        raise UserError(f"--data {data} drops no token of {name}; give a --keep_top far below {len(kept):,}")
    trimmed = trimmed_tokenizer(tokenizer, kept)
    again, report_again = load_examples(data, trimmed, cache_dir, "--data")
    if counts[kept].sum() == counts.sum():
        check_same(examples, again, kept)
    num_parameters = model.num_parameters()
    trim_model(model, kept)
    model.save_pretrained(folder)
    trimmed.save_pretrained(folder)
    return Outcome(
        num_tokens=(len(tokenizer), len(kept)),
        num_occurring=int((counts > 0).sum()),
        num_parameters=(num_parameters, model.num_parameters()),
        data_tokens=(report.tokens, report_again.tokens),
        data=report.line(),
    )


def card_of(name: str, output: str, outcome: Outcome) -> str:
    """Return the README.md of a folder with a smaller vocabulary."""
    metadata, licence = base_licence(name, load_config(output).model_type)
    lines = "\n".join(f"- {line}" for line in (f"data: {outcome.data}", *outcome.lines()))
    return CARD.format(metadata=metadata, name=Path(output).name, base=Path(name).name, lines=lines, licence=licence)


def main() -> None:
    """Trim as the command line says."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model folder or a hub id")
    parser.add_argument("output", help="the model folder to make")
    parser.add_argument("--data", required=True, help="the data to fine-tune on, as train_sft.py's --data_path")
    parser.add_argument("--keep_top", type=int, help="how many of the data's tokens to keep, by default all")
    parser.add_argument("--model_max_length", type=int, default=2048, help="as in training, where longer rows are cut")
    parser.add_argument("--cache_dir", help="where hub files and tokenised data are kept")
    given = parser.parse_args()
    if given.keep_top is not None and given.keep_top < 1:
        raise UserError(f"--keep_top {given.keep_top} must be 1 or more; give another, or leave it out")
    with new_model_folder(given.output) as folder:
        outcome = trim(given.model, given.data, folder, given.keep_top, given.model_max_length, given.cache_dir)
    Path(given.output, "README.md").write_text(card_of(given.model, given.output, outcome), encoding="utf-8")
    for line in outcome.lines():
        print(line)
    print(f"saved in {given.output}")


if __name__ == "__main__":
    run_program(main)
