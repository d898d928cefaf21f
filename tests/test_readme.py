"""README's commands and code are what they claim to be."""

from __future__ import annotations

import re
from pathlib import Path

import modulars
import pytest
import tiny

import srds_fast

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_two_commands_and_ci_runs_the_second_as_printed() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    demo, tests = commands
    assert demo.rstrip().endswith("srds-fast demo")
    assert ".venv/bin/pytest" in tests
    for command in commands:
        assert command.startswith("python3 -m venv"), "each sets itself up on a fresh machine"
        assert len(command.strip().splitlines()) == 1
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines(keepends=True)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_block_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = blocks("python")[number]
    names: dict[str, object] = {"pipe": tiny.stable_diffusion()}
    if "compile(modular" in block:
        names["modular"] = modulars.sdxl()
    exec(compile(block, f"README.md, block {number}", "exec"), names)


def test_the_first_screen_says_when_it_does_not_help() -> None:
    assert "does not help" in "\n".join(README.splitlines()[:40])


def test_every_public_name_in_readme_exists() -> None:
    for name in re.findall(r"`srds_fast\.([A-Za-z_]+)", README):
        assert hasattr(srds_fast, name), name
