"""The rooms of the library know only those below them, and every public name explains itself."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shampoo_func as sf
from shampoo_func.linalg import constant_result

PACKAGE = Path(sf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a room may import itself and the rooms before it.
ROOMS = (
    "errors",
    "types",
    "walk",
    "tree",
    "linalg",
    "codecs",
    "blocks",
    "sharding",
    "preconditioners",
    "transforms",
    "recipes",
    "training",
    "checkpoint",
    "torch_optim",
)
# Rooms that may know less than everything below them.
KNOWS_ONLY = {
    "linalg": {"errors", "types"},
    "codecs": {"errors", "types", "linalg"},
    "blocks": {"errors", "types", "linalg"},
    "sharding": {"errors", "types", "linalg", "blocks", "tree"},
    "preconditioners": {"errors", "types", "linalg", "codecs"},
}
NO_PYTREES = {"optree", "torch.utils._pytree", "torch.utils._cxx_pytree", "tree", "jax"}

PUBLIC = [name for name in sf.__all__ if name != "__version__"]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(sf, name, None))]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """The room a file stands in; "" for the front door, `__init__.py`."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if room == "__init__" else room


def imports(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def rooms_known(path: Path) -> set[str]:
    """The rooms that a file imports from, its own left out."""
    ours = (name.split(".") for name in imports(path) if name.startswith("shampoo_func."))
    return {parts[1] for parts in ours} - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_imports_only_the_rooms_below(path: Path) -> None:
    """The arrows between rooms point downwards."""
    room = room_of(path)
    if not room:
        below = set(ROOMS)
    else:
        assert room in ROOMS, f"{relative(path)} stands in no known room"
        below = KNOWS_ONLY.get(room, set(ROOMS[: ROOMS.index(room)]))
    assert rooms_known(path) <= below


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_leaves_pytrees_to_the_tree_room(path: Path) -> None:
    """Only tree.py imports a pytree library."""
    libraries = {
        library
        for name in imports(path)
        for library in NO_PYTREES
        if name == library or name.startswith(f"{library}.")
    }
    assert libraries <= ({"optree"} if relative(path) == "tree.py" else set())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_leaves_collectives_to_the_sharding_room(path: Path) -> None:
    """Only sharding/ may call a collective; others may know what a mesh is."""
    if room_of(path) == "sharding":
        return
    known = {name for name in imports(path) if name.startswith("torch.distributed")}
    assert known <= {"torch.distributed.device_mesh.DeviceMesh"}
    assert "_c10d" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_is_short(path: Path) -> None:
    """No file has more than 300 lines: it would be a room asking to be split."""
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_asserts_nothing(path: Path) -> None:
    """The library raises typed errors; `python -O` would drop an assertion."""
    found = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
    assert not found


def test_public_names_exist() -> None:
    """Every name of `__all__` is there, once."""
    assert len(set(sf.__all__)) == len(sf.__all__)
    assert [name for name in sf.__all__ if not hasattr(sf, name)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_an_example(name: str) -> None:
    """Every public name shows itself in a doctest under `Example:`."""
    documentation = inspect.getdoc(getattr(sf, name)) or ""
    assert "Example:" in documentation
    assert doctest.DocTestParser().get_examples(documentation)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_explains_its_arguments(name: str) -> None:
    """A function that takes arguments names each of them under `Args:`."""
    function = getattr(sf, name)
    documentation = inspect.getdoc(function) or ""
    taken = list(inspect.signature(function).parameters)
    described = documentation.partition("Args:\n")[2]
    assert [argument for argument in taken if f"{argument}: " not in described] == []


EVERYTHING = "import shampoo_func; [getattr(shampoo_func, name) for name in shampoo_func.__all__]"


def printed_by(program: str) -> str:
    """Run a program in a process in which warnings are errors; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("program", ["import shampoo_func", EVERYTHING])
def test_import_is_silent(program: str) -> None:
    """Importing the library, or all rooms of it, prints nothing and warns of nothing."""
    assert printed_by(program) == ""


def test_import_brings_in_no_compiler_and_no_dtensors() -> None:
    """What takes longer to import than torch is imported by those who use it."""
    script = (
        f"import sys, torch; before = set(sys.modules); {EVERYTHING}; "
        "print('\\n'.join(set(sys.modules) - before))"
    )
    printed = printed_by(script)
    ours = ("shampoo_func", "optree", "jaxtyping")
    theirs = {name for name in printed.split() if name.partition(".")[0] not in ours}
    assert "shampoo_func.sharding" in printed
    assert {name for name in theirs if name.startswith("torch")} == set()


def test_the_mark_of_a_constant_is_that_of_torch() -> None:
    """`constant_result` sets what torch.compiler sets, which would import the compiler."""

    def one() -> int:
        return 1

    def two() -> int:
        return 1

    constant_result(one)
    torch.compiler.assume_constant_result(two)  # type: ignore[no-untyped-call]
    assert vars(one) == vars(two) != {}


def test_names_are_imported_from_where_the_package_says() -> None:
    """What is found at first use is what type checkers read, and nothing is imported before."""
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    imports = [
        node
        for block in body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    ]
    said = {name.name: node.module for node in imports for name in node.names}
    assert set(said) == set(sf.__all__) - {"__version__"}
    for name, module in said.items():
        assert getattr(sf, name) is getattr(importlib.import_module(str(module)), name)
    program = (
        "import sys, shampoo_func; "
        "print([name for name in sys.modules if name.startswith('shampoo_func.')])"
    )
    assert printed_by(program).strip() == "[]"
