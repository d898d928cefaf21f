"""The tables of `every_case`: hundreds of calls, and a fault at each network call of each rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parent / "every_case.py"


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "ranks"), [("answers", 2), ("answers", 3), ("answers", 4), ("faults", 2), ("lost", 2)]
)
def test_every_case_is_as_it_should_be(part: str, ranks: int) -> None:
    ran = subprocess.run(
        [sys.executable, str(COMMAND), "--only", part, "--ranks", str(ranks)], capture_output=True, text=True
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
