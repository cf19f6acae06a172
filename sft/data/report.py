"""What became of every row of the data: counted, printed, and written to the output folder."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sft.data.cache import Counts
from sft.data.columns import NOT_READ
from sft.data.shards import NUM_NAMED, SHAPE, place_of, printable

NOTES = "data_report.jsonl"  # in the output folder


@dataclass
class DataReport:
    """What became of every row that was read: counts.rows = kept + counts.refused + duplicates."""

    counts: Counts
    notes: Path  # one JSON line per row that was refused or cut
    kept: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    longest: int = 0  # tokens in the longest row
    # File and row of each of the D dropped duplicates, and of the first row with its text, (D, 4).
    duplicates: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))

    @property
    def bad_fraction(self) -> float:
        """Return the fraction of refused rows or of unread bytes, whichever is larger."""
        counts = self.counts
        return max(counts.refused / max(1, counts.rows), counts.unread_bytes / max(1, counts.num_bytes))

    def what_is_wrong(self, max_bad_fraction: float) -> str | None:
        """Return why no run should train on this data; None if nothing is wrong."""
        counts = self.counts
        if not counts.rows:
            return f"has no rows to train on; expected rows such as {SHAPE}"
        if self.bad_fraction > max_bad_fraction:
            unread = (
                f" and {counts.unread_bytes:,} of {counts.num_bytes:,} bytes not read" if counts.unread_bytes else ""
            )
            return (
                f"has {counts.refused:,} of {counts.rows:,} rows refused{unread}, more than --max_bad_fraction "
                f"{max_bad_fraction:g}; fix them, or raise --max_bad_fraction"
            )
        return None if self.kept else f"has no rows to train on: all {counts.rows:,} were refused"

    def line(self) -> str:
        """Return how many rows were read, kept, cut and refused, and their tokens, for people."""
        counts = self.counts
        duplicates = f", {len(self.duplicates):,} duplicates" if len(self.duplicates) else ""
        return (
            f"{counts.rows:,} rows read: {self.kept:,} kept ({counts.cut:,} of them cut), {counts.refused:,} refused"
            f"{duplicates}; {self.tokens:,} tokens, {self.labelled_tokens:,} of them trained; "
            f"longest {self.longest:,}"
        )

    def entries(self) -> Iterator[dict[str, str]]:
        """Yield the place of every row that was refused, cut or dropped as a duplicate, and why."""
        first_of = {self.place(*pair[:2]): self.place(*pair[2:]) for pair in self.duplicates.tolist()}
        with self.notes.open(encoding="utf-8") as lines:
            yield from (entry for entry in map(json.loads, lines) if entry["place"] not in first_of)
        yield from ({"place": place, "note": f"duplicate: of {first}"} for place, first in first_of.items())

    def place(self, file: int, row: int) -> str:
        """Return where a row is, from the number of its file and its line or index."""
        return place_of(Path(self.counts.files[file]["file"]), self.counts.files[file]["form"], row)


def print_data(name: str, report: DataReport) -> None:
    """Print what became of the rows: their shapes and encodings, what was noted, and what was refused and why."""
    print(f"{name:9}{report.line()}")
    _print_some("shape", _shapes(report.counts.files))
    _print_some("noted", _noted(report.counts.files))
    _print_some("refused", _refused(report.counts.files))


def _print_some(name: str, lines: list[str]) -> None:
    for line in lines[:NUM_NAMED]:
        print(f"{name:9}{line}")
    if len(lines) > NUM_NAMED:
        print(f"{name:9}{len(lines) - NUM_NAMED:,} more lines like these")


def _shapes(files: Sequence[dict]) -> list[str]:
    """Return how many files have rows of which keys, form and encoding."""
    kinds: Counter[tuple[str, str, str]] = Counter()
    for file in files:
        shape = " and ".join(_main_shapes(file["shapes"])) or ("unknown" if file["refused"] else "empty")
        kinds[shape, file["form"], file["encoding"]] += 1
    lines = []
    for (shape, form, encoding), number in kinds.most_common():
        notice = "" if encoding == "utf-8" else f", read as {encoding}, not as UTF-8"
        lines.append(f"{shape} in {number:,} {'file' if number == 1 else 'files'} ({form}{notice})")
    return lines


def _main_shapes(shapes: dict[str, int]) -> list[str]:
    """Return the shapes, the commonest first, without those whose keys another one has all of."""
    by_number = sorted(shapes, key=shapes.get, reverse=True)
    return [
        shape for shape in by_number if not any(set(shape.split("/")) < set(other.split("/")) for other in by_number)
    ]


def _noted(files: Sequence[dict]) -> list[str]:
    """Return, a line per file, how many rows have keys that are not read, joined turns, or replies without training."""
    lines = []
    for file in files:
        said = [
            f"{remark} in {number:,} {'row' if number == 1 else 'rows'}" for remark, number in file["remarks"].items()
        ]
        unread = [each.removeprefix(NOT_READ) for each in said if each.startswith(NOT_READ)]
        others = [each for each in said if not each.startswith(NOT_READ)]
        if said:
            own = "; ".join([NOT_READ + ", ".join(unread), *others] if unread else others)
            lines.append(f"{printable(file['file'])}: {own}")
    return lines


def _refused(files: Sequence[dict]) -> list[str]:
    """Return, a line per file and kind of reason, the first refused row and how many are like it, the most first."""
    found = [refused for file in files for refused in file["refused"].values()]
    return [
        f"{place}: {reason}" + (f"; and {number - 1:,} more like it" if number > 1 else "")
        for number, place, reason in sorted(found, key=lambda each: -each[0])
    ]


def write_data_report(reports: Iterable[DataReport], path: Path) -> None:
    """Write one JSON line per row that was refused, cut or a duplicate: its place, and why."""
    with path.open("w", encoding="utf-8") as lines:
        for report in reports:
            lines.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in report.entries())
