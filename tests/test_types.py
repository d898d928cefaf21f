"""What type checkers of users see: the types are shipped, and pyright accepts what mypy does."""

from __future__ import annotations

import importlib.resources
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def test_types_are_shipped() -> None:
    assert (importlib.resources.files("srds_fast") / "py.typed").is_file()
    assert "py.typed" in SETTINGS["setuptools"]["package-data"]["srds_fast"]


def test_mypy_checks_a_users_file_and_wants_every_mark_of_a_fault() -> None:
    """mypy itself is run beside the tests: its check of the whole package holds that of this file."""
    assert "tests/users_file.py" in SETTINGS["mypy"]["files"]
    assert SETTINGS["mypy"]["warn_unused_ignores"]
    assert "tolerence=1e-2)  # type: ignore[call-arg]" in (ROOT / "tests/users_file.py").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_accepts_a_users_file_and_finds_every_fault_in_it(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/users_file.py", tmp_path)
    asked = {"reportUnnecessaryTypeIgnoreComment": True, "enableTypeIgnoreComments": False, "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"include": ["."], **asked}))
    command = ["pyright", "--project", str(tmp_path), "--pythonpath", sys.executable]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
