"""Turns of a conversation, in the forms in which data sets write them, as questions and replies."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sft.data.columns import MEDIA, ROLE_OF, TOOLS, Columns, Layout, name_of, not_read
from sft.data.json_stream import RepeatedKeys
from sft.data.texts import MAX_CHARACTERS, RefusedError, brief, text_of, truth_of

WORDS = {
    "user": "user human prompter usr patient client 用户 问 人类 患者 病人 来访者 求助者 客户 顾客",
    "assistant": "assistant gpt chatgpt gpt4 gpt-4 bot bing bard ai model moss chatglm claude doctor counselor "
    "counsellor 助手 答 机器人 医生 咨询师 客服",
    "system": "system developer 系统",
}
SPEAKERS = {word: speaker for speaker, words in WORDS.items() for word in words.split()}
TOOL_SPEAKERS = frozenset(("tool", "function", "function_call", "observation", "ipython"))
SPEAKER_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "utterance")
# OpenAI, axolotl, swift, XTuner and others: 0 or false keeps a reply out of the loss.
TRAINED_KEYS = frozenset(("weight", "loss_weight", "train", "loss", "output_with_loss", "trainable", "training"))
NO_MEANING = frozenset(("name", "id", "timestamp", "create_time", "lang"))
MOSS_TAG = re.compile(r"^<\|[^|]+\|>:\s*|\s*<eo[a-z]>\s*$")  # around each text of MOSS

NAMED = re.compile(r"\s*([\w-]{1,12})\s*[:：]\s*")  # a speaker before a text
NO_REPLY = "no question with a reply"
NUMBERED = re.compile(r"turn_[0-9]{1,9}")


@dataclass(frozen=True)
class Said:
    """One turn: who spoke ("user", "assistant" or "system"), the text, and whether a reply is trained."""

    speaker: str
    text: str | None  # None: the question that an opening by the assistant does not have
    is_trained: bool = True


@dataclass(frozen=True)
class Talk:
    """A conversation: the system text, pairs of a question and its reply, and the replies that are not trained.

    An opening by the assistant is a pair without a question. `remarks` are counted in the report, `note` says what
    was omitted.
    """

    system: str
    pairs: tuple[tuple[str, str], ...]
    untrained: tuple[int, ...]
    remarks: tuple[str, ...]
    note: str = ""


class UnknownSpeakerError(RefusedError):
    """Who speaks in a turn cannot be told by the speaker's name."""

    def __init__(self, number: int, key: str, speaker: object):
        """Take the turn's number, and the speaker that stands under a key."""
        super().__init__(
            'a speaker is not "user", "assistant" or "system"', f"turn {number} has {key} {brief(speaker)}"
        )
        self.speaker = speaker


def read_talk(turns: object, name: str, is_whole: bool = True) -> Talk:
    """Return the conversation that the turns under the key `name` hold; raise RefusedError if they are none.

    The last question and reply of one that is not whole stand elsewhere.
    """
    remarks: dict[str, None] = {}
    said = [each for number, turn in enumerate(_listed(turns, name), 1) for each in _said(turn, number, remarks)]
    said = [each for each in said if each.speaker != "system" or each.text.strip()]
    if not all(each.text.strip() for each in said):
        raise RefusedError("a turn is empty")
    joined = _joined(said)
    if len(joined) < len(said):
        remarks["consecutive turns of one speaker joined"] = None
    system = joined.pop(0).text if joined and joined[0].speaker == "system" else ""
    if any(each.speaker == "system" for each in joined):
        raise RefusedError("a system turn in the middle of the conversation")
    note = ""
    if joined and joined[-1].speaker == "user":
        joined.pop()
        note = "cut: the last turn, a question without a reply"
    if joined and joined[0].speaker == "assistant":
        joined.insert(0, Said("user", None))
        joined[1] = Said("assistant", joined[1].text, is_trained=False)
        remarks["opening turn by the assistant, read and not trained"] = None
    if len(joined) < 2:
        raise RefusedError(NO_REPLY, brief([each.speaker for each in said]))
    replies = joined[1::2]
    untrained = tuple(index for index, reply in enumerate(replies) if not reply.is_trained)
    if is_whole and len(untrained) == len(replies):
        raise RefusedError("no reply is to be trained")
    if any(not reply.is_trained for reply in replies[joined[0].text is None :]):
        remarks["replies not trained, by their weight"] = None
    pairs = tuple((question.text, reply.text) for question, reply in zip(joined[::2], replies, strict=True))
    return Talk(system, pairs, untrained, tuple(remarks), note)


def speaks(turn: object) -> bool:
    """Tell whether a value is an object with a speaker."""
    return isinstance(turn, dict) and any(name_of(key) in SPEAKER_KEYS for key in turn if isinstance(key, str))


def with_speakers(record: dict, layout: Layout, columns: Columns) -> dict:
    """Return a record whose turns have the names of this module for the speakers that --columns names."""
    keys = (layout.messages, layout.history, layout.instruction, layout.output)
    turns = {key: record[key] for key in keys if key and isinstance(record[key], list | dict)}
    return record | {key: _renamed(value, columns.speakers) for key, value in turns.items()}


