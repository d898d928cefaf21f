"""The kernels without a GPU: interpreted against their references, and compiled ahead of time.

Triton interprets kernels only in processes that were started for it, and compiles them only in others; so the tests in
tests/kernels run in a process of their own here. On a machine with a GPU they run on it, in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from srds_fast.kernels.resources import CAPABILITIES, OPERATIONS, compiled, specimens

FOLDER = Path(__file__).parent / "kernels"


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
    """No spills, registers within bounds, 16 bytes at once from and to contiguous states."""
    for name, specimen in specimens():
        if name == operation:
            found = compiled(specimen, capability)
            assert found.spills == 0, specimen.name
            assert found.registers <= specimen.most_registers, (specimen.name, found.registers)
            assert max(found.load_bits) == max(found.store_bits) == 128, (specimen.name, found)
