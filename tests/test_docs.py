"""Every command, path and figure that the READMEs and docs/ name, against the project."""

import re
import shlex
import subprocess
import sys
from itertools import zip_longest

import pytest

from support.project import PROJECT, SAMPLE

READMES = ["README.md", "README_zh.md"]
GENERATED = "docs/results.md"
PAGES = [*READMES, *sorted(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))]
NOT_OURS = ("output_dir", "data_proj/opendata", "my_rows", ".venv", "bigscience/", "tiiuae/", "/path/to", "alpaca_zh")
OF_OTHERS = {"--model", "--model_args", "--tasks", "--include_path", "--apply_chat_template"}  # lm_eval's flags
NOT_OURS += ("http", "Content-Type", "exported", "nvme_folder")


def text_of(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def commands_of(name: str) -> list[list[str]]:
    """Return the words of every command line in the page's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text_of(name), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def train_flags() -> set[str]:
    """Return every flag of train_sft.py, as its own parser has them."""
    from sft.training import arguments

    names = ("ModelArguments", "DataArguments", "LoraArguments", "PlanArguments", "TrainingArguments")
    from train_sft import Parser

    parser = Parser([getattr(arguments, name) for name in names if hasattr(arguments, name)])
    return {option for action in parser._actions for option in action.option_strings}


def test_both_pages_have_the_same_commands_headings_rows_and_numbers():
    english, chinese = map(text_of, READMES)
    assert commands_of("README.md") == commands_of("README_zh.md")
    for pattern in (r"^#+ ", r"^\|", r"^- ", r"^\d+\. ", r"^!\["):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    numbers = [sorted(re.findall(r"\d[\d,.]*\d", page)) for page in (english, chinese)]
    assert numbers[0] == numbers[1], [pair for pair in zip_longest(*numbers) if pair[0] != pair[1]][:5]
    assert sorted(set(re.findall(r"`([^`\n]+)`", english))) == sorted(set(re.findall(r"`([^`\n]+)`", chinese)))


@pytest.mark.parametrize("name", READMES)
def test_a_page_is_at_most_220_lines(name):
    assert text_of(name).count("\n") <= 220


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_command_names_and_every_link_exists(name):
    paths = [word.split("=")[-1] for command in commands_of(name) for word in command if " " not in word]
    paths = [path for path in paths if "/" in path or path.endswith((".py", ".sh", ".ipynb", ".txt"))]
    own = [path for path in paths if not path.startswith(NOT_OURS)]
    assert [path for path in own if not (PROJECT / path).exists()] == []
    links = re.findall(r"\]\((?!http)([^)#]*)(#[\w-]+)?\)", text_of(name))
    for path, anchor in links:
        target = (PROJECT / name).parent / path if path else PROJECT / name
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, (anchor, anchors)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_module_and_variable_is_known(name, train_flags):
    from app import NUMBERS

    known = train_flags | {"--demo", "--all", "--checkpoint"} | {f"--{name}" for name in NUMBERS} | OF_OTHERS
    programs = [*PROJECT.glob("benchmarks/*.py"), *PROJECT.glob("sft/**/*.py"), PROJECT / "app.py"]
    programs += [PROJECT / "tests" / "conftest.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in programs)
    known |= set(re.findall(r'add(?:_argument|option)\(\s*"(--\w+)"', source)) | {"--enable_jit_checkpoint"}
    assert set(re.findall(r"(?<![\w-])--\w+", text_of(name))) - known == set()
    modules = re.findall(r"-m ((?:sft|benchmarks)\.\S+)", text_of(name))
    places = [PROJECT / module.strip("`.,").replace(".", "/") for module in modules]
    assert [place for place in places if not place.with_suffix(".py").exists() and not place.is_dir()] == []
    scripts = [*PROJECT.glob("*.sh"), *PROJECT.glob("data_proj/*.ipynb"), PROJECT / "app.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in scripts) + "HF_ENDPOINT"
    variables = set(re.findall(r"\b([A-Z_]{4,})=", text_of(name)))
    assert [variable for variable in variables if variable not in source] == []


@pytest.mark.parametrize("name", READMES)
def test_every_path_of_the_tree_exists_and_no_folder_is_missing(name):
    tree = re.search(r"```\n(train_sft.py.*?)```", text_of(name), re.DOTALL)[1].splitlines()
    listed = {word for line in tree for word in re.split(r"\s{2,}", line)[0].split()}
    assert len(tree) == 15 and [path for path in listed if not (PROJECT / path).exists()] == []
    rooms = {f"sft/{path.parent.name}/" for path in PROJECT.glob("sft/*/__init__.py")}
    assert rooms <= listed, rooms - listed


def test_results_and_pictures_are_what_the_report_writes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.report", "--output", str(tmp_path)]
    subprocess.run(command, cwd=PROJECT, check=True, timeout=300)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(written) == 3
    for path in written:
        assert (tmp_path / path).read_text(encoding="utf-8") == text_of(str(path)), "run python -m benchmarks.report"


@pytest.mark.parametrize("name", READMES)
def test_the_figures_of_a_page_are_in_the_results(name):
    cells = [re.findall(r"^\| (?:bloom|falcon)-.*$", text, re.M) for text in (text_of(name), text_of(GENERATED))]
    assert len(cells[0]) == 6 and set(cells[0]) <= set(cells[1])
    times = re.findall(r"(\d\.\d\d)(?: times| 倍)", text_of(name)) + re.findall(r"(\d\.\d\d) times as", text_of(name))
    assert len(times) >= 2 and all(f"| {figure} |" in text_of(GENERATED) for figure in times)


def test_the_recipe_is_what_base_run_does():
    script = (PROJECT / "base_run.sh").read_text()
    recipe = ["num_train_epochs 3", "learning_rate 2e-5", "model_max_length 2048", "save_steps 500"]
    packed = ["save_total_limit 2", "packing True", "gradient_accumulation_steps 1"]
    assert [flag for flag in recipe + packed if f"    --{flag} \\\n" not in script] == []


def test_the_models_table_is_sixteen_bytes_a_parameter():
    rows = re.findall(r"^\| `\w+/[\w-]+` \| ([\d,]+) \| ([\d.]+) GiB \|$", text_of("docs/hardware.md"), re.M)
    assert len(rows) == 6
    for parameters, gibibytes in rows:
        assert f"{int(parameters.replace(',', '')) * 16 / 2**30:.1f}" == gibibytes


def test_the_sample_has_as_many_rows_as_the_page_says():
    num_rows = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in SAMPLE.glob("*.json"))
    assert f"{num_rows} rows of our own" in text_of("README.md")


def test_belle_rows_are_read_as_the_page_says():
    from sft.data.formats import Sample, to_sample
    from sft.training.arguments import DataArguments

    seed = {"id": "seed_task_8", "instruction": "写诗", "instances": [{"input": "夏天", "output": "鹿葱。"}]}
    asked = [{"question": "一？", "std_answer": "1", "class": "math"}, {"question": "二？", "std_answer": " "}]
    [given] = re.findall(r"belle_eval_set.jsonl .* --columns (\S+)", text_of("docs/data.md"))
    columns = DataArguments("x", columns=given).reads_by
    rows = [to_sample(seed, "a:1"), *(to_sample(row, "b:1", columns) for row in asked)]
    texts = [(row.instruction, row.input, row.output) for row in rows if isinstance(row, Sample)]
    assert texts == [("写诗", "夏天", "鹿葱。"), ("一？", "", "1")]


def test_every_name_in_the_table_of_roles_has_that_role():
    from sft.data.columns import ROLE_OF

    rows = re.findall(r"^\| (\w+) \| (`.*`.*) \|$", text_of("docs/data.md"), re.M)
    found = {name: role for role, names in rows for name in re.findall("`([^`]+)`", names)}
    assert len(found) > 30 and found == {name: ROLE_OF.get(name) for name in found}
