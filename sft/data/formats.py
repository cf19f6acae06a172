"""Samples: questions and answers, taken from records whose keys have the names that people give them."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sft.data.advice import empty_key, lacks, without_reply
from sft.data.columns import (
    BAD,
    BY_NAME,
    MESSAGES,
    SPEAKERS,
    Columns,
    ColumnsError,
    Layout,
    by_hand,
    has_value,
    ignoring,
    layout_of,
    name_of,
    no_role,
    not_read,
    quoted,
    shown,
    without,
)
from sft.data.json_stream import RepeatedKeys
from sft.data.options import read_options
from sft.data.shards import Block, Refused, place_of, read_blocks, records_of
from sft.data.texts import RefusedError, brief, text_of, truth_of
from sft.data.turns import Talk, UnknownSpeakerError, followed, read_reply, read_talk, speaks, with_speakers
from sft.program import UserError
from sft.prompts import ASSISTANT, HUMAN, build_prompt, chat_instruction

TURN = re.compile(f"^({HUMAN}|{ASSISTANT})", re.MULTILINE)
WRAPPERS = ("instances", "data")  # keys of rows within a row
TEMPLATES = (
    "### Instruction:",
    "### Response:",
    "<|im_start|>",
    "[INST]",
)  # marks of templates, which this one would stand around
ENDS = ("</s>", "<|endoftext|>", "<|im_end|>")
IMAGE = "<image>"  # stands in a text where a picture was


class Sample(NamedTuple):
    """One task, or one conversation whose last question and reply are `instruction` and `output`.

    `place` is where it was read from, "file:line" or "file[index]"; `system`, unless empty, ends in a newline; a pair
    of `history` without a question is an opening by the assistant; `untrained` are the numbers of the replies that
    are read and not trained; `note` says what was omitted. `shape` is the keys it was read from, and `remarks` is what
    the report counts.
    """

    instruction: str
    input: str
    output: str
    place: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    note: str = ""
    untrained: tuple[int, ...] = ()
    shape: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """Return the prompt of the last reply."""
        return build_prompt(chat_instruction(self.system, self.history, self.instruction), self.input)

    def texts(self) -> Iterator[str]:
        """Yield every text of the sample."""
        yield from (self.system, self.instruction, self.input, self.output)
        yield from filter(None, chain.from_iterable(self.history))


# ------------------------------------------------------------------------------------------------------------- records


def to_sample(value: object, place: str, columns: Columns = BY_NAME) -> Sample | Refused:
    """Return a record as a sample, or why it is not one."""
    if isinstance(value, Refused):
        return value
    try:
        return _sample(_record(value), place, columns)
    except ColumnsError as error:
        return Refused(place, _on_one_line(str(error)))
    except RefusedError as error:
        reason = f"{error}{_advice_on_speaker(error, columns)}"
        return Refused(place, _on_one_line(reason), kind=_on_one_line(error.kind))


def _advice_on_speaker(error: RefusedError, columns: Columns) -> str:
    if not isinstance(error, UnknownSpeakerError) or not isinstance(error.speaker, str) or not error.speaker.strip():
        return ""
    return f"; type {' or '.join(by_hand(columns, (role, error.speaker)) for role in SPEAKERS)}"


def _on_one_line(reason: str) -> str:
    """Return a reason, which may name any key, as a line that any terminal can print."""
    return reason if reason.isprintable() else reason.encode("unicode_escape").decode()


def _record(value: object) -> dict:
    """Return a record as an object: a list may hold one object, or the turns of a conversation."""
    if value.__class__ is dict and not ("data" in value or "instances" in value):  # nearly always
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and not speaks(value[0]):
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if not all(map(speaks, value)):
            raise RefusedError(
                "a list of objects that may be rows or the turns of a conversation; give each row its own line, or "
                'write {"messages": [...]}'
            )
        return {"messages": value}
    if not isinstance(value, dict):
        raise RefusedError(f"a JSON {type(value).__name__}; expected an object")
    if isinstance(value, RepeatedKeys):
        raise RefusedError("a key appears twice", quoted(sorted(map(str, value))))
    return _unwrapped(value)


def _unwrapped(record: dict) -> dict:
    """Return a record with the one row that it wraps in its place, as seed tasks are written."""
    for wrapper in WRAPPERS:
        rows = record.get(wrapper)
        is_list = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)
        if not is_list or all(map(speaks, rows)):
            continue
        others = {key: value for key, value in record.items() if key != wrapper}
        if len(rows) > 1 or isinstance(rows[0], RepeatedKeys) or others.keys() & rows[0].keys():
            raise RefusedError(
                f'"{wrapper}" holds rows, or the turns of a conversation; write them as rows of their own, or rename '
                '"data" to "messages"'
            )
        return others | rows[0]
    return record


def _sample(record: dict, place: str, columns: Columns) -> Sample:
    # Most values are texts, and no call is made for those.
    keys = tuple(
        [key for key, value in record.items() if value.__class__ is str and value[2:] or has_value(value, key, columns)]
    )
    plain: list[str] = []
    if not MESSAGES.isdisjoint(keys):
        plain = _plain_messages(keys, record, columns)
        keys = tuple(key for key in keys if key not in plain)
    layout = layout_of(keys, columns)
    remarks = [not_read(key) for key in (*layout.unread, *plain)]
    if columns.by_hand:
        record = with_speakers(record, layout, columns)
        remarks += [without(key) for key in columns.given if not any(key == str(own).strip() for own in record)]
    if layout.copies:
        _check_copies(record, layout, columns)
    if layout.verdicts and (layout.messages or layout.output):
        remarks += [not_read(key) for key in _check_verdicts(record, layout, columns)]
    system = text_of(record[layout.system], layout.system) if layout.system else ""
    system = system if system.strip() else ""
    if talk := _talk(record, layout, columns):
        return _from_talk(talk, record, layout, system, place, remarks, columns)
    return _from_pair(record, layout, system, place, remarks, columns)


def _check_copies(record: dict, layout: Layout, columns: Columns) -> None:
    """Refuse a record with a further text, unless that repeats the question and the answer, as Alpaca's "text" does."""
    own = [record[key] for key in (layout.instruction, layout.output) if key]
    for key in layout.copies:
        text = record[key]
        repeats = isinstance(text, str) and all(isinstance(each, str) and each.strip() in text for each in own)
        if len(own) == 2 and not repeats or layout.messages:
            raise no_role([key], layout.messages, layout.input, columns)


