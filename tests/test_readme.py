"""Every command, path and number that both READMEs name, against the project."""

import json
import re
import shlex
import subprocess
import sys
from itertools import zip_longest

import pytest

from support.project import PROJECT, SAMPLE

READMES = ["README.md", "README_zh.md"]
NOT_OURS = ("output_dir", "data_proj/opendata", "my_rows", ".venv", "bigscience/", "tiiuae/", "/path/to", "alpaca_zh")
NOT_OURS += ("http", "Content-Type")


def text_of(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def commands_of(name: str) -> list[list[str]]:
    """Return the words of every command line in the page's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text_of(name), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_both_pages_have_the_same_commands_headings_rows_and_numbers():
    english, chinese = map(text_of, READMES)
    assert commands_of("README.md") == commands_of("README_zh.md")
    for pattern in (r"^#+ ", r"^\|", r"^- ", r"^\d+\. "):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    numbers = [sorted(re.findall(r"\d[\d,.]*\d", page)) for page in (english, chinese)]
    assert numbers[0] == numbers[1], [pair for pair in zip_longest(*numbers) if pair[0] != pair[1]][:5]
    assert sorted(set(re.findall(r"`([^`\n]+)`", english))) == sorted(set(re.findall(r"`([^`\n]+)`", chinese)))


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_a_command_names_exists(name):
    paths = [word.split("=")[-1] for command in commands_of(name) for word in command]
    paths = [path for path in paths if "/" in path or path.endswith((".py", ".sh", ".ipynb", ".txt", ".json"))]
    own = [path for path in paths if not path.startswith(NOT_OURS)]
    assert len(own) > 8
    assert [path for path in own if not (PROJECT / path).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_every_file_in_the_tree_exists_and_every_file_is_in_the_tree(name):
    tree = re.search(r"```\n(train_sft.py.*?)```", text_of(name), re.DOTALL)[1]
    listed, folder = set(), ""
    for line in tree.splitlines():
        first = line.split()[0]
        folder = folder if line.startswith(" ") else first if first.endswith("/") else ""
        listed |= {first} if not line.startswith(" ") else {folder + first}
        listed |= {word for word in line.split()[1:] if word.endswith("_config.json")}
    assert [path for path in listed if not (PROJECT / path).exists()] == []
    code = {str(path.relative_to(PROJECT)) for path in (*PROJECT.glob("*.*"), *PROJECT.glob("sft/[!_]*.py"))}
    code = {path for path in code if path.endswith((".py", ".sh", ".ipynb", ".json"))}
    assert code <= listed, code - listed


@pytest.mark.parametrize("name", READMES)
def test_every_flag_and_variable_is_known(name):
    from train_sft import DataArguments, LoraArguments, ModelArguments, Parser, PlanArguments, TrainingArguments

    parser = Parser((ModelArguments, DataArguments, LoraArguments, PlanArguments, TrainingArguments))
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {"--demo", "--checkpoint"}
    programs = [*PROJECT.glob("benchmarks/*.py"), *PROJECT.glob("sft/*.py"), *PROJECT.glob("app.py")]
    programs += [PROJECT / "tests" / "conftest.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in programs)
    known |= set(re.findall(r'add(?:_argument|option)\(\s*"(--\w+)"', source))
    assert set(re.findall(r"(?<![\w-])--\w+", text_of(name))) <= known
    sources = [*PROJECT.glob("*.sh"), *PROJECT.glob("data_proj/*.ipynb"), PROJECT / "app.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in sources) + "HF_ENDPOINT"
    variables = set(re.findall(r"\b([A-Z_]{4,})=", text_of(name)))
    assert len(variables) > 5 and [variable for variable in variables if variable not in source] == []


def test_the_recipe_is_what_base_run_does():
    script = (PROJECT / "base_run.sh").read_text()
    recipe = ["num_train_epochs 3", "learning_rate 2e-5", "model_max_length 2048", "save_steps 500"]
    packed = ["save_total_limit 2", "packing True", "gradient_accumulation_steps 1"]
    assert [flag for flag in recipe + packed if f"    --{flag} \\\n" not in script] == []


def test_the_models_table_is_sixteen_bytes_a_parameter():
    rows = re.findall(r"^\| `\w+/[\w-]+` \| ([\d,]+) \| ([\d.]+) GiB \|$", text_of("README.md"), re.M)
    assert len(rows) == 6
    for parameters, gibibytes in rows:
        assert f"{int(parameters.replace(',', '')) * 16 / 2**30:.1f}" == gibibytes


def test_the_sample_has_as_many_rows_as_the_page_says():
    num_rows = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in SAMPLE.glob("*.json"))
    assert f"{num_rows} rows of our own" in text_of("README.md")
    assert json.loads((SAMPLE / "own_with_input.json").read_text(encoding="utf-8").splitlines()[0])["input"]


def test_belle_rows_become_rows_as_the_page_says(tmp_path):
    from sft.data.formats import read_samples

    seed = {"id": "seed_task_8", "instruction": "写诗", "instances": [{"input": "夏天", "output": "鹿葱。"}]}
    asked = [{"question": "一？", "std_answer": "1", "class": "math"}, {"question": "二？", "std_answer": " "}]
    (tmp_path / "belle_zh_seed_tasks.jsonl").write_text(json.dumps(seed) + "\n")
    (tmp_path / "belle_eval_set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    blocks = re.findall(r"```sh\n(.*?)```", text_of("README.md"), re.DOTALL)
    [block] = [block for block in blocks if "belle_zh_seed_tasks" in block]
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    subprocess.run(["sh", "-euc", python + block], cwd=tmp_path, check=True)
    rows = [row for file in sorted((tmp_path / "my_rows").iterdir()) for row in read_samples(file)]
    assert [(row.instruction, row.input, row.output) for row in rows] == [("一？", "", "1"), ("写诗", "夏天", "鹿葱。")]
