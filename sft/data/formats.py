"""Samples: questions and answers, taken from records in any of the common shapes."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from reprlib import Repr

from sft.data.json_stream import RepeatedKeys
from sft.data.shards import SHAPE, Block, Refused, place_of, read_blocks, records_of
from sft.program import UserError
from sft.prompts import ASSISTANT, HUMAN, build_prompt, chat_instruction

NUM_SAMPLED = 100  # first records with a known shape, which decide the file's shape
MAX_CHARACTERS = 1_000_000  # in a prompt or an answer, some hundred times what a model reads
TURN = re.compile(f"^({HUMAN}|{ASSISTANT})", re.MULTILINE)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
}
BRIEF = Repr()  # shortens values of any size and depth
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxdict = 2, 40, 40, 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One task, or one conversation whose last question and reply are `instruction` and `output`.

    `place` is where it was read from, "file:line" or "file[index]"; `system`, unless empty, ends in a newline; `note`
    says what was omitted.
    """

    instruction: str
    input: str
    output: str
    place: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    note: str = ""

    @property
    def prompt(self) -> str:
        """Return the prompt of the last reply."""
        return build_prompt(chat_instruction(self.system, self.history, self.instruction), self.input)


class _RefusedError(Exception):
    """A record is not a valid sample; the message says why."""


# -------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Pair:
    """A shape with a key for the question, one for the answer, and perhaps one for the question's input."""

    instruction: str
    output: str
    input: str | None = None

    @property
    def name(self) -> str:
        """Return the keys, for people."""
        return "/".join(filter(None, (self.instruction, self.input, self.output)))

    @property
    def keys(self) -> set[str]:
        """Return the keys that this shape reads."""
        return set(filter(None, (self.instruction, self.input, self.output)))

    def fits(self, record: dict) -> bool:
        """Tell whether a record has both required keys."""
        return self.instruction in record and self.output in record

    def read(self, record: dict, place: str) -> Sample:
        """Return the sample of a record; a null or missing input, system or history counts as empty."""
        for key in (self.instruction, self.output):
            if key not in record:
                raise _RefusedError(f'no "{key}", which the first rows of the file have; found {_keys(record)}')
        instruction, output = (_text(record[key], key) for key in (self.instruction, self.output))
        input = _text_or_none(record, self.input) if self.input else ""
        system = _text_or_none(record, "system")
        history = _pairs(record.get("history"))
        if not (instruction.strip() or input.strip()):
            raise _RefusedError(f'the "{self.instruction}" is empty')
        if not output.strip():
            raise _RefusedError(f'the "{self.output}" is empty')
        if not (input or history or system):
            history, instruction = split_history(instruction)
        if input and (history or system):  # only the template of a single task has a place for an input
            instruction, input = f"{instruction}\n{input}", ""
        return Sample(instruction, input, output, place, history, f"{system}\n" if system else "")


@dataclass(frozen=True)
class Turns:
    """A shape with a list of turns, each with a key for the speaker and one for the text."""

    turns: str
    role: str
    content: str

    @property
    def name(self) -> str:
        """Return the keys, for people."""
        return f"{self.turns} of {self.role}/{self.content}"

    @property
    def keys(self) -> set[str]:
        """Return the keys that this shape reads."""
        return {self.turns}

    def fits(self, record: dict) -> bool:
        """Tell whether a record has turns, the first of them with a speaker."""
        turns = record.get(self.turns)
        return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and self.role in turns[0]

    def read(self, record: dict, place: str) -> Sample:
        """Return the sample of a record: an optional system turn, then alternating questions and replies."""
        if not isinstance(turns := record.get(self.turns), list):
            raise _RefusedError(f'no "{self.turns}" list, which the first rows of the file have; found {_keys(record)}')
        said = [self._turn(turn, number) for number, turn in enumerate(turns, 1)]
        system = f"{said.pop(0)[1]}\n" if said and said[0][0] == "system" else ""
        is_open = bool(said) and said[-1][0] == "user"
        *history, (question, reply) = _alternating(said, len(said) - is_open)
        note = "cut: the last turn, a question without a reply" if is_open else ""
        return Sample(question, "", reply, place, tuple(history), system, note)

    def _turn(self, turn: object, number: int) -> tuple[str, str]:
        if not isinstance(turn, dict) or self.role not in turn or self.content not in turn:
            raise _RefusedError(f'turn {number} lacks "{self.role}" or "{self.content}": {BRIEF.repr(turn)}')
        if isinstance(turn, RepeatedKeys):
            raise _RefusedError(f"turn {number} repeats a key")
        role = turn[self.role]
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise _RefusedError(
                f'turn {number} has the role {BRIEF.repr(role)}; expected "user", "assistant" or "system"'
            )
        return ROLES[role.lower()], _text(turn[self.content], f"{self.content} of turn {number}")


