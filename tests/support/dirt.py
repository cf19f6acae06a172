"""Dirt in rows: what a file holds, which rows come out of it, and what is said of the rest. `dirt_files` has more.

The good rows around the dirt show that it spoils no others.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GOOD = [
    {"instruction": "甲", "input": "", "output": "一"},
    {"instruction": "乙\n丙", "input": "丁", "output": "二\t二"},
    {"instruction": "戊。", "input": "", "output": " 三\n"},
]
ENDS = [GOOD[0], GOOD[2]]
CHAT = {"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "一"}]}
NOT_JSON = "invalid JSON ("
BREAKS_OFF = "the rest of the file is unreadable: "
CANNOT_GO_ON = "the rest of the file is unreadable: reading failed ("
PRETRAINING = 'pretraining text: a "text" has no question and no answer'


@dataclass(frozen=True)
class Kind:
    """A file, the rows that it gives, and the place, ":line" or "[index]", and reason of all that is noted of it."""

    id: str
    content: bytes | Callable[[Path], None]  # or what makes the file of that name, and perhaps others beside it
    kept: Sequence[dict] = field(default_factory=lambda: GOOD)
    refused: dict[str, str] = field(default_factory=dict)
    cut: dict[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def file(self) -> str:
        return self.name or f"{self.id}.json"

    def write(self, folder: Path) -> None:
        if callable(self.content):
            self.content(folder / self.file)
        else:
            (folder / self.file).write_bytes(self.content)


def dump(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def lines(*values: object) -> str:
    """Return JSON Lines; a string is a line as it stands."""
    return "".join(f"{dump(value)}\n" for value in values)


def array(*values: object) -> str:
    return f"[{', '.join(map(dump, values))}]"


def around(value: object) -> list[object]:
    """Put a good row before a value and one behind it."""
    return [ENDS[0], value, ENDS[1]]


def row(**changed: object) -> dict:
    return {**GOOD[1], **changed}


def without(key: str) -> dict:
    return {name: value for name, value in GOOD[1].items() if name != key}


# -------------------------------------------------------------------------------------------------------------- values

BAD_ROWS = {
    "object for a string": (row(instruction={"text": "乙"}), "\"instruction\" is not a string: {'text': '乙'}"),
    "list for a string": (row(output=["二", "三"]), "\"output\" is not a string: ['二', '三']"),
    "number for a string": (row(output=3.5), '"output" is not a string: 3.5'),
    "huge number for a string": (row(output=10**100), '"output" is not a string: 1000000'),
    "not a number for a string": (row(output=float("nan")), '"output" is not a string: nan'),
    "boolean for a string": (row(instruction=True), '"instruction" is not a string: True'),
    "boolean for an input": (row(input=False), '"input" is not a string: False'),
    "null output": (row(output=None), 'the "output" is null'),
    "null instruction": (row(instruction=None, input=""), 'the "instruction" is null'),
    "null everywhere": (dict.fromkeys(GOOD[0]), 'the "instruction" is null'),
    "missing output": (
        without("output"),
        'no output found ("instruction" is the instruction, "input" is the input); expected a key such as output',
    ),
    "missing instruction": (
        {"output": "二", "title": "乙"},
        'no instruction found ("output" is the output; other keys: "title"); type --columns instruction=title',
    ),
    "no key": ({}, "no instruction and no output found (no keys); type --columns instruction=KEY,output=KEY"),
    "output of spaces": (row(output=" \n\u3000\t"), 'the "output" is empty'),
    "empty instruction and input": (row(instruction=" ", input="\n"), 'the "instruction" is empty'),
    "first half of a character": (
        '{"instruction": "\\ud83d", "output": "二"}',
        "\"instruction\" contains a broken character or a byte that is not UTF-8: '\\ud83d'",
    ),
    "second half of a character": (
        '{"instruction": "乙", "output": "\\ude00"}',
        "\"output\" contains a broken character or a byte that is not UTF-8: '\\ude00'",
    ),
    "key twice": (
        '{"instruction": "乙", "output": "二", "output": "三"}',
        'a key appears twice: "instruction", "output"',
    ),
    "list for a row": (["乙", "二"], "a JSON list; expected an object"),
    "string for a row": ('"乙"', "a JSON str; expected an object"),
    "null for a row": (None, "a JSON NoneType; expected an object"),
    "two questions by name": (row(question="乙"), '"instruction", "question" may each be the instruction'),
    "passage without a role": (row(passage="文"), '"passage" has no role, and the answer may depend on it'),
    "list of rows for a row": ([GOOD[0], GOOD[2]], "a list of objects that may be rows or the turns of a conversation"),
    "turn of a user for an output": (
        row(output={"role": "user", "content": "二"}),
        '"output" is not one trained reply: {',
    ),
    "history of numbers": (row(history=[1, 2]), "a turn is neither an object nor a text: turn 1 is 1"),
    "history of a question alone": (row(history=["乙", "二", "丙"]), '"history" ends with a question without a reply'),
    "history is a string": (row(history="乙"), '"history" is not a list of turns'),
    "text too long": (row(output="长" * 1_000_001), '"output" has more than 1,000,000 characters: 1,000,001'),
}
BAD_TURNS = {
    "wrong role": (
        [{"role": "robot", "content": "乙"}],
        'a speaker is not "user", "assistant" or "system": turn 1 has role \'robot\'; type --columns user=robot or '
        "--columns assistant=robot",
    ),
    "role is no string": (
        [{"role": 1, "content": "乙"}],
        'a speaker is not "user", "assistant" or "system": turn 1 has role 1',
    ),
    "wrong order": (CHAT["messages"][::-1], "no reply is to be trained"),
    "system in the middle": (
        [*CHAT["messages"], {"role": "system", "content": "丙"}],
        "a system turn in the middle of the conversation",
    ),
    "call of a tool": ([*CHAT["messages"], {"role": "tool", "content": "丙"}], "calls of tools"),
    "empty turn": ([{"role": "user", "content": " "}, CHAT["messages"][1]], "a turn is empty"),
    "no turns": ([], 'the "messages" is empty'),
    "a question alone": (CHAT["messages"][:1], "no question with a reply: ['user']"),
    "turns are numbers": ([1, 2], "a turn is neither an object nor a text: turn 1 is 1"),
    "turns are a string": ("乙", 'the "messages" is not a list of turns'),
    "turn without a text": (
        [{"role": "user"}],
        "a turn has no speaker and text, nor a question and a reply: turn 1 is {'role': 'user'}",
    ),
    "text of a turn is null": (
        [{"role": "user", "content": None}],
        '"content" is not a string: turn 1 has None',
    ),
    "text of a turn is a list": (
        [{"role": "user", "content": ["乙"]}],
        "a turn has a part that is no text: turn 1 has '乙'",
    ),
}


def value_kinds() -> list[Kind]:
    """Return each bad row as a line and as an element of an array, and what looks bad and is not."""
    kinds = []
    for name, (bad, said) in BAD_ROWS.items():
        kinds.append(Kind(f"{name}, line", lines(*around(bad)).encode(), ENDS, {":2": said}))
        kinds.append(Kind(f"{name}, array", array(*around(bad)).encode(), ENDS, {"[1]": said}))
    for name, (turns, said) in BAD_TURNS.items():
        kinds.append(Kind(name, lines(CHAT, {"messages": turns}, CHAT).encode(), [GOOD[0]] * 2, {":2": said}))
    twice = lines(CHAT, dump(CHAT).replace('"role"', '"role": "user", "role"', 1), CHAT)
    asked = lines(CHAT, {"messages": [*CHAT["messages"], CHAT["messages"][0]]})
    note = "cut: the last turn, a question without a reply"
    huge = dump(row())[:-1] + f', "id": {"9" * 5000}}}'
    deep = (
        dump(row())[:-1] + f', "id": {"[" * 700}{"]" * 700}}}'
    )  # pickle, between processes, gives up before JSON does
    return [
        *kinds,
        Kind("key twice in a turn", twice.encode(), [GOOD[0]] * 2, {":2": "a turn repeats a key: turn 1"}),
        Kind("last turn is a question", asked.encode(), [GOOD[0]] * 2, cut={":2": note}),
        *accepted_kinds(),
        Kind("null input", lines(row(input=None)).encode(), [row(input="")]),
        Kind("missing input", array(without("input")).encode(), [row(input="")]),
        Kind("huge integer", lines(*around(huge)).encode()),
        Kind("deep but readable, line", lines(*around(deep)).encode()),
        Kind("deep but readable, array", array(*around(deep)).encode()),
    ]


def accepted_kinds() -> list[Kind]:
    """Return rows that are written in another way than those around them, and mean as much."""
    question, reply = CHAT["messages"]
    other = {"instruction": "丁", "input": "", "output": "二"}
    chats = {
        "two questions": ([question, question, reply], row(instruction="甲\n\n甲", input="", output="一")),
        "turns are strings": (["丁", "二"], other),
        "empty system turn": ([{"role": "system", "content": ""}, question, reply], {**other, **GOOD[0]}),
        "turns in parts": (
            [{"role": "user", "content": [{"type": "text", "text": "丁"}]}, reply],
            {**other, "output": "一"},
        ),
    }
    rows = {
        "another shape": ({"prompt": "丁", "response": "二"}, other),
        "list of one string": (row(output=["二"]), row(output="二")),
        "input alone": ({"input": "丁", "output": "二"}, other),
        "null instruction beside an input": ({"instruction": None, "input": "丁", "output": "二"}, other),
        "output is a turn": ({"prompt": "丁", "completion": [{"role": "assistant", "content": "二"}]}, other),
        "an output of no elements": (row(output="[]"), row(output="[]")),
        "list of one row": ([other], other),
    }
    return [
        *(Kind(name, lines(*around(value)).encode(), [ENDS[0], kept, ENDS[1]]) for name, (value, kept) in rows.items()),
        *(
            Kind(name, lines(CHAT, {"messages": turns}, CHAT).encode(), [GOOD[0], kept, GOOD[0]])
            for name, (turns, kept) in chats.items()
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- bytes

ASTRAL = row(instruction="𠀀𪛖", output="😀")  # of four bytes in GB18030 too
GOOD_ASCII = {"instruction": "one", "input": "", "output": "two"}
LINE_ENDS = row(instruction="\u2028行\u0085", output="段\u2029\x1c")  # in the eyes of str.splitlines
NOT_UTF8 = "\"output\" contains a broken character or a byte that is not UTF-8: '\\udcb6'"


def spoilt(text: str) -> bytes:
    """Write a text as UTF-8, but for its first "二", which stands in GBK's bytes."""
    return text.encode().replace("二".encode(), "二".encode("gbk"), 1)


