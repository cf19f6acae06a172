"""Samples to token ids: prompts and answers separately, each text once, the template's own text once for all."""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from sft import IGNORE_INDEX, prompts
from sft.data import trees
from sft.data.formats import Sample
from sft.program import UserError

try:
    import fastokens
except ImportError:  # not built for this machine
    fastokens = None

# What a user's text may begin and end with: one of each kind that pre-tokenizers distinguish.
PROBES = (*"aZ7你é😀#:。？,_\n \t\u3000\u0301\0", "'s", "\r\n")
CONTROL = [*map(chr, range(32)), "\x7f"]  # all that a vocabulary of bytes may lack, as Falcon's lacks some
JOINS_MERGE = 2  # tokens that two texts of a conversation may lose at most where they meet


@dataclass(slots=True)
class Example:
    """The token ids of a prompt and its answer, with eos unless that was cut; `note` says what was cut."""

    prompt: list[int]
    answer: list[int]
    note: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def check_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if `tokenizer.model_max_length` has no room for an answer after the empty prompt."""
    template = len(tokenizer(prompts.build_prompt("-", "-"), verbose=False).input_ids)
    if tokenizer.model_max_length < template + 2:
        raise UserError(
            f"--model_max_length {tokenizer.model_max_length} is too short: the prompt template alone takes {template} "
            f"tokens and an answer needs at least 2 more; give at least {template + 2}"
        )


class Encoder:
    """Tokenises samples as `tokenizer` does, each reply after the prompt that the chat would use to ask for it.

    Prompt and answer are tokenised separately: BLOOM's pre-tokenizer would otherwise merge ":" with the answer's first
    characters into tokens that never occur in inference, where no answer follows the prompt. The name of a special
    token, such as "</s>", is plain text in both.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Take a fast tokenizer with an eos token and a `model_max_length`."""
        self.tokenizer = tokenizer
        self.max_length = tokenizer.model_max_length
        self.eos = tokenizer.eos_token_id
        self.backend = plain_backend(tokenizer)
        self.special = [name for name in special_tokens(tokenizer) if name]
        self.lost = [char for char in CONTROL if not self.backend.encode(char, add_special_tokens=False).ids]
        self.faster = faster_backend(self.backend)
        self.template_ids: dict[str, list[int]] = {}
        if cuts_at_the_template(tokenizer):
            both = (*prompts.split_prompt("")[::2], *prompts.split_prompt("", "-")[::2])
            self.template_ids = {text: self.backend.encode(text, add_special_tokens=False).ids for text in both}
        # What every prompt begins with, without and with an input.
        self.beginnings = [self._beginning(""), self._beginning("x")]

    def encode(self, samples: Sequence[Sample]) -> list[list[Example]]:
        """Return the examples of each sample, one per reply, each of at most `max_length` tokens."""
        turns, owners = [], []
        firsts = self._first_turns(samples)
        for number, sample in enumerate(samples):
            for last, first in enumerate(firsts[number]):
                if last in sample.untrained:
                    continue
                turns.append(_turn(sample, first, last))
                owners.append((number, first, last))
        all_prompts = self._encode_prompts(turns)
        answers = self._encode_texts([answer for _, _, answer in turns])
        examples: list[list[Example]] = [[] for _ in samples]
        for (number, first, last), prompt, answer in zip(owners, all_prompts, answers, strict=True):
            answer.append(self.eos)
            fits = len(prompt) + len(answer) <= self.max_length
            sample = samples[number]
            example = Example(prompt, answer) if fits else self._shorten(sample, first, last, answer)
            if first and fits:
                example.note = _turns_note(first, last)
            examples[number].append(example)
        return examples

    def _beginning(self, input: str) -> np.ndarray:
        one, other = (np.array(self.encode_text(prompts.build_prompt(text, input))) for text in ("x", "这"))
        return one[: trees.common(one, other)]

    def begins(self, example: Example, has_input: bool) -> int:
        """Return how many tokens an example begins with as every prompt of its template does."""
        beginning = self.beginnings[has_input]
        return trees.common(np.array(example.prompt[: len(beginning)], np.int64), beginning)

    def __reduce__(self) -> tuple:
        """Let a process that is not a fork build its own."""
        return Encoder, (self.tokenizer,)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if self.faster is None or not texts:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids, ends = self.faster.encode_batch_flat(texts, add_special_tokens=False)
        ids, ends = (np.frombuffer(buffer, dtype).tolist() for buffer, dtype in ((ids, np.uint32), (ends, np.uint64)))
        encoded = [ids[start:end] for start, end in pairwise(ends)]
        own = self.backend.encode(texts[0], add_special_tokens=False).ids
        assert encoded[0] == own, f"fastokens and tokenizers differ on {texts[0]!r}: {encoded[0]}, {own}"
        return encoded

    def _encode_prompts(self, turns: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        """Return the ids of each turn's prompt; where that is exact, only the user's text is tokenised."""
        if not self.template_ids:
            texts = [prompts.build_prompt(instruction, input) for instruction, input, _ in turns]
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]
        parts = [prompts.split_prompt(instruction, input) for instruction, input, _ in turns]
        own = iter(self._encode_texts([text for each in parts for text in each[1::2]]))
        encoded = []
        for each in parts:
            ids = list(self.template_ids[each[0]])
            for text in each[2::2]:
                ids += next(own)
                ids += self.template_ids[text]
            encoded.append(ids)
        return encoded

    def _first_turns(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Return, for each sample and each of its replies, the first turn of the history that may fit before it.

        Each text is counted once, so that a conversation of a thousand turns is not tokenised a thousand times.
        """
        with_history = [sample for sample in samples if sample.history]
        texts = [prompts.write_turn(turn) for sample in with_history for turn in sample.history]
        lengths = iter(map(len, self._encode_texts(texts)))
        firsts = []
        for sample in samples:
            if not sample.history:
                firsts.append([0])
                continue
            ends = [0, *accumulate(max(0, next(lengths) - JOINS_MERGE) for _ in sample.history)]
            first, own = 0, []
            for end in ends:
                while end - ends[first] > self.max_length:
                    first += 1
                own.append(first)
            firsts.append(own)
        return firsts

    def encode_text(self, prompt: str) -> list[int]:
        """Return the ids of a whole prompt, with those that the tokenizer puts around every text."""
        return self.backend.encode(prompt).ids

    def encode_prompt(self, sample: Sample, num_new_tokens: int) -> tuple[list[int], int, int]:
        """Return the prompt for a reply of `num_new_tokens` to a sample's last question, shortened as in training.

        Also returns how many of the oldest turns and how many of the question's tokens were left out.
        """
        last = len(sample.history)
        room = [self.eos] * num_new_tokens
        first = self._first_fitting(sample, self._first_turns([sample])[0][last], last, room)
        if first <= last:
            [prompt] = self._encode_prompts([_turn(sample, first, last)])
            return prompt, first, 0
        whole = self._encode_prompts([_turn(sample, last, last)])[0]
        prompt = self._shorten(sample, last, last, room).prompt
        return prompt, last, len(whole) - len(prompt)

    def _first_fitting(self, sample: Sample, first: int, last: int, answer: list[int]) -> int:
        """Return the first turn from which the history fits before an answer, `first` or later; `last + 1` if none."""
        return bisect_left(range(last + 1), True, first, key=lambda start: self._fits(sample, start, last, answer))

    def _shorten(self, sample: Sample, first: int, last: int, answer: list[int]) -> Example:
        """Fit a turn and its answer into `max_length` tokens: drop the oldest turns, then shorten the user's text, then
        the answer's end."""
        fitting = self._first_fitting(sample, first + 1, last, answer)
        if fitting <= last:
            [prompt] = self._encode_prompts([_turn(sample, fitting, last)])
            return Example(prompt, answer, _turns_note(fitting, last))
        first = last
        instruction, input, _ = _turn(sample, first, last)
        encoded = self.backend.encode(prompts.build_prompt(instruction, input))
        spans = prompts.body_spans(instruction, input)
        example = join(encoded.ids, encoded.offsets, spans, answer, self.max_length)
        if last:
            example.note = f"{_turns_note(first, last)}; {example.note.removeprefix('cut: ')}"
        return example

    def _fits(self, sample: Sample, first: int, last: int, answer: list[int]) -> bool:
        [prompt] = self._encode_prompts([_turn(sample, first, last)])
        return len(prompt) + len(answer) <= self.max_length


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens, with their ids, that mean something other than their name."""
    added = tokenizer.added_tokens_decoder.items()
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token.content: id for id, token in added if token.special} | named


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return another backend of a tokenizer that takes the names of special tokens in a text as plain text.

    Another, since each call of `tokenizer` sets anew how its own backend takes them.
    """
    own = tokenizer.backend_tokenizer
    plain = Tokenizer(own.model)  # shared, since to copy BLOOM's takes a second
    plain.normalizer, plain.pre_tokenizer, plain.post_processor = own.normalizer, own.pre_tokenizer, own.post_processor
    plain.add_tokens([token for _, token in sorted(own.get_added_tokens_decoder().items())])
    assert plain.get_added_tokens_decoder() == own.get_added_tokens_decoder()
    plain.encode_special_tokens = True
    special = [(name, id) for name, id in special_tokens(tokenizer).items() if len(name) > 1]
    mergeable = [name for name, id in special if [token.id for token in plain.model.tokenize(name)] == [id]]
    if mergeable:  # as in a vocabulary trained on texts with such names; a cut within the name keeps it apart
        ends = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in mergeable)
        cut = pre_tokenizers.Split(Regex(ends), behavior="isolated")
        plain.pre_tokenizer = pre_tokenizers.Sequence([plain.pre_tokenizer, cut]) if plain.pre_tokenizer else cut
    return plain