def _plain_messages(keys: tuple[str, ...], record: dict, columns: Columns) -> list[str]:
    """Return the keys that are named like a conversation and hold none, such as a number of turns."""
    given = {key.strip() for _, key in columns.by_hand}
    plain = [key for key in keys if key in MESSAGES and key not in given and not isinstance(record[key], list | dict)]
    plain = [key for key in plain if key not in columns.ignored]
    for key in plain:
        if isinstance(record[key], str) and key not in ("data", "turns") and len(plain) < len(keys):
            raise ColumnsError(
                f'"{key}" is a text, not a list of turns, and the answer may depend on it; type '
                f"{by_hand(columns, ('input', key))}, or {ignoring(columns, key)}"
            )
    return plain


def _check_verdicts(record: dict, layout: Layout, columns: Columns) -> list[str]:
    """Refuse a record that says that its answer is a bad one; return the keys that say something else."""
    unread = []
    for key in layout.verdicts:
        truth = truth_of(record[key])
        if truth is (name_of(key) in BAD):
            raise RefusedError(
                f'"{key}" is {brief(record[key]).lower()}: the answer is marked as a bad one or not to be trained; '
                f"if it is not, type {ignoring(columns, key)}"
            )
        if truth is None or not (isinstance(record[key], bool) or name_of(key) in BAD):
            unread.append(key)
    return unread


