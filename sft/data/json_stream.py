"""JSON values read one at a time from a stream of bytes in any encoding, however many there are."""

import codecs
import io
import json
import re
import zlib
from collections.abc import Iterator

from sft.program import one_line

SAMPLE_BYTES = 256 * 2**10  # read at a time, and to detect a file's encoding
MAX_RECORD_BYTES = 64 * 2**20
# What reading a broken file raises: gzip, zlib, UTF-16.
READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError)
WHITESPACE = re.compile(r"[ \t\r\n]*")  # JSON's own
WRAPPERS = {"data", "instances", "rows", "examples", "items", "train"}  # keys of an array of rows
# Keys of a row, which may have an array as well, and of a turn.
ROW_KEYS = {"instruction", "prompt", "question", "query", "input", "context", "output", "response", "answer", "system"}
SPEAKERS, SAID = {"role", "from", "speaker"}, {"content", "value", "text"}
MEMBER = re.compile(r'\s*"([^"\\]*)"\s*:\s*')  # no known key has an escape
LONGEST_WORD = 12  # characters of two surrogates as JSON writes them; true, false and null are shorter
SCALAR = re.compile(r'(?:"(?:[^"\\]|\\.)*+"|[-+.\w]+)\s*,')


class BrokenError(Exception):
    """A file cannot be read beyond some record."""

    def __init__(self, reason: str, num_bytes: int = 0):
        """Say what is wrong; `num_bytes` were decoded and not understood."""
        super().__init__(reason)
        self.num_bytes = num_bytes