def _renamed(turns: object, speakers: dict[str, str]) -> object:
    if isinstance(turns, list):
        return [_renamed(turn, speakers) for turn in turns]
    if isinstance(turns, str) and (named := NAMED.match(turns)) and named[1].lower() in speakers:
        return f"{speakers[named[1].lower()]}: {turns[named.end() :]}"
    if not isinstance(turns, dict) or isinstance(turns, RepeatedKeys):
        return turns
    if turns and all(NUMBERED.fullmatch(str(key)) for key in turns):
        return {key: _renamed(turn, speakers) for key, turn in turns.items()}
    own = {speakers.get(str(key).strip().lower(), key): value for key, value in turns.items()}
    for key in own.keys() & {*SPEAKER_KEYS}:
        if isinstance(own[key], str):
            own[key] = speakers.get(own[key].strip().lower(), own[key])
    return own if len(own) == len(turns) else turns


def _listed(turns: object, name: str) -> Sequence[object]:
    """Return turns as a list; MOSS numbers them, and UltraChat writes only the texts, in turn."""
    if isinstance(turns, dict) and all(NUMBERED.fullmatch(str(key)) for key in turns):
        return [turns[key] for key in sorted(turns, key=lambda key: int(key[len("turn_") :]))]
    if not isinstance(turns, list):
        raise RefusedError(f'"{name}" is not a list of turns', brief(turns))
    if turns and all(isinstance(turn, str) for turn in turns):
        named = [NAMED.match(turn) for turn in turns]
        if all(each and each[1].lower() in SPEAKERS for each in named):
            return [{"role": each[1], "content": turn[each.end() :]} for each, turn in zip(named, turns, strict=True)]
        if name_of(name) == "turns" or ROLE_OF.get(name_of(name)) in ("instruction", "input"):
            raise RefusedError(f'"{name}" is a list of texts, and who speaks is not said; give each a role and content')
        return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return turns


def _joined(said: list[Said]) -> list[Said]:
    """Return the turns with consecutive ones of a speaker joined by a blank line."""
    joined = []
    for speaker, group in groupby(said, key=lambda each: each.speaker):
        first, *others = group
        if others:
            text = "\n\n".join(each.text for each in (first, *others))
            if len(text) > MAX_CHARACTERS:
                raise RefusedError(f"turns of one speaker have more than {MAX_CHARACTERS:,} characters together")
            first = Said(speaker, text, all(each.is_trained for each in (first, *others)))
        joined.append(first)
    return joined


def followed(turns: list, answer: object, name: str, key: str) -> list:
    """Return the turns under `name` with the answer under `key`: a text, a turn, or turns, which may begin with the
    same ones. Raise RefusedError where the answer is no reply to the last of them."""
    after = answer if isinstance(answer, list) else [answer]
    after = [{"role": "assistant", "content": each} if isinstance(each, str) else each for each in after]
    before, gist = [_gist(turn) for turn in turns], [_gist(turn) for turn in after]
    if turns and gist[: len(turns)] == before:
        return after
    if before[-len(gist) :] == gist:
        return turns
    if before and before[-1][0] != "assistant" and gist and gist[0][0] == "assistant" or not before:
        return [*turns, *after]
    raise RefusedError(f'"{key}" is no reply to the last turn of "{name}"; type --ignore_columns {key}')


def _gist(turn: object) -> tuple[object, object]:
    """Return who speaks in a turn and what, as far as that is text."""
    if not isinstance(turn, dict):
        return None, turn if isinstance(turn, str) else id(turn)
    speaker, text = (next((turn[key] for key in keys if key in turn), None) for keys in (SPEAKER_KEYS, TEXT_KEYS))
    speaker = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    return speaker, text if isinstance(text, str) else id(turn)


def read_reply(turn: dict, key: str, remarks: dict[str, None]) -> str:
    """Return the text of an answer that is written as a turn; raise RefusedError if it is no trained reply."""
    if not any(name in turn for name in SPEAKER_KEYS):
        turn = {"role": "assistant", **turn}
    said = list(_said(turn, 1, remarks))
    if [each.speaker for each in said] != ["assistant"] or not said[0].is_trained:
        raise RefusedError(f'"{key}" is not one trained reply', brief(turn))
    return said[0].text


