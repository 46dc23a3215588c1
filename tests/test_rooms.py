"""The rooms: imports lead downward, without a circle; files and functions are short."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "bioscan_xla"
# From the bottom up. A module imports from its own room and from those before it.
ROOMS = [
    "errors",
    "stopping",
    "reads",
    "options",  # checks ranks and header styles against reads/lineages
    "encode",
    "table",
    "embedding",
    "training",
    "federation",
    "classification",
    "planning",
    "transfer",
    "serving",
    "cli",
    "commands",
]
COMMANDS = {path.stem for path in PACKAGE.glob("*.py")} - set(ROOMS)
# Who alone imports what.
ONLY_IN = {
    "torch_xla": {"encode/runtime.py", "encode/hosts.py"},
    "jax": {"planning/compiler.py"},
    "libtpu": {"planning/compiler.py"},
    "ray": {"embedding/cluster.py", "embedding/ray_nodes.py"},
    "accelerate": {"training"},
    "fastapi": {"serving"},
    "uvicorn": {"serving/run.py"},
}
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
# Longer ones, each with its reason; the list may only get shorter.
LONG_FILES = {}
LONG_FUNCTIONS = {
    "classification/run.py:classify": "the run, step by step",
    "embedding/cluster.py:run": "the loop that gives out chunks and takes in vectors",
    "embedding/run.py:_embed": "the run, step by step: open, read, compute, commit, report",
    "encode/encoder.py:load_encoder": "checks of one model, one after another",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module):
    """The room of a module's path inside the package, `encode/runtime` or `embed`."""
    first = module.split("/")[0]
    return "commands" if first in COMMANDS else first


def imports(path):
    """Modules that a file imports, ours as paths inside the package, and whether at its top."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = node in tree.body and node not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, at_top
        elif isinstance(node, ast.ImportFrom):
            folder = path.parent
            for _ in range(node.level - 1):
                folder = folder.parent
            base = folder.joinpath(*(node.module or "").split("."))
            for alias in node.names:
                target = base / alias.name
                is_module = target.with_suffix(".py").is_file() or target.is_dir()
                found = target if is_module else base
                if found != PACKAGE:  # `from . import __version__`
                    yield found.relative_to(PACKAGE), at_top


ARROWS = [
    (path.relative_to(PACKAGE).with_suffix("").as_posix(), target, at_top)
    for path in FILES
    for target, at_top in imports(path)
]
OURS = [
    (source, target.as_posix(), at_top)
    for source, target, at_top in ARROWS
    if isinstance(target, Path)
]


def test_every_room_is_known_and_none_is_named_as_a_command():
    rooms = {path.parent.name for path in FILES if path.parent != PACKAGE}
    assert rooms <= set(ROOMS)
    assert not rooms & COMMANDS
    for command in COMMANDS - {"__init__"}:
        assert "def main(" in (PACKAGE / f"{command}.py").read_text()


def test_imports_lead_downward():
    assert len(OURS) > 100
    upward = {
        f"{source} imports {target}"
        for source, target, _ in OURS
        if ROOMS.index(room_of(target)) > ROOMS.index(room_of(source)) and source != "__init__"
    }
    assert not upward


def test_no_room_imports_a_command_or_the_command_line():
    wrong = {
        f"{source} imports {target}"
        for source, target, _ in OURS
        if room_of(target) in ("cli", "commands") and room_of(source) != "commands"
    }
    assert not wrong


def test_no_circle_among_modules():
    """Neither at import nor, between modules of different rooms, later."""
    graph: dict[str, set[str]] = {}
    for source, target, at_top in OURS:
        if at_top and source != target and not source.endswith("__init__"):
            graph.setdefault(source, set()).add(target)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_special_libraries_stay_in_their_room():
    wrong = {
        f"{source} imports {target}"
        for source, target, _ in ARROWS
        if not isinstance(target, Path)
        for library, homes in ONLY_IN.items()
        if target.split(".")[0] == library
        and not any(f"{source}.py" == home or source.startswith(f"{home}/") for home in homes)
    }
    assert not wrong


def test_no_file_is_long():
    lengths = {path.relative_to(PACKAGE).as_posix(): path.read_text().count("\n") for path in FILES}
    long = {name for name, length in lengths.items() if length > LONGEST_FILE}
    assert long <= set(LONG_FILES)


def length_of(function):
    """Lines of a function, without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_no_function_is_long():
    lengths = {
        f"{path.relative_to(PACKAGE).as_posix()}:{node.name}": length_of(node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    long = {name for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert long <= set(LONG_FUNCTIONS)


def test_every_folder_is_packaged():
    """`packages = find:` passes over a folder without `__init__.py`."""
    folders = {path.parent for path in FILES}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_python_m_names_modules_that_are_there():
    named = {
        found
        for path in [*FILES, *ROOT.glob("configs/*"), *ROOT.glob("launch/*"), ROOT / "Makefile"]
        if path.is_file()
        for found in re.findall(r"-m bioscan_xla\.([a-z_.]*[a-z_])", path.read_text())
    }
    assert len(named) > 3
    assert all((PACKAGE / f"{name.replace('.', '/')}.py").is_file() for name in named)


def test_the_map_of_the_rooms_names_every_file():
    text = (ROOT / "docs/architecture.md").read_text()
    missing = [
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if path.stem != "__init__" and f"`{path.stem}`" not in text and path.parent != PACKAGE
    ]
    assert not missing