def encoding_kinds() -> list[Kind]:
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    texts = {"lines": lines(*GOOD, ASTRAL), "array": array(*GOOD, ASTRAL)}
    marked = [
        Kind(f"{encoding} {form}", mark + text.encode(encoding), [*GOOD, ASTRAL])
        for encoding, mark in marks.items()
        for form, text in texts.items()
    ]
    ascii_first = "{" + " " * 300_000 + dump(GOOD_ASCII)[1:]  # more than the sample that tells an encoding
    cut_line = codecs.BOM_UTF16_LE + lines(*GOOD).encode("utf-16-le")[:-5]
    cut_array = codecs.BOM_UTF16_BE + array(*GOOD).encode("utf-16-be")[:-1]
    return [
        *marked,
        Kind("mark and spaces before an array", codecs.BOM_UTF8 + b"\n \r\n\t" + array(*GOOD).encode()),
        Kind("mark alone", codecs.BOM_UTF8, []),
        Kind("mark in the middle", lines(*around(f"\ufeff{dump(row())}")).encode(), ENDS, {":2": NOT_JSON}),
        Kind("GBK lines", lines(*GOOD).encode("gbk")),
        Kind("GB18030 array", array(*GOOD).encode("gb18030")),
        Kind("GB18030 of four bytes", lines(ASTRAL, *GOOD).encode("gb18030"), [ASTRAL, *GOOD]),
        Kind("GB18030 behind much ASCII", lines(ascii_first, *GOOD).encode("gb18030"), [GOOD_ASCII, *GOOD]),
        Kind("UTF-16 without a mark", '{"a": 1}'.encode("utf-16-le"), [], {":1": NOT_JSON}),
        Kind("UTF-16 line cut in a character", cut_line, GOOD[:2], {":3": CANNOT_GO_ON}),
        Kind("UTF-16 array cut in a character", cut_array, GOOD, {"[3]": CANNOT_GO_ON}),
        Kind("not UTF-8, line", spoilt(lines(*around(row()))), ENDS, {":2": NOT_UTF8}),
        Kind("not UTF-8, array", spoilt(array(*around(row()))), ENDS, {"[1]": NOT_UTF8}),
    ]


