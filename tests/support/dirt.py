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
NO_INSTRUCTION = 'no "instruction", which the first rows of the file have; found '


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
    "object for a string": (row(instruction={"text": "乙"}), "\"instruction\" is {'text': '乙'}; expected a string"),
    "list for a string": (row(output=["二"]), "\"output\" is ['二']; expected a string"),
    "number for a string": (row(output=3.5), '"output" is 3.5; expected a string'),
    "huge number for a string": (row(output=10**100), '"output" is 1000000'),
    "not a number for a string": (row(output=float("nan")), '"output" is nan; expected a string'),
    "boolean for a string": (row(instruction=True), '"instruction" is True; expected a string'),
    "boolean for an input": (row(input=False), '"input" is False; expected a string'),
    "null output": (row(output=None), '"output" is None; expected a string'),
    "null instruction": (row(instruction=None), '"instruction" is None; expected a string'),
    "null everywhere": (dict.fromkeys(GOOD[0]), '"instruction" is None; expected a string'),
    "missing output": (
        without("output"),
        'no "output", which the first rows of the file have; found ' + "['input', 'ins",
    ),
    "missing instruction": (without("instruction"), NO_INSTRUCTION + "['input', 'output']"),
    "no key": ({}, NO_INSTRUCTION + "[]"),
    "output of spaces": (row(output=" \n\u3000\t"), 'the "output" is empty'),
    "empty instruction and input": (row(instruction=" ", input="\n"), 'the "instruction" is empty'),
    "first half of a character": (
        '{"instruction": "\\ud83d", "output": "二"}',
        "\"instruction\" contains '\\ud83d', a broken",
    ),
    "second half of a character": (
        '{"instruction": "乙", "output": "\\ude00"}',
        "\"output\" contains '\\ude00', a broken",
    ),
    "key twice": (
        '{"instruction": "乙", "output": "二", "output": "三"}',
        "a key appears twice among ['instruction', 'ou",
    ),
    "list for a row": (["乙", "二"], "a JSON list; expected an object"),
    "string for a row": ('"乙"', "a JSON str; expected an object"),
    "null for a row": (None, "a JSON NoneType; expected an object"),
    "another shape": ({"prompt": "乙", "response": "二"}, NO_INSTRUCTION + "['prompt', 'response']"),
    "history of strings": (
        row(history=["乙", "二"]),
        "\"history\" is ['乙', '二']; expected a list of [question, reply]",
    ),
    "text too long": (row(output="长" * 1_000_001), '"output" has 1,000,001 characters; at most 1,000,000'),
}
BAD_TURNS = {
    "wrong role": (
        [{"role": "robot", "content": "乙"}],
        'turn 1 has the role \'robot\'; expected "user", "assistant" or',
    ),
    "role is no string": ([{"role": 1, "content": "乙"}], 'turn 1 has the role 1; expected "user"'),
    "wrong order": (CHAT["messages"][::-1], "user first; found ['assistant', 'user']"),
    "two questions": ([*CHAT["messages"][:1], *CHAT["messages"]], "found ['user', 'user', 'assistant']"),
    "system in the middle": ([*CHAT["messages"], {"role": "system", "content": "丙"}], "'assistant', 'system']"),
    "empty turn": ([{"role": "user", "content": " "}, CHAT["messages"][1]], "a turn is empty"),
    "no turns": ([], "found no question with a reply"),
    "a question alone": (CHAT["messages"][:1], "found no question with a reply"),
    "turns are strings": (["乙", "二"], 'turn 1 lacks "role" or "content": \'乙\''),
    "turns are a string": ("乙", "no \"messages\" list, which the first rows of the file have; found ['messages']"),
    "turn without a text": ([{"role": "user"}], 'turn 1 lacks "role" or "content": {'),
    "text of a turn is null": ([{"role": "user", "content": None}], '"content of turn 1" is None; expected a string'),
    "text of a turn is a list": ([{"role": "user", "content": ["乙"]}], "\"content of turn 1\" is ['乙']; expected a"),
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
        Kind("key twice in a turn", twice.encode(), [GOOD[0]] * 2, {":2": "turn 1 repeats a key"}),
        Kind("last turn is a question", asked.encode(), [GOOD[0]] * 2, cut={":2": note}),
        Kind("null input", lines(row(input=None)).encode(), [row(input="")]),
        Kind("missing input", array(without("input")).encode(), [row(input="")]),
        Kind("huge integer", lines(*around(huge)).encode()),
        Kind("deep but readable, line", lines(*around(deep)).encode()),
        Kind("deep but readable, array", array(*around(deep)).encode()),
    ]


# -------------------------------------------------------------------------------------------------------------- bytes

ASTRAL = row(instruction="𠀀𪛖", output="😀")  # of four bytes in GB18030 too
GOOD_ASCII = {"instruction": "one", "input": "", "output": "two"}
LINE_ENDS = row(instruction="\u2028行\u0085", output="段\u2029\x1c")  # in the eyes of str.splitlines
NOT_UTF8 = "\"output\" contains '\\udcb6', a broken character or a byte that is not UTF-8"


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
    no_shape = {f":{number}": NO_INSTRUCTION + "['text']" for number in range(1, 151)}
    long_line = '"instruction" has 50,000,000 characters; at most 1,000,000'
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

MANY_SHAPES = {"[0]": NO_INSTRUCTION + "['text']", "[4]": NO_INSTRUCTION + "['messages']"}


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
            {":1": "of no known shape, with ['n', 'ro"},
        ),
        Kind("objects over several lines", spread.encode()),
        Kind("objects over several lines, cut", spread[:-3].encode(), GOOD[:2], {"[2]": said}),
        Kind("objects without line ends", "".join(map(dump, GOOD)).encode()),
        Kind("many shapes", array({"text": "丙"}, *GOOD, CHAT).encode(), GOOD, MANY_SHAPES),
    ]