def faster_backend(backend: Tokenizer) -> "fastokens.Tokenizer | None":
    """Return the same tokenizer in fastokens, several times as fast; None if that does not support its parts.

    It supports BLOOM's pre-tokenizer, not Falcon's (https://github.com/crusoecloud/fastokens). It would split special
    tokens as well, but not find another added token within the name of one, as `tokenizers` does.
    """
    if fastokens is None:
        return None
    state, key = backend.to_str(), '"added_tokens":'
    start = state.index(key) + len(key)
    added, end = json.JSONDecoder().raw_decode(state, start)  # the whole takes a second for BLOOM's
    ordinary = json.dumps([token for token in added if not token["special"]])
    try:
        return fastokens.Tokenizer.from_json_str(state[:start] + ordinary + state[end:])
    except ValueError:
        return None


def cuts_at_the_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the template's own text can be tokenised once for all samples.

    No token crosses a boundary of the pre-tokenizer, so this is exact if the pre-tokenizer splits the parts of
    `prompts.split_prompt` into the same pieces as the whole, whatever a user's text begins and ends with, and no
    normalizer rewrites the text first. BLOOM's and Falcon's do, since the parts meet at ":" and a line end, and at a
    line end and "#"; GPT-2's does not, since it looks ahead from a line end. Tokens that were added to the vocabulary
    are found before that, so each is tried.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None or backend.pre_tokenizer is None:
        return False
    for probe in PROBES:
        for parts in (prompts.split_prompt(probe), prompts.split_prompt(f"{probe}x{probe}", f"{probe * 2}")):
            whole = backend.pre_tokenizer.pre_tokenize_str("".join(parts))
            pieces = chain.from_iterable(map(backend.pre_tokenizer.pre_tokenize_str, parts))
            if [piece for piece, _ in whole] != [piece for piece, _ in pieces]:
                return False
    ordinary = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    for name in ordinary:
        for parts in (prompts.split_prompt(name), prompts.split_prompt(name, name)):
            whole, *ids = (backend.encode(text, add_special_tokens=False).ids for text in ("".join(parts), *parts))
            if whole != [*chain.from_iterable(ids)]:
                return False
    text = prompts.build_prompt("x")
    return tokenizer(text).input_ids == backend.encode(text, add_special_tokens=False).ids