# --------------------------------------------------------------------------------------------------------------- lines

NO_LINES = {
    "line of NUL bytes": "\0\0\0",
    "NUL inside a string": '{"instruction": "乙\0", "output": "二"}',
    "CR inside a string": '{"instruction": "乙\r", "output": "二"}',
    "Python's quotes": "{'instruction': '乙', 'output': '二'}",
    "comment": "// 乙",
    "unknown escape": '{"instruction": "\\x41", "output": "二"}',
    "two objects on a line": dump(GOOD[0]) * 2,
    "two commas behind a line": dump(GOOD[0]) + ",,",
    "deep nesting, line": f'{{"instruction": {"[" * 100_000}{"]" * 100_000}}}',
}


def line_kinds() -> list[Kind]:
    nul, carriage = row(output="二\0二"), row(output="二\r\r\n二")
    crlf = lines(*GOOD).replace("\n", "\r\n").encode()
    blanks = f"\n \t\n{dump(GOOD[0])}\n\n\r\n{dump(GOOD[1])}\n\n5\n".encode()
    rubbish = {f":{number}": NOT_JSON for number in range(1, 151)}
    no_shape = {f":{number}": PRETRAINING for number in range(1, 151)}
    long_line = '"instruction" has more than 1,000,000 characters: 50,000,000'
    csv = "instruction,input,output\n甲,,一\n".encode()
    return [
        *(Kind(name, lines(*around(line)).encode(), ENDS, {":2": NOT_JSON}) for name, line in NO_LINES.items()),
        Kind("NUL escaped", lines(nul).encode(), [nul]),
        Kind("CR escaped", lines(carriage).encode(), [carriage]),
        Kind("line ends inside strings", lines(LINE_ENDS, *GOOD).encode(), [LINE_ENDS, *GOOD]),
        Kind("CRLF", crlf),
        Kind("CRLF, not ended", crlf.removesuffix(b"\r\n")),
        Kind("blank lines", blanks, GOOD[:2], {":8": "a JSON int"}),
        Kind("a block of blank lines first", b"\n" * 1500 + lines(*GOOD).encode()),
        Kind("150 lines of rubbish first", b"x\n" * 150 + lines(*GOOD).encode(), GOOD, rubbish),
        Kind("150 rows of no shape first", lines(*[{"text": "丙"}] * 150, *GOOD).encode(), GOOD, no_shape),
        Kind("empty", b"", []),
        Kind("only spaces", b" \n\t\r\n ", []),
        Kind("last line cut off", lines(*GOOD)[:-6].encode(), GOOD[:2], {":3": NOT_JSON}),
        Kind("first line spoilt", lines(dump(GOOD[0]) + ";", *GOOD[1:]).encode(), GOOD[1:], {":1": NOT_JSON}),
        Kind("comma behind every line", lines(*(f"{dump(each)}, " for each in GOOD)).encode()),
        Kind("header line", lines("instruction,input,output", *GOOD).encode(), GOOD, {":1": NOT_JSON}),
        Kind("CSV named .json", csv, [], {":1": NOT_JSON, ":2": NOT_JSON}),
        Kind("scalar", b"42", [], {":1": "a JSON int; expected an object"}),
        Kind("50 MB line", write_long_line, ENDS, {":2": long_line}),
    ]