def _talk(record: dict, layout: Layout, columns: Columns) -> Talk | None:
    """Return the conversation of a record; None if it is one question and answer."""
    key = layout.messages or layout.instruction
    question = record[key] if key else None
    answer = record[layout.output] if layout.output else None
    if layout.messages is None and not isinstance(question, list) and not (_are_turns(answer) and answer[1:]):
        return None
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question or []
    if layout.output and isinstance(turns, list):
        turns = followed(turns, answer, key, layout.output)
    try:
        talk = read_talk(turns, key or layout.output)
    except RefusedError as error:
        raise without_reply(error, layout, columns) from None
    texts = [text for pair in talk.pairs for text in pair]
    own = (layout.history, layout.input, *layout.options) if layout.messages is None else ()
    for other in (*layout.beside, *filter(None, own)):
        if not (isinstance(record[other], str) and record[other] in texts):
            flag = by_hand(columns, ("instruction", "KEY"), ("output", "KEY"))
            raise RefusedError(
                f'"{other}" and the turns of "{key or layout.output}" are both there; type {ignoring(columns, other)}, '
                f"or {flag}"
            )
    return talk


def _are_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _refuse_images(*texts: str | None) -> None:
    for text in texts:
        if text and IMAGE in text:
            raise RefusedError(f"{IMAGE} stands in the text for a picture, which these models cannot see")


def _one_system(system: str, other: str, key: str | None, columns: Columns) -> str:
    """Return the system text that stands in a record and perhaps again in its turns, ending in a newline."""
    if system and other and system.strip() != other.strip():
        raise RefusedError(f'"{key}" and the first turn are two system texts; type {ignoring(columns, key)}')
    return f"{system or other}\n" if system or other else ""


def _from_talk(
    talk: Talk, record: dict, layout: Layout, system: str, place: str, remarks: list[str], columns: Columns
) -> Sample:
    system = _one_system(system, talk.system, layout.system, columns)
    *history, (question, reply) = talk.pairs
    _refuse_images(system, *(question for question, _ in talk.pairs))
    remarks = tuple(dict.fromkeys((*remarks, *talk.remarks)))
    return Sample(question, "", reply, place, tuple(history), system, talk.note, talk.untrained, layout.shape, remarks)


def _from_pair(record: dict, layout: Layout, system: str, place: str, remarks: list[str], columns: Columns) -> Sample:
    """Return the sample of one question and answer, with an input, a system text and a history where it has them."""
    if layout.instruction is None:
        raise lacks(record, layout, "instruction", columns)
    noted: dict[str, None] = dict.fromkeys(remarks)
    instruction = text_of(record[layout.instruction], layout.instruction)
    input = _input(record[layout.input], layout.input, noted, columns) if layout.input else ""
    output = _answer(record[layout.output], layout.output, noted) if layout.output else ""
    if not instruction.strip() and not input.strip():
        raise RefusedError(f'the "{layout.instruction}" is empty')
    if not output.strip():
        _check_empty(record, layout, columns)
        noted["empty output, trained as an answer of nothing"] = None
    texts = "\n".join((instruction, input, output))
    if "<" in texts or "#" in texts or "[" in texts:  # one of which is in every mark
        _refuse_images(instruction, input)
        noted.update(_marks(texts, output))
    if layout.options:
        instruction = "\n".join((instruction, *read_options(record, layout.options, columns)))
    history: tuple[tuple[str, str], ...] = ()
    untrained: tuple[int, ...] = ()
    if layout.history:
        past = read_talk(record[layout.history], layout.history, is_whole=False)
        if past.note:
            raise RefusedError(f'"{layout.history}" ends with a question without a reply')
        history, untrained = past.pairs, past.untrained
        system = _one_system(system, past.system, layout.system, columns)
        noted.update(dict.fromkeys(past.remarks))
    elif system:
        system += "\n"
    if not (input or history or system):
        history, instruction = split_history(instruction)
    if input and (history or system):  # only the template of a single task has a place for an input
        instruction, input = f"{instruction}\n{input}", ""
    if system or history:
        _refuse_images(system, *(question for question, _ in history))
    return Sample(instruction, input, output, place, history, system, "", untrained, layout.shape, tuple(noted))