class RepeatedKeys(dict):
    """A JSON object that repeats a key, so that one of its values would be lost."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else RepeatedKeys(record)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4300 else float(digits)  # Python refuses longer ones


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


class _Text:
    """A text decoded piece by piece, and the position up to which it is parsed."""

    def __init__(self, stream: io.BufferedIOBase, encoding: str):
        self.encoding, self.errors = encoding, "surrogatepass" if encoding.startswith("utf-16") else "surrogateescape"
        self.stream, self.decoder = stream, codecs.getincrementaldecoder(encoding)(self.errors)
        self.text, self.position, self.at_end = "", 0, False
        self.fault: Exception | None = None  # of the stream, raised once everything before it is parsed

    def more(self) -> bool:
        """Read as much again as is not parsed yet, so that a long value is tried only a few times."""
        pieces, wanted = [self.text[self.position :]], max(SAMPLE_BYTES, len(self.text) - self.position)
        try:
            while wanted > 0 and not self.at_end:
                data = self.stream.read1(SAMPLE_BYTES)
                self.at_end = not data
                pieces.append(self.decoder.decode(data, final=self.at_end))
                wanted -= len(pieces[-1])
        except READ_ERRORS as error:
            self.fault, self.at_end = error, True
        self.text, self.position = "".join(pieces), 0
        if self.fault and len(self.text) == len(pieces[0]):
            raise self.broken(f"reading failed ({one_line(self.fault)})")
        return len(self.text) > len(pieces[0])

    def peek(self) -> str:
        """Return the next character that is not whitespace, "" at the end."""
        while True:
            self.position = WHITESPACE.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def value(self) -> tuple[object, int]:
        """Return the JSON value at the character of `peek`, and its size; raise BrokenError if there is none."""
        while True:
            start = self.position
            try:
                value, end = DECODER.raw_decode(self.text, start)
                if (
                    end < len(self.text) or not isinstance(value, int | float) or not self.more()
                ):  # a number may continue
                    self.position += end - start
                    return value, end - start
            except RecursionError:
                raise self.broken("an element is nested too deeply") from None
            except ValueError as error:
                is_long = len(self.text) - start > MAX_RECORD_BYTES
                if is_long and _is_cut(self.text, error):
                    size = f"{MAX_RECORD_BYTES // 2**20} MiB"
                    raise self.broken(
                        f"one element is over {size} long; if rows stand within it, write each as a line of its own"
                    ) from None
                if is_long or not self.more():
                    raise self.broken(f"invalid JSON from here on ({reason_of(error)})") from None

    def skip(self, character: str) -> bool:
        """Pass over a character if it is the next; tell whether it was."""
        is_next = self.peek() == character
        self.position += is_next
        return is_next

    def expect(self, character: str, said: str = "") -> None:
        """Pass over a character; raise BrokenError, with what is expected, if another one is next."""
        if not self.skip(character):
            raise self.broken(f"expected {said or character}")

    def broken(self, reason: str) -> BrokenError:
        """Return the error for a fault at the current position."""
        return BrokenError(reason, len(self.text[self.position :].encode(self.encoding, self.errors)))


def values_of(stream: io.BufferedIOBase, form: str, encoding: str) -> Iterator[tuple[object, int]]:
    """Yield, each with its size, the elements of a JSON array, or of one in an object, or JSON objects in a row."""
    text = _Text(stream, encoding)
    if form == "objects":
        while text.peek():
            yield text.value()
            text.skip(",")
        return
    closing = "]"
    if form == "array":
        yield from _elements(text)
    else:
        yield from _members(text, json.loads(form.removeprefix("array in ")))
        closing = "}"
    if text.peek():
        raise text.broken(f"more text follows the closing {closing}")


def _elements(text: _Text) -> Iterator[tuple[object, int]]:
    text.expect("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != ",":
            break
        text.position += 1
    text.expect("]", ", or ] after an element")


def _members(text: _Text, wanted: str) -> Iterator[tuple[object, int]]:
    """Yield the elements of the array that is the value of one key of an object, and pass over the other keys."""
    text.expect("{")
    is_found = False
    while text.peek() != "}":
        key, _ = text.value()
        text.expect(":")
        is_array = text.peek() == "["
        if is_array and key == wanted and not is_found:
            is_found = True
            yield from _elements(text)
        elif is_array:
            for _ in _elements(text):  # one by one, since it may be as long as the other
                pass
        else:
            text.value()
        if not text.skip(","):
            break
    text.expect("}", ", or } after a value")


# ------------------------------------------------------------------------------------------------------ how it begins


def wrapped_in(text: str) -> str | None:
    """Return the key of the array of rows in the object that a text begins with, None if that object is a row itself.

    A row is told by what else it has, by the turns or strings in its array, and by the rows that follow it.
    """
    try:
        _, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        end = len(text)  # cut, as an object around many rows is
    rest = text[end:].lstrip(" \t\r\n,")
    if rest.startswith("{") or (rest and "\n" not in text[:end]):
        return None
    position = 1
    while member := MEMBER.match(text, position):
        key, position = member[1], member.end()
        if text.startswith("[", position):
            return key if key in WRAPPERS and _begins_with_row(text, position + 1) else None
        if key in ROW_KEYS or not (scalar := SCALAR.match(text, position)):
            return None
        position = scalar.end()
    return None


def _begins_with_row(text: str, position: int) -> bool:
    """Tell whether the elements of an array, from behind its bracket on, are objects and not turns."""
    position = WHITESPACE.match(text, position).end()
    try:
        element, _ = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):  # longer than the text
        return text.startswith("{", position)
    return isinstance(element, dict) and not _is_turn(element)


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and bool(value.keys() & SPEAKERS and value.keys() & SAID)


def is_lines_of_lists(text: str) -> bool:
    """Tell whether a text begins with a line that holds an array, and others follow it or it holds only turns."""
    line, _, rest = text.partition("\n")
    if rest.strip() and not rest.lstrip().startswith("["):
        return False
    try:
        values = DECODER.decode(line.rstrip().removesuffix(","))
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip()) or (bool(values) and all(map(_is_turn, values)))


def spans_lines(text: str) -> bool:
    """Tell whether a text begins with a JSON object that spans lines, or with several on one line."""
    line = text.partition("\n")[0]
    if not line.startswith("{") or _is_json(line):
        return False
    try:
        _, end = DECODER.raw_decode(text)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        return line.rstrip() != text.rstrip() and _is_cut(text, error)
    except ValueError:
        return False
    return end > len(line) or line[end:].lstrip().startswith("{")  # anything else after it spoils only this line


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Tell whether a text is no JSON only for its end, as the beginning of a long one is."""
    ends_in_a_word = error.msg.startswith(("Expecting value", "Invalid \\uXXXX"))
    return (
        error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - LONGEST_WORD * ends_in_a_word
    )


def _is_json(text: str) -> bool:
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_some(stream: io.BufferedIOBase) -> bytes:
    """Return up to SAMPLE_BYTES of a stream, or what can be read of them."""
    pieces, wanted = [], SAMPLE_BYTES
    try:
        while wanted > 0 and (data := stream.read1(wanted)):
            pieces.append(data)
            wanted -= len(data)
    except READ_ERRORS:
        pass  # the next read raises it again
    return b"".join(pieces)


def guess_encoding(stream: io.BufferedIOBase, sample: bytes) -> str:
    """Return "gb18030" if the text from its first non-ASCII byte on is that rather than UTF-8, else "utf-8".

    A UTF-8 file with a few broken bytes is still UTF-8, although GB18030 may decode it, into nonsense.
    """
    while sample.isascii():
        sample = read_some(stream)
        if not sample:
            return "utf-8"
    sample = sample[re.search(rb"[\x80-\xff]", sample).start() :] + read_some(stream)
    text = sample.decode("utf-8", "surrogateescape")
    num_broken = len(re.findall("[\udc80-\udcff]", text))
    if num_broken <= len(re.findall("[^\0-\x7f\udc80-\udcff]", text)):
        return "utf-8"
    try:
        codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return "utf-8"
    return "gb18030"


def reason_of(error: Exception) -> str:
    """Return what is wrong, without line and column, which count in the decoded piece alone."""
    return error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