def write_long_line(file: Path) -> None:
    file.write_text(lines(*around(row(instruction="a" * 50_000_000))), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- arrays


def array_kinds() -> list[Kind]:
    spread = "\n".join(json.dumps(each, indent=2) for each in GOOD)
    deep = f"[{dump(GOOD[0])}, {'[' * 100_000}"
    said, no_comma = BREAKS_OFF + "invalid JSON from here on (", BREAKS_OFF + "expected , or ] after an element"
    behind = BREAKS_OFF + "more text follows the closing ]"
    return [
        Kind("array over several lines", json.dumps(GOOD, indent=1).encode()),
        Kind("empty array", b" [ ]\n", []),
        Kind("comma before the closing bracket", f"{array(*GOOD)[:-1]},]".encode()),
        Kind("two commas before the closing bracket", f"{array(*GOOD)[:-1]},,]".encode(), GOOD, {"[3]": said}),
        Kind("comma missing", array(*GOOD).replace("}, {", "} {", 1).encode(), GOOD[:1], {"[1]": no_comma}),
        Kind("array cut in an element", array(*GOOD)[:-9].encode(), GOOD[:2], {"[2]": said}),
        Kind("array cut between elements", array(*GOOD)[:-1].encode(), GOOD, {"[3]": no_comma}),
        Kind("text behind an array", f"{array(*GOOD)}\nend".encode(), GOOD, {"[3]": behind}),
        Kind("deep nesting, array", deep.encode(), GOOD[:1], {"[1]": BREAKS_OFF + "an element is nested too deeply"}),
        Kind("array of arrays", b'[["a", "b"], ["c"]]', [], {"[0]": "a JSON list", "[1]": "a JSON list"}),
        Kind("lists by line", b'["a"]\n["b"]', [], {":1": "a JSON list", ":2": "a JSON list"}),
        Kind("object around the rows", lines({"data": GOOD}).encode()),
        Kind(
            "object around the rows, cut",
            lines({"data": GOOD}).encode()[:-2],
            GOOD,
            {"[3]": f"{BREAKS_OFF}expected , or }}"},
        ),
        Kind(
            "object around rows of numbers",
            b'{"n": 2, "rows": [1, 2]}',
            [],
            {":1": 'no instruction and no output found (other keys: "n", "rows")'},
        ),
        Kind("objects over several lines", spread.encode()),
        Kind("objects over several lines, cut", spread[:-3].encode(), GOOD[:2], {"[2]": said}),
        Kind("objects without line ends", "".join(map(dump, GOOD)).encode()),
        Kind("many shapes", array({"text": "丙"}, *GOOD, CHAT).encode(), [*GOOD, GOOD[0]], {"[0]": PRETRAINING}),
    ]
