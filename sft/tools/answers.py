"""Put the answers of several checkpoints to the questions of a file side by side, on one page to read and hand around.

    python -m sft.tools.answers output_dir/mine bigscience/bloom-560m --data questions.jsonl --output answers.html

    python -m sft.tools.answers ... --data belle_eval_set.jsonl --columns output=std_answer

The questions are rows as train_sft.py takes them; an answer in a row is the reference, and a row may have none. A key
such as "class" or "category" groups them. Answers are kept beside the page as they come, and the same command goes on
where it was stopped.
"""

import argparse
import hashlib
import html
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sft.chat.load import QUANTIZATIONS, is_address, load_chat
from sft.chat.reply import cut_at_marker
from sft.chat.sampling import Sampling
from sft.data.columns import BY_NAME, Columns
from sft.data.files import find_shards
from sft.data.formats import Sample, to_sample
from sft.data.shards import Refused, place_of, read_blocks, records_of
from sft.model.download import locate
from sft.program import ArgumentParser, UserError, one_line, run_program
from sft.training.arguments import DataArguments

CATEGORIES = ("class", "category", "task_type", "type", "subject", "topic", "类别", "分类")
NO_CATEGORY = "all"
PLACEHOLDER = "-"  # in place of an answer, for rows that have none
WATCHED_FILES = ("*.json", "*.safetensors", "*.bin")  # of a checkpoint: if one changes, its answers are asked again
PAGE = """<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.6 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2rem auto; max-width: 90rem;
padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; margin: 1rem 0 2rem; }}
th, td {{ border: 1px solid #ccc; padding: .4rem .6rem; text-align: left; vertical-align: top;
overflow-wrap: anywhere; }}
td {{ white-space: pre-wrap; }} th {{ background: #f4f4f4; }} .right {{ background: #eaf6ea; }}
.small {{ color: #666; font-size: .85em; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd; }} th {{ background: #222; }}
.right {{ background: #16301a; }} th, td {{ border-color: #444; }} }}
</style>
<h1>{title}</h1>
<p class="small">{about}</p>
{summary}
{questions}
</html>
"""


@dataclass(frozen=True)
class Question:
    """A question, its category, and the reference to compare answers with, empty if there is none."""

    sample: Sample
    category: str
    reference: str


def read_questions(data: str, number: int | None, columns: Columns = BY_NAME) -> tuple[list[Question], list[Refused]]:
    """Return the first `number` questions of a file or folder, and the rows that have none.

    Raises UserError if no row has a question.
    """
    questions, refused = [], []
    for record, place in islice(_records(data), number):
        sample, reference = _asked(record, place, columns)
        if isinstance(sample, Refused):
            refused.append(sample)
        else:
            questions.append(Question(sample, category_of(record), reference))
    if not questions:
        reason = f": {refused[0].place}: {refused[0].reason}" if refused else ""
        raise UserError(f"--data {data} has no questions{reason}; expected rows as train_sft.py takes them")
    return questions, refused


def _records(data: str) -> Iterator[tuple[Any, str]]:
    for shard in find_shards(data, "--data"):
        for block in read_blocks(shard):
            for number, record in records_of(block):
                yield record, place_of(shard, block.form, number)


def _asked(record: Any, place: str, columns: Columns) -> tuple[Sample | Refused, str]:
    """Return a record's question and reference; without an answer it is read as if it had one."""
    sample = to_sample(record, place, columns)
    if isinstance(sample, Refused) and isinstance(record, dict):
        key = next((key for key, role in columns.given.items() if role == "output"), "output")
        without = to_sample({**record, key: PLACEHOLDER}, place, columns)
        return (sample, "") if isinstance(without, Refused) else (without, "")
    return sample, sample.output if isinstance(sample, Sample) else ""


def category_of(record: Any) -> str:
    """Return the category that a record names, if it does."""
    names = (name for name in CATEGORIES if isinstance(record, dict) and isinstance(record.get(name), str))
    return next((record[name].strip() for name in names), "") or NO_CATEGORY


# ----------------------------------------------------------------------------------------------------------- measures


