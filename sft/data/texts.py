"""Texts of a record, checked; and the reason why a record is refused."""

from reprlib import Repr

MAX_CHARACTERS = 1_000_000  # in a prompt or an answer, some hundred times what a model reads
BRIEF = Repr()  # shortens values of any size and depth
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxdict = 2, 40, 40, 3
YES, NO = (
    frozenset(["true", "yes", "y", "1", "1.0", "good", "chosen"]),
    frozenset(["false", "no", "n", "0", "0.0", "bad", "rejected"]),
)


def brief(value: object) -> str:
    """Return a value of any kind for people, shortened."""
    try:
        return BRIEF.repr(value).encode("utf-8", "backslashreplace").decode()
    except Exception:  # the value's own code fails
        return type(value).__name__


def visible(text: str) -> str:
    """Return a text on one line that any terminal can print; keys of records may hold anything."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class RefusedError(Exception):
    """A record is not a valid sample: `kind` says why, for every record alike, and `detail` what this one has."""

    def __init__(self, kind: str, detail: str = ""):
        """Take a reason without values, under which refused records are counted, and what this record has."""
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def truth_of(value: object) -> bool | None:
    """Return what a value says that may be written as a number or a word; None if it is neither yes nor no."""
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in YES else False if word in NO else None
    try:
        number = float(value)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return None if number != number else number != 0


def text_of(value: object, key: str, where: str = "") -> str:
    """Return the valid text under a key; raise RefusedError otherwise. `where` is which turn, for people."""
    if not isinstance(value, str):
        kind, detail = f'"{key}" is not a string', brief(value)
    elif len(value) > MAX_CHARACTERS:
        kind, detail = f'"{key}" has more than {MAX_CHARACTERS:,} characters', f"{len(value):,}"
    else:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            kind = f'"{key}" contains a broken character or a byte that is not UTF-8'
            detail = ascii(value[error.start])
        else:
            return value
    raise RefusedError(kind, f"{where} has {detail}" if where else detail)
