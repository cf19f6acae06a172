"""House rules that a program can check: rooms and their imports, docstrings, lengths, clean notebooks, one prompt."""

import ast
import json
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from support.project import PROJECT

FOLDERS = ["sft", "tests", "benchmarks", "data_proj"]
GROUND = {"program", "prompts", "machine", "network"}
# What a room may import beside itself and the ground floor. No room is in the list of one beside it.
BELOW = {
    "data": set(),
    "model": set(),
    "training": {"data", "model"},
    "chat": {"data", "model"},
    "plan": {"data", "model", "training", "chat"},
    "web": {"data", "model", "training", "chat"},
    "tools": {"data", "model", "training", "chat"},
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "config", "misc", "core", "base"}


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
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PYTHON}


def imported(tree: ast.Module) -> set[str]:
    """Return the dotted name of every module, or name in a module, that is imported anywhere in a file."""
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(file: Path) -> set[str]:
    """Return the modules of `sft` that a file imports, such as "data.packing" or "program"."""
    known = {module_of(each) for each in MODULES}
    found = set()
    for name in imported(TREES[file]):
        parts = name.split(".")
        if parts[0] == "sft":
            longest = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.add(next((each for each in longest if each in known), ""))
    return found - {""}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PROJECT / "sft").with_suffix("").parts).removesuffix("__init__").rstrip(".")


def room_of(module: str) -> str:
    """Return the room of a module; "" for the ground floor."""
    return module.partition(".")[0] if module.partition(".")[0] in BELOW else ""


def public_definitions(node: ast.Module | ast.ClassDef) -> Iterable[ast.ClassDef | ast.FunctionDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


def test_the_files_are_found():
    assert {"train_sft.py", "app.py"} <= {file.name for file in SCRIPTS}
    assert {"prompts", "training.trainer"} <= {module_of(file) for file in MODULES}
    assert {"infer.ipynb", "process_data.ipynb"} <= {file.name for file in NOTEBOOKS}


def test_every_module_is_in_a_room_or_on_the_ground_floor():
    modules = {module_of(file) for file in MODULES}
    assert {module for module in modules if not room_of(module)} == GROUND | {""}
    assert {room_of(module) for module in modules if room_of(module)} == set(BELOW)


def test_a_room_imports_only_what_is_below_it():
    wrong = []
    for file in MODULES:
        module = module_of(file)
        room = room_of(module)
        for other in map(room_of, own_imports(file)):
            if other and other != room and (not room or other not in BELOW[room]):
                wrong.append(f"{module} imports from {other}")
    assert wrong == []


def test_no_imports_form_a_circle():
    arrows = {module_of(file): own_imports(file) for file in MODULES}
    while leaves := [module for module, others in arrows.items() if not others & arrows.keys() - {module}]:
        for module in leaves:
            del arrows[module]
    assert arrows == {}


def test_a_rooms_docstring_is_one_paragraph_of_what_belongs_there():
    rooms = [file for file in MODULES if file.name == "__init__.py" and file.parent.name in BELOW]
    assert {file.parent.name for file in rooms} == set(BELOW)
    assert [name_of(file) for file in rooms if not 100 < len(ast.get_docstring(TREES[file])) < 500] == []
    assert [name_of(file) for file in rooms if len(TREES[file].body) > 1] == []  # importing a room starts nothing


def test_names_say_what_a_module_is():
    assert {file.stem for file in PYTHON} & NAMES_THAT_SAY_NOTHING == set()


def test_tests_stand_where_their_module_does():
    rooms = {name: {file.stem for file in (PROJECT / "sft" / name).glob("*.py")} for name in BELOW}
    wrong = [
        name_of(file)
        for room, modules in rooms.items()
        for file in (PROJECT / "tests" / room).glob("test_*.py")
        if not any(file.stem == f"test_{module}" or file.stem.startswith(f"test_{module}_") for module in modules)
    ]
    assert wrong == []


def test_no_script_is_imported():
    scripts = {script.stem for script in SCRIPTS}
    assert [
        name_of(file) for file in (*SCRIPTS, *MODULES) if {n.split(".")[0] for n in imported(TREES[file])} & scripts
    ] == []


def test_modules_have_docstrings():
    assert [name_of(file) for file in PYTHON if not ast.get_docstring(TREES[file])] == []


def test_public_names_have_docstrings():
    code = [file for file in PYTHON if not is_test(file)]
    without = [
        (name_of(file), node.name)
        for file in code
        for node in public_definitions(TREES[file])
        if not ast.get_docstring(node)
    ]
    assert without == []


def test_functions_and_files_are_short():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    too_long = [
        f"{name_of(file)} {node.name}: {length} lines"
        for file in PYTHON
        for node in ast.walk(TREES[file])
        if isinstance(node, kinds)
        and (length := node.end_lineno - node.lineno + 1) > (60 if node.name == "main" else 40)
    ]
    too_long += [name_of(file) for file in PYTHON if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    assert too_long == []


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


def pinned(folder: Path) -> set[str]:
    file = folder / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("-", "_") for name, version in pins if version}


def code_of(file: Path) -> ast.Module:
    if file.suffix == ".py":
        return TREES[file]
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))


def test_every_import_is_pinned():
    own = {"sft", "benchmarks", "support", *BELOW, *(script.stem for script in SCRIPTS)}
    installed = packages_distributions()  # without what only the benchmarks need
    unpinned = {}
    for file in (*PYTHON, *NOTEBOOKS):
        third_party = {name.split(".")[0] for name in imported(code_of(file))} - own - set(sys.stdlib_module_names)
        folder = PROJECT / file.relative_to(PROJECT).parts[0]
        pins = pinned(PROJECT) | (pinned(folder) if folder.is_dir() else set())
        for name in third_party:
            if installed.get(name, [name])[0].lower().replace("-", "_") not in pins:
                unpinned.setdefault(name, name_of(file))
    assert unpinned.keys() <= {
        "gradio_client",  # gradio needs it
        "starlette",  # gradio needs it
        "safetensors",  # transformers needs it
        "jinja2",  # torch needs it
        "triton",  # pinned in tests/run.sh, and installed beside the rest
        "xllamacpp",  # pinned where it is asked for, and for the tests
        *("ctranslate2", "lm_eval", "vllm"),  # pinned in benchmarks/clients.py, which installs them
    }, unpinned
