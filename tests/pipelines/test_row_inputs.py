"""What the network is given for the rows of a wave: timesteps, input scale, conditioning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.sampling.rows import PerState, TiledConditioning, tile
from srds_fast.solvers import program
from srds_fast.solvers.contract import Evaluate


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_tiles_are_what_tile_makes(branches: int, batch: int, widths: list[int], data: st.DataObject) -> None:
    tensor = torch.randn(branches * batch, 2)
    tiles = TiledConditioning(tensor, batch, branches, peak_rows=6)
    samples = tuple(range(batch))
    for rows in widths:
        if data.draw(st.booleans()):
            samples = samples[: data.draw(st.integers(1, len(samples)))]
        assert torch.equal(tiles.of(rows, samples), tile(tensor, samples, rows, batch, branches))


@pytest.mark.parametrize("branches", [1, 2])
def test_every_state_is_given_the_entry_of_its_position(branches: int) -> None:
    waves = program.srds(20, 5, 3)
    column = torch.randn(20, 1)
    per_state = PerState(waves, torch.device("cpu"))
    for samples in ((0, 1, 2), (0, 2)):
        for number, wave in enumerate(waves):
            rows = len(wave.rows)
            evaluate = Evaluate(torch.empty(rows, len(samples), 4), waves.positions[number], samples, number)
            expected = [column[row.position] for _ in range(branches) for row in wave.rows for _ in samples]
            assert torch.equal(per_state.of(column, evaluate, branches), torch.stack(expected))