def _said(turn: object, number: int, remarks: dict[str, None]) -> Iterator[Said]:
    """Yield what one element of the list holds: a turn, or a question and its reply."""
    if isinstance(turn, list) and len(turn) == 2:
        turn = {"input": turn[0], "output": turn[1]}
    if not isinstance(turn, dict):
        raise RefusedError("a turn is neither an object nor a text", f"turn {number} is {brief(turn)}")
    if isinstance(turn, RepeatedKeys):
        raise RefusedError("a turn repeats a key", f"turn {number}")
    speaker_key, text_key = _first(SPEAKER_KEYS, turn), _first(TEXT_KEYS, turn)
    if not (speaker_key and text_key):
        turn = _plainly_named(turn, number)
        speaker_key, text_key = _first(SPEAKER_KEYS, turn), _first(TEXT_KEYS, turn)
    if speaker_key and text_key:
        yield _one(turn, speaker_key, text_key, number, remarks)
        return
    keys = [key for key, value in turn.items() if _pair_role(key) and _says_something(value)]
    by_speaker = {_pair_role(key): key for key in keys}
    if not {"user", "assistant"} <= by_speaker.keys() or len(by_speaker) < len(keys):
        raise RefusedError(
            "a turn has no speaker and text, nor a question and a reply",
            f"turn {number} is {brief(turn)}; if its keys are the speakers, type --columns user=KEY,assistant=KEY",
        )
    _note_unread(turn, set(keys), number, remarks)
    is_trained = _is_trained(turn, number, remarks)
    for speaker in ("system", "user", "assistant"):
        if key := by_speaker.get(speaker):
            text = text_of(turn[key], key, f"turn {number}")
            yield Said(speaker, MOSS_TAG.sub("", text) if "MOSS" in turn else text, is_trained)


def _first(names: Sequence[str], turn: dict) -> str | None:
    """Return the first of some keys that a turn has, if possible one with a value."""
    has = [name for name in names if name in turn]
    return next((name for name in has if turn[name] not in (None, "")), has[0]) if len(has) > 1 else (*has, None)[0]


def _plainly_named(turn: dict, number: int) -> dict:
    """Return a turn with "Role" and "Content" as "role" and "content"; others keep their keys."""
    if strange := [key for key in turn if not isinstance(key, str)]:
        raise RefusedError("a turn has a key that is not a string", f"turn {number} has {brief(strange[0])}")
    known = {*SPEAKER_KEYS, *TEXT_KEYS}
    named = {name if (name := name_of(key)) in known else key: value for key, value in turn.items()}
    return named if len(named) == len(turn) else turn


def _pair_role(key: str) -> str | None:
    """Return whose text a key holds in a turn that is a question with its reply."""
    name = name_of(key)
    return SPEAKERS.get(name) or {
        "instruction": "user",
        "input": "user",
        "output": "assistant",
        "system": "system",
    }.get(ROLE_OF.get(name, ""))


def _one(turn: dict, speaker_key: str, text_key: str, number: int, remarks: dict[str, None]) -> Said:
    speaker = turn[speaker_key]
    name = speaker.strip().lower() if isinstance(speaker, str) else None
    if name in TOOL_SPEAKERS or any(turn.get(key) for key in ("tool_calls", "function_call")):
        raise RefusedError("calls of tools, which are not trained here", f"turn {number}")
    if name not in SPEAKERS:
        raise UnknownSpeakerError(number, speaker_key, speaker)
    text = text_of(_plain(turn[text_key], number), text_key, f"turn {number}")
    if len(turn) > 2:
        _note_unread(turn, {speaker_key, text_key}, number, remarks)
    return Said(SPEAKERS[name], text, len(turn) == 2 or _is_trained(turn, number, remarks))


def _is_trained(turn: dict, number: int, remarks: dict[str, None]) -> bool:
    """Tell whether a turn's own weight lets it be trained."""
    is_trained = True
    for key, value in turn.items():
        if value is None or name_of(key) not in TRAINED_KEYS:
            continue
        truth = truth_of(value)
        if truth is None:
            raise RefusedError(f'"{key}" of a turn is neither true nor false', f"turn {number} has {brief(value)}")
        if truth and value not in (1, True) and not isinstance(value, str):
            remarks[f"{key} of turns other than 0 and 1, trained as 1"] = None
        is_trained &= truth
    return is_trained


def _plain(content: object, number: int) -> object:
    """Return content given in parts as one text; raise RefusedError for a part that is no text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        key = "text" if not isinstance(part, dict) or "text" in part else "value"
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get(key), str):
            raise RefusedError("a turn has a part that is no text", f"turn {number} has {brief(part)}")
        texts.append(part[key])
    return "".join(texts)


def _note_unread(turn: dict, read: set[str], number: int, remarks: dict[str, None]) -> None:
    """Remark on the keys of a turn that are not read; raise RefusedError for those that change what it means."""
    for key, value in turn.items():
        if not isinstance(key, str):
            raise RefusedError("a turn has a key that is not a string", f"turn {number} has {brief(key)}")
        name = name_of(key)
        if key in read or name in NO_MEANING or name in TRAINED_KEYS or not _says_something(value):
            continue
        if "MOSS" in turn and isinstance(value, str) and MOSS_TAG.sub("", MOSS_TAG.sub("", value)).strip() == "None":
            continue
        if name in MEDIA | TOOLS:
            raise RefusedError(f'a turn has "{key}", which is not read', f"turn {number}")
        if names := next((each for each in (SPEAKER_KEYS, TEXT_KEYS) if name in each), ()):
            if isinstance(value, str) and any(turn[each] == value for each in read.intersection(names)):
                continue
            raise RefusedError(f'a turn has "{key}" beside {" and ".join(sorted(read))}', f"turn {number}")
        remarks[not_read(key, " of turns")] = None


def _says_something(value: object) -> bool:
    return bool(value) if isinstance(value, str | list | dict) else value is not None