def _alternating(said: list[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    """Return the first `number` turns, of role and text, as pairs of a question and its reply."""
    roles = [role for role, _ in said]
    if not number or roles[:number] != ["user", "assistant"] * (number // 2):
        order = BRIEF.repr(roles) if number else "no question with a reply"
        raise _RefusedError(f"turns must alternate between user and assistant, user first; found {order}")
    texts = [text for _, text in said[:number]]
    if not all(text.strip() for text in texts):
        raise _RefusedError("a turn is empty")
    return list(zip(texts[::2], texts[1::2], strict=True))


SHAPES = (
    Turns("messages", "role", "content"),
    Turns("conversations", "from", "value"),
    Turns("conversations", "role", "content"),
    Turns("conversation", "from", "value"),
    Turns("conversation", "role", "content"),
    Pair("instruction", "output", "input"),
    Pair("instruction", "response", "context"),
    Pair("prompt", "response"),
    Pair("prompt", "completion"),
    Pair("prompt", "output"),
    Pair("question", "answer"),
    Pair("question", "response"),
    Pair("query", "response"),
    Pair("query", "answer"),
    Pair("input", "target"),
    Pair("input", "output"),
)
Shape = Pair | Turns
# Shapes that read all keys of another and more, which a record of theirs would lose if read as the other.
FULLER = {shape: [other for other in SHAPES if shape.keys < other.keys] for shape in SHAPES}


def find_shape(block: Block) -> Shape | None:
    """Return the commonest shape of the first records that have a known one; None if no record of the block has."""
    records = (value for _, value in records_of(block) if isinstance(value, dict))
    counted = Counter(chain.from_iterable(islice(filter(None, map(_shapes_of, records)), NUM_SAMPLED)))
    return max(SHAPES, key=counted.__getitem__) if counted else None


def _shapes_of(record: dict) -> list[Shape]:
    """Return the shapes that a record has, without those that ignore a key that another reads."""
    fitting = [shape for shape in SHAPES if shape.fits(record)]
    return [shape for shape in fitting if not any(other in fitting for other in FULLER[shape])]


def to_sample(value: object, shape: Shape | None, place: str) -> Sample | Refused:
    """Return a record as a sample, or why it is not one."""
    if isinstance(value, Refused):
        return value
    try:
        if not isinstance(value, dict):
            raise _RefusedError(f"a JSON {type(value).__name__}; expected an object")
        if isinstance(value, RepeatedKeys):
            raise _RefusedError(f"a key appears twice among {_keys(value)}")
        if shape is None:
            raise _RefusedError(f"of no known shape, with {_keys(value)}; expected keys such as {SHAPE}")
        if fuller := next((other for other in FULLER[shape] if other.fits(value)), None):
            raise _RefusedError(f"of the shape {fuller.name}, but the first rows of the file are of {shape.name}")
        return shape.read(value, place)
    except _RefusedError as error:
        return Refused(place, str(error))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _RefusedError(f'"{name}" is {BRIEF.repr(value)}; expected a string')
    if len(value) > MAX_CHARACTERS:
        raise _RefusedError(f'"{name}" has {len(value):,} characters; at most {MAX_CHARACTERS:,} are allowed')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        broken = value[error.start]
        raise _RefusedError(f'"{name}" contains {broken!a}, a broken character or a byte that is not UTF-8') from None
    return value


def _text_or_none(record: dict, key: str) -> str:
    return "" if record.get(key) is None else _text(record[key], key)


def _pairs(history: object) -> tuple[tuple[str, str], ...]:
    """Return the earlier turns of a record, given as a list of [question, reply]."""
    if not history:
        return ()
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise _RefusedError(f'"history" is {BRIEF.repr(history)}; expected a list of [question, reply]')
    pairs = tuple((_text(question, "history"), _text(reply, "history")) for question, reply in history)
    if not all(text.strip() for pair in pairs for text in pair):
        raise _RefusedError('a turn in the "history" is empty')
    return pairs


def _keys(record: dict) -> str:
    return BRIEF.repr(sorted(map(str, record)))


def split_history(instruction: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """Split a `Human:` / `Assistant:` history, as in multiturn_chat_0.8M, into earlier turns and the last question.

    The names must begin their lines, alternate, and leave the last reply open, so that `chat_instruction` restores the
    same text from two turns or more; any other text is one question.
    """
    _, *parts = TURN.split(instruction) if instruction.startswith(HUMAN) else ("",)
    names, texts = parts[::2], parts[1::2]
    if len(names) < 2 or names != [HUMAN, ASSISTANT] * (len(names) // 2) or texts[-1]:
        return (), instruction
    texts = [text.removesuffix("\n") for text in texts[:-1]]
    if not all(text.strip() for text in texts):
        return (), instruction
    return tuple(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


# ------------------------------------------------------------------------------------------------------------- reading


def read_shaped(shard: Path) -> Iterator[tuple[Block, Shape | None]]:
    """Yield the blocks of a shard, each with the shape that the first records decide; None until one has a shape."""
    shape = None
    for block in read_blocks(shard):
        shape = shape or find_shape(block)
        yield block, shape


def samples_of(block: Block, shape: Shape | None) -> Iterator[tuple[int, Sample | Refused]]:
    """Yield the line or index of each record of a block and its sample, then the fault that ends it, if any."""
    for number, value in records_of(block):
        yield number, to_sample(value, shape, place_of(block.shard, block.form, number))
    if block.fault:
        yield block.start + len(block.records), block.fault


def read_all(shard: Path) -> Iterator[Sample | Refused]:
    """Yield each sample of a shard, in file order, or why it is refused."""
    for block, shape in read_shaped(shard):
        for _, sample in samples_of(block, shape):
            yield sample


def read_samples(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a shard; raise UserError on the first that is refused."""
    for sample in read_all(shard):
        if isinstance(sample, Refused):
            raise UserError(f"{sample.place}: {sample.reason}; fix or remove it")
        yield sample
