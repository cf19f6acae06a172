"""Samples: questions and answers, taken from records whose keys have the names that people give them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from sft.data.columns import (
    BAD,
    BY_NAME,
    MESSAGES,
    NOT_READ,
    ROLE_OF,
    Columns,
    ColumnsError,
    Layout,
    keys_of,
    layout_of,
    missing,
    name_of,
    quoted,
    shortened,
)
from sft.data.json_stream import RepeatedKeys
from sft.data.shards import Block, Refused, place_of, read_blocks, records_of
from sft.data.texts import RefusedError, brief, text_of, visible
from sft.data.turns import SPEAKER_KEYS, SPEAKERS, Talk, read_reply, read_talk
from sft.program import UserError
from sft.prompts import ASSISTANT, HUMAN, build_prompt, chat_instruction

TURN = re.compile(f"^({HUMAN}|{ASSISTANT})", re.MULTILINE)
NO_VALUE = (None, "", [], {})  # as good as no key at all
NO_LIST = ("[]", "{}")  # nor are these, where no text is expected
IMAGE = "<image>"  # stands in a text where a picture was


@dataclass(frozen=True, slots=True)
class Sample:
    """One task, or one conversation whose last question and reply are `instruction` and `output`.

    `place` is where it was read from, "file:line" or "file[index]"; `system`, unless empty, ends in a newline; a pair
    of `history` with an empty question is an opening by the assistant; `untrained` are the numbers of the replies that
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
        yield from chain.from_iterable(self.history)


# ------------------------------------------------------------------------------------------------------------- records


def to_sample(value: object, place: str, columns: Columns = BY_NAME) -> Sample | Refused:
    """Return a record as a sample, or why it is not one."""
    if isinstance(value, Refused):
        return value
    try:
        return _sample(_record(value), place, columns)
    except ColumnsError as error:
        return Refused(place, visible(str(error)))
    except RefusedError as error:
        return Refused(place, visible(str(error)), kind=visible(error.kind))
    except RecursionError:
        return Refused(place, "a value is nested too deeply")


