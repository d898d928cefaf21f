"""The kernels without a GPU: interpreted against their references, and compiled ahead of time.

Triton interprets kernels only in processes that were started for it, and compiles them only in others; so the tests in
tests/kernels run in a process of their own here. On a machine with a GPU they run on it, in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from srds_fast.kernels.resources import CAPABILITIES, OPERATIONS, compiled, specimens

FOLDER = Path(__file__).parent / "kernels"
# bytes: the assembler of Triton 3.6 lays three registers of one specimen aside, on sm_90
SPILLS = 24 if version("triton").startswith("3.6.") else 0


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_interpreted(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_ahead_of_time(operation: str, capability: int) -> None:
    """No spills but those known, registers within bounds, 16 bytes at once from and to contiguous states."""
    for name, specimen in specimens():
        if name == operation:
            found = compiled(specimen, capability)
            assert found.spills <= SPILLS, (specimen.name, found.spills)
            assert found.registers <= specimen.most_registers, (specimen.name, found.registers)
            wide = found.load_bits.count(128), found.store_bits.count(128)
            assert wide[0] >= specimen.wide[0], (specimen.name, wide)
            assert wide[1] >= specimen.wide[1], (specimen.name, wide)


def test_the_table_of_resources_is_printed_by_one_command() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "srds_fast.kernels.resources", "affine_scan"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if line.startswith("affine_scan")]
    assert len(lines) == len(CAPABILITIES) * sum(operation == "affine_scan" for operation, _ in specimens())
    refused = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Unset it" in refused.stderr
