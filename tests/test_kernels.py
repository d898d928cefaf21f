"""The kernels without a GPU: interpreted against their references, and compiled ahead of time.

A process either interprets kernels or compiles them: Triton decides when it is imported. So the tests in tests/kernels
run in processes of their own here. On a machine with a GPU they run on it, in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from srds_fast.kernels.aot import resources
from srds_fast.kernels.aot.resources import CAPABILITIES, OPERATIONS, compiled, specimens

FOLDER = Path(__file__).parent / "kernels"
# bytes: the assembler of Triton 3.6 spills three registers of one specimen on sm_90
SPILLS = 24 if version("triton").startswith("3.6.") else 0


@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_compiled_ahead_of_time(operation: str, every: bool, capability: int) -> None:
    """No spills but those known, registers within bounds, 16 bytes at once from and to contiguous states.

    Of each kernel the last specimen, which has the most to do, or every one.
    """
    known = [specimen for name, specimen in specimens() if name == operation]
    last_of_each = {specimen.kernel: specimen for specimen in known}
    for specimen in known if every else last_of_each.values():
        found = compiled(specimen, capability)
        assert found.spills <= SPILLS, (specimen.name, found.spills)
        assert found.registers <= specimen.most_registers, (specimen.name, found.registers)
        wide = found.load_bits.count(128), found.store_bits.count(128)
        assert wide[0] >= specimen.wide[0], (specimen.name, wide)
        assert wide[1] >= specimen.wide[1], (specimen.name, wide)


def test_the_table_of_resources_has_a_line_for_each_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next(specimens())
    monkeypatch.setattr(resources, "specimens", lambda: iter([one]))
    resources.main()
    heading, *lines = capsys.readouterr().out.splitlines()
    assert "registers" in heading
    assert [line.split()[:3] for line in lines] == [["wave_update,", "plain", f"sm_{each}"] for each in CAPABILITIES]
    assert all(int(number) > 0 for line in lines for number in line.split()[3:5])


def test_a_process_that_interprets_kernels_cannot_compile_them() -> None:
    command = [sys.executable, "-m", "srds_fast.kernels.aot.resources"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Unset it" in refused.stderr
