"""The house rules that a program can check: imports, docstrings, lengths, clean notebooks, one prompt."""

import ast
import json
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import PROJECT

FOLDERS = ["sft", "tests", "benchmarks", "data_proj"]


def find(*suffixes: str) -> list[Path]:
    files = [*PROJECT.iterdir(), *(file for folder in FOLDERS for file in (PROJECT / folder).rglob("*"))]
    hidden = re.compile(r"(^|/)\.")
    return sorted(file for file in files if file.suffix in suffixes and not hidden.search(name_of(file)))


def name_of(file: Path) -> str:
    return file.relative_to(PROJECT).as_posix()


def is_test(file: Path) -> bool:
    return file.is_relative_to(PROJECT / "tests")


PYTHON = find(".py")
SCRIPTS = [file for file in PYTHON if file.parent == PROJECT]
MODULES = [file for file in PYTHON if file.is_relative_to(PROJECT / "sft")]
NOTEBOOKS = find(".ipynb")


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def public_definitions(node: ast.Module | ast.ClassDef) -> list[ast.ClassDef | ast.FunctionDef]:
    found = []
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            found += [child, *(public_definitions(child) if isinstance(child, ast.ClassDef) else [])]
    return found


def test_the_files_are_found():
    assert {"train_sft.py", "app.py"} <= {file.name for file in SCRIPTS}
    assert {"prompts.py", "chat.py"} <= {file.name for file in MODULES}
    assert {"infer.ipynb", "process_data.ipynb"} <= {file.name for file in NOTEBOOKS}


@pytest.mark.parametrize("file", [*SCRIPTS, *MODULES], ids=name_of)
def test_no_script_is_imported(file: Path):
    assert not imported(parse(file)) & {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("file", PYTHON, ids=name_of)
def test_modules_have_docstrings(file: Path):
    assert ast.get_docstring(parse(file))


@pytest.mark.parametrize("file", [file for file in PYTHON if not is_test(file)], ids=name_of)
def test_public_names_have_docstrings(file: Path):
    assert [node.name for node in public_definitions(parse(file)) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("file", PYTHON, ids=name_of)
def test_functions_and_files_are_short(file: Path):
    functions = [node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > (60 if name == "main" else 40)} == {}
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_notebooks_are_kept_without_results(file: Path):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


def test_the_inference_notebook_is_short():
    assert len(json.loads((PROJECT / "infer.ipynb").read_text(encoding="utf-8"))["cells"]) <= 12


def test_the_prompt_stands_in_one_file():
    files = [file for file in find(".py", ".ipynb", ".sh") if not is_test(file)]
    text = "Below is an instruction"
    assert [name_of(file) for file in files if text in file.read_text(encoding="utf-8")] == ["sft/prompts.py"]


def test_nothing_is_left_to_do():
    files = find(".py", ".ipynb", ".sh", ".md", ".json", ".txt", ".toml")
    files = [file for file in files if "opendata" not in file.parts]
    assert [name_of(file) for file in files if re.search("TO[D]O|FIX[M]E", file.read_text(encoding="utf-8"))] == []


def pinned(folder: str | Path) -> set[str]:
    lines = (PROJECT / folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("-", "_") for name, version in pins if version}


def code_of(file: Path) -> ast.Module:
    if file.suffix == ".py":
        return parse(file)
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))


@pytest.mark.parametrize("file", [*PYTHON, *NOTEBOOKS], ids=name_of)
def test_every_import_is_pinned(file: Path):
    own = {"sft", "benchmarks", *(script.stem for script in SCRIPTS), *(each.stem for each in PYTHON if is_test(each))}
    third_party = imported(code_of(file)) - own - set(sys.stdlib_module_names)
    folder = file.parent.relative_to(PROJECT)
    pins = {name for path in ("", folder) if (PROJECT / path / "requirements.txt").exists() for name in pinned(path)}
    installed = packages_distributions()  # without what only the benchmarks need
    distributions = {name: installed.get(name, [name])[0].lower().replace("-", "_") for name in third_party}
    assert {name for name, distribution in distributions.items() if distribution not in pins} <= {
        "gradio_client",  # gradio needs it
        "starlette",  # gradio needs it
        "safetensors",  # transformers needs it
        "jinja2",  # torch needs it
        "triton",  # pinned in tests/run.sh, and installed beside the rest
    }