def plain(text: str) -> str:
    """Return a text without spaces and marks, in one width and case, as answers are compared."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(character for character in text if unicodedata.category(character)[0] in "LNS")


def is_exact(answer: str, reference: str) -> bool:
    """Tell whether an answer is the reference, whatever spaces and marks it has."""
    return plain(answer) == plain(reference)


def character_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's characters, order aside, 0 to 1.

    As for words in https://arxiv.org/abs/1606.05250, by characters since Chinese has no spaces.
    """
    given, expected = Counter(plain(answer)), Counter(plain(reference))
    both = (given & expected).total()
    return 2 * both / (given.total() + expected.total()) if both else float(not given and not expected)


# ------------------------------------------------------------------------------------------------------------- answers


def key_of(checkpoint: str, sampling: Sampling, quantization: str) -> str:
    """Return what an answer depends on beside its prompt: the checkpoint's files, or a server's address, and how."""
    stamp: list = [checkpoint, quantization, sampling.max_new_tokens, sampling.temperature, sampling.seed]
    if not is_address(checkpoint):
        files = [file for pattern in WATCHED_FILES for file in sorted(Path(locate(checkpoint)).glob(pattern))]
        stamp += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16]


def read_kept(file: Path) -> dict[tuple[str, str], str]:
    """Return the answers that are kept in a file by key and prompt; a line that is not whole is left out."""
    kept = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # of a run that was killed while it wrote
            continue
        kept[entry["key"], entry["prompt"]] = entry["answer"]
    return kept


def ask(
    checkpoint: str, questions: Sequence[Question], file: Path, batch: int, sampling: Sampling, given: dict[str, str]
) -> list[str]:
    """Return a checkpoint's answers, those that are kept as they are; each batch is added to the file."""
    key, kept = key_of(checkpoint, sampling, given["quantization"]), read_kept(file)
    prompts = [question.sample.prompt for question in questions]
    by_prompt = {question.sample.prompt: question.sample for question in questions}
    left = [prompt for prompt in by_prompt if (key, prompt) not in kept]
    if left:
        chat = load_chat(checkpoint, **given)
        with file.open("a", encoding="utf-8") as lines, tqdm(total=len(left), desc=Path(checkpoint).name) as bar:
            lines.write("\n")  # ends a line that was not whole
            for start in range(0, len(left), batch):
                asked = left[start : start + batch]
                fitted = [fitted_to(chat, by_prompt[prompt], sampling) for prompt in asked]
                for prompt, answer in zip(asked, chat.answer(fitted, sampling), strict=True):
                    kept[key, prompt] = cut_at_marker(answer)[0].strip()
                    entry = {"key": key, "checkpoint": checkpoint, "prompt": prompt, "answer": kept[key, prompt]}
                    lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
                lines.flush()
                bar.update(len(asked))
    return [kept[key, prompt] for prompt in prompts]


