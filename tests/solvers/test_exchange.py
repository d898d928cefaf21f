"""The memory of a program. That slots hold what is read from them is shown by every core that is exact."""

from __future__ import annotations

import torch
from cores import table

from srds_fast.solvers import program
from srds_fast.solvers.wave_table import wave_table


def test_the_memory_does_not_grow_with_the_iterations() -> None:
    def slots(num_iterations: int) -> int:
        waves = program.srds(100, 20, num_iterations)
        return wave_table(table(100), waves, "2m", torch.zeros(1, 2, dtype=torch.float64)).num_slots

    # 20 rows in the widest wave, and what they and the corrections leave for later waves
    assert slots(20) <= 3.5 * 20
    assert slots(20) <= slots(10) + 5