def _turn(sample: Sample, first: int, last: int) -> tuple[str, str, str]:
    """Return (instruction, input, output) of reply `last` of a sample, with its history from turn `first` on."""
    if last < len(sample.history):
        question, reply = sample.history[last]
        return prompts.chat_instruction(sample.system, sample.history[first:last], question), "", reply
    return (
        prompts.chat_instruction(sample.system, sample.history[first:], sample.instruction),
        sample.input,
        sample.output,
    )


def _turns_note(first: int, last: int) -> str:
    return f"cut: the first {first} of the {last} turns before reply {last + 1}"


def join(
    prompt: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], answer: list[int], max_length: int
) -> Example:
    """Join a prompt and its answer (eos included) into at most `max_length` tokens.

    If they do not fit, the user's text in the prompt is shortened first: each of `spans` (in characters; `offsets` maps
    tokens to them) from its left end, with the template kept whole. Then the answer loses its end, with its eos.
    """
    excess = len(prompt) + len(answer) - max_length
    if excess <= 0:
        return Example(prompt, answer)
    length = len(prompt)
    prompt = shorten(prompt, offsets, spans, excess)
    note = f"cut: {length - len(prompt)} of the prompt's {length} tokens"
    if len(prompt) + len(answer) > max_length:
        note += f", {len(prompt) + len(answer) - max_length} of the answer's {len(answer)}"
        answer = answer[: max_length - len(prompt)]
    return Example(prompt, answer, note)


def shorten(prompt: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], excess: int) -> list[int]:
    """Return the prompt with about `excess` tokens removed, never any of the template's own.

    A character of several tokens is removed whole, so a few more tokens may go.
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


def group(examples: Sequence[Example], max_length: int) -> Iterator[list[Example]]:
    """Yield a sample's examples, in order, in groups of at most `max_length` tokens."""
    together: list[Example] = []
    length = 0
    for example in examples:
        if together and length + len(example) > max_length:
            yield together
            together, length = [], 0
        together.append(example)
        length += len(example)
    yield together


def encode_samples(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """Yield one example per reply: `input_ids` and `labels`, lists of one length, "length", "place" and "note"."""
    for sample, examples in zip(samples, Encoder(tokenizer).encode(samples), strict=True):
        for example in examples:
            yield {
                "input_ids": example.prompt + example.answer,
                "labels": [IGNORE_INDEX] * len(example.prompt) + example.answer,
                "length": len(example),
                "place": sample.place,
                "note": example.note or sample.note,
            }
