"""Rooms of the source import downwards only, and no two rooms or modules import each other in a circle."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "srds_fast"
# from the top of the house to its ground floor; a room imports itself and rooms below it
ROOMS = (
    "cli",
    "serving",
    "integrations",
    "pipelines",
    "sampling",
    "engine",
    "planner",
    "telemetry",
    "methods",
    "solvers",
    "schedulers",
    "zoo",
    "kernels",
    "environment",
    "caches",
    "progress",
    "log",
    "clock",
    "files",
    "errors",
    "words",
    "_version",
)


def modules() -> dict[str, Path]:
    """The modules of the package by import name; the lazy front, srds_fast itself, is left out."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *(part for part in parts if part != "__init__")))
            found[name] = path
    del found[PACKAGE]
    return found


MODULES = modules()


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, in functions and for type checkers too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            if name in MODULES:
                yield name
            elif base in MODULES:
                yield base


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in MODULES} <= set(ROOMS)


def test_imports_run_downwards() -> None:
    upward = [
        f"{module} imports {target}"
        for module in MODULES
        for target in imports(module)
        if ROOMS.index(room_of(target)) < ROOMS.index(room_of(module))
    ]
    assert not upward, "\n".join(sorted(set(upward)))


def test_modules_import_in_no_circle() -> None:
    graph = {module: {target for target in imports(module) if target != module} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a clone and git")
def test_nothing_else_lies_at_the_top_level() -> None:
    """Tools that a test starts may leave files there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {line.split("/")[0] for line in listed.splitlines()}
    folders = {"srds_fast", "kernels", "tests", "profiling", "bench"}
    assert {name for name in found if not name.startswith(".")} == folders | {"README.md", "LICENSE", "pyproject.toml"}
