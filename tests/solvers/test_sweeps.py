"""Fixed-point methods before any network is called: options, the program of sweeps, nodes, interpolation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srds_fast import InvalidArgument
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.grid import interpolation
from srds_fast.solvers.fixed_point.options import FixedPoint, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point.program import Sweeps


@st.composite
def descending(draw: st.DrawFn) -> Tensor:
    gaps = draw(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=14))
    return -torch.tensor(gaps, dtype=torch.float64).cumsum(0)


@given(descending(), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(0, 99))
def test_interpolation_reproduces_cubics(nodes: Tensor, where: list[float], seed: int) -> None:
    points = nodes[0] + (nodes[-1] - nodes[0]) * torch.tensor(where, dtype=torch.float64)
    weights = interpolation(nodes, points)
    assert weights.shape == (len(points), len(nodes))
    assert int((weights != 0).sum(1).max()) <= 4
    degree = min(4, len(nodes))
    cubic = torch.randn(degree, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    powers = torch.arange(degree)
    # in the middle of the nodes, where powers are small
    middle = nodes.mean()
    at_nodes, at_points = ((each - middle)[:, None] ** powers @ cubic for each in (nodes, points))
    scale = float((weights.abs() @ at_nodes.abs()).max())
    torch.testing.assert_close(weights @ at_nodes, at_points, rtol=0, atol=1e-9 * max(1.0, scale))
    torch.testing.assert_close(weights.sum(1), torch.ones_like(points), rtol=0, atol=1e-9 * float(weights.abs().max()))
    torch.testing.assert_close(interpolation(nodes, nodes), torch.eye(len(nodes), dtype=torch.float64))


@given(st.integers(0, 300), st.integers(1, 300), st.integers(sweeps.FEWEST_NODES, 40), st.booleans())
def test_nodes_are_as_many_as_asked_for(first: int, left: int, num_nodes: int, between: bool) -> None:
    num_steps = first + left
    found = sweeps.nodes(first, num_steps, num_nodes, between=between)
    assert list(found) == sorted(set(found))
    assert len(found) == min(num_nodes, left)
    last = range(max(first, num_steps - sweeps.NODES_AT_THE_END), num_steps)
    assert {first, *last} <= set(found)
    assert found[-1] == num_steps - 1


def check_sweeps(found: Sweeps, num_steps: int) -> None:
    for positions in found.positions:
        assert list(positions) == sorted(set(positions))
        assert 0 <= positions[0] <= positions[-1] < num_steps
    assert list(found.final_steps) == sorted(found.final_steps)
    assert len(found.final_steps) == found.num_waves
    assert found.final_steps[-1] == num_steps


@given(st.integers(1, 60), st.none() | st.integers(sweeps.FEWEST_NODES, 30), st.data())
def test_sweeps_begin_where_nothing_is_exact_yet(num_steps: int, num_nodes: int | None, data: st.DataObject) -> None:
    iterations = data.draw(st.integers(1, num_steps))
    found = sweeps.fixed_point(num_steps, iterations, num_nodes)
    check_sweeps(found, num_steps)
    assert found.num_waves == iterations
    widths = [len(positions) for positions in found.positions]
    for number, positions in enumerate(found.positions):
        assert positions[0] == number
        assert positions[-1] == num_steps - 1
        assert found.spent(number + 1) == (number + 1, sum(widths[: number + 1]), max(widths[: number + 1]))
        left = num_steps - number
        if num_nodes is None or number >= sweeps.MOST_SPARSE_SWEEPS + sweeps.MOST_DENSER_SWEEPS:
            assert widths[number] == left
        else:
            assert widths[number] == min(left, num_nodes * (1 if number < sweeps.MOST_SPARSE_SWEEPS else 2))
    assert found.final_steps[:-1] == tuple(range(1, iterations))
    assert found.num_rows == sum(widths)


@given(st.integers(1, 60), st.integers(1, 70))
def test_windows_begin_at_every_step(num_steps: int, window: int) -> None:
    found = sweeps.windows(num_steps, window)
    check_sweeps(found, num_steps)
    for first, positions in enumerate(found.positions):
        assert positions == tuple(range(first, min(first + window, num_steps)))
    assert found.spent(num_steps).waves == num_steps


@pytest.mark.parametrize(
    ("cls", "given", "says"),
    [
        (ParaTAA, {"num_nodes": 4}, "num_nodes is 4. It must be a whole number, 5 or more"),
        (ParaTAA, {"num_nodes": 9, "order": 3}, "num_nodes goes with neither window nor order"),
        (ParaTAA, {"num_nodes": 9, "window": 5, "step_tolerance": 0.1}, "num_nodes goes with neither window nor order"),
        (ParaTAA, {"history": 6}, "history is 6. It must be a whole number, 0 to 5"),
        (ParaTAA, {"order": 0}, "order is 0. It must be a whole number, 1 or more"),
        (ParaTAA, {"step_tolerance": 1e-3}, "step_tolerance is 0.001, and there is no window"),
        (ParaDiGMS, {"window": None, "tolerance": 1e-3}, "tolerance is 0.001, and there is no window"),
        (ParaDiGMS, {"tolerance": -1.0}, "tolerance is -1.0. It must be a positive number"),
        (ParaTAA, {"data_std": 0}, "data_std is 0. It must be a positive number"),
        (ParaTAA, {"data_std": math.nan}, "data_std is nan"),
        (ParaTAA, {"regularisation": math.inf}, "regularisation is inf"),
        (ParaDiGMS, {"step_tolerance": 0.0}, "step_tolerance is 0.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", "says"),
)
def test_bad_options_are_named(cls: type[FixedPoint], given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        cls(**given)