def _marks(texts: str, output: str) -> dict[str, None]:
    """Return remarks on what another prompt template has left in the texts of a pair, and at the end of its output."""
    marks = {"a prompt template of its own": None} if any(mark in texts for mark in TEMPLATES) else {}
    if output.endswith(ENDS):
        marks["an answer that ends with a mark such as </s>, which is trained as text,"] = None
    return marks


def _check_empty(record: dict, layout: Layout, columns: Columns) -> None:
    """Refuse an output without a text, unless it is there and such ones are trained."""
    key = layout.output or empty_key(record, "output", columns)
    if key is None or not isinstance(record[key], str):
        raise lacks(record, layout, "output", columns)
    if not columns.trains_empty_outputs:
        raise RefusedError(f'the "{key}" is empty; --empty_output train trains it')


def _answer(value: object, key: str, remarks: dict[str, None]) -> str:
    """Return an answer, which preference data may write as one turn."""
    if value.__class__ is not str:
        if isinstance(value, list) and len(value) == 1:
            [value] = value
        if isinstance(value, dict):
            return read_reply(value, key, remarks)
    return text_of(value, key)


def _input(value: object, key: str, remarks: dict[str, None], columns: Columns) -> str:
    """Return an input; several texts, such as passages, are one below the other.

    An object, or a list of them, is read as JSON where --columns makes it the input.
    """
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(text_of(each, key) for each in value)
    if isinstance(value, list | dict) and columns.given.get(key.strip()) == "input":
        remarks[f"{shown(key)} read as JSON"] = None
        value = json.dumps(value, ensure_ascii=False)
    return text_of(value, key)


def split_history(instruction: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """Split a `Human:` / `Assistant:` history, as in multiturn_chat_0.8M, into earlier turns and the last question.

    The names must begin their lines, alternate, and leave the last reply open, so that `chat_instruction` restores the
    same text from two turns or more; any other text is one question.
    """
    if not instruction.startswith(HUMAN):
        return (), instruction
    _, *parts = TURN.split(instruction)
    names, texts = parts[::2], parts[1::2]
    if len(names) < 2 or names != [HUMAN, ASSISTANT] * (len(names) // 2) or texts[-1]:
        return (), instruction
    texts = [text.removesuffix("\n") for text in texts[:-1]]
    if not all(text.strip() for text in texts):
        return (), instruction
    return tuple(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


# ------------------------------------------------------------------------------------------------------------- reading


def samples_of(block: Block, columns: Columns = BY_NAME) -> Iterator[tuple[int, Sample | Refused]]:
    """Yield the line or index of each record of a block and its sample, then the fault that ends it, if any."""
    for number, value in records_of(block):
        yield number, to_sample(value, place_of(block.shard, block.form, number), columns)
    if block.fault:
        yield block.start + len(block.records), block.fault


def read_all(shard: Path, columns: Columns = BY_NAME) -> Iterator[Sample | Refused]:
    """Yield each sample of a shard, in file order, or why it is refused."""
    for block in read_blocks(shard):
        for _, sample in samples_of(block, columns):
            yield sample


def read_samples(shard: Path, columns: Columns = BY_NAME) -> Iterator[Sample]:
    """Yield the samples of a shard; raise UserError on the first that is refused."""
    for sample in read_all(shard, columns):
        if isinstance(sample, Refused):
            raise UserError(f"{sample.place}: {sample.reason}; fix or remove it")
        yield sample