def fitted_to(chat: Any, sample: Sample, sampling: Sampling) -> str | list[int]:
    """Return a question's prompt, as the ids that fit into the model's context; a server has the text."""
    if not hasattr(chat, "encoder"):
        return sample.prompt
    return chat.encoder.encode_prompt(sample, min(sampling.max_new_tokens, chat.encoder.max_length // 2))[0]


# ------------------------------------------------------------------------------------------------------------ the page


def summary_of(questions: Sequence[Question], answers: dict[str, list[str]]) -> str:
    """Return the table of exact matches and character F1 by category, where there are references."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        if question.reference:
            groups[question.category].append(number)
    if not groups:
        return ""
    everything = [number for numbers in groups.values() for number in numbers]
    rows = [*sorted(groups.items()), *([("total", everything)] if len(groups) > 1 else [])]
    header = ["category", "questions", *(f"{name}: {what}" for name in answers for what in ("exact", "character F1"))]
    cells = []
    for category, numbers in rows:
        row = [category, str(len(numbers))]
        for given in answers.values():
            pairs = [(given[number], questions[number].reference) for number in numbers]
            row += [f"{sum(is_exact(*pair) for pair in pairs) / len(pairs):.1%}"]
            row += [f"{sum(character_f1(*pair) for pair in pairs) / len(pairs):.3f}"]
        cells.append(row)
    return table(header, cells)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: set[tuple[int, int]] = frozenset()) -> str:
    """Return an HTML table of plain texts; `right` are the cells (row, column) that stand out."""
    heads = "".join(f"<th>{html.escape(each)}</th>" for each in header)
    lines = []
    for i, row in enumerate(rows):
        marks = [' class="right"' if (i, j) in right else "" for j in range(len(row))]
        cells = (f"<td{mark}>{html.escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


def page_of(questions: Sequence[Question], answers: dict[str, list[str]], title: str, about: str) -> str:
    """Return the page: a summary, and each question with its reference and the answers side by side, by category."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        groups[question.category].append(number)
    sections = []
    for category, numbers in sorted(groups.items()):
        with_reference = any(questions[number].reference for number in numbers)
        header = ["question", *(["reference"] if with_reference else []), *answers]
        rows, right = [], set()
        for row, number in enumerate(numbers):
            question = questions[number]
            asked = question.sample.instruction + (f"\n{question.sample.input}" if question.sample.input else "")
            rows.append([asked, *([question.reference] if with_reference else [])])
            for given in answers.values():
                if question.reference and is_exact(given[number], question.reference):
                    right.add((row, len(rows[-1])))
                rows[-1].append(given[number])
        sections.append(f"<h2>{html.escape(category)} ({len(numbers)})</h2>{table(header, rows, right)}")
    summary = summary_of(questions, answers)
    parts = {"title": html.escape(title), "about": html.escape(about)}
    return PAGE.format(**parts, summary=summary, questions="\n".join(sections))


def names_of(checkpoints: Sequence[str]) -> list[str]:
    """Return a short name for each checkpoint, or the whole where two would be alike."""
    short = [each if is_address(each) else Path(each).name for each in checkpoints]
    return short if len(set(short)) == len(short) else list(checkpoints)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; raise UserError for a flag or a number that is out of range."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="model folders, adapters, hub ids, or a server's URL")
    parser.add_argument("--data", required=True, help="a file or folder of questions, as train_sft.py takes rows")
    parser.add_argument("--output", required=True, help="the page to write, such as answers.html")
    parser.add_argument("--columns", help="as for train_sft.py, such as output=std_answer")
    parser.add_argument("--ignore_columns", help="as for train_sft.py: keys that are not read")
    parser.add_argument("--rows", type=int, help="how many questions, from the first (default all)")
    parser.add_argument("--batch", type=int, default=8, help="how many are answered together (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer at most (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default 0)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, xpu")
    parser.add_argument("--quantize", default="none", choices=QUANTIZATIONS, help="faster on a CPU, by llama.cpp")
    given = parser.parse_args()
    if given.batch < 1 or (given.rows is not None and given.rows < 1):
        raise UserError("--batch and --rows must be 1 or more; give others, or leave them out")
    given.sampling = Sampling(given.max_new_tokens, given.temperature, seed=0)
    try:
        given.sampling.check()
    except ValueError as error:
        raise UserError(f"--{error}") from None
    for checkpoint in given.checkpoints:
        if not is_address(checkpoint):
            locate(checkpoint)
    return given


def main() -> None:
    """Ask every checkpoint and write the page."""
    given = parse_arguments()
    columns = DataArguments(given.data, columns=given.columns, ignore_columns=given.ignore_columns).reads_by
    questions, refused = read_questions(given.data, given.rows, columns)
    for each in refused:
        print(f"left out: {each.place}: {each.reason}")
    kept, names = Path(given.output).with_suffix(".jsonl"), names_of(given.checkpoints)
    computed_by = {"device": given.device, "quantization": given.quantize}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        answers = {
            name: ask(checkpoint, questions, kept, given.batch, given.sampling, computed_by)
            for name, checkpoint in zip(names, given.checkpoints, strict=True)
        }
        about = f"{len(questions)} questions of {Path(given.data).name}; at most {given.max_new_tokens} tokens each"
        about += f"; temperature {given.temperature:g}" + (f"; {given.quantize}" if given.quantize != "none" else "")
        page = page_of(questions, answers, " / ".join(answers), about)
        Path(given.output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{given.output} cannot be written: {one_line(error)}; give a file elsewhere") from None
    print(f"{len(questions)} questions, {len(answers)} checkpoints: {given.output}; the answers alone: {kept}")


if __name__ == "__main__":
    run_program(main)
