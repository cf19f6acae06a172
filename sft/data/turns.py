"""Turns of a conversation, in the forms in which data sets write them, as questions and replies."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft.data.columns import MEDIA, NOT_READ, ROLE_OF, TOOLS, name_of, shortened
from sft.data.json_stream import RepeatedKeys
from sft.data.texts import RefusedError, brief, text_of

WORDS = {
    "user": "user human prompter usr 用户 问 人类",
    "assistant": "assistant gpt chatgpt gpt4 gpt-4 bot bing bard ai model moss chatglm claude 助手 答 机器人",
    "system": "system developer 系统",
}
SPEAKERS = {word: speaker for speaker, words in WORDS.items() for word in words.split()}
TOOL_SPEAKERS = frozenset(("tool", "function", "function_call", "observation", "ipython"))
SPEAKER_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "utterance")
TRAINED_KEYS = ("weight", "train", "loss")  # OpenAI, axolotl, swift: 0 or false keeps a reply out of the loss
NO_MEANING = frozenset((*SPEAKER_KEYS, *TEXT_KEYS, *TRAINED_KEYS, "name", "id", "timestamp", "create_time", "lang"))
MOSS_TAG = re.compile(r"^<\|[^|]+\|>:\s*|\s*<eo[a-z]>\s*$")  # around each text of MOSS


@dataclass(frozen=True)
class Said:
    """One turn: who spoke ("user", "assistant" or "system"), the text, and whether a reply is trained."""

    speaker: str
    text: str
    is_trained: bool = True


@dataclass(frozen=True)
class Talk:
    """A conversation: the system text, pairs of a question and its reply, and the replies that are not trained.

    An opening by the assistant is a pair with an empty question. `remarks` are counted in the report, `note` says what
    was omitted.
    """

    system: str
    pairs: tuple[tuple[str, str], ...]
    untrained: tuple[int, ...]
    remarks: tuple[str, ...]
    note: str = ""


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
        joined.insert(0, Said("user", ""))
        joined[1] = Said("assistant", joined[1].text, is_trained=False)
        remarks["opening turn by the assistant, read and not trained"] = None
    if len(joined) < 2:
        raise RefusedError("no question with a reply", brief([each.speaker for each in said]))
    replies = joined[1::2]
    untrained = tuple(index for index, reply in enumerate(replies) if not reply.is_trained)
    if is_whole and len(untrained) == len(replies):
        raise RefusedError("no reply is to be trained")
    if any(not reply.is_trained for reply in replies[bool(not joined[0].text) :]):
        remarks["replies not trained, by their weight"] = None
    pairs = tuple((question.text, reply.text) for question, reply in zip(joined[::2], replies, strict=True))
    return Talk(system, pairs, untrained, tuple(remarks), note)


def read_reply(turn: dict, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the text of a turn that stands where an answer is expected, and remarks; refuse one that is no reply."""
    if isinstance(turn, RepeatedKeys):
        raise RefusedError("a turn repeats a key", f'in "{name}"')
    if not any(key in turn for key in SPEAKER_KEYS):
        turn = {"role": "assistant", **turn}
    remarks: dict[str, None] = {}
    said = list(_said(turn, 1, remarks))
    if [each.speaker for each in said] != ["assistant"]:
        raise RefusedError(f'"{name}" is not a reply of the assistant', brief(turn))
    if not said[0].is_trained:
        raise RefusedError("no reply is to be trained")
    return said[0].text, tuple(remarks)


def _listed(turns: object, name: str) -> Sequence[object]:
    """Return turns as a list; MOSS numbers them, and UltraChat writes only the texts, in turn."""
    if (
        isinstance(turns, dict)
        and not isinstance(turns, RepeatedKeys)
        and all(key.startswith("turn_") for key in turns)
    ):
        return list(turns.values())
    if not isinstance(turns, list):
        raise RefusedError(f'"{name}" is not a list of turns', brief(turns))
    if turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return turns


def _joined(said: list[Said]) -> list[Said]:
    """Return the turns with consecutive ones of a speaker joined by a blank line."""
    joined: list[Said] = []
    for each in said:
        if joined and joined[-1].speaker == each.speaker:
            last = joined.pop()
            each = Said(each.speaker, f"{last.text}\n\n{each.text}", last.is_trained and each.is_trained)
        joined.append(each)
    return joined


def _said(turn: object, number: int, remarks: dict[str, None]) -> Iterator[Said]:
    """Yield what one element of the list holds: a turn, or a question and its reply."""
    if isinstance(turn, list) and len(turn) == 2:
        turn = {"input": turn[0], "output": turn[1]}
    if not isinstance(turn, dict):
        raise RefusedError("a turn is neither an object nor a text", f"turn {number} is {brief(turn)}")
    if isinstance(turn, RepeatedKeys):
        raise RefusedError("a turn repeats a key", f"turn {number}")
    speaker_key = next((key for key in SPEAKER_KEYS if key in turn), None)
    text_key = next((key for key in TEXT_KEYS if key in turn), None)
    if speaker_key and text_key:
        yield _one(turn, speaker_key, text_key, number, remarks)
        return
    keys = [key for key, value in turn.items() if _pair_role(key) and value not in (None, "")]
    by_speaker = {_pair_role(key): key for key in keys}
    if not {"user", "assistant"} <= by_speaker.keys() or len(by_speaker) < len(keys):
        raise RefusedError(
            "a turn has no speaker and text, nor a question and a reply", f"turn {number} is {brief(turn)}"
        )
    _note_unread(turn, set(keys), remarks)
    for speaker in ("system", "user", "assistant"):
        if key := by_speaker.get(speaker):
            text = text_of(turn[key], key, f"turn {number}")
            yield Said(speaker, MOSS_TAG.sub("", text) if "MOSS" in turn else text, is_trained(turn))


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
        raise RefusedError(
            'a speaker is not "user", "assistant" or "system"', f"turn {number} has {speaker_key} {brief(speaker)}"
        )
    text = text_of(_plain(turn[text_key], number), text_key, f"turn {number}")
    _note_unread(turn, {speaker_key, text_key}, remarks)
    return Said(SPEAKERS[name], text, is_trained(turn))


def is_trained(turn: dict) -> bool:
    """Tell whether a turn's own weight lets it be trained."""
    return all(turn.get(key) is None or bool(turn[key]) for key in TRAINED_KEYS)


def _plain(content: object, number: int) -> object:
    """Return content given in parts as one text; raise RefusedError for a part that is no text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RefusedError("a turn has a part that is no text", f"turn {number} has {brief(part)}")
    return "".join(part["text"] for part in content)


def _note_unread(turn: dict, read: set[str], remarks: dict[str, None]) -> None:
    for key, value in turn.items():
        name = name_of(key)
        if value in (None, "", [], {}) or key in read or name in NO_MEANING:
            continue
        if "MOSS" in turn and "None" in str(value):
            continue
        if name in MEDIA | TOOLS:
            raise RefusedError(f'a turn has "{key}", which is not read')
        remarks[f"{NOT_READ}{shortened(key)} of turns"] = None