def _record(value: object) -> dict:
    """Return a record as an object: a list may hold one object, or the turns of a conversation."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return _record(value[0])
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if _are_rows(value):
            raise RefusedError("a list of rows in one row; write each row alone")
        return {"messages": value}
    if not isinstance(value, dict):
        raise RefusedError(f"a JSON {type(value).__name__}; expected an object")
    if isinstance(value, RepeatedKeys):
        raise RefusedError("a key appears twice", quoted(sorted(map(str, value))))
    return value


def _are_rows(turns: object) -> bool:
    """Tell whether a list holds rows, each a question and an answer of its own, rather than turns."""
    return isinstance(turns, list) and any(
        isinstance(turn, dict)
        and not any(key in turn for key in SPEAKER_KEYS)
        and any(ROLE_OF.get(name_of(key)) == "output" and name_of(key) not in SPEAKERS for key in turn)
        for turn in turns
    )


def _has_value(key: str, value: object, columns: Columns) -> bool:
    """Tell whether there is a value under a key; "[]" is one where it may be a question or an answer."""
    if value in NO_LIST:
        return any(key in keys_of(role, (key,), columns) for role in ("instruction", "input", "output"))
    return value not in NO_VALUE


def _sample(record: dict, place: str, columns: Columns) -> Sample:
    keys = [key for key, value in record.items() if _has_value(key, value, columns)]
    plain = [key for key in keys if key in MESSAGES and not isinstance(record[key], list | dict)]  # such as a date
    layout = layout_of(tuple(key for key in keys if key not in plain), columns)
    remarks = [f"{NOT_READ}{shortened(key)}" for key in (*layout.unread, *plain, *_check_verdicts(record, layout))]
    system = text_of(record[layout.system], layout.system) if layout.system else ""
    system = system if system.strip() else ""
    talk = _talk(record, layout)
    if talk:
        sample = _from_talk(talk, record, layout, system, place)
        remarks += talk.remarks
    else:
        sample = _from_pair(record, layout, system, place, columns)
        if not sample.output.strip():
            remarks.append("empty output, trained as an answer of nothing")
    if IMAGE in sample.instruction or IMAGE in sample.input or any(IMAGE in question for question, _ in sample.history):
        raise RefusedError(f"{IMAGE} stands in the text for a picture, which these models cannot see")
    remarks += sample.remarks
    return replace(sample, shape=visible("/".join(layout.keys)), remarks=tuple(dict.fromkeys(map(visible, remarks))))


def _check_verdicts(record: dict, layout: Layout) -> list[str]:
    """Refuse a record that says that its answer is a bad one; return the keys that say something else."""
    for key in layout.verdicts:
        if record[key] is (name_of(key) in BAD):
            raise RefusedError(f'"{key}" is {str(record[key]).lower()}: the answer is marked as a bad one')
    return [key for key in layout.verdicts if not isinstance(record[key], bool)]


def _talk(record: dict, layout: Layout) -> Talk | None:
    """Return the conversation of a record; None if it is one question and answer."""
    question, answer = (record[key] if key else None for key in (layout.messages or layout.instruction, layout.output))
    if layout.messages is None and not isinstance(question, list) and not (_are_turns(answer) and answer[1:]):
        return None
    if layout.messages and name_of(layout.messages) == "data" and _are_rows(question):
        raise RefusedError(f'"{layout.messages}" holds a list of rows; write each row alone')
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question or []
    if answer is not None and isinstance(turns, list):
        turns = _followed(turns, answer)
    talk = read_talk(turns, layout.messages or layout.instruction or layout.output)
    texts = [text for pair in talk.pairs for text in pair]
    own = (layout.history, layout.input, *layout.options) if layout.messages is None else ()
    for key in (*layout.beside, *filter(None, own)):
        if not any(record[key] == text for text in texts):
            turns_key = layout.messages or layout.instruction or layout.output
            raise RefusedError(
                f'"{key}" and the turns of "{turns_key}" are both there; type --ignore_columns {key}, or '
                "--columns instruction=KEY,output=KEY"
            )
    return talk


def _are_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _followed(turns: list, answer: object) -> list:
    """Return turns with the answer that follows them: a text, a turn, or turns, which may begin with the same ones."""
    if isinstance(answer, dict):
        return [*turns, answer]
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        [answer] = answer
    if isinstance(answer, list):
        if not _are_turns(answer):
            raise RefusedError("an answer to turns is a list of something else", brief(answer))
        values, first = ([_values(each) for each in turns] for turns in (turns, answer[: len(turns)]))
        begins_alike = values == first
        return answer if begins_alike else [*turns, *answer]
    return [*turns, {"role": "assistant", "content": answer}]


def _values(turn: object) -> object:
    return list(turn.values()) if isinstance(turn, dict) else turn


def _from_talk(talk: Talk, record: dict, layout: Layout, system: str, place: str) -> Sample:
    if system and talk.system and system.strip() != talk.system.strip():
        raise RefusedError(
            f'"{layout.system}" and the first turn are two system texts; type --ignore_columns {layout.system}'
        )
    system = system or talk.system
    *history, (question, reply) = talk.pairs
    return Sample(
        question, "", reply, place, tuple(history), f"{system}\n" if system else "", talk.note, talk.untrained
    )


def _from_pair(record: dict, layout: Layout, system: str, place: str, columns: Columns) -> Sample:
    """Return the sample of one question and answer, with an input, a system text and a history where it has them."""
    if layout.instruction is None:
        raise RefusedError(_lacking(record, layout, "instruction", columns))
    instruction = text_of(record[layout.instruction], layout.instruction)
    input = _input(record[layout.input], layout.input) if layout.input else ""
    if layout.output:
        output, of_output = _answer(record[layout.output], layout.output)
    else:
        output, of_output = _empty_output(record, layout, columns), ()
    past = read_talk(record[layout.history], layout.history, is_whole=False) if layout.history else None
    if past and past.note:
        raise RefusedError(f'"{layout.history}" ends with a question without a reply')
    if not instruction.strip() and not input.strip():
        raise RefusedError(f'the "{layout.instruction}" is empty')
    if not output.strip() and not columns.trains_empty_outputs:
        raise RefusedError(f'the "{layout.output}" is empty; --empty_output train trains it')
    history = past.pairs if past else ()
    if past and past.system:
        system = system or past.system
    for number, text in enumerate(_options(record, layout)):
        instruction += f"\n{chr(ord('A') + number)}. {text}"
    if not (input or history or system):
        history, instruction = split_history(instruction)
    if input and (history or system):  # only the template of a single task has a place for an input
        instruction, input = f"{instruction}\n{input}", ""
    untrained, remarks = (past.untrained, past.remarks) if past else ((), ())
    system = f"{system}\n" if system else ""
    return Sample(instruction, input, output, place, history, system, "", untrained, "", (*remarks, *of_output))


def _lacking(record: dict, layout: Layout, role: str, columns: Columns) -> str:
    """Return why a record has no instruction or no output."""
    if empty := keys_of(role, tuple(record), columns):
        return f'the "{empty[0]}" is {"null" if record[empty[0]] is None else "empty"}'
    turns = [key for key in keys_of("messages", tuple(record), columns) if name_of(key) != "data"]
    if turns and not layout.keys:
        key = turns[0]
        return f'the "{key}" is empty' if record[key] in NO_VALUE else f'"{key}" is not a list of turns'
    return missing(layout, [key for key in record if _has_value(key, record[key], columns)], role)


def _empty_output(record: dict, layout: Layout, columns: Columns) -> str:
    """Return "" for an output that is there and empty, if such ones are trained."""
    empty = [key for key in keys_of("output", tuple(record), columns) if record[key] == ""]
    if not empty:
        raise RefusedError(_lacking(record, layout, "output", columns))
    if not columns.trains_empty_outputs:
        raise RefusedError(f'the "{empty[0]}" is empty; --empty_output train trains it')
    return ""


def _answer(value: object, key: str) -> tuple[str, tuple[str, ...]]:
    """Return an answer, which preference data may write as one turn, and the remarks on it."""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    return read_reply(value, key) if isinstance(value, dict) else (text_of(value, key), ())


def _input(value: object, key: str) -> str:
    """Return an input; several texts, such as passages, are one below the other."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(text_of(each, key) for each in value)
    return text_of(value, key)


def _options(record: dict, layout: Layout) -> list[str]:
    """Return the texts of a multiple-choice question."""
    if not layout.options:
        return []
    values = [record[key] for key in layout.options]
    if any(isinstance(value, RepeatedKeys) for value in values):
        raise RefusedError(f'"{layout.options[0]}" repeats a key')
    if len(values) == 1 and name_of(layout.options[0]) not in ("a", "b"):
        [value] = values
        values = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise RefusedError(f'"{layout.options[0]}" is not a list of options', brief(record[layout.options[0]]))
    return [text_of(each, layout.options[0]) for each in values]


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
