"""The layout that CONTRIBUTING.md promises: imports point one way, without cycles, and modules keep no state."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("parallel", "rre", "pangu_sigma", "extract")  # each may import those before it
# The top layer, the packages' `__main__` included: it may import every package, and nothing below imports it.
TOP_LAYER = (
    "pangu_sigma/__init__.py",
    "pangu_sigma/__main__.py",
    "pangu_sigma/api.py",
    "pangu_sigma/api_arguments.py",
    "pangu_sigma/api_models.py",
    "pangu_sigma/cli/",
    "extract/__main__.py",
)
# These files go into exported folders and run where none of these packages is.
EXPORTED = "extract/export/hf_files"
FILES = {
    str(path.relative_to(ROOT)): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if EXPORTED not in str(path)
}
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(encoding="utf-8"))


def file_of(module: str) -> str | None:
    """The file of one of our modules or packages, None for anything else."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in FILES), None)


def imports(node: ast.AST) -> Iterator[str]:
    """Our files that an import statement names."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "a relative import"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if file_of(name) else node.module for name in inner]
    yield from (file for name in names if (file := file_of(name)) is not None)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, in order; what only a type checker reads is left out."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(statement, part, []))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    upward = [
        f"{file}:{node.lineno} imports {found}"
        for file in FILES
        if file.startswith(f"{package}/") and not file.startswith(TOP_LAYER)
        for node in ast.walk(tree(file))
        for found in imports(node)
        if found.split("/")[0] in above
    ]
    assert not upward


def test_nothing_below_imports_the_top_layer():
    importing = {
        file
        for file in FILES
        if not file.startswith(TOP_LAYER)
        for node in ast.walk(tree(file))
        for found in imports(node)
        if found.startswith(TOP_LAYER)
    }
    assert not importing


def test_no_modules_import_each_other():
    """Imports inside functions and those that only a type checker reads count too. `from package.module import name`
    depends on the module and not on the package's `__init__`, which `from package import name` does."""
    graph = {file: {found for node in ast.walk(tree(file)) for found in imports(node)} for file in FILES}
    # Raises CycleError, which names the modules.
    assert set(TopologicalSorter(graph).static_order()) == set(FILES)


def test_modules_keep_no_state():
    """No `global`, and no function changes a list, set or mapping of its module."""
    changes = []
    for file in FILES:
        named = {
            target.id
            for statement in at_import(tree(file).body)
            for target in getattr(statement, "targets", [getattr(statement, "target", None)])
            if isinstance(target, ast.Name)
        }
        for function in (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.Lambda)):
            own = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
            own |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for node in ast.walk(function):
                changed = None
                if isinstance(node, ast.Global):
                    changes.append(f"{file}:{node.lineno}")
                elif isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
                    changed = node.value
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
                    changed = node.func.value
                if isinstance(changed, ast.Name) and changed.id in named - own:
                    changes.append(f"{file}:{node.lineno}")
    assert not changes
